"""Losses with a bounded ratio against loops over their formulas."""

import functools
import math

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from t2po_jax.learning import losses
from t2po_jax.learning.policy_losses import clipped, record
from tests.learning import loss_cases as cases


class PpoTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_by_hand(self):
    ratio = jnp.array([[1.0, 1.5, 1.5, 0.5, 0.5, 9.0]])
    advantages = jnp.array([[2.0, 2.0, -2.0, 2.0, -2.0, -2.0]])
    with jax.debug_nans(True):
      loss, stats = self.variant(
        functools.partial(
          record.evaluate, clipped.ppo, clip_high=0.3, dual_clip=4.0
        )
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

  @parameterized.product(low=(0.1, 0.3), high=(0.2, 0.5), dual=(0.0, 1.5, 3.0))
  def test_equals_loop(self, low, high, dual):
    logprobs, old, advantages = cases.batch(spread=1.0)

    def one(place):
      rho = math.exp(float(logprobs[place]) - float(old[place]))
      advantage = float(advantages[place])
      gain = min(rho * advantage, min(max(rho, 1 - low), 1 + high) * advantage)
      if dual and advantage < 0:
        gain = max(gain, dual * advantage)
      return -gain

    loss, _ = record.evaluate(
      clipped.ppo,
      logprobs,
      old,
      advantages,
      cases.MASK,
      clip_low=low,
      clip_high=high,
      dual_clip=dual,
    )
    np.testing.assert_allclose(loss, cases.loop(one), rtol=2e-5)

  def test_gradient_stops_where_clipped(self):
    advantages = jnp.array([[1.0, 1.0, -1.0, -1.0, -1.0]])
    log_ratio = jnp.log(jnp.array([[1.0, 1.5, 0.5, 1.5, 5.0]]))
    zeros, ones = jnp.zeros((1, 5)), jnp.ones((1, 5))
    slope = jax.grad(
      lambda x: record.evaluate(clipped.ppo, x, zeros, advantages, ones)[
        0
      ].sum()
    )(log_ratio)
    np.testing.assert_allclose(slope, [[-1, 0, 0, 1.5, 0]], rtol=1e-6)

  def test_dual_clip_out_of_range(self):
    with self.assertRaisesRegex(ValueError, "dual_clip: found 1.0"):
      record.evaluate(
        clipped.ppo,
        cases.MASK,
        cases.MASK,
        cases.MASK,
        cases.MASK,
        dual_clip=1.0,
      )


class OtherRatioTest(chex.TestCase):
  def test_gspo_equals_loop(self):
    logprobs, old, advantages = cases.batch(spread=0.3)

    def sequence_ratio(turn):
      kept = (cases.TURN == turn) & (cases.MASK > 0)
      gaps = [
        float(a) - float(b)
        for a, b in zip(logprobs[kept], old[kept], strict=True)
      ]
      return math.exp(sum(gaps) / len(gaps))

    def one(place):
      s, advantage = sequence_ratio(cases.TURN[place]), float(advantages[place])
      return -min(s * advantage, min(max(s, 0.9), 1.1) * advantage)

    loss, _ = record.evaluate(
      clipped.gspo,
      logprobs,
      old,
      advantages,
      cases.MASK,
      turn=cases.TURN,
      clip_low=0.1,
      clip_high=0.1,
    )
    np.testing.assert_allclose(loss, cases.loop(one), rtol=1e-5)

  def test_gspo_gradient_is_that_of_the_sequence_objective(self):
    # With one advantage per turn: d/dx of -s A per turn, times its length,
    # because every token of the turn carries the loss.
    logprobs, old, _ = cases.batch(spread=0.3)
    signs = np.where(cases.TURN % 2 == 0, 1.0, -1.0).astype("f4")

    def per_turn(x):
      total = 0.0
      for turn, size in cases.SIZES.items():
        kept = (cases.TURN == turn) & (cases.MASK > 0)
        gap = jnp.where(kept, x, 0.0) - jnp.where(kept, old, 0.0)
        ratio = jnp.exp(gap.sum() / size)
        total -= size * ratio * signs[kept][0]
      return total

    found = jax.grad(
      lambda x: record.evaluate(
        clipped.gspo,
        x,
        old,
        signs,
        cases.MASK,
        turn=cases.TURN,
        clip_low=0.99,
        clip_high=99.0,
      )[0].sum()
    )(logprobs)
    np.testing.assert_allclose(found, jax.grad(per_turn)(logprobs), rtol=1e-5)

  def test_cispo_equals_loop(self):
    logprobs, old, advantages = cases.batch(spread=1.0)

    def weight(place):
      rho = math.exp(float(logprobs[place]) - float(old[place]))
      return min(max(rho, 0.5), 1.5) * float(advantages[place])

    def total(x):
      loss, stats = record.evaluate(
        clipped.cispo,
        x,
        old,
        advantages,
        cases.MASK,
        clip_low=0.5,
        clip_high=0.5,
      )
      return loss.sum(), (loss, stats)

    slope, (loss, stats) = jax.grad(total, has_aux=True)(logprobs)
    np.testing.assert_allclose(
      loss, cases.loop(lambda p: -weight(p) * float(logprobs[p])), rtol=1e-5
    )
    np.testing.assert_allclose(
      slope, cases.loop(lambda p: -weight(p)), rtol=1e-5
    )
    outside = np.abs(stats["ratio"] - 1) > 0.5
    np.testing.assert_array_equal(
      stats["clip_fraction"], outside & (cases.MASK > 0)
    )

  def test_sapo_equals_loop(self):
    logprobs, old, advantages = cases.batch(spread=1.0)

    def one(place):
      advantage = float(advantages[place])
      tau = 0.8 if advantage > 0 else 1.3
      rho = math.exp(float(logprobs[place]) - float(old[place]))
      gate = 1 / (1 + math.exp(-tau * (rho - 1)))
      return -4 / tau * gate * advantage

    loss, _ = record.evaluate(
      clipped.sapo,
      logprobs,
      old,
      advantages,
      cases.MASK,
      temperature_positive=0.8,
      temperature_negative=1.3,
    )
    np.testing.assert_allclose(loss, cases.loop(one), rtol=1e-5)

  def test_gspo_caps_the_mean_not_the_token(self):
    turn = jnp.zeros((1, 1), jnp.int32)

    def total(x, size):
      turn = jnp.zeros((1, size), jnp.int32)
      ones = jnp.ones((1, size))
      per_token, _ = record.evaluate(
        clipped.gspo, x, 0 * ones, -ones, ones, turn=turn
      )
      weights = losses.token_weights(ones, turn, mode="seq_mean_token_mean")
      return losses.aggregate(per_token, weights)

    # The reference: 22026 with gradient 0, and 0.5 each.
    loss, slope = jax.value_and_grad(total)(jnp.array([[12.0]]), 1)
    self.assertAlmostEqual(float(loss), math.exp(10), places=1)
    np.testing.assert_array_equal(slope, [[0.0]])
    loss, slope = jax.value_and_grad(total)(jnp.array([[30.0, -30.0]]), 2)
    self.assertAlmostEqual(float(loss), 1.0)
    np.testing.assert_allclose(slope, [[0.5, 0.5]])
    del turn

  def test_sapo_weighs_turns_alike(self):
    # Turns of 1 and 3 tokens, A = 1 and -1, ratio 1.
    mask = jnp.array([[1.0, 0, 0], [1, 1, 1]])
    turn = jnp.array([[0, -1, -1], [1, 1, 1]])
    advantages = jnp.array([[1.0], [-1.0]]) * mask
    loss, _ = record.evaluate(
      clipped.sapo, 0 * mask, 0 * mask, advantages, mask
    )
    found = {
      mode: float(
        losses.aggregate(loss, losses.token_weights(mask, turn, mode=mode))
      )
      for mode in ("seq_mean_token_mean", "token_mean")
    }
    self.assertAlmostEqual(found["seq_mean_token_mean"], -0.0476, places=4)
    self.assertAlmostEqual(found["token_mean"], 0.9286, places=4)
    self.assertEqual(clipped.LOSSES["sapo"].aggregation, "seq_mean_token_mean")

  def test_gmpo_by_hand(self):
    # One turn of A = 1 and one of A = -1, log-ratios 0.2 and +-1.
    x = jnp.array([[0.2, 1.0, 0.2, -1.0]])
    turn = jnp.array([[0, 0, 1, 1]])
    advantages = jnp.array([[1.0, 1.0, -1.0, -1.0]])
    ones = jnp.ones((1, 4))

    def total(x):
      loss, stats = record.evaluate(
        clipped.gmpo, x, 0 * ones, advantages, ones, turn=turn
      )
      weights = losses.token_weights(ones, turn, mode="seq_mean_token_mean")
      return losses.aggregate(loss, weights), (loss, stats)

    slope, (loss, stats) = jax.grad(total, has_aux=True)(x)
    up, down = math.exp((0.2 + 0.4) / 2), math.exp((0.2 - 0.4) / 2)
    np.testing.assert_allclose(loss, [[-up, -up, down, down]], rtol=1e-6)
    np.testing.assert_allclose(
      slope, [[-up / 4, 0, down / 4, 0]], rtol=1e-5, atol=1e-7
    )
    np.testing.assert_array_equal(stats["clip_fraction"], [[0, 1, 0, 1]])

  def test_gmpo_equals_loop(self):
    logprobs, old, advantages = cases.batch(spread=0.6)
    signs = np.where(cases.TURN % 2 == 0, 0.7, -1.3).astype("f4")
    del advantages

    def one(place):
      total, count, a = 0.0, 0, float(signs[place])
      for other in zip(*np.nonzero(cases.MASK), strict=True):
        if cases.TURN[other] == cases.TURN[place]:
          x = float(logprobs[other]) - float(old[other])
          bounded = min(max(x, -0.3), 0.5)
          total += min(x, bounded) if a > 0 else max(x, bounded)
          count += 1
      return -a * math.exp(total / count)

    loss, _ = record.evaluate(
      clipped.gmpo,
      logprobs,
      old,
      signs,
      cases.MASK,
      turn=cases.TURN,
      clip_low=0.3,
      clip_high=0.5,
    )
    np.testing.assert_allclose(loss, cases.loop(one), rtol=2e-5)

  def test_gpg_equals_loop(self):
    logprobs, old, advantages = cases.batch(spread=0.6)
    loss, stats = record.evaluate(
      clipped.gpg, logprobs, old, advantages, cases.MASK
    )
    expected = cases.loop(lambda p: -float(advantages[p]) * float(logprobs[p]))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_array_equal(stats["clip_fraction"], 0.0)

  def test_ce_gppo_by_hand(self):
    ratio = jnp.array([[0.5, 2.0, 0.5, 2.0, 9.0]])
    advantages = jnp.array([[-1.0, 1.0, 1.0, -1.0, -2.0]])
    ones = jnp.ones((1, 5))

    def total(x):
      loss, stats = record.evaluate(
        clipped.ce_gppo, x, 0 * ones, advantages, ones
      )
      return loss.sum(), (loss, stats)

    slope, (loss, stats) = jax.grad(total, has_aux=True)(jnp.log(ratio))
    # 0.75 x 0.8, -1 x 1.2, plain, plain, dual clip at 3.
    np.testing.assert_allclose(loss, [[0.6, -1.2, -0.5, 2.0, 6.0]], rtol=1e-6)
    np.testing.assert_allclose(slope, [[0.6, -1.2, -0.5, 2.0, 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(stats["clip_fraction"], [[1, 1, 0, 0, 0]])

  def test_ce_gppo_equals_loop(self):
    logprobs, old, advantages = cases.batch(spread=1.0)

    def one(place):
      rho = math.exp(float(logprobs[place]) - float(old[place]))
      a = float(advantages[place])
      if a < 0 and rho < 0.9:
        return min(-0.5 * 0.9 * a, -2.0 * a)
      if a > 0 and rho > 1.3:
        return -0.4 * 1.3 * a
      return min(-rho * a, -2.0 * a) if a < 0 else -rho * a

    loss, _ = record.evaluate(
      clipped.ce_gppo,
      logprobs,
      old,
      advantages,
      cases.MASK,
      clip_low=0.1,
      clip_high=0.3,
      dual_clip=2.0,
      beta_low=0.5,
      beta_high=0.4,
    )
    np.testing.assert_allclose(loss, cases.loop(one), rtol=2e-5)


if __name__ == "__main__":
  absltest.main()
