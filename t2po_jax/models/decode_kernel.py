"""Attention of one new token per row to its cache: a Pallas kernel for TPUs.

Decoding reads every live key and value once and computes little with them, so
it is memory-bound. The kernel loops over blocks of a row's positions, skips
those beyond the row's length, keeps the online softmax of FlashAttention (arXiv
2205.14135, section 3.1), and writes the new key and value into their block as
it passes: the cache is updated in place, one block per row, whereas a scatter
makes XLA copy or re-lay out all of it.
"""

import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from t2po_jax import types

# The lanes of a register, and its rows for the narrowest dtype.
LANES = 128
_ROWS = 16
# Block sizes; the largest that divides the cache is used.
_BLOCKS = (512, 256, LANES)
_MASKED = -1e30

_Ref = Any  # A kernel argument; Pallas has no public type for it.
_Index = tuple[Any, ...]  # The indices of a block, static or traced.


def supports(length: int, head_width: int) -> bool:
  """Whether a cache of S positions and heads of width H fits the kernel."""
  return length % LANES == 0 and head_width % 32 == 0


def _kernel(
  position: _Ref, queries: _Ref, new_key: _Ref, new_value: _Ref, keys: _Ref,
  values: _Ref, mixed: _Ref, keys_out: _Ref, values_out: _Ref, largest: _Ref,
  total: _Ref, summed: _Ref, *, block: int, heads: int,
) -> None:  # fmt: skip
  """Processes one block of one row; the refs are blocks in fast memory."""
  row, step = pl.program_id(0), pl.program_id(1)
  place = position[row]
  last = keys_out_block(place, block, pl.num_programs(1))

  @pl.when(step == 0)
  def _() -> None:
    largest[...] = jnp.full_like(largest, _MASKED)
    total[...] = jnp.zeros_like(total)
    summed[...] = jnp.zeros_like(summed)

  @pl.when(step <= last)
  def _() -> None:
    first = step * block
    precise = jax.lax.Precision.HIGHEST
    if keys.dtype == jnp.bfloat16:
      precise = jax.lax.Precision.DEFAULT
    for head in range(heads):
      key, value = keys[0, head], values[0, head]  # [H, block], [block, H]
      across = first + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
      down = first + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0)
      # Transposes a row to a column by a product with a one-hot matrix: exact.
      chosen = first + jax.lax.broadcasted_iota(jnp.int32, (_ROWS, block), 1)
      chosen = (chosen == place).astype(key.dtype)
      column = jax.lax.dot_general(
        new_key[0, head],
        chosen,
        (((0,), (0,)), ((), ())),
        precision=precise,
        preferred_element_type=jnp.float32,
      ).astype(key.dtype)
      key = jnp.where(across == place, column, key)
      value = jnp.where(down == place, new_value[0, head][:1], value)

      @pl.when(step == last)
      def _(
        head: int = head, key: jax.Array = key, value: jax.Array = value
      ) -> None:
        keys_out[0, head] = key
        values_out[0, head] = value

      scores = jnp.dot(
        queries[0, head],
        key,
        precision=precise,
        preferred_element_type=jnp.float32,
      )
      scores = jnp.where(across <= place, scores, _MASKED)
      before = largest[head]  # [rows, LANES], equal in all lanes.
      after = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
      weights = jnp.exp(scores - after[:, :1])
      fade = jnp.exp(before - after)
      largest[head] = after
      total[head] = total[head] * fade + jnp.sum(weights, axis=1, keepdims=True)
      added = jnp.dot(
        weights.astype(value.dtype),
        value,
        precision=precise,
        preferred_element_type=jnp.float32,
      )
      summed[head] = summed[head] * fade[:, :1] + added

  @pl.when(step == last)
  def _() -> None:
    for head in range(heads):
      mixed[0, head] = (summed[head] / total[head][:, :1]).astype(mixed.dtype)


