"""Checks that need eight devices; `mesh_test.py` runs them in a process whose
CPU poses as eight. Sharded must equal unsharded, on every mesh."""

import dataclasses
import functools
import pathlib
import tempfile

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from t2po_jax.distributed import sharding
from t2po_jax.learning import batching, learner, lora, objectives
from t2po_jax.models import config as config_lib
from t2po_jax.models import critic as critics
from t2po_jax.models import decoder
from t2po_jax.training import checkpoint
from tests.learning import learner_test as toy

MESHES = (
  dict(data=8, fsdp=1),
  dict(fsdp=8),
  dict(data=2, fsdp=2, tensor=2),
)
ONE = tuple(jax.devices()[:1])
OBJECTIVE = objectives.PolicyObjective(
  aggregation="seq_mean_token_mean",
  kl="k3",
  kl_coefficient=0.1,
  entropy_coefficient=0.01,
  old_logprobs="recompute",
)


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)


def make_learner(policy, axes, mesh, critic=None):
  return learner.Learner(
    policy,
    axes,
    mesh,
    optimizer=toy.OPTIMIZER,
    objective=OBJECTIVE,
    rows=8,
    chunk=4,
    critic=critic,
  )


def run_updates(policy, axes, params, mesh, critic=None):
  """Two optimizer steps; returns the learner, its state and the metrics."""
  trainer = make_learner(policy, axes, mesh, critic)
  state = trainer.init_state(params)
  ref_params = trainer.place_params(
    jax.tree.map(lambda x: 1.1 * x, jax.device_get(params))
  )
  segments = toy.make_segments(0, 24)
  packed = batching.pack(segments, lengths=[16], rows=8, minibatches=2)
  batches = [
    batch.replace(value_targets=batch.advantages) for batch in packed.batches
  ]
  state, metrics = trainer.update(state, batches, ref_params=ref_params)
  return trainer, state, metrics


@functools.cache
def run_toy(**sizes):
  mesh = sharding.create_mesh(**sizes)
  return run_updates(toy.ToyPolicy(), toy.AXES, toy.make_params(), mesh)


class MeshTest(chex.TestCase):
  def test_axes_fill_the_devices(self):
    self.assertEqual(jax.device_count(), 8)
    mesh = sharding.create_mesh(data=2, tensor=2)
    self.assertEqual(dict(mesh.shape), {"data": 2, "fsdp": 2, "tensor": 2})
    self.assertEqual(sharding.row_shards(mesh), 4)
    with self.assertRaisesRegex(ValueError, "tensor 3 does not fit 8 devices"):
      sharding.create_mesh(tensor=3)
    with self.assertRaisesRegex(ValueError, "data 2 x fsdp 2 x tensor 1"):
      sharding.create_mesh(data=2, fsdp=2)

  def test_put_splits_and_gather_joins(self):
    mesh = sharding.create_mesh(data=2, tensor=2)
    rows = np.arange(48.0).reshape(2, 8, 3)
    placed = sharding.put(rows, sharding.row_sharding(mesh, dimension=1))
    self.assertEqual(placed.addressable_shards[0].data.shape, (2, 2, 3))
    np.testing.assert_array_equal(sharding.gather(placed), rows)

  def test_constrain_splits_an_activation(self):
    mesh = sharding.create_mesh(data=2, tensor=2)
    with jax.set_mesh(mesh):
      y = jax.jit(lambda x: sharding.constrain(x, "rows", "mlp"))(
        jnp.ones((8, 6))
      )
    self.assertEqual(y.addressable_shards[0].data.shape, (2, 3))

  def test_over_rows_keeps_values_and_gradients(self):
    mesh = sharding.create_mesh(data=2, tensor=2)
    weights = np.arange(12.0, dtype=np.float32).reshape(4, 3)
    rows = np.arange(32.0, dtype=np.float32).reshape(8, 4)

    def score(weights, rows):
      return jnp.tanh(rows @ weights / 100).sum(axis=1)

    def loss(function, weights):
      return jnp.sum(function(weights, rows) ** 2)

    with jax.set_mesh(mesh):
      split = sharding.over_rows(score, mesh)
      found = jax.jit(jax.value_and_grad(lambda w: loss(split, w)))(weights)
    wanted = jax.value_and_grad(lambda w: loss(score, w))(weights)
    chex.assert_trees_all_close(found, wanted, rtol=1e-4)

  def test_rows_must_divide_over_the_mesh(self):
    with self.assertRaisesRegex(
      ValueError, r"found 6 per micro-batch, expected a multiple of 8 "
    ):
      learner.Learner(
        toy.ToyPolicy(),
        toy.AXES,
        sharding.create_mesh(data=2, fsdp=4),
        optimizer=toy.OPTIMIZER,
        objective=OBJECTIVE,
        rows=6,
      )


