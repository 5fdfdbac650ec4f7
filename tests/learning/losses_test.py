"""Losses per token and their aggregation against loops."""

import math

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from t2po_jax.learning import losses
from t2po_jax.learning.policy_losses import clipped, record
from tests.learning import loss_cases as cases


class WeightsTest(chex.TestCase):
  @parameterized.parameters(
    ("token_mean", lambda size: 1 / 10),
    ("seq_mean_token_mean", lambda size: 1 / (size * 4)),
    ("seq_mean_token_sum", lambda size: 1 / 4),
    ("seq_mean_token_sum_norm", lambda size: 1 / (4 * 50)),
  )
  def test_equals_loop(self, mode, weight):
    found = losses.token_weights(cases.MASK, cases.TURN, mode=mode, horizon=50)
    expected = cases.loop(lambda place: weight(cases.SIZES[cases.TURN[place]]))
    np.testing.assert_allclose(found, expected, rtol=1e-6)

  @parameterized.parameters(*losses.AGGREGATIONS)
  def test_packing_and_padding_change_nothing(self, mode):
    values = np.random.default_rng(0).normal(size=cases.MASK.shape)
    weights = losses.token_weights(cases.MASK, cases.TURN, mode=mode, horizon=9)
    packed = losses.aggregate(values, weights)
    # One turn a row, in another order, with more padding.
    rows = np.full((6, 11), -1)
    mask, moved = np.zeros((6, 11), "f4"), np.full((6, 11), np.nan)
    for turn, row in ((4, 0), (2, 1), (0, 3), (3, 4), (1, 5)):
      place = cases.TURN == turn
      count = place.sum()
      rows[row, 2 : 2 + count] = turn
      mask[row, 2 : 2 + count] = cases.MASK[place]
      moved[row, 2 : 2 + count] = values[place]
    weights = losses.token_weights(mask, rows, mode=mode, horizon=9)
    alone = losses.aggregate(moved, weights)
    np.testing.assert_allclose(alone, packed, rtol=1e-5)

  @parameterized.parameters(*losses.AGGREGATIONS)
  def test_micro_batches_add_up(self, mode):
    logprobs, old, advantages = cases.batch()
    weights = losses.token_weights(cases.MASK, cases.TURN, mode=mode, horizon=9)

    @jax.jit
    def slope(logprobs, old, advantages, mask, weights):
      def loss(logprobs):
        per_token, _ = record.evaluate(
          clipped.ppo, logprobs, old, advantages, mask
        )
        return losses.aggregate(per_token, weights)

      return jax.value_and_grad(loss)(logprobs)

    whole, gradient = slope(logprobs, old, advantages, cases.MASK, weights)
    for split in ([1], [2], [1, 2, 3]):
      parts = [
        slope(*arrays)
        for arrays in zip(
          *(
            np.split(np.asarray(array), split)
            for array in (logprobs, old, advantages, cases.MASK, weights)
          ),
          strict=True,
        )
      ]
      np.testing.assert_allclose(sum(v for v, _ in parts), whole, rtol=1e-5)
      np.testing.assert_allclose(
        np.concatenate([g for _, g in parts]), gradient, rtol=1e-6
      )

  @chex.variants(with_jit=True, without_jit=True)
  def test_nothing_sampled(self):
    for mode in losses.AGGREGATIONS:

      def total(values, mode=mode):
        mask = jnp.zeros((2, 3))
        weights = losses.token_weights(
          mask, jnp.zeros((2, 3), int), mode=mode, horizon=4
        )
        return losses.aggregate(values, weights)

      with jax.debug_nans(True):
        found, slope = self.variant(jax.value_and_grad(total))(jnp.ones((2, 3)))
      self.assertEqual(found, 0.0)
      np.testing.assert_array_equal(slope, 0.0)

  def test_turns_are_counted_exactly(self):
    # 1/n summed n times is not exactly 1 for many n.
    found = []
    for size in range(1, 65):
      mask = np.arange(64)[None] < size
      weights = losses.token_weights(
        mask, np.where(mask, 0, -1), mode="seq_mean_token_sum"
      )
      found.append(float(np.max(weights)))
    self.assertEqual(found, [1.0] * 64)

  def test_bad_options(self):
    with self.assertRaisesRegex(ValueError, "mode: found 'mean'"):
      losses.token_weights(cases.MASK, cases.TURN, mode="mean")
    with self.assertRaisesRegex(ValueError, "horizon: found None"):
      losses.token_weights(
        cases.MASK, cases.TURN, mode="seq_mean_token_sum_norm"
      )


