"""Adapters: their mathematics by hand, what they leave alone, PEFT's files.

What needs several devices is in `eight_devices.py`.
"""

import copy
import dataclasses
import functools
import importlib.util
import json
import pathlib
import tempfile

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from t2po_jax.configs import base as base_config
from t2po_jax.configs import base as settings
from t2po_jax.configs import smoke
from t2po_jax.distributed import sharding
from t2po_jax.learning import batching, learner, lora, objectives
from t2po_jax.models import agent as agents
from t2po_jax.models import config as config_lib
from t2po_jax.models import decoder, weights
from t2po_jax.setup import build, validate
from t2po_jax.training import checkpoint, cold_start
from tests.learning import learner_test as toy

CONFIG = config_lib.ModelConfig(
  "qwen3", toy.V, 8, 2, 4, 2, 4, 12, qk_norm=True, tied_embeddings=False
)
POLICY = decoder.Policy(CONFIG)
SPEC = lora.Adapters(POLICY, 2, 6.0, ("query", "value", "down", "head"))
TOKENS = np.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]], np.int32)
POSITIONS = np.tile(np.arange(6, dtype=np.int32), (2, 1))
ROWS = (TOKENS, POSITIONS, np.ones_like(TOKENS))
OBJECTIVE = objectives.PolicyObjective(
  kl="k3", kl_coefficient=0.1, old_logprobs="recompute"
)


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def base_params():
  return jax.tree.map(np.asarray, jax.jit(POLICY.init)(jax.random.key(1)))


@functools.cache
def drawn_adapters():
  """Adapters after some training: no factor is zero."""
  rng = np.random.default_rng(2)
  return jax.tree.map(
    lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32),
    jax.eval_shape(SPEC.init),
  )


@jax.jit
def logits(params):
  return POLICY.logits(params, POLICY.hidden(params, *ROWS))


@functools.cache
def make_learner(spec=SPEC):
  return learner.Learner(
    POLICY,
    decoder.logical_axes(base_params()),
    sharding.create_mesh(devices=jax.devices()[:1]),
    optimizer=toy.OPTIMIZER,
    objective=OBJECTIVE,
    rows=2,
    chunk=4,
    adapters=spec,
  )


@functools.cache
def batches():
  segments = toy.make_segments(0, 6)
  return batching.pack(segments, lengths=[16], rows=2).batches


def merged_by_loops(params, adapters):
  """W + (alpha / r) A B, element by element, in float64."""
  params = jax.tree.map(lambda x: np.array(x, np.float64), params)
  places = {
    "query": ("layers", "attention"),
    "value": ("layers", "attention"),
    "down": ("layers", "mlp"),
    "head": (),
  }
  for name, place in places.items():
    linear = functools.reduce(dict.get, place, params)[name]
    factors = functools.reduce(dict.get, place, adapters)[name]
    kernel, a, b = linear["kernel"], factors["lora_a"], factors["lora_b"]
    for index in np.ndindex(kernel.shape):
      *layer, row, column = index
      for k in range(2):
        kernel[index] += (
          3.0 * float(a[(*layer, row, k)]) * float(b[(*layer, k, column)])
        )
  return params


