"""Losses per token and their aggregation against loops."""

import functools
import math

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from t2po_jax.learning import losses

# Five turns of 3, 2, 4, 1 and 0 sampled tokens; the last but one row holds
# two of them, the last row is padding.
TURN = np.array(
  [
    [0, 0, 0, 0, 1, 1, 1],
    [2, 2, 2, 2, -1, -1, -1],
    [3, 3, 4, 4, -1, -1, -1],
    [-1] * 7,
  ]
)
MASK = np.array(
  [
    [1, 1, 0, 1, 0, 1, 1],
    [1, 1, 1, 1, 0, 0, 0],
    [0, 1, 0, 0, 0, 0, 0],
    [0] * 7,
  ],
  "f4",
)
SIZES = {0: 3, 1: 2, 2: 4, 3: 1}


def _batch(seed=0, spread=0.5):
  """Log-probs, old log-probs and advantages; rubbish outside the mask."""
  rng = np.random.default_rng(seed)
  logprobs = rng.uniform(-4, 0, MASK.shape).astype("f4")
  old = logprobs - rng.normal(0, spread, MASK.shape).astype("f4")
  advantages = rng.normal(size=MASK.shape).astype("f4")
  for array in (logprobs, old):
    array[MASK == 0] = rng.choice([np.nan, np.inf, -np.inf])
  advantages[MASK == 0] = 1e6
  return logprobs, old, advantages


def _loop(function):
  """Fills [B, R] from a function of each sampled place."""
  result = np.zeros(MASK.shape)
  for place in zip(*np.nonzero(MASK), strict=True):
    result[place] = function(place)
  return result