class UpdateTest(chex.TestCase):
  @parameterized.parameters(*MESHES)
  def test_sharded_equals_unsharded(self, **sizes):
    _, state, metrics = run_toy(**sizes)
    _, alone, alone_metrics = run_toy(devices=ONE)
    self.assertGreater(float(alone_metrics["update_norm"]), 1e-3)
    chex.assert_trees_all_close(
      sharding.gather((state, metrics)),
      sharding.gather((alone, alone_metrics)),
      rtol=1e-4,
      atol=1e-6,
    )

  def test_decoder_and_critic_are_split_and_equal(self):
    policy = decoder.Policy(
      config_lib.ModelConfig("qwen3", toy.V, 8, 2, 4, 2, 4, 8, qk_norm=True),
      remat="full",
    )
    params = policy.init(jax.random.key(0))
    axes = decoder.logical_axes(params)
    critic = critics.Critic(policy, "separate")
    _, state, metrics = run_updates(
      policy, axes, params, sharding.create_mesh(data=2, tensor=2), critic
    )
    _, alone, alone_metrics = run_updates(
      policy, axes, params, sharding.create_mesh(devices=ONE), critic
    )
    self.assertGreater(float(alone_metrics["value_loss"]), 0.01)
    chex.assert_trees_all_close(
      sharding.gather((state, metrics)),
      sharding.gather((alone, alone_metrics)),
      rtol=2e-4,
      atol=2e-6,
    )
    up = state.params["layers"]["mlp"]["up"]["kernel"]
    self.assertEqual(up.shape, (2, 8, 8))
    self.assertEqual(up.addressable_shards[0].data.shape, (2, 4, 4))
    # The optimizer's moments are laid out as the parameters are.
    shapes = {
      leaf.addressable_shards[0].data.shape
      for leaf in jax.tree.leaves(state.opt_state)
      if leaf.shape == up.shape
    }
    self.assertEqual(shapes, {(2, 4, 4)})


class FamiliesTest(parameterized.TestCase):
  @parameterized.parameters("experts", "gemma")
  def test_split_equals_whole(self, kind):
    """Experts over `tensor`, each device its own; windows and two ropes."""
    plain = config_lib.ModelConfig("qwen3_moe", toy.V, 8, 2, 4, 2, 4, 8)
    options = {
      "experts": {"qk_norm": True, "experts": 4, "experts_per_token": 2},
      "gemma": {
        "family": "gemma3_text",
        "kinds": (config_lib.LayerKind(3, "local"), config_lib.LayerKind()),
        "activation": "gelu_tanh",
        "norm_offset": True,
        "post_norms": True,
        "scaled_embeddings": True,
        "logit_softcap": 5.0,
      },
    }
    config = dataclasses.replace(plain, **options[kind])
    policy = decoder.Policy(config, remat="full")
    params = policy.init(jax.random.key(0))
    axes = decoder.logical_axes(params)
    found = []
    for mesh in (
      sharding.create_mesh(data=2, fsdp=2, tensor=2),
      sharding.create_mesh(devices=ONE),
    ):
      _, state, metrics = run_updates(policy, axes, params, mesh)
      found.append((state, metrics))
    chex.assert_trees_all_close(
      *(sharding.gather(part) for part in found), rtol=2e-4, atol=2e-6
    )
    if kind == "experts":
      kernel = found[0][0].params["layers"]["mlp"]["expert_up"]["kernel"]
      self.assertEqual(kernel.shape, (2, 4, 8, 8))
      self.assertEqual(kernel.addressable_shards[0].data.shape, (2, 2, 4, 8))


