"""Whole runs on the toy bandit: learning, killing, resuming, bad input."""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import numpy as np

from t2po_jax.configs import base as settings
from t2po_jax.configs import smoke
from t2po_jax.models import weights
from t2po_jax.setup import build
from t2po_jax.training import export, loop, metrics
from tests import places

ROOT = places.ROOT
# What may differ between two runs of the same updates.
CLOCKS = ("time", "elapsed", "seconds/", "speed/", "compiles")


def run(workdir, cache, *arguments, check=True, wait=True):
  """Starts the command line of the project in another process."""
  command = [
    sys.executable,
    str(ROOT / "experiments" / "main.py"),
    f"--config={ROOT / 'configs' / 'smoke.py'}",
    f"--workdir={workdir}",
    f"--config.cache_dir={cache}",
    "--config.log.tensorboard=False",
    *arguments,
  ]
  process = subprocess.Popen(
    command,
    cwd=tempfile.gettempdir(),
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  if not wait:
    return process
  output, _ = process.communicate(timeout=600)
  if check and process.returncode:
    raise AssertionError(output)
  return process.returncode, output


def comparable(path):
  """The lines of a metrics file without what the clock says."""
  return [
    {k: str(v) for k, v in line.items() if not k.startswith(CLOCKS)}
    for line in metrics.read(pathlib.Path(path) / "metrics.jsonl")
  ]


def wait_for_lines(workdir, count, process):
  """Waits until a run that is going on has written so many lines of metrics."""
  file, deadline = workdir / "metrics.jsonl", time.monotonic() + 300
  while time.monotonic() < deadline and process.poll() is None:
    if file.is_file() and file.read_text().count("\n") >= count:
      break
    time.sleep(0.002)


class ResumeTest(parameterized.TestCase):
  def test_a_killed_run_goes_on_exactly(self):
    place = pathlib.Path(tempfile.mkdtemp())
    cache = place / "cache"
    run(place / "whole", cache)
    killed = run(place / "killed", cache, wait=False)
    # After the line of update 2 is on disk the run is inside update 3.
    wait_for_lines(place / "killed", 3, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    self.assertEqual(killed.returncode, -signal.SIGKILL)
    _, output = run(place / "killed", cache)
    self.assertIn("resuming after update", output)
    whole, resumed = comparable(place / "whole"), comparable(place / "killed")
    self.assertEqual([float(line["step"]) for line in whole], [0, 1, 2, 3, 4])
    self.assertEqual(whole, resumed)

  @parameterized.parameters(
    (("--config.rollout.env_calls=2",), ["0.0", "1.0", "1.0", "1.0"]),
    (
      ("--config.rollout.one_size=True", "--config.rollout.oversample=6"),
      # All groups were begun a rollout before, the first ones two.
      ["0.0", "1.0", "2.0", "3.0"],
    ),
  )
  def test_overlap_is_exact_whatever_the_latency_and_after_a_kill(
    self, more, staleness
  ):
    place = pathlib.Path(tempfile.mkdtemp())
    cache = place / "cache"
    options = (
      "--config.rollout.ahead=1",
      "--config.rollout.env_threads=8",
      "--config.env.sleep_turn=2",
      "--config.train.eval_every=0",
      *more,
    )
    run(place / "whole", cache, *options)
    slow = (*options, "--config.env.sleep_seconds=0.1")
    killed = run(place / "killed", cache, *slow, wait=False)
    wait_for_lines(place / "killed", 3, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    self.assertEqual(killed.returncode, -signal.SIGKILL)
    _, output = run(place / "killed", cache, *slow)
    self.assertIn("resuming after update", output)
    whole, resumed = (
      [
        # Where answers are taken as they come, so are the calls.
        {k: v for k, v in line.items() if not k.startswith("sampler/")}
        for line in comparable(place / name)
      ]
      for name in ("whole", "killed")
    )
    self.assertEqual(whole, resumed)
    lags = [line.get("train/staleness_max") for line in whole]
    self.assertEqual(lags, [None, *staleness])

  @parameterized.parameters("window", "append")
  def test_new_weights_between_turns_are_exact_after_a_stop(self, context):
    place = pathlib.Path(tempfile.mkdtemp())
    config = smoke.get_config()
    config.cache_dir = str(place / "cache")
    config.log.tensorboard = False
    config.cold_start.episodes = 16
    config.rollout.oversample, config.rollout.refresh = 3, True
    config.rollout.slots = 8
    config.rollout.context = context
    if context == "append":
      config.rollout.max_prompt, config.train.row_tokens = 96, 112
    config.train.eval_every = 0
    loop.train(settings.read(config), place / "whole")

    class Stop(Exception):
      pass

    def stop(run, update):
      if update == 3:
        raise Stop
      return update_as_usual(run, update)

    update_as_usual = loop.Run._update
    with mock.patch.object(loop.Run, "_update", stop):
      with self.assertRaises(Stop):
        loop.train(settings.read(config), place / "stopped")
    loop.train(settings.read(config), place / "stopped")
    whole = comparable(place / "whole")
    self.assertEqual(whole, comparable(place / "stopped"))
    self.assertEqual(
      [line.get("train/staleness_max") for line in whole],
      [None, "0.0", "1.0", "1.0", "1.0"],
    )
    # Some turns of what was carried over were spoken by newer weights.
    means = [float(line["train/staleness_mean"]) for line in whole[2:]]
    groups = config.rollout.oversample / config.rollout.tasks
    self.assertBetween(np.mean(means), 0.01, groups - 0.01)

  def test_a_finished_run_has_nothing_left_to_do(self):
    place = pathlib.Path(tempfile.mkdtemp())
    options = ("--config.train.updates=1", "--config.cold_start.kind=none")
    run(place / "run", place / "cache", *options)
    before = comparable(place / "run")
    run(place / "run", place / "cache", *options)
    self.assertEqual(comparable(place / "run"), before)


class SpeedTest(absltest.TestCase):
  def test_a_rollout_may_find_all_its_episodes_ended(self):
    run = mock.Mock()
    run.improver.caution.steps.return_value = 2
    speeds = [
      loop.Run._speed(
        run,
        {"seconds/rollout": 0.5, "pack/tokens": 6.0, **work},
        {"seconds/update": 3.0},
      )
      for work in ({}, {"sampler/slot_steps_used": 4.0})
    ]
    trained = {"speed/trained_tokens": 4.0}
    self.assertEqual(
      speeds,
      [
        {"speed/sampled_tokens": 0.0, **trained},
        {"speed/sampled_tokens": 8.0, **trained},
      ],
    )


class BadInputTest(parameterized.TestCase):
  @parameterized.parameters(
    ("--config.train.update=3", "train.update"),
    ("--config.model.source=/nowhere/at/all", "/nowhere/at/all"),
    ("--config.train.micro_rows=0", "rows"),
    ("--config.rollout.max_prompt=3", "rollout.max_prompt"),
    ("--config.train.row_tokens=32", "train.row_tokens"),
    ("--config.env.name=toi", "toy"),
    ("--config.mesh.data=3", "device"),
    ("--config.loss.kl_coefficient=0.1", "loss.kl_coefficient"),
    ("--config.control.thinking.epsilon=auto(7)", "thinking.epsilon"),
    ("--config.control.signal=calibrted", "control.signal"),
    ("--config.rollout.oversample=-1", "rollout.oversample"),
    ("--config.rollout.refresh=True", "rollout.refresh"),
  )
  def test_is_refused_in_one_line(self, argument, named):
    place = pathlib.Path(tempfile.mkdtemp())
    code, output = run(place / "run", place / "cache", argument, check=False)
    self.assertNotEqual(code, 0)
    self.assertNotIn("Traceback", output)
    self.assertIn(named, output.splitlines()[-1])

  def test_another_model_does_not_fit_the_checkpoint(self):
    place = pathlib.Path(tempfile.mkdtemp())
    options = ("--config.train.updates=1", "--config.cold_start.kind=none")
    run(place / "run", place / "cache", *options)
    code, output = run(
      place / "run",
      place / "cache",
      *options,
      "--config.model.size=tiny",
      check=False,
    )
    self.assertNotEqual(code, 0)
    self.assertNotIn("Traceback", output)
    self.assertIn("checkpoint", output.splitlines()[-1])

  @parameterized.parameters(
    (("--config=configs/nope.py",), "nope.py"),
    ((f"--config={ROOT}/configs/smoke.py:grop",), "preset 'grop'"),
    (
      (f"--config={ROOT}/configs/smoke.py", "--config.trai.updates=2"),
      "unknown key 'trai'; did you mean 'train'?",
    ),
    (
      (f"--config={ROOT}/configs/smoke.py", "--config.train.update=2"),
      "updates",
    ),
    ((), "--config"),
  )
  def test_a_wrong_command_line_gets_one_line(self, arguments, named):
    found = subprocess.run(
      [sys.executable, str(ROOT / "experiments" / "main.py"), *arguments],
      capture_output=True,
      text=True,
    )
    self.assertNotEqual(found.returncode, 0)
    self.assertNotIn("Traceback", found.stderr)
    self.assertIn(named, found.stderr.strip().splitlines()[-1])

  def test_unknown_presets_are_refused(self):
    with self.assertRaisesRegex(ValueError, "preset 'grop'"):
      smoke.get_config("grop")

  def test_the_configuration_is_locked(self):
    config = smoke.get_config()
    with self.assertRaises(AttributeError):
      config.train.update = 3


class LearningTest(absltest.TestCase):
  def test_the_toy_is_learned(self):
    place = pathlib.Path(tempfile.mkdtemp())
    config = smoke.get_config().unlock()
    config.cache_dir = str(place / "cache")
    config.log.tensorboard = False
    config.cold_start.episodes = 48
    config.rollout.tasks = 8
    config.train.updates = 25
    config.train.eval_every = config.train.save_every = 0
    config.optimizer.learning_rate = 5e-4
    loop.train(settings.read(config), place / "run")
    lines = metrics.read(place / "run" / "metrics.jsonl")
    returns = [line["train/return"] for line in lines[1:]]
    self.assertGreater(sum(returns[-5:]) / 5, sum(returns[:5]) / 5 + 0.1)
    # Once the batches' shapes have been seen nothing is compiled.
    self.assertEqual(sum(line["compiles"] for line in lines[10:-1]), 0)
    mismatch = max(line["learn/mismatch_max"] for line in lines[1:])
    self.assertLess(mismatch, 1e-4)


class AdaptersTest(absltest.TestCase):
  def test_a_run_of_adapters_resumes_and_is_exported(self):
    place = pathlib.Path(tempfile.mkdtemp())
    config = smoke.get_config().unlock()
    config.cache_dir = str(place / "cache")
    config.log.tensorboard = False
    config.cold_start.kind = "none"
    config.lora.rank = 2
    config.lora.targets = "value,down"
    config.loss.kl, config.loss.kl_coefficient = "k3", 0.01
    config.train.updates = 1
    loop.train(settings.read(config), place / "run")
    config.train.updates = 2
    loop.train(settings.read(config), place / "run")
    lines = metrics.read(place / "run" / "metrics.jsonl")
    self.assertEqual([line["step"] for line in lines], [0, 1, 2])
    self.assertLess(lines[1]["learn/mismatch_max"], 1e-4)
    # B was zero, so the first policy is the reference, and the next is not.
    self.assertLess(abs(lines[1]["learn/kl"]), 1e-6)
    self.assertGreater(lines[2]["learn/kl"], 1e-9)
    export.export(place / "run", place / "out", step="latest")
    _, params = weights.load(place / "out")
    base = build.agent(
      settings.read(config), build.benchmark(settings.read(config))
    ).params
    changed = jax.tree.map(
      lambda x, y: bool(np.any(np.asarray(x) != y)), base, params
    )
    names = {
      "/".join(part.key for part in path)
      for path, moved in jax.tree.leaves_with_path(changed)
      if moved
    }
    self.assertEqual(
      names, {"layers/attention/value/kernel", "layers/mlp/down/kernel"}
    )


class FingerprintTest(absltest.TestCase):
  def test_depends_on_every_value_and_not_on_order(self):
    one = {"a": 1, "b": {"c": 2}}
    same = {"b": {"c": 2}, "a": 1}
    other = {"a": 1, "b": {"c": 3}}
    self.assertEqual(build.fingerprint(one), build.fingerprint(same))
    self.assertNotEqual(build.fingerprint(one), build.fingerprint(other))


if __name__ == "__main__":
  absltest.main()