class KlTest(chex.TestCase):
  @parameterized.parameters(
    ("k1", lambda d: d, lambda d: 1.0),
    ("k2", lambda d: d * d / 2, lambda d: d),
    ("k3", lambda d: math.exp(-d) + d - 1, lambda d: 1 - math.exp(-d)),
    ("k1+", lambda d: d, lambda d: d),
    ("k3+", lambda d: math.exp(-d) + d - 1, lambda d: d),
  )
  def test_value_and_gradient(self, kind, value, slope):
    logprobs, ref, _ = cases.batch(spread=0.7)

    def gap(place):
      return float(logprobs[place]) - float(ref[place])

    def total(x):
      kl = losses.kl_penalty(x, ref, cases.MASK, kind=kind)
      return kl.sum(), kl

    with jax.debug_nans(True):
      gradient, kl = jax.jit(jax.grad(total, has_aux=True))(logprobs)
    np.testing.assert_allclose(
      kl, cases.loop(lambda p: value(gap(p))), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
      gradient, cases.loop(lambda p: slope(gap(p))), rtol=1e-4, atol=1e-6
    )

  def test_clamps(self):
    logprobs = jnp.array([[25.0, -25.0, -3.0]])
    zeros, ones = jnp.zeros((1, 3)), jnp.ones((1, 3))
    straight = [25.0, -25.0, -3.0]
    for kind, expected, slope in (
      ("k1", straight, [1.0, 1.0, 1.0]),
      ("k2", [312.5, 312.5, 4.5], straight),
      ("k3", [10.0, 10.0, 10.0], [0.0, 0.0, 0.0]),
      ("k1+", straight, straight),
      ("k3+", [10.0, 10.0, 10.0], straight),
    ):

      def total(x, kind=kind):
        found = losses.kl_penalty(x, zeros, ones, kind=kind)
        return found.sum(), found

      found_slope, found = jax.grad(total, has_aux=True)(logprobs)
      np.testing.assert_allclose(found[0], expected)
      np.testing.assert_allclose(found_slope[0], slope)

  def test_expectations_over_a_small_vocabulary(self):
    policy = np.array([0.5, 0.3, 0.2])
    reference = np.array([0.2, 0.2, 0.6])
    exact = sum(policy * np.log(policy / reference))
    for kind in ("k1", "k3"):
      found = losses.kl_penalty(
        jnp.log(policy)[None],
        jnp.log(reference)[None],
        np.ones((1, 3)),
        kind=kind,
      )
      self.assertAlmostEqual(float(found[0] @ policy), exact, places=5)

  def test_unknown_kind(self):
    with self.assertRaisesRegex(ValueError, "kl: found 'k4'"):
      losses.kl_penalty(cases.MASK, cases.MASK, cases.MASK, kind="k4")


class MismatchTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_statistics(self):
    trainer, sampler, _ = cases.batch(spread=0.4)
    with jax.debug_nans(True):
      found = self.variant(losses.mismatch)(
        jnp.array(np.where(cases.MASK > 0, trainer, 7.0)),
        jnp.array(np.where(cases.MASK > 0, sampler, -7.0)),
        jnp.array(cases.MASK),
      )
    gaps = [
      float(a) - float(b)
      for a, b in zip(
        trainer[cases.MASK > 0], sampler[cases.MASK > 0], strict=True
      )
    ]
    expected = {
      "mean_abs": sum(abs(g) for g in gaps) / len(gaps),
      "max_abs": max(abs(g) for g in gaps),
      "kl": sum(math.exp(g) - 1 - g for g in gaps) / len(gaps),
    }
    self.assertEqual(set(found), set(expected))
    for name, value in expected.items():
      self.assertAlmostEqual(float(found[name]), value, places=5)

  def test_agreement_and_nothing_sampled(self):
    logprobs, _, _ = cases.batch()
    for mask in (cases.MASK, np.zeros_like(cases.MASK)):
      found = losses.mismatch(logprobs, logprobs, mask)
      self.assertEqual({float(v) for v in found.values()}, {0.0})


class ValueLossTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_by_hand(self):
    # Moved within the clip, beyond it towards the target, beyond it away.
    values = jnp.array([[1.2, 3.0, -3.0, 0.0]])
    old = jnp.array([[1.0, 1.0, 1.0, 0.0]])
    targets = jnp.array([[2.0, 2.0, 2.0, 5.0]])
    mask = jnp.array([[1, 1, 1, 0]])
    loss, stats = self.variant(losses.value_loss)(
      values, old, targets, mask, clip=0.5
    )
    np.testing.assert_allclose(loss, [[0.32, 0.5, 12.5, 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(stats["value_clip_fraction"], 0.0)
    loss, stats = self.variant(losses.value_loss)(
      jnp.array([[2.0]]), old[:, :1], targets[:, :1], mask[:, :1], clip=0.5
    )
    # The error vanished only because the value jumped: it still costs.
    np.testing.assert_allclose(loss, [[0.125]])
    np.testing.assert_array_equal(stats["value_clip_fraction"], [[1.0]])

  def test_equals_loop(self):
    values, old, targets = cases.batch(3)
    for clip in (None, 0.2):

      def one(place, clip=clip):
        v, o, y = (float(a[place]) for a in (values, old, targets))
        worst = (v - y) ** 2
        if clip is not None:
          worst = max(worst, (min(max(v, o - clip), o + clip) - y) ** 2)
        return worst / 2

      with jax.debug_nans(True):
        slope = jax.grad(
          lambda v, clip=clip: losses.value_loss(
            v, old, targets, cases.MASK, clip=clip
          )[0].sum()
        )(values)
      loss, _ = losses.value_loss(values, old, targets, cases.MASK, clip=clip)
      np.testing.assert_allclose(loss, cases.loop(one), rtol=1e-5)
      np.testing.assert_array_equal(slope[cases.MASK == 0], 0.0)


if __name__ == "__main__":
  absltest.main()