class MathematicsTest(chex.TestCase):
  def test_merge_is_that_of_the_loops(self):
    wanted = merged_by_loops(base_params(), drawn_adapters())
    found = SPEC.merge(base_params(), drawn_adapters())
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)
    self.assertIsInstance(found["head"]["kernel"], np.ndarray)
    self.assertIs(found["embed"]["table"], base_params()["embed"]["table"])

  def test_beside_the_kernel_equals_merged_into_it(self):
    beside = logits(SPEC.attach(base_params(), drawn_adapters()))
    merged = logits(SPEC.merge(base_params(), drawn_adapters()))
    plain = logits(base_params())
    np.testing.assert_allclose(beside, merged, rtol=2e-4, atol=2e-5)
    self.assertGreater(np.max(np.abs(merged - plain)), 0.1)

  def test_new_adapters_change_nothing(self):
    adapters = SPEC.init()
    np.testing.assert_array_equal(
      logits(SPEC.attach(base_params(), adapters)), logits(base_params())
    )
    a = adapters["layers"]["attention"]["query"]["lora_a"]
    self.assertEqual(a.shape, (2, 8, 2))
    self.assertLessEqual(float(jnp.max(jnp.abs(a))), 8**-0.5)
    self.assertGreater(float(jnp.std(a)), 0.3 * 8**-0.5)

  def test_gradient_is_the_full_gradient_projected(self):
    """dL/dA = s dL/dW B^T and dL/dB = s A^T dL/dW, W the merged kernel."""

    def loss(params):
      return jnp.mean(jnp.sin(logits(params)))

    full = jax.jit(jax.grad(loss))(SPEC.merge(base_params(), drawn_adapters()))
    found = jax.jit(
      jax.grad(lambda adapters: loss(SPEC.attach(base_params(), adapters)))
    )(drawn_adapters())
    adapters = drawn_adapters()
    for place in (
      ("layers", "attention", "query"),
      ("layers", "attention", "value"),
      ("layers", "mlp", "down"),
      ("head",),
    ):
      of_kernel, of_factors, factors = (
        functools.reduce(dict.get, place, dict(tree))
        for tree in (full, found, adapters)
      )
      gradient = np.array(of_kernel["kernel"], np.float64)
      wanted_a = np.einsum("...io,...ro->...ir", gradient, factors["lora_b"])
      wanted_b = np.einsum("...ir,...io->...ro", factors["lora_a"], gradient)
      self.assertGreater(np.max(np.abs(wanted_b)), 1e-4)
      for name, wanted in (("lora_a", wanted_a), ("lora_b", wanted_b)):
        np.testing.assert_allclose(
          of_factors[name], 3.0 * wanted, rtol=1e-3, atol=1e-7
        )


class LearnerTest(chex.TestCase):
  def test_adapters_alone_are_trained(self):
    trainer = make_learner()
    state = trainer.init_state(base_params())
    count = sum(x.size for x in jax.tree.leaves(SPEC.init()))
    sizes = [x.size for x in jax.tree.leaves(state.opt_state)]
    self.assertEqual(sum(x.size for x in jax.tree.leaves(state.params)), count)
    # Two moments, and a few counters.
    self.assertBetween(sum(sizes), 2 * count, 2 * count + 8)
    before = jax.device_get(state.params)
    reference = trainer.place_reference(base_params())
    state, metrics = trainer.update(state, batches(), ref_params=reference)
    self.assertGreater(float(metrics["update_norm"]), 1e-4)
    moved = jax.tree.map(
      lambda x, y: float(np.max(np.abs(x - y))), before, state.params
    )
    # A waits for B, which began at zero.
    self.assertGreater(moved["head"]["lora_b"], 1e-4)
    state, _ = trainer.update(state, batches(), ref_params=reference)
    chex.assert_trees_all_equal(trainer._base, base_params())
    merged = SPEC.merge(base_params(), jax.device_get(state.params))
    chex.assert_trees_all_close(
      trainer.policy_params(state.params), merged, rtol=1e-6, atol=1e-7
    )

  def test_the_reference_is_the_base(self):
    trainer = make_learner()
    state = trainer.init_state(base_params())
    state, _ = trainer.update(
      state, batches(), ref_params=trainer.place_reference(base_params())
    )
    reference = trainer.place_reference(base_params())
    found = trainer.logprobs(reference, batches()[0])
    plain = make_learner(None)
    place = plain.place_reference(base_params())
    wanted = plain.logprobs(place, batches()[0])
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    adapted = trainer.logprobs(state.params, batches()[0])
    self.assertGreater(np.max(np.abs(adapted - wanted)), 1e-3)
    whole = plain.logprobs(trainer.policy_params(state.params), batches()[0])
    np.testing.assert_allclose(adapted, whole, rtol=1e-4, atol=1e-5)

  def test_a_restored_state_goes_on_exactly(self):
    trainer = make_learner()
    reference = trainer.place_reference(base_params())

    def step(state):
      return trainer.update(state, batches(), ref_params=reference)[0]

    state = step(trainer.init_state(base_params()))
    with tempfile.TemporaryDirectory() as place:
      store = checkpoint.Checkpoints(pathlib.Path(place) / "saved")
      store.save(1, state, {})
      whole = jax.device_get(step(state))
      trainer.load_base(base_params())
      restored, _ = store.restore(trainer.abstract_state())
      store.close()
    chex.assert_trees_all_equal(jax.device_get(step(restored)), whole)
    self.assertEqual(whole.step, 2)

  def test_the_base_is_kept_in_the_dtype_of_the_computation(self):
    policy = decoder.Policy(CONFIG, dtype=jnp.bfloat16)
    spec = lora.Adapters(policy, 2, 6.0, ("query",))
    frozen = spec.freeze(base_params())
    kernel = frozen["layers"]["attention"]["query"]["kernel"]
    self.assertEqual(kernel.dtype, jnp.bfloat16)
    self.assertEqual(frozen["norm"]["scale"].dtype, jnp.float32)
    merged = spec.merge(frozen, spec.init())
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, frozen)

  def test_layout_names_every_axis(self):
    axes = SPEC.logical_axes()
    self.assertEqual(
      axes["layers"]["mlp"]["down"],
      {
        "lora_a": ("layers", "mlp", "rank"),
        "lora_b": ("layers", "rank", "width"),
      },
    )
    self.assertEqual(axes["head"]["lora_b"], ("rank", "vocab"))