class MoreFamiliesTest(parameterized.TestCase):
  @parameterized.parameters("llama3", "mistral", "smollm3", "gemma2")
  def test_logits_and_gradients_split_equal_whole(self, kind):
    """What is new in these has no parameters: windows, ropes, bounds."""
    plain = config_lib.ModelConfig("llama", toy.V, 8, 2, 4, 2, 4, 8)
    windowed, full = config_lib.LayerKind(3), config_lib.LayerKind()
    options = {
      "llama3": {"rope_scaling": config_lib.RopeScaling("llama3", 4.0, 8)},
      "mistral": {"kinds": (windowed, windowed)},
      "smollm3": {"kinds": (full, config_lib.LayerKind(rope="none"))},
      "gemma2": {
        "kinds": (windowed, full),
        "activation": "gelu_tanh",
        "norm_offset": True,
        "post_norms": True,
        "scaled_embeddings": True,
        "attention_softcap": 2.0,
        "logit_softcap": 3.0,
      },
    }
    config = dataclasses.replace(plain, family=kind, **options[kind])
    policy = decoder.Policy(config)
    params = jax.tree.map(
      lambda x: x + 0.1, jax.device_get(policy.init(jax.random.key(0)))
    )
    tokens = np.random.default_rng(0).integers(0, toy.V, (8, 10))
    positions = np.tile(np.arange(10), (8, 1))

    def loss(params, *rows):
      logits = policy.logits(params, policy.hidden(params, *rows))
      return jnp.sum(jnp.sin(logits)), logits

    found = []
    for mesh in (
      sharding.create_mesh(data=2, fsdp=2, tensor=2),
      sharding.create_mesh(devices=ONE),
    ):
      layout = sharding.params_sharding(
        mesh, params, decoder.logical_axes(params)
      )
      rows = [
        sharding.put(row, sharding.row_sharding(mesh))
        for row in (tokens, positions, np.ones_like(tokens))
      ]
      with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        found.append(step(sharding.put(params, layout), *rows))
    up = found[0][1]["layers"]["mlp"]["up"]["kernel"]
    self.assertEqual(len(up.sharding.device_set), 8)
    chex.assert_trees_all_close(
      *(sharding.gather(part) for part in found), rtol=2e-4, atol=2e-5
    )


class AdaptersTest(chex.TestCase):
  def test_base_and_adapters_are_split_and_equal(self):
    policy = decoder.Policy(
      config_lib.ModelConfig("llama", toy.V, 8, 2, 4, 2, 4, 8), remat="full"
    )
    params = policy.init(jax.random.key(0))
    spec = lora.Adapters(policy, 2, 4.0, ("query", "down"))
    batches = batching.pack(
      toy.make_segments(0, 24), lengths=[16], rows=8
    ).batches
    found = []
    for sizes in (dict(data=2, fsdp=2, tensor=2), dict(devices=ONE)):
      trainer = learner.Learner(
        policy,
        decoder.logical_axes(params),
        sharding.create_mesh(**sizes),
        optimizer=toy.OPTIMIZER,
        objective=OBJECTIVE,
        rows=8,
        chunk=4,
        adapters=spec,
      )
      state = trainer.init_state(params)
      reference = trainer.place_reference(params)
      state, metrics = trainer.update(
        state, batches, epochs=2, ref_params=reference
      )
      found.append((state, metrics, trainer.policy_params(state.params)))
    (state, _, merged), _ = found
    chex.assert_trees_all_close(
      *(sharding.gather(part) for part in found), rtol=2e-4, atol=2e-6
    )
    down = state.params["layers"]["mlp"]["down"]
    # The inner width is split over tensor, the residual stream over fsdp.
    self.assertEqual(down["lora_a"].addressable_shards[0].data.shape, (2, 4, 2))
    self.assertEqual(down["lora_b"].addressable_shards[0].data.shape, (2, 2, 4))
    kernel = merged["layers"]["mlp"]["down"]["kernel"]
    self.assertEqual(kernel.addressable_shards[0].data.shape, (2, 4, 4))


class CheckpointTest(chex.TestCase):
  def test_saved_on_one_mesh_restored_on_another(self):
    policy, params = toy.ToyPolicy(), toy.make_params()
    writer = make_learner(
      policy, toy.AXES, sharding.create_mesh(data=2, tensor=2)
    )
    state = writer.init_state(params)
    with tempfile.TemporaryDirectory() as place:
      store = checkpoint.Checkpoints(pathlib.Path(place) / "saved")
      store.save(1, state, {"update": 1})
      for sizes in (dict(fsdp=8), dict(devices=ONE)):
        reader = make_learner(policy, toy.AXES, sharding.create_mesh(**sizes))
        like = reader.abstract_state()
        restored, _ = store.restore(like)
        chex.assert_trees_all_equal(
          sharding.gather(restored), sharding.gather(state)
        )
        for leaf, wanted in zip(
          jax.tree.leaves(restored), jax.tree.leaves(like), strict=True
        ):
          self.assertEqual(leaf.sharding, wanted.sharding)
      store.close()


if __name__ == "__main__":
  absltest.main()
