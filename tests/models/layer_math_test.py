"""Tests written-out gradients against complex steps of NumPy in float64.

A derivative along a direction is the imaginary part of a function that is
evaluated a tiny imaginary step away, without the rounding of differences.
"""

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from t2po_jax.models import layer_math

EPS = 1e-3
STEP = 1e-30


def numpy_matmul(x, kernel):
  return np.einsum("...i,ij->...j", x, kernel)


def numpy_swiglu(gate, up):
  return gate / (1 + np.exp(-gate)) * up


def numpy_rms_norm(x, scale):
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * scale


FUNCTIONS = {
  "matmul_wide": (layer_math.matmul, numpy_matmul, (2, 3, 5), (5, 7)),
  "matmul_narrow": (layer_math.matmul, numpy_matmul, (2, 3, 7), (7, 5)),
  "matmul_vector": (layer_math.matmul, numpy_matmul, (7,), (7, 5)),
  "swiglu": (layer_math.swiglu, numpy_swiglu, (2, 3, 5), (2, 3, 5)),
  "rms_norm": (
    lambda x, scale: layer_math.rms_norm(x, scale, EPS),
    numpy_rms_norm,
    (2, 3, 5),
    (5,),
  ),
  "rms_norm_columns": (
    lambda x, scale: layer_math.rms_norm(x, scale, EPS, 0),
    lambda x, scale: numpy_rms_norm(x.T, scale).T,
    (5, 3),
    (5,),
  ),
  "rms_norm_heads": (
    lambda x, scale: layer_math.rms_norm(x, scale, EPS),
    numpy_rms_norm,
    (2, 3, 4, 6),
    (6,),
  ),
}
CASES = tuple((name, *case) for name, case in FUNCTIONS.items())


def draw(*shapes, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.normal(size=shape) for shape in shapes]


def as_jax(arrays, dtype=jnp.float32):
  return [jnp.asarray(x, dtype) for x in arrays]


class LayerMathTest(chex.TestCase):
  @parameterized.named_parameters(*CASES)
  def test_values(self, function, expected, *shapes):
    arrays = draw(*shapes)
    found = jax.jit(function)(*as_jax(arrays))
    np.testing.assert_allclose(found, expected(*arrays), rtol=1e-5, atol=1e-6)

  @parameterized.named_parameters(*CASES)
  def test_gradients(self, function, expected, *shapes):
    arrays = draw(*shapes)
    value, pull = jax.vjp(jax.jit(function), *as_jax(arrays))
    (weights,) = draw(value.shape, seed=1)
    gradients = pull(jnp.asarray(weights, jnp.float32))
    for place, gradient in enumerate(gradients):
      for seed in range(3):
        (direction,) = draw(arrays[place].shape, seed=2 + seed)
        moved = list(arrays)
        moved[place] = arrays[place] + 1j * STEP * direction
        slope = np.sum(weights * expected(*moved)).imag / STEP
        np.testing.assert_allclose(
          np.sum(gradient * direction), slope, rtol=1e-4, atol=1e-5
        )

  @parameterized.named_parameters(*CASES)
  def test_bfloat16_stays_and_is_close(self, function, expected, *shapes):
    arrays = draw(*shapes)
    value, pull = jax.vjp(function, *as_jax(arrays, jnp.bfloat16))
    self.assertEqual(value.dtype, jnp.bfloat16)
    exact, pull_exact = jax.vjp(function, *as_jax(arrays))
    found = pull(jnp.ones_like(value))
    wanted = pull_exact(jnp.ones_like(exact))
    for one, other in zip(found, wanted, strict=True):
      self.assertEqual(one.dtype, jnp.bfloat16)
      np.testing.assert_allclose(
        np.float32(one), other, rtol=0.05, atol=0.05 * np.abs(other).max()
      )

  def test_swiglu_keeps_its_arguments_only(self):
    arrays = as_jax(draw((64, 32), (64, 32)))
    _, pull = jax.vjp(layer_math.swiglu, *arrays)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pull))
    self.assertEqual(kept, sum(x.nbytes for x in arrays))

  def test_swiglu_far_out_is_finite(self):
    with jax.debug_nans(True):
      gate = jnp.asarray([-1e4, 0.0, 1e4])
      gradient = jax.grad(lambda g: layer_math.swiglu(g, jnp.ones(3)).sum())
      np.testing.assert_allclose(gradient(gate), [0.0, 0.5, 1.0], atol=1e-6)

  def test_rms_norm_of_zeros_is_finite(self):
    with jax.debug_nans(True):
      x, scale = jnp.zeros((2, 3)), jnp.ones(3)
      value, pull = jax.vjp(lambda *a: layer_math.rms_norm(*a, EPS), x, scale)
      of_x, of_scale = pull(jnp.ones_like(value))
    np.testing.assert_array_equal(value, 0.0)
    np.testing.assert_allclose(of_x, 1 / np.sqrt(EPS), rtol=1e-5)
    np.testing.assert_array_equal(of_scale, 0.0)

  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_computed_once_is_exact(self, dtype):
    (x,) = as_jax(draw((3, 4, 48)), dtype)
    x = x * jnp.asarray([[[1e-6], [1.0], [1e6], [1e30]]], dtype)
    np.testing.assert_array_equal(jax.jit(layer_math.computed_once)(x), x)

  def test_a_frozen_kernel_costs_nothing(self):
    x, kernels = as_jax(draw((64, 32), (4, 32, 32)))

    def loss(x, kernels):
      def layer(x, kernel):
        return layer_math.matmul(x, kernel), None

      return jnp.sum(jnp.square(jax.lax.scan(layer, x, kernels)[0]))

    def flops(arguments):
      gradient = jax.jit(jax.grad(loss, arguments))
      return gradient.lower(x, kernels).compile().cost_analysis()["flops"]

    product = 2 * 64 * 32 * 32
    # XLA counts the body of a loop once: one product each way, or two back.
    self.assertLess(flops((0,)), 2.5 * product)
    self.assertGreater(flops((0, 1)), 2.9 * product)


if __name__ == "__main__":
  absltest.main()
