"""The preset for environments that take their time."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest

from t2po_jax.configs import environment, own, searchqa
from t2po_jax.setup import validate
from t2po_jax.training import metrics
from tests import places

ROOT = places.ROOT
SLOW = "t2po_jax.experiments.benchmarks.slow_toy:SlowToy"


class SlowEnvTest(absltest.TestCase):
  def test_begins_the_whole_next_update_early(self):
    config = own.get_config(f"{SLOW},slow_env")
    rollout = config.rollout
    self.assertEqual(rollout.oversample, rollout.tasks)
    self.assertEqual(
      rollout.env_threads, 2 * rollout.tasks * rollout.group_size
    )
    self.assertTrue(rollout.one_size)
    validate.read(config)

  def test_filtered_groups_are_played_beside_the_update(self):
    rollout = searchqa.get_config("tiny,gigpo_dapo,slow_env").rollout
    self.assertEqual((rollout.oversample, rollout.ahead), (0, 1))

  def test_worker_processes_stay(self):
    config = searchqa.get_config().unlock()
    config.rollout.env_workers = 2
    environment.slow_env(config)
    self.assertEqual(config.rollout.env_threads, 0)
    validate.read(config)

  def test_runs_from_the_command_line(self):
    with tempfile.TemporaryDirectory() as folder:
      done = subprocess.run(
        [
          sys.executable,
          str(ROOT / "experiments" / "main.py"),
          f"--config={ROOT / 'configs' / 'own.py'}:{SLOW},slow_env",
          f"--workdir={folder}/run",
          f"--config.cache_dir={folder}/cache",
          "--config.env.latency=0.01",
          "--config.model.size=nano",
          "--config.cold_start.kind=none",
          "--config.rollout.tasks=1",
          "--config.rollout.oversample=1",
          "--config.rollout.group_size=2",
          "--config.rollout.slots=2",
          "--config.rollout.max_response=8",
          "--config.train.updates=2",
          "--config.train.eval_every=0",
          "--config.eval.tasks=1",
          "--config.log.tensorboard=False",
        ],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
      )
      self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
      place = pathlib.Path(folder) / "run"
      written = json.loads((place / "config.json").read_text())
      lines = metrics.read(place / "metrics.jsonl")
    self.assertTrue(written["rollout.one_size"])
    # The second update's group was started by the policy before the first.
    lags = [float(line["train/staleness_max"]) for line in lines[1:]]
    self.assertEqual(lags, [0.0, 1.0])


if __name__ == "__main__":
  absltest.main()
