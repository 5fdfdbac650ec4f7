"""The learner's benchmark: its arithmetic, and a tiny run of it."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest
import numpy as np

from t2po_jax.experiments.benchmarks import learner, learner_worker
from t2po_jax.models import config as model_config
from tests import places

ROOT = places.ROOT


class ArithmeticTest(absltest.TestCase):
  def test_flops_by_hand(self):
    config = model_config.ModelConfig("llama", 10, 4, 2, 2, 1, 2, 8)
    # Query and output 4 x 4, key and value 4 x 2, three of 4 x 8.
    weights = 2 * (2 * 16 + 2 * 8 + 3 * 32)
    pairs = 2 * 2 * 2 * (5**2 + 4**2)
    wanted = 6 * (weights * 9 + 10 * 4 * (2 + 3) + pairs)
    found = learner.useful_flops(config, [(3, 2), (1, 3)])
    self.assertEqual(found, wanted)

  def test_rows_hold_each_turn_once(self):
    workload = {"turns": [(3, 2), (1, 1), (2, 3)], "seed": 0}
    turns = learner_worker.turns_of(workload, 50)
    batches = learner_worker.padded_rows(turns, 2)
    self.assertEqual([b["tokens"].shape for b in batches], [(2, 5), (1, 5)])
    np.testing.assert_array_equal(
      batches[0]["mask"], [[0, 0, 1, 1, 0], [1, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(batches[0]["there"][1], [1, 1, 0, 0, 0])
    np.testing.assert_array_equal(
      batches[1]["old"][0, 1:4], turns[2]["logprobs"]
    )

  def test_lengths_are_those_of_an_agent(self):
    pairs = learner.dialogue_lengths(200, 384, 48, 1024)
    seen, said = np.array(pairs).T
    self.assertBetween(np.median(seen), 330, 440)
    self.assertBetween(np.median(said), 40, 56)
    self.assertLessEqual(np.max(seen + said), 1024)
    self.assertEqual(pairs, learner.dialogue_lengths(200, 384, 48, 1024))


class RunTest(absltest.TestCase):
  def test_contestants_compute_the_same(self):
    peers = ["ours"]
    if importlib.util.find_spec("torch"):
      peers.append("torch")
    file = pathlib.Path(tempfile.mkdtemp()) / "found.json"
    run = subprocess.run(
      [
        sys.executable,
        str(ROOT / "experiments" / "benchmarks" / "learner.py"),
        "--model=nano",
        "--length=16",
        "--turns=3",
        "--prompt=8",
        "--response=4",
        "--row_tokens=32",
        "--steps=1",
        "--peak_size=64",
        "--memory_at=2,32",
        f"--peers={','.join(peers)}",
        f"--json={file}",
      ],
      env={
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      },
      capture_output=True,
      text=True,
    )
    self.assertEqual(run.returncode, 0, run.stderr)
    self.assertIn("| dialogue | ours |", run.stdout)
    found = json.loads(file.read_text())
    for name in ("padded", "dialogue"):
      losses = found["first_loss"][name]
      self.assertNotAlmostEqual(losses["ours"], 0.0, places=4)
      for peer in peers[1:]:
        self.assertAlmostEqual(losses[peer], losses["ours"], places=3)
      numbers = found["workloads"][name]["ours"]
      self.assertEqual(numbers["ours_is_faster_by"], 1.0)
      self.assertGreater(numbers["utilisation"], 0)
    sizes = found["xla_temporary_bytes"]
    self.assertLess(sizes["chunked, remat full"], sizes["naive, no remat"])


if __name__ == "__main__":
  absltest.main()
