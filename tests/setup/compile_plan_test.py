"""Programs for TPUs, compiled without one; figures against arithmetic."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized

from t2po_jax.configs import base as settings
from t2po_jax.configs import searchqa, smoke
from t2po_jax.setup import compile_plan, memory_plan, roofline
from tests import places

LIBTPU = importlib.util.find_spec("libtpu") is not None


def nano() -> settings.Config:
  """The smoke test with the smallest model in bfloat16."""
  config = smoke.get_config()
  config.model.size = "nano"
  config.model.dtype = "bfloat16"
  config.mesh.data = 1
  config.mesh.fsdp = -1
  return settings.read(config)


class TargetTest(parameterized.TestCase):
  @parameterized.parameters("v5e", "v9:2x2", "v5e:2", "tpu", "v5e:2xx2")
  def test_unknown_names_are_refused(self, name):
    with self.assertRaisesRegex(ValueError, "^topology: found '.*v5e:4x4"):
      compile_plan.target(name)

  def test_without_the_compiler_one_line_says_how_to_get_it(self):
    with mock.patch.object(importlib.util, "find_spec", return_value=None):
      with self.assertRaisesRegex(ValueError, "pip install libtpu") as raised:
        compile_plan.target("v5e:2x2")
    self.assertNotIn("\n", str(raised.exception))

  def test_what_is_here(self):
    found = compile_plan.target("cpu")
    self.assertTrue(found.shared)
    self.assertIsNone(found.chip)
    self.assertGreater(found.limit, 1e8)


class ShapeTest(absltest.TestCase):
  def config(self, source):
    config = smoke.get_config()
    config.model.source = source
    return settings.read(config)

  def test_sizes_without_weights(self):
    read = compile_plan.model_shape
    self.assertEqual(read(self.config("Qwen/Qwen3-4B")).width, 2560)
    found = read(self.config("smollm2-135m-instruct"))
    self.assertEqual(found.layers, 30)
    with self.assertRaisesRegex(ValueError, "^model.source: .*'a/b'"):
      read(self.config("a/b"))
    folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    (folder / "config.json").write_text(
      json.dumps(
        {
          "model_type": "qwen3",
          "vocab_size": 99,
          "hidden_size": 8,
          "intermediate_size": 16,
          "num_hidden_layers": 2,
          "num_attention_heads": 2,
        }
      )
    )
    self.assertEqual(read(self.config(str(folder))).vocab_size, 99)


@absltest.skipUnless(LIBTPU, "libtpu is not installed: pip install libtpu")
class TPUTest(absltest.TestCase):
  def test_kernels_bytes_and_collectives_of_a_slice(self):
    plan = compile_plan.Plan(nano(), compile_plan.target("v5e:2x2"))
    self.assertLen(plan.target.devices, 4)
    found = {
      one.name.split()[0]: one
      for one in plan.compile(
        kinds=("prefill", "decode", "update"),
        every_size=False,
        progress=lambda _: None,
      )
    }
    decode, update = found["decode"], found["update"]
    self.assertEqual(decode.kernels, ("decode_attention",))
    self.assertContainsSubset(
      {"splash_mha_fwd_segmented_residuals"}, update.kernels
    )
    # The slots are changed in place: nothing but a count comes out anew.
    self.assertLess(decode.results, 8192)
    self.assertLess(update.results, 65536)
    # A device alone decodes its own slots; it tells how many are running.
    self.assertEqual(set(decode.exchanged), {"all-reduce over data"})
    self.assertLess(decode.exchanged["all-reduce over data"], 64)
    kinds = {name.split(" over ")[1] for name in update.exchanged}
    self.assertEqual(kinds, {"fsdp"})
    assert update.bound is not None
    self.assertGreater(update.bound.seconds, 0)
    # What a run prints of its memory is what the compiler needs.
    printed = plan.measured(found.values()).total
    most = max(one.total for one in found.values())
    self.assertBetween(printed / most, 0.9, 1.1)
    # By hand: 12 bytes a weight, split in four, and nothing else lasts but
    # the batch, and what small arrays are padded to.
    state = memory_plan.device_bytes(plan.learner.abstract_state())
    self.assertBetween(update.arguments, state, 2 * state)

  def test_what_does_not_fit_names_the_largest_arrays(self):
    where = compile_plan.target("v5e:2x2")
    where = dataclasses.replace(where, limit=1000)
    plan = compile_plan.Plan(nano(), where)
    with self.assertRaisesRegex(
      compile_plan.DoesNotFit,
      r"^v5e:2x2: fork 4 does not fit: .*largest arrays.*: \w+.*\d\.\d\d",
    ):
      list(
        plan.compile(kinds=("fork",), every_size=False, progress=lambda _: None)
      )

  def test_the_papers_model_lasts_within_a_chip(self):
    config = settings.read(searchqa.get_config("qwen3-4b"))
    plan = compile_plan.Plan(config, compile_plan.target("v5e:4x4"))
    # 4.02 G weights: 12 bytes each over 16 chips, 2 bytes each over the 4 of a
    # host, which hold 32 slots of 4,608 positions.
    weights = 4.022e9
    cache = 32 * 4608 * 36 * 8 * 128 * 2 * 2
    expected = weights * 12 / 16 + (weights * 2 + cache) / 4
    self.assertBetween(plan.lasting() / expected, 0.99, 1.01)
    self.assertLess(plan.lasting(), 0.75 * plan.target.limit)
    self.assertEqual(plan.target.chip, roofline.CHIPS[1])
    # Three copies of the largest array, an MLP's kernels of all 36 layers in
    # bfloat16; the compiler finds 5.491 GB.
    gathering = plan.memory.parts["gathering an array"]
    self.assertEqual(gathering, 3 * 36 * 2560 * 9728 * 2)
    self.assertBetween(gathering / 5.491e9, 0.9, 1.0)


class CommandTest(absltest.TestCase):
  def test_compiles_for_what_is_here_and_writes_json(self):
    place = (
      pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
      / "found.json"
    )
    done = subprocess.run(
      [
        sys.executable,
        "experiments/compile.py",
        "--config=configs/smoke.py",
        "--config.model.size=nano",
        "--topology=cpu",
        "--programs=largest",
        "--kinds=fork,layout",
        f"--json={place}",
      ],
      cwd=places.ROOT,
      env={**os.environ, "JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
      check=True,
    )
    self.assertIn("at the same time", done.stdout)
    names = [one["name"] for one in json.loads(place.read_text())["programs"]]
    self.assertEqual(names, ["fork 16", "layout"])

  def test_a_wrong_name_ends_in_one_line(self):
    done = subprocess.run(
      [
        sys.executable,
        "experiments/compile.py",
        "--config=configs/smoke.py",
        "--topology=v7:1x1",
      ],
      cwd=places.ROOT,
      env={**os.environ, "JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(done.returncode, 1)
    self.assertRegex(done.stderr.strip(), r"^error: topology: found 'v7:1x1'")


if __name__ == "__main__":
  absltest.main()