class PeftTest(chex.TestCase):
  def save(self, place):
    """A base model and adapters on disk."""
    weights.save(base_params(), CONFIG, place / "base")
    base = str(place / "base")
    lora.save(SPEC, drawn_adapters(), place / "adapter", base=base)
    return place / "adapter"

  def test_names_and_shapes(self):
    with tempfile.TemporaryDirectory() as place:
      saved = self.save(pathlib.Path(place))
      tensors = safetensors.numpy.load_file(saved / lora.ADAPTER_FILE)
      described = json.loads((saved / lora.CONFIG_FILE).read_text())
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    layer = "base_model.model.model.layers.1."
    self.assertLen(shapes, 2 * (3 * 2 + 1))
    self.assertEqual(shapes[layer + "self_attn.q_proj.lora_A.weight"], (2, 8))
    self.assertEqual(shapes[layer + "self_attn.q_proj.lora_B.weight"], (16, 2))
    self.assertEqual(shapes[layer + "mlp.down_proj.lora_A.weight"], (2, 12))
    self.assertEqual(shapes["base_model.model.lm_head.lora_B.weight"], (11, 2))
    np.testing.assert_array_equal(
      tensors[layer + "self_attn.v_proj.lora_B.weight"],
      drawn_adapters()["layers"]["attention"]["value"]["lora_b"][1].T,
    )
    self.assertEqual((described["r"], described["lora_alpha"]), (2, 6.0))
    self.assertEqual(
      described["target_modules"], ["q_proj", "v_proj", "down_proj", "lm_head"]
    )

  @absltest.skipIf(
    not importlib.util.find_spec("peft"), "peft is not installed"
  )
  def test_peft_computes_the_same(self):
    import peft
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as place:
      saved = self.save(pathlib.Path(place))
      model = transformers.AutoModelForCausalLM.from_pretrained(
        saved.parent / "base"
      )
      model = peft.PeftModel.from_pretrained(model, saved)
      with torch.no_grad():
        found = model(torch.tensor(TOKENS).long()).logits.numpy()
    wanted = logits(SPEC.merge(base_params(), drawn_adapters()))
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


class FamiliesTest(parameterized.TestCase):
  """Beside the kernel equals merged into it, for every form of layer."""

  @parameterized.parameters("experts", "gemma", "mistral", "smollm3", "llama3")
  def test_all_that_a_family_has_is_adapted(self, kind):
    options = {
      "mistral": {"family": "mistral", "kinds": (config_lib.LayerKind(2),) * 2},
      "smollm3": {
        "family": "smollm3",
        "kinds": (config_lib.LayerKind(rope="none"), config_lib.LayerKind()),
      },
      "llama3": {
        "family": "llama",
        "rope_scaling": config_lib.RopeScaling("llama3", 4.0, 4),
      },
      "experts": {
        "family": "qwen3_moe",
        "qk_norm": True,
        "experts": 3,
        "experts_per_token": 2,
      },
      "gemma": {
        "family": "gemma3_text",
        "qk_norm": True,
        "kinds": (config_lib.LayerKind(2, "local"), config_lib.LayerKind()),
        "activation": "gelu_tanh",
        "norm_offset": True,
        "post_norms": True,
        "query_scalar": 5.0,
      },
    }
    config = dataclasses.replace(
      CONFIG,
      attention_bias=False,
      output_bias=False,
      **{"qk_norm": False, **options[kind]},
    )
    policy = decoder.Policy(config)
    spec = lora.Adapters(policy, 2, 6.0)
    rng = np.random.default_rng(3)
    params, adapters = (
      jax.tree.map(
        lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), tree
      )
      for tree in (decoder.shapes(config), jax.eval_shape(spec.init))
    )
    self.assertEqual(
      "gate" in adapters["layers"].get("mlp", {}), kind != "experts"
    )

    @jax.jit
    def run(params):
      return policy.logits(params, policy.hidden(params, *ROWS))

    beside = run(spec.attach(params, adapters))
    merged = run(spec.merge(params, adapters))
    np.testing.assert_allclose(beside, merged, rtol=2e-4, atol=2e-4)
    self.assertGreater(np.max(np.abs(merged - run(params))), 0.05)
    with tempfile.TemporaryDirectory() as place:
      lora.save(spec, adapters, place, base="base")
      saved = json.loads(
        (pathlib.Path(place) / "adapter_config.json").read_text()
      )
    self.assertEqual("gate_proj" in saved["target_modules"], kind != "experts")

  def test_experts_that_are_asked_for_are_refused(self):
    config = dataclasses.replace(
      CONFIG, family="qwen3_moe", experts=3, experts_per_token=2
    )
    with self.assertRaisesRegex(ValueError, "lora.targets: found 'up'"):
      lora.Adapters(decoder.Policy(config), 2, 6.0, ("query", "up"))


