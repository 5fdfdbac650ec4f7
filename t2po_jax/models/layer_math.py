"""Functions of a layer, with hand-written gradients that are fast on CPUs.

Automatic differentiation would be correct but slow, for reasons that show in a
profile and not in the formulas. It keeps every intermediate of a gate, although
two arrays suffice. It sums over rows for the gradient of a norm's scale, where
a matrix product is many times faster. And it computes the gradient of a kernel
transposed, for which XLA transposes the wide activations element by element
while computing them. The effect on accelerators has not been measured.

The barriers prevent XLA from recomputing the operands inside each of several
products.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t2po_jax import types
from t2po_jax.distributed import sharding


def along_last(vector: types.Array, like: types.Array) -> types.Array:
  """A vector reshaped to broadcast along the last axis of `like`."""
  return vector.reshape((1,) * (like.ndim - 1) + (-1,))


@jax.custom_vjp
def matmul(x: types.Array, kernel: types.Array) -> types.Array:
  """x @ kernel in the dtype of x.

  No wider result type is requested: hardware accumulates in float32 anyway, and
  a float32 cotangent would turn the backward pass into a float32 product.

  Args:
    x: [..., inputs].
    kernel: [inputs, outputs] in the dtype of x.

  Returns:
    [..., outputs].
  """
  return jnp.dot(x, kernel)


def _matmul_forward(
  x: types.Array, kernel: types.Array
) -> tuple[jax.Array, tuple[types.Array, types.Array]]:
  return jnp.dot(x, kernel), (x, kernel)


def _matmul_backward(
  saved: tuple[Any, ...], slope: types.Array
) -> tuple[jax.Array, jax.Array]:
  x, kernel = saved
  x, slope = jax.lax.optimization_barrier((x, slope))
  lead = tuple(range(x.ndim - 1))

  def over_rows(left: types.Array, right: types.Array) -> jax.Array:
    return jax.lax.dot_general(left, right, ((lead, lead), ((), ())))

  # The product transposes its left operand, so that should be the narrower.
  if kernel.shape[0] <= kernel.shape[1]:
    of_kernel = over_rows(x, slope)
  else:
    of_kernel = jax.lax.optimization_barrier(over_rows(slope, x)).T
  of_x = jax.lax.dot_general(slope, kernel, (((x.ndim - 1,), (1,)), ((), ())))
  return of_x, of_kernel


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def swiglu(gate: types.Array, up: types.Array) -> types.Array:
  """silu(gate) * up, the first factor in float32 (arXiv 2002.05202).

  Args:
    gate: [...].
    up: [...].

  Returns:
    [...] in the dtype of `up`.
  """
  return jax.nn.silu(gate.astype(jnp.float32)).astype(up.dtype) * up


def _swiglu_forward(
  gate: types.Array, up: types.Array
) -> tuple[types.Array, tuple[types.Array, types.Array]]:
  return swiglu(gate, up), (gate, up)


def _swiglu_backward(
  saved: tuple[Any, ...], slope: types.Array
) -> tuple[types.Array, types.Array]:
  """silu'(g) = s (1 + g (1 - s)), s the logistic function of g."""
  gate, up = saved
  wide = gate.astype(jnp.float32)
  logistic = jax.nn.sigmoid(wide)
  of_silu = (slope * up).astype(jnp.float32)
  of_gate = of_silu * logistic * (1.0 + wide * (1.0 - logistic))
  of_up = slope * (wide * logistic).astype(up.dtype)
  return of_gate.astype(gate.dtype), of_up


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rms_norm(
  x: types.Array, scale: types.Array, eps: float, axis: int = -1
) -> types.Array:
  """x / sqrt(mean(x^2) + eps) * scale over one axis, in float32.

  Args:
    x: [..., D], or columns [D, P].
    scale: [D].
    eps: above 0.
    axis: the axis of D: -1, or 0 for columns.

  Returns:
    With the shape and dtype of `x`.
  """
  return _rms_norm_forward(x, scale, eps, axis)[0]


def _rms_norm_forward(
  x: types.Array, scale: types.Array, eps: float, axis: int
) -> tuple[types.Array, tuple[types.Array, types.Array, types.Array]]:
  wide = x.astype(jnp.float32)
  mean = jnp.mean(jnp.square(wide), axis=axis, keepdims=True)
  inverse = jax.lax.rsqrt(mean + eps)
  along = along_last(scale, x) if axis == -1 else scale[:, None]
  normed = wide * inverse * along
  return normed.astype(x.dtype), (x, scale, inverse)


def _rms_norm_backward(
  eps: float, axis: int, saved: tuple[Any, ...], slope: types.Array
) -> tuple[types.Array, types.Array]:
  """With r = 1 / rms and z = x dy: dscale = sum r z, and
  dx = r scale dy - x r^3 / D sum z scale.
  """
  x, scale, inverse = saved
  if axis == 0:
    of_x, of_scale = _rms_norm_backward(
      eps, -1, (x.T, scale, inverse.T), slope.T
    )
    return of_x.T, of_scale
  wide, slope = x.astype(jnp.float32), slope.astype(jnp.float32)
  lead = tuple(range(x.ndim - 1))
  product = functools.partial(
    jax.lax.dot_general, precision=jax.lax.Precision.HIGHEST
  )
  z = jax.lax.optimization_barrier(wide * slope)
  of_scale = product(inverse[..., 0], z, ((lead, lead), ((), ())))
  along = product(z, scale[:, None], (((x.ndim - 1,), (0,)), ((), ())))
  of_mean = wide * (inverse**3 * along / x.shape[-1])
  of_x = inverse * along_last(scale, x) * slope - of_mean
  return of_x.astype(x.dtype), of_scale.astype(scale.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def computed_once(x: types.Array) -> types.Array:
  """Returns x, materialised in memory on CPUs.

  XLA's CPU fusions recompute seemingly cheap operations, such as cosines, for
  every consumer and every element of a broadcast, and remove barriers before.
  They never recompute a matrix product, and one with the identity is exact.

  Args:
    x: [..., D], finite, with a small D.

  Returns:
    The same.
  """
  if sharding.backend() != "cpu":
    return x
  return jnp.matmul(x, np.eye(x.shape[-1], dtype=x.dtype))
