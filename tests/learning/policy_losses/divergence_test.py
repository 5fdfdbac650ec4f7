"""DPPO against loops over its formulas."""

import math

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from t2po_jax.learning.policy_losses import divergence, record
from tests.learning import loss_cases as cases


class DppoTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_by_hand(self):
    # q = 0.5: too far up, a little up, too far down, up against the advantage.
    p = jnp.array([[0.9, 0.52, 0.1, 0.9]])
    q = jnp.full((1, 4), 0.5)
    advantages = jnp.array([[1.0, 1.0, -1.0, -1.0]])
    for name, options in (
      ("dppo_tv", {}),
      ("dppo_kl", {"divergence_low": 0.05, "divergence_high": 0.05}),
    ):

      def total(x, name=name, options=options):
        loss, stats = record.evaluate(
          divergence.LOSSES[name].formula,
          x,
          jnp.log(q),
          advantages,
          jnp.ones((1, 4)),
          **options,
        )
        return loss.sum(), (loss, stats)

      slope, (loss, stats) = self.variant(jax.grad(total, has_aux=True))(
        jnp.log(p)
      )
      np.testing.assert_array_equal(stats["clip_fraction"], [[1, 0, 1, 0]])
      expected = [0.0, -1.04 * math.log(0.52), 0.0, 1.8 * math.log(0.9)]
      np.testing.assert_allclose(loss, [expected], rtol=1e-5)
      np.testing.assert_allclose(slope, [[0, -1.04, 0, 1.8]], rtol=1e-5)

  @parameterized.parameters("dppo_tv", "dppo_kl")
  def test_equals_loop(self, name):
    logprobs, old, advantages = cases.batch(spread=1.0)
    old = np.minimum(old, -0.01)
    left_out = 0

    def one(place):
      nonlocal left_out
      p, q = math.exp(float(logprobs[place])), math.exp(float(old[place]))
      a = float(advantages[place])
      if name == "dppo_tv":
        out = p - q > 0.1 if a > 0 else q - p > 0.05
      else:
        d = q * math.log(q / p) + (1 - q) * math.log(
          (1 - q + 1e-8) / (1 - p + 1e-8)
        )
        out = d > 0.1 and p > q if a > 0 else d > 0.05 and p < q
      left_out += out
      return 0.0 if out else -min(p / q, 20) * a * math.log(p)

    loss, stats = record.evaluate(
      divergence.LOSSES[name].formula,
      logprobs,
      old,
      advantages,
      cases.MASK,
      divergence_low=0.05,
      divergence_high=0.1,
    )
    np.testing.assert_allclose(loss, cases.loop(one), rtol=2e-4, atol=1e-6)
    self.assertEqual(stats["clip_fraction"].sum(), left_out)
    self.assertBetween(left_out, 1, int(cases.MASK.sum()) - 1)

  def test_weights_are_truncated(self):
    ones = jnp.ones((1, 1))
    slope = jax.grad(
      lambda x: record.evaluate(divergence.dppo_tv, x, -9 * ones, ones, ones)[
        0
      ].sum()
    )(-5.0 * ones)
    np.testing.assert_allclose(slope, [[-20.0]])


if __name__ == "__main__":
  absltest.main()