class ColdStartTest(chex.TestCase):
  def test_adapters_are_merged_after_it(self):
    config = smoke.get_config().unlock()
    config.lora.rank, config.lora.targets = 2, "up"
    config.lora.cold_start = True
    config.train.row_tokens, config.cold_start.batch_size = 16, 4
    config.cold_start.micro_rows = 2
    agent = agents.Agent(POLICY, base_params(), None)
    pairs = [(np.arange(1, 5), np.arange(5, 9))] * 4
    found = cold_start.imitate(
      settings.read(config), agent, batching.pair_segments(pairs), 3, {}
    ).params
    before, after = (
      params["layers"]["mlp"].pop("up")["kernel"]
      for params in map(copy.deepcopy, (base_params(), found))
    )
    self.assertGreater(np.max(np.abs(before - after)), 1e-5)
    found["layers"]["mlp"]["up"] = base_params()["layers"]["mlp"]["up"]
    chex.assert_trees_all_equal(found, base_params())

  def test_its_name_depends_on_the_adapters(self):
    config = smoke.get_config().unlock()
    config.lora.rank = 2
    plain = cold_start.name(settings.read(config), "expert")
    config.lora.cold_start = True
    adapted = cold_start.name(settings.read(config), "expert")
    config.lora.rank = 4
    names = {plain, adapted, cold_start.name(settings.read(config), "expert")}
    self.assertLen(names, 3)


class SettingsTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"lora": {"alpha": 8.0}}, "lora.alpha: found 8.0.*lora.rank 0"),
    ({"lora": {"targets": "query"}}, "lora.targets.*lora.rank 0"),
    ({"lora": {"cold_start": True}}, "lora.cold_start: found True"),
    ({"lora": {"rank": -1}}, "lora.rank: found -1, expected at least 0"),
    ({"lora": {"rank": 2, "alpha": 0.0}}, "lora.alpha.*above 0"),
    (
      {"lora": {"rank": 2, "targets": "query,kee"}},
      "lora.targets: found 'kee', expected 'all' or some of query, key",
    ),
    (
      {
        "lora": {"rank": 2},
        "advantage": {"estimator": "gae"},
        "critic": {"kind": "separate"},
      },
      "critic.kind: found 'separate', expected 'trunk' with lora.rank",
    ),
    (
      {
        "lora": {"rank": 2, "cold_start": True},
        "cold_start": {"kind": "expert"},
      },
      "lora.cold_start: found True, expected False with model.source 'scratch'",
    ),
  )
  def test_refused_by_name(self, changes, message):
    config = base_config.get_config()
    config.update(changes)
    with self.assertRaisesRegex(ValueError, message):
      validate.read(config)

  def test_the_spec_is_that_of_the_configuration(self):
    config = base_config.get_config()
    self.assertIsNone(build.adapters(config, POLICY))
    config.lora.rank = 4
    spec = build.adapters(config, POLICY)
    self.assertEqual((spec.scale, spec.targets), (8.0, lora.IN_LAYERS))
    config.lora.targets = "down, query"
    spec = build.adapters(config, POLICY)
    self.assertEqual(spec.targets, ("query", "down"))

  def test_a_tied_head_has_no_kernel_to_adapt(self):
    tied = decoder.Policy(config_lib.named("nano"))
    with self.assertRaisesRegex(ValueError, "lora.targets: found 'head'"):
      lora.Adapters(tied, 2, 4.0, ("head",))
    with self.assertRaisesRegex(ValueError, "lora.rank: found 0"):
      lora.Adapters(tied, 0, 4.0)


if __name__ == "__main__":
  absltest.main()
