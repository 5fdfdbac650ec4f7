"""Several processes as one: exchange, equal updates, kill and resume."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

from absl.testing import absltest, parameterized
import numpy as np

from t2po_jax.distributed import processes
from t2po_jax.rollout import actor, collect
from t2po_jax.training import metrics
from tests import places
from tests.training import experience_test, loop_test

ROOT = places.ROOT
# Small enough to compile in seconds: few sizes of everything.
TINY = (
  "--config.rollout.slots=4",
  "--config.rollout.max_response=8",
  "--config.rollout.group_size=2",
  "--config.train.row_tokens=48",
  "--config.train.micro_rows=4",
  "--config.train.updates=3",
  "--config.eval.tasks=5",
  "--config.cold_start.episodes=8",
  "--config.cold_start.epochs=1",
  "--config.cold_start.micro_rows=4",
)


def free_address() -> str:
  with socket.socket() as found:
    found.bind(("localhost", 0))
    return f"localhost:{found.getsockname()[1]}"


def start(command, *, devices):
  """Starts a program whose CPU poses as several devices."""
  return subprocess.Popen(
    [sys.executable, "-u", *map(str, command)],
    cwd=ROOT,
    env={
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      "PYTHONPATH": str(ROOT),
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(started):
  """Waits for all; raises with the outputs of all if one failed."""
  outputs = [process.communicate(timeout=1500)[0] for process in started]
  if any(process.returncode for process in started):
    raise AssertionError("\n".join(outputs))
  return outputs


def start_training(workdir, cache, *arguments, count=2):
  """Starts `count` processes of the command line on the toy."""
  address = free_address()
  command = [
    ROOT / "experiments" / "main.py",
    f"--config={ROOT / 'configs' / 'smoke.py'}",
    f"--workdir={workdir}",
    f"--config.cache_dir={cache}",
    "--config.log.tensorboard=False",
    *TINY,
    *arguments,
  ]
  if count == 1:
    return [start(command, devices=2)]
  command += [f"--coordinator={address}", f"--processes={count}"]
  command.append("--heartbeat=30")
  return [
    start([*command, f"--process_id={index}"], devices=1)
    for index in range(count)
  ]


class OneProcessTest(parameterized.TestCase):
  def test_alone_nothing_travels(self):
    value = object()
    self.assertIs(processes.gather(value)[0], value)
    self.assertIs(processes.first_alone(lambda: value), value)
    self.assertEqual(processes.share("abc"), ["a", "b", "c"])
    processes.require_equal({"a": 1})

  @parameterized.parameters(
    (None, "2", 0, "--coordinator: found None"),
    ("here", "2", 0, "--coordinator: found 'here'"),
    ("here:1", "two", 0, "--processes: found 'two'"),
    ("here:1", "0", 0, "--processes: found '0'"),
    ("here:1", "2", 2, "--process_id: found 2, expected 0 to 1"),
    ("here:1", "2", None, "--process_id: found None"),
  )
  def test_what_does_not_fit_is_refused(self, address, count, index, message):
    with self.assertRaisesRegex(ValueError, message) as raised:
      processes.start(address, count, index)
    self.assertNotIn("\n", str(raised.exception))

  def test_no_cluster_is_refused(self):
    # In a process of its own: JAX must not have been used before.
    script = (
      "from t2po_jax.distributed import processes; "
      "processes.start(None, 'auto', None)"
    )
    output, _ = start(["-c", script], devices=1).communicate(timeout=300)
    self.assertIn("--processes: found 'auto' outside of a cluster", output)

  def test_parts_of_a_rollout_become_the_whole(self):
    def part(group, deltas):
      episodes = [
        experience_test.make_episode(f"task{group}", group, member, [1.0])
        for member in range(2)
      ]
      deltas = np.asarray(deltas, np.float32)
      return collect.Rollout(episodes, deltas, deltas[:1], group)

    whole = actor.merge([part(1, [0.1, 0.5]), part(0, [0.3]), part(2, [])])
    self.assertEqual(
      [(t.task_id, t.member) for t in whole.trajectories],
      [(f"task{group}", member) for group in range(3) for member in range(2)],
    )
    np.testing.assert_allclose(whole.deltas, [0.1, 0.3, 0.5])
    np.testing.assert_allclose(whole.phi_changes, [0.1, 0.3])
    self.assertEqual(whole.aborted, 3)


class TwoProcessesTest(absltest.TestCase):
  def test_two_processes_update_as_one(self):
    folder = pathlib.Path(tempfile.mkdtemp())
    script = "tests.distributed.two_processes"
    address = free_address()
    alone = start(["-m", script, folder, address, 1, 0], devices=8)
    pair = [
      start(["-m", script, folder, address, 2, index], devices=4)
      for index in (0, 1)
    ]
    finish([alone, *pair])
    wanted = np.load(folder / "params-1-0.npz")
    for index in (0, 1):
      found = np.load(folder / f"params-2-{index}.npz")
      self.assertEqual(found.files, wanted.files)
      for name in wanted.files:
        np.testing.assert_allclose(
          found[name], wanted[name], rtol=1e-5, atol=1e-6
        )


class TrainingTest(absltest.TestCase):
  def test_trains_as_one_and_goes_on_after_a_kill(self):
    place = pathlib.Path(tempfile.mkdtemp())
    cache = place / "cache"
    outputs = finish(start_training(place / "whole", cache))
    self.assertIn("workdir:", outputs[0])
    self.assertNotIn("workdir:", outputs[1])
    whole = loop_test.comparable(place / "whole")
    self.assertEqual([float(line["step"]) for line in whole], [0, 1, 2, 3])

    arguments = ("--config.train.updates=0",)
    finish(start_training(place / "alone", cache, *arguments, count=1))
    (alone,) = metrics.read(place / "alone" / "metrics.jsonl")
    pair = metrics.read(place / "whole" / "metrics.jsonl")[0]
    played = [name for name in alone if name.startswith("eval/")]
    self.assertNotEmpty(played)
    for name in played:
      np.testing.assert_allclose(pair[name], alone[name], rtol=1e-5)

    # The first rollout and update are the same with those after them beside
    # the updates.
    beside = "--config.rollout.ahead=1"
    finish(start_training(place / "beside", cache, beside))
    overlapped = loop_test.comparable(place / "beside")
    for line in overlapped[:2]:
      for name in ("train/staleness_mean", "train/staleness_max"):
        line.pop(name, None)
    self.assertEqual(overlapped[:2], whole[:2])
    self.assertEqual(overlapped[3]["train/staleness_max"], "1.0")

    for arguments, wanted in (((), whole), ((beside,), overlapped)):
      killed = place / f"killed{len(arguments)}"
      self.kill_one(killed, cache, *arguments)
      outputs = finish(start_training(killed, cache, *arguments))
      self.assertIn("resuming after update", outputs[0])
      found = loop_test.comparable(killed)
      self.assertEqual(found[2:], wanted[2:])

  def kill_one(self, workdir, cache, *arguments):
    """Kills process 1 in the midst of update 3; the other has to end too."""
    started = start_training(workdir, cache, *arguments)
    file, deadline = workdir / "metrics.jsonl", time.monotonic() + 900
    while time.monotonic() < deadline and started[1].poll() is None:
      if file.is_file() and file.read_text().count("\n") >= 3:
        break
      time.sleep(0.002)
    started[1].send_signal(signal.SIGKILL)
    for process in started:
      process.communicate(timeout=120)
    self.assertEqual(started[1].returncode, -signal.SIGKILL)
    self.assertNotEqual(started[0].returncode, 0)


if __name__ == "__main__":
  absltest.main()
