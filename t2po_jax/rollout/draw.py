"""Draws tokens from logits.

Filters follow the usual order: temperature, top-k, top-p, min-p. Tokens are
drawn by exactly inverting the cumulative distribution at one uniform number per
row, in two stages (the block of the vocabulary, then the token in it): Gumbel
noise would need a random number per vocabulary entry, which on a CPU takes
longer than the model's output projection.
"""

import dataclasses

import jax
import jax.numpy as jnp

from t2po_jax import types
from t2po_jax.control import uncertainty

_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Sampling settings.

  Attributes:
    temperature: divides the logits; 0 takes the most likely token.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the smallest set of tokens with at least this probability; 1
      keeps all.
    min_p: keep tokens with at least this fraction of the largest probability;
      0 keeps all.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0

  def __post_init__(self) -> None:
    for name, ok, want in (
      ("temperature", self.temperature >= 0, ">= 0"),
      ("top_k", self.top_k >= 0, ">= 0"),
      ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
      ("min_p", 0 <= self.min_p < 1, "in [0, 1)"),
    ):
      if not ok:
        raise ValueError(
          f"sampling.{name}: found {getattr(self, name)}, must be {want}"
        )


def filter_logits(logits: types.Array, sampling: Sampling) -> types.Array:
  """Sets the logits that top-k, top-p and min-p exclude to -inf.

  Args:
    logits: [B, V] float32, already divided by the temperature.
    sampling: the filters.

  Returns:
    [B, V] float32. The most likely token always stays.
  """
  size = logits.shape[-1]
  limit = min(sampling.top_k, size) if sampling.top_k else size
  if limit < size:
    kept = uncertainty.largest_values(logits, limit)
  elif sampling.top_p < 1:
    kept = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
  else:
    kept = jnp.max(logits, axis=-1, keepdims=True)
  threshold = jnp.full_like(kept[:, 0], -jnp.inf)
  if limit < size:
    threshold = kept[:, -1]
  if sampling.top_p < 1:
    probs = jax.nn.softmax(kept, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    count = jnp.sum(before < sampling.top_p, axis=-1)
    nucleus = jnp.take_along_axis(kept, count[:, None] - 1, axis=-1)[:, 0]
    threshold = jnp.maximum(threshold, nucleus)
  if sampling.min_p > 0:
    threshold = jnp.maximum(threshold, kept[:, 0] + jnp.log(sampling.min_p))
  return jnp.where(logits >= threshold[:, None], logits, -jnp.inf)


def invert_cdf(weights: types.Array, uniform: types.Array) -> types.Array:
  """The first token whose cumulative probability exceeds the uniform number.

  Args:
    weights: [B, V] float32, probabilities times any positive number a row;
      their sum must be a normal number, neither 0 nor subnormal.
    uniform: [B] float32 in [0, 1).

  Returns:
    [B] int32 token ids; a token of probability 0 is never returned. A row
    without a sum gives some token of the vocabulary.
  """
  rows, size = weights.shape
  pad = -size % _BLOCK
  blocks = jnp.pad(weights, ((0, 0), (0, pad))).reshape(rows, -1, _BLOCK)
  cumulative = jnp.cumsum(jnp.sum(blocks, axis=-1), axis=-1)
  # The largest float32 below 1, times any sum, is still less than the sum.
  target = uniform[:, None] * cumulative[:, -1:]
  block = jnp.argmax(cumulative > target, axis=-1)
  before = jnp.where(
    block > 0,
    jnp.take_along_axis(cumulative, (block - 1)[:, None], axis=-1)[:, 0],
    0.0,
  )
  row = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  inside = jnp.cumsum(row, axis=-1) > target - before[:, None]
  # The sum of a block and its running sum may differ in the last bit.
  last = _BLOCK - 1 - jnp.argmax(jnp.flip(row > 0, axis=-1), axis=-1)
  offset = jnp.where(jnp.any(inside, -1), jnp.argmax(inside, -1), last)
  return jnp.minimum(block * _BLOCK + offset, size - 1).astype(jnp.int32)


def draw(
  logits: types.Array, uniform: types.Array, sampling: Sampling
) -> types.Array:
  """Draws one token a row.

  Args:
    logits: [B, V] float32, divided by the temperature (if that is not 0).
    uniform: [B] float32 in [0, 1).
    sampling: temperature and filters.

  Returns:
    [B] int32 token ids.
  """
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  if sampling.top_k or sampling.top_p < 1 or sampling.min_p > 0:
    logits = filter_logits(logits, sampling)
  return invert_cdf(uncertainty.weigh(logits)[1], uniform)


def uniforms(keys: jax.Array, index: jax.Array) -> types.Array:
  """One uniform number a row, a pure function of the row's key and index.

  Args:
    keys: [B, 2] uint32, raw threefry keys.
    index: [B] int32, position of the token in its response.

  Returns:
    [B] float32 in [0, 1).
  """

  def one(key: jax.Array, position: jax.Array) -> jax.Array:
    key = jax.random.wrap_key_data(key, impl="threefry2x32")
    return jax.random.uniform(jax.random.fold_in(key, position))

  return jax.vmap(one)(keys, index)
