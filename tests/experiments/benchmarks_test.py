"""Both sampling benchmarks on a model of nothing: they run, and add up."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest

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
    found, printed = run(
      "rollout.py",
      *("--mode=loop", "--size=nano", "--slots=4", "--rounds=1"),
      *("--latencies=0.01", "--variants=logical,ahead", "--updates=5"),
    )
    self.assertEqual(list(found), ["0.01"])
    self.assertEqual(list(found["0.01"]), ["logical", "ahead"])
    for numbers in found["0.01"].values():
      seconds = numbers["seconds_per_update"]
      self.assertGreater(seconds, 0.01)
      self.assertAlmostEqual(numbers["updates_per_hour"] * seconds, 3600)
      self.assertAlmostEqual(numbers["trajectories_per_s"] * seconds, 16)
    self.assertRegex(printed, r"latency +logical +ahead")


if __name__ == "__main__":
  absltest.main()
