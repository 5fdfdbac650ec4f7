"""Runs whose rollouts have devices of their own, from the command line."""

import pathlib
import tempfile

from absl.testing import absltest, parameterized
import numpy as np

from t2po_jax.training import metrics
from tests import places
from tests.distributed import processes_test
from tests.training import loop_test

ROOT = places.ROOT


def train(workdir, cache, *arguments, devices):
  """Starts the command line of the project on so many devices."""
  command = [
    ROOT / "experiments" / "main.py",
    f"--config={ROOT / 'configs' / 'smoke.py'}",
    f"--workdir={workdir}",
    f"--config.cache_dir={cache}",
    "--config.log.tensorboard=False",
    *processes_test.TINY,
    "--config.train.updates=2",
    "--config.train.eval_every=0",
    "--config.cold_start.kind=none",
    *arguments,
  ]
  return processes_test.start(command, devices=devices)


class DevicesTest(parameterized.TestCase):
  def test_a_split_equals_shared_devices(self):
    place = pathlib.Path(tempfile.mkdtemp())
    ahead = "--config.rollout.ahead=1"
    one, four = (f"--config.mesh.rollout_devices={n}" for n in (1, 4))
    runs = {
      "shared": train(place / "shared", place / "cache", ahead, devices=1),
      "split": train(place / "split", place / "cache", ahead, one, devices=2),
      "eight": train(place / "eight", place / "cache", ahead, four, devices=8),
    }
    outputs = processes_test.finish(list(runs.values()))
    self.assertIn("those that roll out, mesh data 4", outputs[-1])
    shared, split = (
      loop_test.comparable(place / name) for name in ("shared", "split")
    )
    self.assertEqual(shared, split)
    # On four devices sums are added up in another order.
    lines = [
      metrics.read(place / name / "metrics.jsonl")[1]
      for name in ("shared", "eight")
    ]
    for name in ("train/return", "train/tokens", "learn/grad_norm"):
      np.testing.assert_allclose(lines[0][name], lines[1][name], rtol=1e-4)

  @parameterized.parameters(
    (
      ("--config.rollout.ahead=1",),
      "rollout.ahead: found 1, expected 0 with 2",
    ),
    (
      ("--config.mesh.rollout_devices=2",),
      "mesh.rollout_devices: found 2, expected less than 2",
    ),
  )
  def test_what_cannot_be_is_refused(self, arguments, message):
    place = pathlib.Path(tempfile.mkdtemp())
    started = train(place / "run", place / "cache", *arguments, devices=2)
    output, _ = started.communicate(timeout=600)
    self.assertNotEqual(started.returncode, 0)
    self.assertIn(message, output.splitlines()[-1])
    self.assertNotIn("Traceback", output)


if __name__ == "__main__":
  absltest.main()
