"""Every policy loss by name: masks, gradients on policy, huge ratios."""

import dataclasses
import inspect

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from t2po_jax import keys
from t2po_jax.learning import policy_losses
from t2po_jax.learning.policy_losses import record
from tests.learning import loss_cases as cases


class EveryPolicyLossTest(chex.TestCase):
  @parameterized.parameters(*policy_losses.POLICY_LOSSES)
  def test_masked_entries_do_not_leak(self, name):
    logprobs, old, advantages = cases.batch()

    def total(x):
      loss, stats = record.evaluate(
        policy_losses.POLICY_LOSSES[name].formula,
        x,
        old,
        advantages,
        cases.MASK,
        turn=cases.TURN,
      )
      return loss.sum(), (loss, stats)

    with jax.debug_nans(True):
      slope, (loss, stats) = jax.jit(jax.grad(total, has_aux=True))(logprobs)
    for array in (slope, loss, *stats.values()):
      self.assertTrue(np.isfinite(array).all())
      np.testing.assert_array_equal(np.asarray(array)[cases.MASK == 0], 0.0)
    self.assertEqual(
      set(stats), {"clip_fraction", "dual_clip_fraction", "ratio", "kl_old"}
    )

  @parameterized.parameters(*policy_losses.POLICY_LOSSES)
  def test_on_policy_gradient_is_the_plain_one(self, name):
    logprobs, _, advantages = cases.batch()
    # The same for a turn, and so small that Clip-Cov draws no token.
    own = 0.1 * (cases.TURN - 1.5).astype("f4")
    advantages = np.where(cases.MASK > 0, own, advantages)
    slope = jax.grad(
      lambda x: record.evaluate(
        policy_losses.POLICY_LOSSES[name].formula,
        x,
        logprobs,
        advantages,
        cases.MASK,
        turn=cases.TURN,
      )[0].sum()
    )(logprobs)
    expected = np.where(cases.MASK > 0, -advantages, 0.0)
    np.testing.assert_allclose(slope, expected, rtol=1e-5)

  @parameterized.parameters(*policy_losses.POLICY_LOSSES)
  def test_huge_ratios_stay_finite(self, name):
    ones = jnp.ones((1, 2))
    logprobs, old = jnp.array([[0.0, -900.0]]), jnp.array([[-900.0, 0.0]])
    for sign in (1.0, -1.0):
      with jax.debug_nans(True):
        loss, slope = jax.value_and_grad(
          lambda x, sign=sign: record.evaluate(
            policy_losses.POLICY_LOSSES[name].formula,
            x,
            old,
            sign * ones,
            ones,
            turn=jnp.array([[0, 1]]),
          )[0].sum()
        )(logprobs)
      self.assertTrue(np.isfinite(loss))
      self.assertTrue(np.isfinite(slope).all())


class RegistryTest(absltest.TestCase):
  def test_options_are_arguments(self):
    for name, loss in policy_losses.POLICY_LOSSES.items():
      taken = {
        key
        for key, parameter in inspect.signature(loss.formula).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
      }
      self.assertEqual(set(loss.keys), taken, msg=name)

  def test_a_name_or_a_key_that_is_taken(self):
    @dataclasses.dataclass(frozen=True)
    class Other:
      clip_low: float = keys.key(0.9, "Something else.")

    other = record.PolicyLoss(lambda: None, Other)
    with self.assertRaisesRegex(ValueError, "'ppo': the name is taken"):
      policy_losses.register("ppo", other)
    with self.assertRaisesRegex(ValueError, "key 'clip_low' of Other differs"):
      policy_losses.register("other", other)
    self.assertNotIn("other", policy_losses.POLICY_LOSSES)


if __name__ == "__main__":
  absltest.main()
