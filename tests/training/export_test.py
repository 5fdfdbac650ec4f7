"""From a run's folder to directories that transformers and PEFT load."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from t2po_jax import types
from t2po_jax.configs import base as settings
from t2po_jax.configs import smoke
from t2po_jax.models import tokenizer, weights
from t2po_jax.setup import build
from t2po_jax.training import checkpoint, export
from tests import places

ROOT = places.ROOT
HAS_TORCH = importlib.util.find_spec("torch") is not None
CHAT = [
  {"role": "user", "content": "pick 3 <think> naïve"},
  {"role": "assistant", "content": "<action>b</action>"},
  {"role": "user", "content": "reward 1"},
]


def state_of(params, step):
  return types.TrainState(step=jnp.int32(step), params=params, opt_state=())


def make_run(place, **changes):
  """A folder with two checkpoints; returns it with what the first holds."""
  config = smoke.get_config().unlock()
  config.cache_dir = str(place / "cache")
  config.cold_start.kind = "none"
  config.update(changes)
  workdir = place / "run"
  workdir.mkdir()
  text = json.dumps(settings.flatten(config.to_dict()))
  (workdir / "config.json").write_text(text)
  config = settings.read(config)
  agent = build.agent(config, build.benchmark(config))
  spec = build.adapters(config, agent.policy)
  shapes = agent.params if spec is None else spec.init()
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes
  )
  store = checkpoint.Checkpoints(workdir / "checkpoints")
  store.save(1, state_of(params, 1), {}, score=0.5)
  other = jax.tree.map(np.zeros_like, params)
  store.save(2, state_of(other, 2), {}, score=0.25)
  store.close()
  return workdir, agent, spec, params


class ExportTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    place = tempfile.TemporaryDirectory()
    self.addCleanup(place.cleanup)
    self.place = pathlib.Path(place.name)

  def make_run(self, **changes):
    return make_run(self.place, **changes)

  def test_the_best_checkpoint_is_written_whole(self):
    workdir, agent, _, params = self.make_run()
    before = sorted(p.name for p in (workdir / "checkpoints").iterdir())
    out = self.place / "models" / "mine"
    self.assertEqual(export.export(workdir, out), 1)
    config, loaded = weights.load(out)
    self.assertEqual(config, agent.policy.config)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    tokens = tokenizer.load(out)
    self.assertEqual(
      tokens.render_chat(CHAT), agent.tokenizer.render_chat(CHAT)
    )
    report = json.loads((out / "export.json").read_text())
    self.assertEqual((report["update"], report["score"]), (1, 0.5))
    sampling = json.loads((out / "generation_config.json").read_text())
    self.assertEqual(
      sampling,
      {
        "eos_token_id": [1],
        "pad_token_id": 0,
        "do_sample": True,
        "max_new_tokens": 16,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
      },
    )
    after = sorted(p.name for p in (workdir / "checkpoints").iterdir())
    self.assertEqual(before, after)

  @absltest.skipIf(not HAS_TORCH, "torch is not installed")
  def test_transformers_loads_model_tokenizer_and_chat(self):
    import torch
    import transformers

    workdir, agent, _, params = self.make_run()
    out = self.place / "out"
    export.export(workdir, out)
    fast = transformers.AutoTokenizer.from_pretrained(out)
    ids = fast.apply_chat_template(
      CHAT, add_generation_prompt=True, return_dict=False
    )
    self.assertEqual(ids, agent.tokenizer.render_chat(CHAT))
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    self.assertEqual(model.generation_config.top_k, 20)
    tokens = np.array([ids], np.int32)
    with torch.no_grad():
      found = model(torch.tensor(tokens).long()).logits.numpy()
    positions = np.arange(len(ids), dtype=np.int32)[None]
    hidden = agent.policy.hidden(
      params, tokens, positions, np.ones_like(tokens)
    )
    wanted = agent.policy.logits(params, hidden)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)

  def test_adapters_are_merged_or_written_alone(self):
    workdir, agent, spec, adapters = self.make_run(lora={"rank": 2})
    self.assertEqual(export.export(workdir, self.place / "merged"), 1)
    _, loaded = weights.load(self.place / "merged")
    base = jax.tree.map(np.asarray, agent.params)
    wanted = spec.merge(base, adapters)
    jax.tree.map(np.testing.assert_array_equal, loaded, wanted)
    up = ("layers", "mlp", "up", "kernel")
    difference = loaded, base
    for key in up:
      difference = tuple(tree[key] for tree in difference)
    self.assertGreater(np.max(np.abs(difference[0] - difference[1])), 0.01)
    export.export(workdir, self.place / "adapter", kind="adapter")
    tensors = safetensors.numpy.load_file(
      self.place / "adapter" / "adapter_model.safetensors"
    )
    self.assertLen(tensors, 2 * 2 * 7)
    self.assertFalse((self.place / "adapter" / "config.json").exists())

  def test_in_another_dtype_and_of_another_step(self):
    workdir, *_ = self.make_run()
    out = self.place / "out"
    step = export.export(workdir, out, step="latest", dtype="bfloat16")
    self.assertEqual(step, 2)
    described = json.loads((out / "config.json").read_text())
    self.assertEqual(described["torch_dtype"], "bfloat16")
    self.assertEqual(export.export(workdir, self.place / "o", step="1"), 1)

  def test_bad_input_gets_one_line(self):
    workdir, *_ = self.make_run()
    out = self.place / "out"
    for options, message in (
      ({"step": "newest"}, "--step: found 'newest', expected best, latest"),
      ({"step": "9"}, r"holds no checkpoint 9; found \[1, 2\]"),
      ({"kind": "adapter"}, "--kind: found 'adapter', but .*lora.rank 0"),
      ({"kind": "peft"}, "--kind: found 'peft'"),
      ({"dtype": "float16"}, "--dtype: found 'float16'"),
    ):
      with self.assertRaisesRegex(ValueError, message) as raised:
        export.export(workdir, out, **options)
      self.assertNotIn("\n", str(raised.exception))
    self.assertFalse(out.exists())
    with self.assertRaisesRegex(ValueError, "--workdir: .*cannot be read"):
      export.export(self.place / "nowhere", out)
    self.assertFalse((self.place / "nowhere").exists())
    with self.assertRaisesRegex(ValueError, "--out: .* exists already"):
      export.export(workdir, workdir)

  def test_a_cold_start_that_is_gone_is_named(self):
    workdir, *_ = self.make_run(lora={"rank": 2}, cold_start={"kind": "expert"})
    with self.assertRaisesRegex(ValueError, "cache_dir: found no cold start"):
      export.export(workdir, self.place / "out")


class CommandTest(absltest.TestCase):
  def test_a_wrong_folder_gets_one_line(self):
    place = tempfile.mkdtemp()
    command = [
      sys.executable,
      str(ROOT / "experiments" / "export.py"),
      f"--workdir={place}/none",
      f"--out={place}/out",
    ]
    found = subprocess.run(
      command,
      env={**os.environ, "JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
    )
    self.assertNotEqual(found.returncode, 0)
    self.assertNotIn("Traceback", found.stderr)
    last = found.stderr.strip().splitlines()[-1]
    self.assertIn("error: --workdir", last)


if __name__ == "__main__":
  absltest.main()