def keys_out_block(
  place: types.Array, block: int, blocks: types.Array | int
) -> jax.Array:
  """The block of a position; the last block for positions beyond the end."""
  return jnp.minimum(place // block, blocks - 1)


def _grid(
  rows: int, heads: int, width: int, padded: int, block: int, blocks: int
) -> Any:
  """The grid: rows, and the blocks of each row."""
  from jax.experimental.pallas import tpu as pltpu  # Slow to import.

  def whole(row: jax.Array, step: jax.Array, position: _Ref) -> _Index:
    return row, 0, 0, 0

  def key_block(row: jax.Array, step: jax.Array, position: _Ref) -> _Index:
    last = keys_out_block(position[row], block, blocks)
    return row, 0, 0, jnp.minimum(step, last)

  def value_block(row: jax.Array, step: jax.Array, position: _Ref) -> _Index:
    last = keys_out_block(position[row], block, blocks)
    return row, 0, jnp.minimum(step, last), 0

  def key_written(row: jax.Array, step: jax.Array, position: _Ref) -> _Index:
    return row, 0, 0, keys_out_block(position[row], block, blocks)

  def value_written(row: jax.Array, step: jax.Array, position: _Ref) -> _Index:
    return row, 0, keys_out_block(position[row], block, blocks), 0

  across, down = (1, heads, width, block), (1, heads, block, width)
  small = pl.BlockSpec((1, heads, padded, width), whole)
  one = pl.BlockSpec((1, heads, _ROWS, width), whole)
  return pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=1,
    grid=(rows, blocks),
    in_specs=[
      small,
      one,
      one,
      pl.BlockSpec(across, key_block),
      pl.BlockSpec(down, value_block),
    ],
    out_specs=[
      small,
      pl.BlockSpec(across, key_written),
      pl.BlockSpec(down, value_written),
    ],
    scratch_shapes=[
      pltpu.VMEM((heads, padded, LANES), jnp.float32),
      pltpu.VMEM((heads, padded, LANES), jnp.float32),
      pltpu.VMEM((heads, padded, width), jnp.float32),
    ],
  )


def extend(
  queries: types.Array,
  new_keys: types.Array,
  new_values: types.Array,
  keys: jax.Array,
  values: jax.Array,
  position: types.Array,
  *,
  live: int,
  interpret: bool = False,
) -> tuple[types.Array, jax.Array, jax.Array]:
  """Appends a token to every row and attends to the row's cache.

  Args:
    queries: [B, M, N/M, H].
    new_keys: [B, M, H].
    new_values: [B, M, H].
    keys: [B, M, H, S], see `supports`; updated in place if donated.
    values: [B, M, S, H].
    position: [B] int32, the new token's offset; it attends up to there. Nothing
      is written at S or beyond.
    live: static; an upper bound on the positions.
    interpret: whether to interpret the kernel, on any backend.

  Returns:
    [B, M, N/M, H] in the dtype of the queries, and the new keys and values.
  """
  rows, heads, share, width = queries.shape
  length = keys.shape[-1]
  block = next(size for size in _BLOCKS if length % size == 0)
  blocks = -(-min(live, length) // block)
  padded = -(-share // _ROWS) * _ROWS
  scaled = (queries * width**-0.5).astype(keys.dtype)
  scaled = jnp.pad(scaled, ((0, 0), (0, 0), (0, padded - share), (0, 0)))

  def several(
    x: types.Array,
  ) -> jax.Array:  # [B, M, H] -> [B, M, _ROWS, H], zeros below.
    x = x.astype(keys.dtype)[:, :, None]
    return jnp.pad(x, ((0, 0), (0, 0), (0, _ROWS - 1), (0, 0)))

  grid = _grid(rows, heads, width, padded, block, blocks)
  cached = rows * heads * blocks * block * width
  mixed, keys, values = pl.pallas_call(
    functools.partial(_kernel, block=block, heads=heads),
    grid_spec=grid,
    out_shape=[
      jax.ShapeDtypeStruct(scaled.shape, queries.dtype),
      jax.ShapeDtypeStruct(keys.shape, keys.dtype),
      jax.ShapeDtypeStruct(values.shape, values.dtype),
    ],
    # Counted with the position.
    input_output_aliases={4: 1, 5: 2},
    cost_estimate=pl.CostEstimate(
      flops=4 * cached * share,
      transcendentals=rows * heads * share * blocks * block,
      bytes_accessed=2 * cached * keys.dtype.itemsize,
    ),
    interpret=interpret,
    name="decode_attention",
  )(
    position.astype(jnp.int32),
    scaled,
    several(new_keys),
    several(new_values),
    keys,
    values,
  )
  return mixed[:, :, :share], keys, values
