"""The benchmarks of sampling on a model of nothing: they run, and add up."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from absl.testing import absltest
import numpy as np

from t2po_jax.envs import base
from t2po_jax.experiments.benchmarks import lock_step, slow_toy
from t2po_jax.rollout import environments
from tests import places

ROOT = places.ROOT
FOLDER = ROOT / "experiments" / "benchmarks"

# Poses as llama.cpp's benchmark: 0.06 s for all tokens.
LLAMA = """#!/bin/sh
echo "loading $2"
echo '{"pp": 8, "tg": 3, "pl": 2, "t_pp": 0.5, "t_tg": 0.06}'
"""


def run(script, *arguments, path=""):
  """What a benchmark writes with --json, and what it prints."""
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "numbers.json"
    done = subprocess.run(
      [sys.executable, str(FOLDER / script), f"--json={file}", *arguments],
      env={**os.environ, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"},
      cwd=ROOT,
      capture_output=True,
      text=True,
    )
    if done.returncode:
      raise RuntimeError(done.stdout + done.stderr)
    return json.loads(file.read_text()), done.stdout


class SamplerBenchmarkTest(absltest.TestCase):
  def test_a_tiny_table_adds_up(self):
    with tempfile.TemporaryDirectory() as folder:
      program = pathlib.Path(folder) / "llama-batched-bench"
      program.write_text(LLAMA)
      program.chmod(0o755)
      found, printed = run(
        "sampler.py",
        *("--size=nano", "--batches=2", "--prompt=8", "--tokens=3"),
        *("--rounds=1", "--peers=llama_cpp,tunix", "--gguf=nano.gguf"),
        path=folder,
      )
    numbers = found["batches"]["2"]
    ours = numbers["step_ms"]["ours"]["median"]
    self.assertAlmostEqual(numbers["tokens_per_s"], 2e3 / ours, delta=1e-3)
    peer = numbers["step_ms"]["llama_cpp"]["median"]
    self.assertAlmostEqual(peer, 20.0, delta=1e-6)
    self.assertAlmostEqual(numbers["ratio"]["llama_cpp"], peer / ours)
    off = numbers["step_ms"]["ours_without_control"]["median"]
    self.assertAlmostEqual(numbers["control_overhead"], ours / off - 1)
    # Two rows of 8 to 11 tokens; a layer caches 2 x 1 x 32 numbers of each.
    weights = 1024 * 64 + 64 + 2 * (64 * 64 * 3 + 3 * 64 * 192 + 128)
    cache = 2 * 9.5 * 2 * 2 * 32
    floor = 4e3 * (weights + cache) / numbers["bandwidth_gb_per_s"] / 1e9
    self.assertAlmostEqual(
      numbers["roofline_fraction"], floor / ours, delta=1e-3
    )
    self.assertIn("llama_cpp", printed)
    if importlib.util.find_spec("tunix") is None:
      self.assertRegex(printed, "tunix +left out: needs")

  def test_an_unknown_peer_is_one_line(self):
    with self.assertRaisesRegex(RuntimeError, "error: --peers: found 'vllm'"):
      run("sampler.py", "--size=nano", "--peers=vllm")


class RolloutBenchmarkTest(absltest.TestCase):
  def test_both_loops_play_the_same(self):
    found, printed = run(
      "rollout.py",
      *("--size=nano", "--episodes=10", "--slots=4", "--rounds=1"),
      *("--max_turns=4", "--max_response=12", "--latency=0.002"),
    )
    ours, other = found["ours"], found["lock_step"]
    for key in ("trajectories", "turns", "tokens"):
      self.assertEqual(ours[key], other[key])
    self.assertEqual(ours["trajectories"], 10)
    self.assertLess(ours["decode_steps"], other["decode_steps"])
    self.assertGreater(ours["slots_used"], other["slots_used"])
    self.assertAlmostEqual(
      found["ratio"]["trajectories_per_s"],
      ours["trajectories_per_s"] / other["trajectories_per_s"],
    )
    self.assertIn("lock step", printed)

  def test_whole_updates_with_and_without_overlap(self):
    variants = ["lock step", "logical", "oversample ahead"]
    found, printed = run(
      "rollout.py",
      *("--mode=loop", "--size=nano", "--slots=4", "--rounds=1", "--tokens=8"),
      *("--latencies=0.01", f"--variants={','.join(variants)}", "--updates=5"),
    )
    self.assertEqual(list(found), ["0.01"])
    self.assertEqual(list(found["0.01"]), variants)
    for variant, numbers in found["0.01"].items():
      seconds = numbers["seconds_per_update"]
      self.assertBetween(seconds, numbers["fastest"], numbers["slowest"])
      self.assertGreater(numbers["fastest"], 0)
      self.assertAlmostEqual(numbers["updates_per_hour"] * seconds, 3600)
      self.assertAlmostEqual(numbers["trajectories_per_s"] * seconds, 16)
      self.assertBetween(numbers["slots_used"], 0.01, 1)
      self.assertEqual(numbers["aborted"], 0)
      self.assertEqual(
        numbers["updates_behind"] > 0, variant == "oversample ahead"
      )
      self.assertIn(f"| 0.01 s | {variant} | {seconds:.3g} ", printed)
    self.assertIn("| 1.00x |", printed)

  def test_steps_that_hang_are_given_up(self):
    found, _ = run(
      "rollout.py",
      *("--mode=loop", "--size=nano", "--slots=4", "--rounds=1", "--tokens=4"),
      *("--latencies=0.001", "--variants=threads", "--updates=5"),
      *("--hang=0.2", "--timeout=10"),
    )
    numbers = found["0.001"]["threads"]
    # Three steps that all answer: half of 16 episodes.
    self.assertBetween(numbers["aborted"], 2, 14)
    self.assertGreater(numbers["fastest"], 1.0)

  def test_what_cannot_be_compared_is_one_line(self):
    for arguments, named in (
      (["--variants=lockstep"], "--variants: found 'lockstep'"),
      (["--variants=tunix", "--epochs=2"], "--epochs: found 2, expected 1"),
      (["--variants=tunix", "--tunix_python=false"], "--tunix_python"),
    ):
      with self.assertRaisesRegex(RuntimeError, f"error: .*{named}"):
        run("rollout.py", "--mode=loop", "--size=nano", *arguments)


class SlowToyTest(absltest.TestCase):
  def env(self, **settings):
    made = slow_toy.SlowToy(slow_toy.Settings(**settings)).env()
    made.reset("echo-red-red-red")
    return made

  def test_steps_take_their_time(self):
    env = self.env(latency=2.0, spread=0.5, hang=0.1)
    seconds = np.array([env.seconds(f"response {i}") for i in range(4000)])
    self.assertEqual(env.seconds("response 7"), seconds[7])
    self.assertAlmostEqual(np.mean(np.isinf(seconds)), 0.1, delta=0.02)
    logs = np.log(seconds[np.isfinite(seconds)])
    self.assertAlmostEqual(np.median(logs), np.log(2.0), delta=0.03)
    self.assertAlmostEqual(np.std(logs), 0.5, delta=0.03)

  def test_a_step_waits(self):
    env = self.env(latency=0.05, spread=0.0)
    start = time.perf_counter()
    self.assertEqual(env.step("<action>red</action>").reward, 1 / 3)
    self.assertGreater(time.perf_counter() - start, 0.05)


class LockStepTest(absltest.TestCase):
  def test_nobody_steps_before_all_may(self):
    made = slow_toy.SlowToy(slow_toy.Settings())
    pool = lock_step.HeldPool(environments.EnvironmentPool(made.env, threads=0))
    seats = []
    for colour in ("red", "blue"):
      seat, seen = pool.start(f"echo-{colour}-red-red")
      self.assertEqual(seen.result().text, colour)
      seats.append(seat)
    right, wrong = (pool.step(seat, "<action>red</action>") for seat in seats)
    self.assertFalse(right.done() or wrong.done())
    pool.send()
    self.assertEqual(right.result(1).reward, 1 / 3)
    self.assertEqual(wrong.result(1).reward, 0)
    pool.close()

  def test_failures_are_passed_on(self):
    made = slow_toy.SlowToy(slow_toy.Settings(error_turn=1))
    pool = lock_step.HeldPool(environments.EnvironmentPool(made.env, threads=0))
    seat, _ = pool.start("echo-red-red-red")
    failed = pool.step(seat, "<action>red</action>")
    pool.send()
    with self.assertRaises(base.EnvError):
      failed.result(1)
    pool.close()


if __name__ == "__main__":
  absltest.main()
