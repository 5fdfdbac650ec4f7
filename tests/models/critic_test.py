"""The critic: its values, its loss, and what it leaves alone."""

import dataclasses
import functools

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from t2po_jax.distributed import sharding
from t2po_jax.learning import batching, learner, objectives, optimizers
from t2po_jax.models import config, critic, decoder

SIZES = dataclasses.replace(config.named("tiny"), vocab_size=17, layers=1)
POLICY = decoder.Policy(SIZES)
PARAMS = jax.tree.map(np.asarray, POLICY.init(jax.random.key(0)))


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


def make_batch():
  """Five turns in a few rows, with random values and targets."""
  rng = np.random.default_rng(0)
  segments = []
  for number in range(5):
    prompt, size = rng.integers(2, 6), rng.integers(2, 6)
    tokens = rng.integers(0, 17, prompt + size).astype(np.int32)
    index = np.arange(prompt - 1, prompt + size - 1, dtype=np.int32)
    segments.append(
      batching.Segment(
        tokens=tokens,
        index=index,
        targets=tokens[index + 1],
        mask=(rng.random(size) < 0.7).astype(np.float32),
        turn=np.full(size, number, np.int32),
        advantages=rng.normal(size=size).astype(np.float32),
        logprobs=rng.uniform(-4, -1, size).astype(np.float32),
      )
    )
  (batch,) = batching.pack(segments, lengths=[32], rows=1).batches
  targets = rng.normal(size=batch.turn.shape).astype(np.float32)
  targets[rng.random(targets.shape) < 0.4] = np.nan
  return batch.replace(
    value_targets=targets,
    old_values=rng.normal(size=targets.shape).astype(np.float32),
  )


@functools.cache
def make_learner(kind, max_kl=0.0):
  return learner.Learner(
    POLICY,
    decoder.logical_axes(PARAMS),
    sharding.create_mesh(data=1, fsdp=1, tensor=1),
    optimizer=optimizers.OptimizerConfig(learning_rate=1e-3),
    objective=objectives.PolicyObjective(value_clip=0.3),
    rows=1,
    max_kl=max_kl,
    critic=critic.Critic(POLICY, kind) if kind else None,
    critic_optimizer=optimizers.OptimizerConfig(learning_rate=0.02),
  )


def with_head(state, kernel, bias):
  head = {"kernel": jnp.asarray(kernel), "bias": jnp.float32(bias)}
  return state.replace(critic=state.critic | {"value_head": head})


class CriticTest(parameterized.TestCase):
  @parameterized.parameters(*critic.KINDS)
  def test_begins_at_zero(self, kind):
    state = make_learner(kind).init_state(PARAMS)
    values = make_learner(kind).values(state, make_batch())
    self.assertEqual(float(jnp.max(jnp.abs(values))), 0.0)

  @parameterized.parameters(*critic.KINDS)
  def test_values_read_the_state_before_each_token(self, kind):
    batch = make_batch()
    state = make_learner(kind).init_state(PARAMS)
    kernel = np.random.default_rng(1).normal(size=SIZES.width)
    kernel = kernel.astype(np.float32)
    values = make_learner(kind).values(with_head(state, kernel, 0.5), batch)
    hidden = POLICY.hidden(
      PARAMS, batch.tokens, batch.positions, batch.segments
    )
    for row, place in np.argwhere(batch.turn >= 0):
      wanted = hidden[row, batch.index[row, place]] @ kernel + 0.5
      np.testing.assert_allclose(values[row, place], wanted, rtol=2e-4)

  @parameterized.parameters(*critic.KINDS)
  def test_loss_by_a_loop(self, kind):
    batch = make_batch()
    state = make_learner(kind).init_state(PARAMS)
    state = with_head(state, np.zeros(SIZES.width, np.float32), 0.25)
    terms = []
    for row, place in np.argwhere(batch.turn >= 0):
      target = batch.value_targets[row, place]
      if np.isnan(target):
        continue
      old = batch.old_values[row, place]
      near = min(max(0.25, old - 0.3), old + 0.3)
      terms.append(0.5 * max((0.25 - target) ** 2, (near - target) ** 2))
    _, metrics = make_learner(kind).update(state, [batch])
    np.testing.assert_allclose(metrics["value_loss"], np.mean(terms), rtol=1e-5)
    np.testing.assert_allclose(metrics["value"], 0.25, rtol=1e-5)

  def test_learns_although_the_policy_has_moved_far(self):
    trainer = make_learner("separate", max_kl=1e-6)
    before = trainer.init_state(PARAMS)
    after, metrics = trainer.update(trainer.init_state(PARAMS), [make_batch()])
    self.assertEqual(float(metrics["halted"]), 1)
    chex.assert_trees_all_equal(after.params, before.params)
    head = after.critic["value_head"]["kernel"]
    self.assertGreater(float(jnp.max(jnp.abs(head))), 0.0)

  def test_a_separate_critic_leaves_the_policy_alone(self):
    batch = make_batch()
    plain, metrics = make_learner(None).update(
      make_learner(None).init_state(PARAMS), [batch]
    )
    state = make_learner("separate").init_state(PARAMS)
    state = with_head(state, np.ones(SIZES.width, np.float32), 0.0)
    moved, with_critic = make_learner("separate").update(state, [batch])
    chex.assert_trees_all_close(moved.params, plain.params, atol=1e-6)
    np.testing.assert_allclose(
      metrics["grad_norm"], with_critic["grad_norm"], rtol=1e-4
    )
    trunk = moved.critic["trunk"]["norm"]["scale"]
    self.assertGreater(np.max(np.abs(trunk - PARAMS["norm"]["scale"])), 1e-3)

  @parameterized.parameters(*critic.KINDS)
  def test_learns_its_targets(self, kind):
    batch = make_batch()
    targets = np.where(np.isnan(batch.value_targets), np.nan, 0.7)
    batch = batch.replace(
      value_targets=targets.astype(np.float32),
      old_values=np.full_like(batch.old_values, 0.7),
    )
    state, first = make_learner(kind).init_state(PARAMS), None
    for _ in range(20):
      state, metrics = make_learner(kind).update(state, [batch])
      first = first or float(metrics["value_loss"])
    self.assertLess(float(metrics["value_loss"]), 0.2 * first)

  def test_refuses_an_unknown_kind(self):
    with self.assertRaisesRegex(ValueError, "critic: found 'shared'"):
      critic.Critic(POLICY, "shared")


if __name__ == "__main__":
  absltest.main()
