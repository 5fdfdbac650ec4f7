"""Masked statistics; the only place where an epsilon guards a division.

A mask is 1 where a value counts and 0 where it does not; bool, int and float
masks are all fine, and a float mask may hold weights. What is masked out may
be NaN or infinite without leaking. An empty mask gives 0, never NaN, and so
does its gradient.
"""

import jax.numpy as jnp

from t2po_jax import types

# Keeps the division finite when nothing is counted.
EPSILON = 1e-8
# Added to a standard deviation that divides, as the estimators define it.
SPREAD_EPSILON = 1e-6


def masked_sum(
  values: types.Array,
  mask: types.Array,
  axis: int | tuple[int, ...] | None = None,
) -> types.Array:
  """Sum of mask * values; masked NaNs do not leak in."""
  return jnp.sum(jnp.where(mask > 0, values, 0) * mask, axis=axis)


def masked_mean(
  values: types.Array,
  mask: types.Array,
  axis: int | tuple[int, ...] | None = None,
) -> types.Array:
  """Mean of the values, weighted with the mask; 0 if the mask is empty."""
  return _divide(masked_sum(values, mask, axis), jnp.sum(mask, axis=axis))


def masked_std(
  values: types.Array,
  mask: types.Array,
  axis: int | tuple[int, ...] | None = None,
  *,
  ddof: int = 0,
) -> types.Array:
  """Standard deviation of the kept values; 0 if there are at most `ddof`.

  Args:
    values: any shape.
    mask: broadcastable to values.
    axis: reduced axes; None means all.
    ddof: subtracted from the count, as in numpy.

  Returns:
    The deviation. Its gradient is 0 where all kept values are equal.
  """
  count = jnp.sum(mask, axis=axis)
  mean = _divide(
    jnp.sum(jnp.where(mask > 0, values, 0) * mask, axis=axis, keepdims=True),
    jnp.sum(mask, axis=axis, keepdims=True),
  )
  # Selected before the subtraction: a masked infinity must not meet it.
  centred = jnp.where(mask > 0, values, mean) - mean
  total = masked_sum(jnp.square(centred), mask, axis)
  variance = jnp.where(count > ddof, _divide(total, count - ddof), 0)
  # The slope of a root is infinite at 0, and 0 * inf would be NaN.
  positive = variance > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 0)


def _divide(total: types.Array, count: types.Array) -> types.Array:
  """total / count, guarded against a count of 0."""
  return total / jnp.maximum(count, EPSILON)
