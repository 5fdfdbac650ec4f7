"""Masked statistics against numpy on the kept values."""

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from t2po_jax import masked

VALUES = np.array([[1.0, np.nan, 4.0, np.inf], [2.0, 2.0, 6.0, -1.0]], "f4")
MASK = np.array([[1, 0, 1, 0], [1, 1, 0, 1]])


class MaskedTest(chex.TestCase):
  @parameterized.parameters(bool, "i4", "f4")
  def test_by_hand(self, dtype):
    mask = jnp.array(MASK.astype(dtype))
    self.assertEqual(masked.masked_sum(VALUES, mask), 8.0)
    self.assertAlmostEqual(float(masked.masked_mean(VALUES, mask)), 1.6, 6)
    np.testing.assert_allclose(
      masked.masked_mean(VALUES, mask, axis=1), [2.5, 1.0]
    )

  @chex.variants(with_jit=True, without_jit=True)
  def test_equals_numpy_on_the_kept_values(self):
    kept = VALUES[MASK > 0]
    for ddof in (0, 1):
      std = self.variant(
        lambda v, m, ddof=ddof: masked.masked_std(v, m, ddof=ddof)
      )
      np.testing.assert_allclose(std(VALUES, MASK), np.std(kept, ddof=ddof))
    rows = masked.masked_std(VALUES, MASK, axis=1)
    expected = [np.std(v[m > 0]) for v, m in zip(VALUES, MASK, strict=True)]
    np.testing.assert_allclose(rows, expected, rtol=1e-6)

  def test_weights(self):
    mean = masked.masked_mean(jnp.array([1.0, 5.0]), jnp.array([0.75, 0.25]))
    self.assertEqual(mean, 2.0)

  @chex.variants(with_jit=True, without_jit=True)
  def test_empty_and_constant(self):
    def total(values, mask):
      return masked.masked_mean(values, mask) + masked.masked_std(
        values, mask, ddof=1
      )

    values = jnp.array([2.0, 2.0, 2.0])
    with jax.debug_nans(True):
      for mask in ([0, 0, 0], [1, 0, 0], [1, 1, 1]):
        mask = jnp.array(mask)
        found, slope = self.variant(jax.value_and_grad(total))(values, mask)
        self.assertEqual(found, 2.0 * bool(mask.sum()))
        np.testing.assert_allclose(slope, mask / max(mask.sum(), 1), atol=1e-6)


if __name__ == "__main__":
  absltest.main()
