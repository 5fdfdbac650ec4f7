"""Masked statistics: the only place with an epsilon.

A mask is 1 where a value counts and 0 where it does not. An empty mask gives
0, never NaN, and its gradient is 0 as well.
"""

import jax.numpy as jnp

from t2po_jax import types

EPSILON = 1e-8


def masked_sum(values, mask, axis=None) -> types.Array:
  """Sum of the values where the mask is 1; masked NaNs do not leak in."""
  return jnp.sum(jnp.where(mask > 0, values, 0.0) * mask, axis=axis)


def masked_mean(values, mask, axis=None) -> types.Array:
  """Mean of the values where the mask is 1, else 0."""
  count = jnp.sum(mask, axis=axis)
  return masked_sum(values, mask, axis) / jnp.maximum(count, EPSILON)


def masked_std(values, mask, *, ddof: int = 0) -> types.Array:
  """Standard deviation over all kept values, `ddof` as in numpy; else 0."""
  mean = masked_mean(values, mask)
  count = jnp.sum(mask)
  total = masked_sum(jnp.square(values - mean), mask)
  variance = total / jnp.maximum(count - ddof, EPSILON)
  return jnp.where(count > ddof, jnp.sqrt(variance), 0.0)


def masked_whiten(values, mask) -> types.Array:
  """Shifts and scales kept values to mean 0 and deviation 1; others are 0."""
  centred = values - masked_mean(values, mask)
  scaled = centred / (masked_std(values, mask, ddof=1) + EPSILON)
  return jnp.where(mask > 0, scaled, 0.0)
