"""The prepared script for an accelerator: it runs, and keeps what it has."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest

from tests import places


class AcceleratorTest(absltest.TestCase):
  def run_script(self, *arguments):
    """The finished process, and what it wrote, if anything."""
    place = (
      pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
      / "found.json"
    )
    done = subprocess.run(
      [
        sys.executable,
        "experiments/benchmarks/accelerator.py",
        "--tiny",
        f"--json={place}",
        *arguments,
      ],
      cwd=places.ROOT,
      env={**os.environ, "JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
      check=False,
    )
    found = json.loads(place.read_text()) if place.is_file() else None
    return done, found

  def test_parts_measure_and_are_kept(self):
    done, found = self.run_script(
      "--minutes=20", "--parts=facts,parity,sampler,learner"
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertEqual(list(found), ["facts", "parity", "sampler", "learner"])
    for name, part in found.items():
      self.assertEqual(part["ended"], "done", f"{name}: {done.stderr}")
    self.assertGreater(found["facts"]["matrix_tflops_float32"], 0)
    parity = found["parity"]
    # The device is the CPU itself: float32 differs by rounding at most.
    self.assertLess(parity["float32 auto"]["gradient_relative"], 1e-5)
    self.assertEqual(parity["rollouts_equal_float32"], 1.0)
    bf16 = parity["bfloat16 auto"]["gradient_relative"]
    self.assertBetween(bf16, 1e-4, 0.2)
    step = found["sampler"]["nano batch 2 calibrated"]
    self.assertAlmostEqual(step["tokens_per_s"], 2e3 / step["step_ms"])
    self.assertIn("nano batch 2 control_overhead", found["sampler"])
    learned = found["learner"]["attention auto, remat dots"]
    self.assertGreater(learned["tokens_per_s"], 0)
    self.assertIsNone(learned["mfu"])  # No data sheet of this CPU.

  def test_a_part_out_of_time_is_said_to_be(self):
    done, found = self.run_script("--minutes=0.02", "--parts=train")
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertEqual(found["train"]["ended"], "time was up")

  def test_an_unknown_part_ends_in_one_line(self):
    done, found = self.run_script("--parts=facts,sample")
    self.assertIsNone(found)
    self.assertRegex(
      done.stderr.strip(), "error: --parts: found 'sample', expected some of"
    )


if __name__ == "__main__":
  absltest.main()