class WeightsTest(chex.TestCase):
  @parameterized.parameters(
    ("token_mean", lambda size: 1 / 10),
    ("seq_mean_token_mean", lambda size: 1 / (size * 4)),
    ("seq_mean_token_sum", lambda size: 1 / 4),
    ("seq_mean_token_sum_norm", lambda size: 1 / (4 * 50)),
  )
  def test_equals_loop(self, mode, weight):
    found = losses.token_weights(MASK, TURN, mode=mode, horizon=50)
    expected = _loop(lambda place: weight(SIZES[TURN[place]]))
    np.testing.assert_allclose(found, expected, rtol=1e-6)

  @parameterized.parameters(*losses.AGGREGATIONS)
  def test_packing_and_padding_change_nothing(self, mode):
    values = np.random.default_rng(0).normal(size=MASK.shape)
    weights = losses.token_weights(MASK, TURN, mode=mode, horizon=9)
    packed = losses.aggregate(values, weights)
    # One turn a row, in another order, with more padding.
    rows = np.full((6, 11), -1)
    mask, moved = np.zeros((6, 11), "f4"), np.full((6, 11), np.nan)
    for turn, row in ((4, 0), (2, 1), (0, 3), (3, 4), (1, 5)):
      place = TURN == turn
      count = place.sum()
      rows[row, 2 : 2 + count] = turn
      mask[row, 2 : 2 + count] = MASK[place]
      moved[row, 2 : 2 + count] = values[place]
    weights = losses.token_weights(mask, rows, mode=mode, horizon=9)
    alone = losses.aggregate(moved, weights)
    np.testing.assert_allclose(alone, packed, rtol=1e-5)

  @parameterized.parameters(*losses.AGGREGATIONS)
  def test_micro_batches_add_up(self, mode):
    logprobs, old, advantages = _batch()
    weights = losses.token_weights(MASK, TURN, mode=mode, horizon=9)

    @jax.jit
    def slope(logprobs, old, advantages, mask, weights):
      def loss(logprobs):
        per_token, _ = losses.policy_loss(logprobs, old, advantages, mask)
        return losses.aggregate(per_token, weights)

      return jax.value_and_grad(loss)(logprobs)

    whole, gradient = slope(logprobs, old, advantages, MASK, weights)
    for split in ([1], [2], [1, 2, 3]):
      parts = [
        slope(*arrays)
        for arrays in zip(
          *(
            np.split(np.asarray(array), split)
            for array in (logprobs, old, advantages, MASK, weights)
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
      losses.token_weights(MASK, TURN, mode="mean")
    with self.assertRaisesRegex(ValueError, "horizon: found None"):
      losses.token_weights(MASK, TURN, mode="seq_mean_token_sum_norm")


class PolicyLossTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_by_hand(self):
    ratio = jnp.array([[1.0, 1.5, 1.5, 0.5, 0.5, 9.0]])
    advantages = jnp.array([[2.0, 2.0, -2.0, 2.0, -2.0, -2.0]])
    with jax.debug_nans(True):
      loss, stats = self.variant(
        functools.partial(losses.policy_loss, clip_high=0.3, dual_clip=4.0)
      )(jnp.log(ratio), jnp.zeros((1, 6)), advantages, jnp.ones((1, 6)))
    np.testing.assert_allclose(
      loss, [[-2.0, -2.6, 3.0, -1.0, 1.6, 8.0]], rtol=1e-6
    )
    np.testing.assert_array_equal(stats["clip_fraction"], [[0, 1, 0, 0, 1, 0]])
    np.testing.assert_array_equal(
      stats["dual_clip_fraction"], [[0, 0, 0, 0, 0, 1]]
    )
    np.testing.assert_allclose(stats["ratio"], ratio, rtol=1e-6)
    np.testing.assert_allclose(
      stats["kl_old"], ratio - 1 - np.log(ratio), atol=1e-6
    )

  @parameterized.product(low=(0.1, 0.3), high=(0.2, 0.5), dual=(None, 1.5, 3.0))
  def test_equals_loop(self, low, high, dual):
    logprobs, old, advantages = _batch(spread=1.0)

    def one(place):
      rho = math.exp(float(logprobs[place]) - float(old[place]))
      advantage = float(advantages[place])
      gain = min(rho * advantage, min(max(rho, 1 - low), 1 + high) * advantage)
      if dual is not None and advantage < 0:
        gain = max(gain, dual * advantage)
      return -gain

    loss, _ = losses.policy_loss(
      logprobs,
      old,
      advantages,
      MASK,
      clip_low=low,
      clip_high=high,
      dual_clip=dual,
    )
    np.testing.assert_allclose(loss, _loop(one), rtol=2e-5)

  def test_gradient_stops_where_clipped(self):
    advantages = jnp.array([[1.0, 1.0, -1.0, -1.0, -1.0]])
    log_ratio = jnp.log(jnp.array([[1.0, 1.5, 0.5, 1.5, 5.0]]))
    zeros, ones = jnp.zeros((1, 5)), jnp.ones((1, 5))
    slope = jax.grad(
      lambda x: losses.policy_loss(x, zeros, advantages, ones)[0].sum()
    )(log_ratio)
    np.testing.assert_allclose(slope, [[-1, 0, 0, 1.5, 0]], rtol=1e-6)

  def test_dual_clip_out_of_range(self):
    with self.assertRaisesRegex(ValueError, "dual_clip: found 1.0"):
      losses.policy_loss(MASK, MASK, MASK, MASK, dual_clip=1.0)


class EveryPolicyLossTest(chex.TestCase):
  @parameterized.parameters(*losses.POLICY_LOSSES)
  def test_masked_entries_do_not_leak(self, name):
    logprobs, old, advantages = _batch()

    def total(x):
      loss, stats = losses.POLICY_LOSSES[name](
        x, old, advantages, MASK, turn=TURN
      )
      return loss.sum(), (loss, stats)

    with jax.debug_nans(True):
      slope, (loss, stats) = jax.jit(jax.grad(total, has_aux=True))(logprobs)
    for array in (slope, loss, *stats.values()):
      self.assertTrue(np.isfinite(array).all())
      np.testing.assert_array_equal(np.asarray(array)[MASK == 0], 0.0)
    self.assertEqual(
      set(stats), {"clip_fraction", "dual_clip_fraction", "ratio", "kl_old"}
    )

  @parameterized.parameters(*losses.POLICY_LOSSES)
  def test_on_policy_gradient_is_the_plain_one(self, name):
    logprobs, _, advantages = _batch()
    slope = jax.grad(
      lambda x: losses.POLICY_LOSSES[name](
        x, logprobs, advantages, MASK, turn=TURN
      )[0].sum()
    )(logprobs)
    expected = np.where(MASK > 0, -advantages, 0.0)
    np.testing.assert_allclose(slope, expected, rtol=1e-5)

  @parameterized.parameters(*losses.POLICY_LOSSES)
  def test_huge_ratios_stay_finite(self, name):
    ones = jnp.ones((1, 2))
    logprobs, old = jnp.array([[0.0, -900.0]]), jnp.array([[-900.0, 0.0]])
    for sign in (1.0, -1.0):
      with jax.debug_nans(True):
        loss, slope = jax.value_and_grad(
          lambda x, sign=sign: losses.POLICY_LOSSES[name](
            x, old, sign * ones, ones, turn=jnp.array([[0, 1]])
          )[0].sum()
        )(logprobs)
      self.assertTrue(np.isfinite(loss))
      self.assertTrue(np.isfinite(slope).all())

  def test_gspo_equals_loop(self):
    logprobs, old, advantages = _batch(spread=0.3)

    def sequence_ratio(turn):
      kept = (TURN == turn) & (MASK > 0)
      gaps = [
        float(a) - float(b)
        for a, b in zip(logprobs[kept], old[kept], strict=True)
      ]
      return math.exp(sum(gaps) / len(gaps))

    def one(place):
      s, advantage = sequence_ratio(TURN[place]), float(advantages[place])
      return -min(s * advantage, min(max(s, 0.9), 1.1) * advantage)

    loss, _ = losses.gspo_loss(
      logprobs, old, advantages, MASK, turn=TURN, clip_low=0.1, clip_high=0.1
    )
    np.testing.assert_allclose(loss, _loop(one), rtol=1e-5)

  def test_gspo_gradient_is_that_of_the_sequence_objective(self):
    # With one advantage per turn: d/dx of -s A per turn, times its length,
    # because every token of the turn carries the loss.
    logprobs, old, _ = _batch(spread=0.3)
    signs = np.where(TURN % 2 == 0, 1.0, -1.0).astype("f4")

    def per_turn(x):
      total = 0.0
      for turn, size in SIZES.items():
        kept = (TURN == turn) & (MASK > 0)
        gap = jnp.where(kept, x, 0.0) - jnp.where(kept, old, 0.0)
        ratio = jnp.exp(gap.sum() / size)
        total -= size * ratio * signs[kept][0]
      return total

    found = jax.grad(
      lambda x: losses.gspo_loss(
        x, old, signs, MASK, turn=TURN, clip_low=0.99, clip_high=99.0
      )[0].sum()
    )(logprobs)
    np.testing.assert_allclose(found, jax.grad(per_turn)(logprobs), rtol=1e-5)

  def test_cispo_equals_loop(self):
    logprobs, old, advantages = _batch(spread=1.0)

    def weight(place):
      rho = math.exp(float(logprobs[place]) - float(old[place]))
      return min(max(rho, 0.5), 1.5) * float(advantages[place])

    def total(x):
      loss, stats = losses.cispo_loss(
        x, old, advantages, MASK, clip_low=0.5, clip_high=0.5
      )
      return loss.sum(), (loss, stats)

    slope, (loss, stats) = jax.grad(total, has_aux=True)(logprobs)
    np.testing.assert_allclose(
      loss, _loop(lambda p: -weight(p) * float(logprobs[p])), rtol=1e-5
    )
    np.testing.assert_allclose(slope, _loop(lambda p: -weight(p)), rtol=1e-5)
    outside = np.abs(stats["ratio"] - 1) > 0.5
    np.testing.assert_array_equal(stats["clip_fraction"], outside & (MASK > 0))

  def test_sapo_equals_loop(self):
    logprobs, old, advantages = _batch(spread=1.0)

    def one(place):
      advantage = float(advantages[place])
      tau = 0.8 if advantage > 0 else 1.3
      rho = math.exp(float(logprobs[place]) - float(old[place]))
      gate = 1 / (1 + math.exp(-tau * (rho - 1)))
      return -4 / tau * gate * advantage

    loss, _ = losses.sapo_loss(
      logprobs,
      old,
      advantages,
      MASK,
      temperature_positive=0.8,
      temperature_negative=1.3,
    )
    np.testing.assert_allclose(loss, _loop(one), rtol=1e-5)


class KlTest(chex.TestCase):
  @parameterized.parameters(
    ("k1", lambda d: d, lambda d: 1.0),
    ("k2", lambda d: d * d / 2, lambda d: d),
    ("k3", lambda d: math.exp(-d) + d - 1, lambda d: 1 - math.exp(-d)),
    ("k1+", lambda d: d, lambda d: d),
    ("k3+", lambda d: math.exp(-d) + d - 1, lambda d: d),
  )
  def test_value_and_gradient(self, kind, value, slope):
    logprobs, ref, _ = _batch(spread=0.7)

    def gap(place):
      return float(logprobs[place]) - float(ref[place])

    def total(x):
      kl = losses.kl_penalty(x, ref, MASK, kind=kind)
      return kl.sum(), kl

    with jax.debug_nans(True):
      gradient, kl = jax.jit(jax.grad(total, has_aux=True))(logprobs)
    np.testing.assert_allclose(
      kl, _loop(lambda p: value(gap(p))), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
      gradient, _loop(lambda p: slope(gap(p))), rtol=1e-4, atol=1e-6
    )

  def test_clamps(self):
    logprobs = jnp.array([[50.0, -50.0, -3.0]])
    zeros, ones = jnp.zeros((1, 3)), jnp.ones((1, 3))
    for kind, expected in (
      ("k1", [20.0, -20.0, -3.0]),
      ("k2", [200.0, 200.0, 4.5]),
      ("k3", [10.0, 10.0, 10.0]),
    ):
      found = losses.kl_penalty(logprobs, zeros, ones, kind=kind)
      np.testing.assert_allclose(found[0], expected)

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
      losses.kl_penalty(MASK, MASK, MASK, kind="k4")


class MismatchTest(chex.TestCase):
  def test_masked_importance_weight(self):
    rng = np.random.default_rng(4)
    trainer, sampler = rng.normal(size=(2, *MASK.shape), scale=0.3).astype(
      np.float32
    )
    found = losses.masked_importance_weight(trainer, sampler, MASK, cap=1.5)
    kept = 0
    for place in np.ndindex(MASK.shape):
      weight = np.exp(float(trainer[place]) - float(sampler[place]))
      inside = MASK[place] > 0 and 1 / 1.5 <= weight <= 1.5
      kept += inside
      self.assertAlmostEqual(
        float(found[place]), weight if inside else 0.0, places=5
      )
    self.assertBetween(kept, 1, int(np.sum(MASK)) - 1)
    grad = jax.grad(
      lambda x: losses.masked_importance_weight(x, sampler, MASK).sum()
    )(trainer)
    self.assertFalse(np.any(grad))

  def test_importance_weight(self):
    trainer, sampler, _ = _batch(spread=1.0)
    found = losses.truncated_importance_weight(trainer, sampler, MASK, cap=1.5)

    def weight(place):
      return min(math.exp(float(trainer[place]) - float(sampler[place])), 1.5)

    np.testing.assert_allclose(found, _loop(weight), rtol=1e-5)
    slope = jax.grad(
      lambda x: losses.truncated_importance_weight(x, sampler, MASK).sum()
    )(trainer)
    np.testing.assert_array_equal(slope, 0.0)

  @chex.variants(with_jit=True, without_jit=True)
  def test_statistics(self):
    trainer, sampler, _ = _batch(spread=0.4)
    with jax.debug_nans(True):
      found = self.variant(losses.mismatch)(
        jnp.array(np.where(MASK > 0, trainer, 7.0)),
        jnp.array(np.where(MASK > 0, sampler, -7.0)),
        jnp.array(MASK),
      )
    gaps = [
      float(a) - float(b)
      for a, b in zip(trainer[MASK > 0], sampler[MASK > 0], strict=True)
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
    logprobs, _, _ = _batch()
    for mask in (MASK, np.zeros_like(MASK)):
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
    values, old, targets = _batch(3)
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
            v, old, targets, MASK, clip=clip
          )[0].sum()
        )(values)
      loss, _ = losses.value_loss(values, old, targets, MASK, clip=clip)
      np.testing.assert_allclose(loss, _loop(one), rtol=1e-5)
      np.testing.assert_array_equal(slope[MASK == 0], 0.0)


if __name__ == "__main__":
  absltest.main()
