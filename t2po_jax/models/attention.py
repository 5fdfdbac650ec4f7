"""Grouped-query attention: a reference, and kernels for accelerators.

`attend` is the reference, plain batched products; decoding always uses it.
`select` chooses the implementation for whole packed rows: cuDNN's fused
attention on GPUs, JAX's Pallas splash attention on TPUs, and where no kernel
fits, the reference on blocks of queries (`attend_rows`). None of them keeps the
scores of a row, [heads, T, T], for the backward pass.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from t2po_jax import types
from t2po_jax.distributed import sharding
from t2po_jax.models import decode_kernel, layer_math

KINDS = ("auto", "einsum")

# Finite, so that a row without any allowed key still has a gradient.
MASKED = -1e30

# Name, for rematerialisation policies, of the residuals that `attend_rows`
# keeps besides its arguments.
KEPT = "attention"

# `attend_rows`: the least queries per block, and the most blocks, each of which
# is compiled.
_BLOCK = 128
_MOST_BLOCKS = 8

# Block size of a key cache. CPUs multiply a few queries with a block of keys
# that fits their vector registers twice as fast.
_CACHE_BLOCK = 32

# Block sizes of the splash kernel; the largest that fits is used. A TPU's
# vector registers have 128 lanes.
_LANES = 128
_BLOCKS = (512, 256, _LANES)


@dataclasses.dataclass(frozen=True)
class Attention:
  """How the tokens of whole packed rows attend to each other.

  Attributes:
    context: (segments [B, T] int32, window) -> the input of `mix` derived from
      them; computed once for all layers with that window.
    mix: (queries [B, T, M, N/M, H], keys [B, T, M, H], values [B, T, M, H],
      context) -> [B, T, M, N/M, H].
  """

  context: Callable[[types.Array, int], Any]
  mix: Callable[..., types.Array]


def select(
  kind: str,
  *,
  length: int,
  head_width: int,
  dtype: Any,
  backend: str,
  windowed: bool = False,
  softcap: float = 0.0,
) -> Attention:
  """Chooses the implementation for rows of one shape.

  Args:
    kind: `auto` uses a kernel if there is one, `einsum` never does.
    length: T, tokens of a row.
    head_width: H.
    dtype: of queries, keys and values.
    backend: of the devices, as JAX names it.
    windowed: whether any layer has a sliding window.
    softcap: bound of the scores; 0 for none.

  Returns:
    The implementation.
  """
  if softcap:
    mix = functools.partial(attend_rows_capped, softcap=softcap)
    return Attention(allowed_in, mix)
  if kind == "auto" and backend == "gpu":
    if (
      dtype == jnp.bfloat16
      and length % 2 == 0
      and head_width % 8 == 0
      and head_width <= 128
    ):
      return CUDNN
  if kind == "auto" and backend == "tpu":
    if not windowed:
      return SPLASH
  return EINSUM


def _product(left: types.Array, right: types.Array) -> jax.Array:
  """Batched matrix product in float32; CPUs have none for bfloat16."""
  if sharding.backend() == "cpu":
    left, right = left.astype(jnp.float32), right.astype(jnp.float32)
  return jnp.matmul(left, right, preferred_element_type=jnp.float32)


def attend(
  queries: types.Array,
  keys: types.Array,
  values: types.Array,
  allowed: types.Array,
  softcap: float = 0.0,
) -> types.Array:
  """Softmax attention of grouped queries, the softmax in float32.

  The queries of a group are the rows of one matrix, on the left of both
  products: with few rows this is several times faster on CPUs than the
  transposed product that an einsum over all axes compiles to.

  Args:
    queries: [B, T, M, N/M, H].
    keys: [B, M, C, H, S/C], positions in C blocks.
    values: [B, M, S, H].
    allowed: [B, T, S] bool, True where a query may attend.
    softcap: scores s become softcap tanh(s / softcap); 0 for none.

  Returns:
    [B, T, M, N/M, H] in the dtype of the queries.
  """
  return _attend(queries, keys, values, allowed, softcap)[0]


def cache_block(length: int, *, backend: str) -> int:
  """The number of positions S/C in a block of cached keys.

  Args:
    length: the least positions of the cache.
    backend: of the devices, as JAX names it.

  Returns:
    At most the length, such that rounding up adds less than a twentieth; on
    accelerators a single block, on TPUs a multiple of the lanes.
  """
  if backend == "tpu":
    return -(-length // _LANES) * _LANES
  blocks = -(-length // _CACHE_BLOCK) if backend == "cpu" else 1
  return -(-length // blocks)


def attend_cache(
  queries: types.Array,
  keys: types.Array,
  values: types.Array,
  slots: types.Array,
  *,
  live: int,
  window: int = 0,
  softcap: float = 0.0,
) -> types.Array:
  """`attend` for new tokens against a cache, in blocks if there are many.

  Args:
    queries: [B, T, M, N/M, H].
    keys: [B, M, C, H, S/C].
    values: [B, M, S, H].
    slots: [B, T] int32, the tokens' cache offsets; each attends up to its own.
    live: positions to attend to, a multiple of the block size, at most S.
    window: how many of these a token attends to; 0 for all.
    softcap: as in `attend`.

  Returns:
    [B, T, M, N/M, H] in the dtype of the queries.
  """
  size = keys.shape[-1]
  if keys.shape[2] == 1:
    keys = keys[..., :live]
  else:
    keys = keys[:, :, : live // size]
  values = values[:, :, :live]

  def attend_to(queries: types.Array, slots: types.Array) -> types.Array:
    offsets = jnp.arange(live)[None, None]
    allowed = offsets <= slots[:, :, None]
    if window:
      allowed &= offsets > slots[:, :, None] - window
    return attend(queries, keys, values, allowed, softcap)

  length = queries.shape[1]
  if length <= queries_at_once(length):
    return attend_to(queries, slots)
  more = -length % _BLOCK
  blocks = (length + more) // _BLOCK

  def cut(x: types.Array) -> jax.Array:
    x = jnp.pad(x, ((0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)))
    return x.reshape(x.shape[0], blocks, _BLOCK, *x.shape[2:]).swapaxes(0, 1)

  mixed = jax.lax.map(lambda pair: attend_to(*pair), (cut(queries), cut(slots)))
  mixed = mixed.swapaxes(0, 1).reshape(queries.shape[0], -1, *queries.shape[2:])
  return mixed[:, :length]


def queries_at_once(length: int) -> int:
  """The number of new tokens, of T, in a block of `attend_cache`."""
  return length if sharding.backend() == "cpu" else min(length, _BLOCK)


def takes_one(keys: types.Array, length: int) -> bool:
  """Whether `extend_one` supports T new tokens and a cache of keys."""
  return (
    sharding.backend() == "tpu"
    and length == 1
    and keys.shape[2] == 1
    and decode_kernel.supports(keys.shape[-1], keys.shape[-2])
  )


def extend_one(
  queries: types.Array,
  new_keys: types.Array,
  new_values: types.Array,
  keys: jax.Array,
  values: jax.Array,
  position: types.Array,
  *,
  live: int,
) -> tuple[types.Array, jax.Array, jax.Array]:
  """`decode_kernel.extend`, with each device handling its own rows and heads.

  Args:
    queries: [B, 1, M, N/M, H].
    new_keys: [B, 1, M, H].
    new_values: [B, 1, M, H].
    keys: [B, M, 1, H, S].
    values: [B, M, S, H].
    position: [B] int32.
    live: positions that may be attended to.

  Returns:
    [B, 1, M, N/M, H], the new keys and the new values.
  """
  row = ("rows", "kv_heads", None, None)
  mixed, new, values = sharding.on_each_device(
    functools.partial(decode_kernel.extend, live=live),
    (row, row[:3], row[:3], row, row, row[:1]),
    like=(0, 3, 4),
  )(
    queries[:, 0],
    new_keys[:, 0],
    new_values[:, 0],
    keys[:, :, 0],
    values,
    position,
  )
  return mixed[:, None], new[:, :, None], values


def _attend(
  queries: types.Array,
  keys: types.Array,
  values: types.Array,
  allowed: types.Array,
  softcap: float,
) -> tuple[jax.Array, jax.Array]:
  """`attend`, and the log-sum-exp of the scores, [B, M, N/M, T, 1]."""
  scores = _scores(queries, keys, allowed, softcap)
  largest = jnp.max(scores, axis=-1, keepdims=True)
  weights = jnp.exp(scores - jax.lax.stop_gradient(largest))
  # Normalised at the end, where there are fewer elements.
  total = jnp.sum(weights, axis=-1, keepdims=True)
  mixed = _product(_stacked(weights).astype(values.dtype), values)
  mixed = mixed.reshape(*total.shape[:-1], -1) / total
  mixed = mixed.transpose(0, 3, 1, 2, 4).astype(queries.dtype)
  return mixed, largest + jnp.log(total)


def _scores(
  queries: types.Array, keys: types.Array, allowed: types.Array, softcap: float
) -> jax.Array:
  """Scaled products [B, M, N/M, T, S], `MASKED` where not allowed."""
  rows, length, heads, share, width = queries.shape
  left = _grouped(queries) * width**-0.5
  *_, blocks, _, size = keys.shape
  if blocks > 1 and left.shape[2] < size:
    # Repeating the queries moves less data than merging the keys' blocks.
    left = layer_math.computed_once(left)
    left = jnp.broadcast_to(
      left[:, :, None], (rows, heads, blocks, *left.shape[2:])
    )
    scores = _product(left, keys).swapaxes(2, 3)
  else:
    together = keys.swapaxes(2, 3).reshape(rows, heads, width, -1)
    scores = _product(left, together)
  scores = scores.reshape(rows, heads, share, length, -1)
  if softcap:
    scores = softcap * jnp.tanh(scores / softcap)
  return jnp.where(allowed[:, None, None], scores, MASKED)


def _grouped(x: types.Array) -> types.Array:
  """[B, T, M, N/M, H] -> [B, M, N/M x T, H]."""
  return _stacked(x.transpose(0, 2, 3, 1, 4))


def _stacked(x: types.Array) -> types.Array:
  """[B, M, N/M, T, *] -> [B, M, N/M x T, *]."""
  return x.reshape(*x.shape[:2], -1, x.shape[-1])


def allowed_in(segments: types.Array, window: int = 0) -> types.Array:
  """[B, T, T] bool: each token may attend to itself and earlier in its segment.

  With a window, only to the last `window` of these.
  """
  causal = jnp.tril(jnp.ones((segments.shape[1],) * 2, bool))
  if window:
    causal = jnp.triu(causal, 1 - window)
  return causal[None] & (segments[:, :, None] == segments[:, None, :])


def attend_rows(
  queries: types.Array,
  keys: types.Array,
  values: types.Array,
  allowed: types.Array,
) -> types.Array:
  """`attend_rows_capped` without bounding the scores."""
  return attend_rows_capped(queries, keys, values, allowed, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_rows_capped(
  queries: types.Array,
  keys: types.Array,
  values: types.Array,
  allowed: types.Array,
  softcap: float,
) -> types.Array:
  """Causal `attend` for whole rows, in blocks of queries.

  A block only multiplies the keys up to its own end, which saves nearly half of
  the pairs. The log-sum-exp of every query is kept for the backward pass, which
  recomputes the weights block by block (as in FlashAttention, arXiv 2205.14135,
  section 3.1, which also loops over blocks of keys).

  Args:
    queries: [B, T, M, N/M, H].
    keys: [B, T, M, H].
    values: [B, T, M, H].
    allowed: [B, T, T] bool, False wherever a key is later than the query.
    softcap: as in `attend`.

  Returns:
    [B, T, M, N/M, H] in the dtype of the queries.
  """
  return _rows_forward(queries, keys, values, allowed, softcap)[0]


def _blocks(length: int) -> Iterator[slice]:
  """The blocks of queries of a row."""
  size = max(_BLOCK, -(-length // _MOST_BLOCKS))
  for start in range(0, length, size):
    yield slice(start, min(start + size, length))


def _rows_forward(
  queries: types.Array,
  keys: types.Array,
  values: types.Array,
  allowed: types.Array,
  softcap: float,
) -> tuple[types.Array, tuple[types.Array, ...]]:
  across, down = keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3)
  across = across[:, :, None]  # One block.
  mixed, log_totals = [], []
  for block in _blocks(queries.shape[1]):
    end = block.stop
    part, log_total = _attend(
      queries[:, block],
      across[..., :end],
      down[:, :, :end],
      allowed[:, block, :end],
      softcap,
    )
    mixed.append(part)
    log_totals.append(log_total)
  mixed = checkpoint_name(jnp.concatenate(mixed, axis=1), KEPT)
  log_totals = checkpoint_name(jnp.concatenate(log_totals, axis=3), KEPT)
  return mixed, (queries, keys, values, allowed, mixed, log_totals)


def _rows_backward(
  softcap: float, saved: tuple[Any, ...], slope: types.Array
) -> tuple[types.Array, types.Array, types.Array, None]:
  """Starts with the last block, which involves all keys."""
  queries, keys, values, allowed, mixed, log_totals = saved
  across, down = keys.transpose(0, 2, 3, 1), keys.transpose(0, 2, 1, 3)
  across, values = across[:, :, None], values.transpose(0, 2, 3, 1)
  slope, across, down, values = jax.lax.optimization_barrier(
    (slope, across, down, values)
  )
  # sum_s w_s dw_s = dy . y, which needs no [T, S] array.
  level = jnp.sum(slope.astype(jnp.float32) * mixed, axis=-1)
  level = level.transpose(0, 2, 3, 1)[..., None]
  of_queries: list[jax.Array] = []
  sums: list[jax.Array] = []
  for block in reversed(list(_blocks(queries.shape[1]))):
    end = block.stop
    of_block, *more = _block_backward(
      queries[:, block],
      across[..., :end],
      down[:, :, :end],
      values[..., :end],
      allowed[:, block, :end],
      log_totals[:, :, :, block],
      level[:, :, :, block],
      slope[:, block],
      softcap,
    )
    of_queries.append(of_block)
    if not sums:
      sums = more
      continue
    sums = [
      total.at[..., :end].add(part)
      for total, part in zip(sums, more, strict=True)
    ]
  of_keys, of_values = sums
  return (
    jnp.concatenate(of_queries[::-1], axis=1).astype(queries.dtype),
    of_keys.transpose(0, 3, 1, 2).astype(keys.dtype),
    of_values.transpose(0, 3, 1, 2).astype(values.dtype),
    None,
  )


def _block_backward(
  queries: types.Array,
  across: types.Array,
  down: types.Array,
  values: types.Array,
  allowed: types.Array,
  log_total: types.Array,
  level: types.Array,
  slope: types.Array,
  softcap: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients by queries [B, T, M, N/M, H], keys and values [B, M, H, S].

  With w the softmax weights: ds = w (dw - sum w dw), times 1 - (s / cap)^2
  for bounded scores s.
  """
  dtype, width = queries.dtype, queries.shape[-1]
  scores = _scores(queries, across, allowed, softcap)
  weights = jnp.exp(scores - log_total)
  of_weights = _product(_grouped(slope), values).reshape(weights.shape)
  of_scores = weights * (of_weights - level) * width**-0.5
  if softcap:
    bounded = jnp.clip(scores / softcap, -1.0, 1.0)  # Also where masked.
    of_scores *= 1.0 - jnp.square(bounded)
  # Kept in this layout, so that none of the three products transposes them.
  weights, of_scores = jax.lax.optimization_barrier(
    (_stacked(weights).astype(dtype), _stacked(of_scores).astype(dtype))
  )
  of_queries = _product(of_scores, down)
  of_queries = of_queries.reshape(*log_total.shape[:-1], width)
  return (
    of_queries.transpose(0, 3, 1, 2, 4),
    _product(_grouped(queries).mT, of_scores),
    _product(_grouped(slope).mT, weights),
  )


attend_rows_capped.defvjp(_rows_forward, _rows_backward)


def _mix_cudnn(
  queries: types.Array,
  keys: types.Array,
  values: types.Array,
  allowed: types.Array,
) -> types.Array:
  """`attend` with cuDNN's fused kernel."""
  lead = queries.shape[:2]
  mixed = jax.nn.dot_product_attention(
    queries.reshape(*lead, -1, queries.shape[-1]),
    keys,
    values,
    mask=allowed[:, None],
    implementation="cudnn",
  )
  return mixed.reshape(queries.shape)


def mix_splash(
  queries: types.Array,
  keys: types.Array,
  values: types.Array,
  segments: types.Array,
  *,
  interpret: bool = False,
) -> types.Array:
  """`attend` with Pallas' splash attention. Only run in its interpreter so far.

  Args:
    queries: [B, T, M, N/M, H].
    keys: [B, T, M, H].
    values: [B, T, M, H].
    segments: [B, T] int32.
    interpret: whether to interpret the kernel, on any backend.

  Returns:
    [B, T, M, N/M, H].
  """
  rows = ("rows", "length", "kv_heads", None)
  return sharding.on_each_device(
    functools.partial(_splash, interpret=interpret),
    ((*rows, None), rows, rows, rows[:2]),
    like=0,
  )(queries, keys, values, segments)


def _splash(
  queries: types.Array,
  keys: types.Array,
  values: types.Array,
  segments: types.Array,
  *,
  interpret: bool,
) -> types.Array:
  """`mix_splash` for one device's rows and heads."""
  # Slow to import, and not used elsewhere.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  true_length, width = queries.shape[1], queries.shape[-1]
  scaled = (queries * width**-0.5).reshape(*queries.shape[:2], -1, width)
  more = -true_length % _LANES
  # Padding has segment 0, which nothing else attends to.
  segments = jnp.pad(segments, ((0, 0), (0, more)))
  scaled, keys, values = (
    jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0)))
    for x in (scaled, keys, values)
  )
  length, heads = scaled.shape[1:3]
  size = next(block for block in _BLOCKS if length % block == 0)
  blocks = ("block_q", "block_kv", "block_kv_compute")
  blocks += tuple(f"{name}_dkv" for name in ("block_q", "block_kv"))
  blocks += ("block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
  sizes: dict[str, Any] = dict.fromkeys(blocks, size)
  kernel = splash.make_splash_mha_single_device(
    splash.MultiHeadMask([splash.CausalMask((length, length))] * heads),
    block_sizes=splash.BlockSizes(**sizes),
    interpret=interpret,
  )
  mixed: Any = jax.vmap(kernel)(
    scaled.swapaxes(1, 2),
    keys.swapaxes(1, 2),
    values.swapaxes(1, 2),
    splash.SegmentIds(segments, segments),
  )
  mixed = mixed.swapaxes(1, 2)[:, :true_length]
  return mixed.reshape(queries.shape).astype(queries.dtype)


EINSUM = Attention(allowed_in, attend_rows)
CUDNN = Attention(allowed_in, _mix_cudnn)
SPLASH = Attention(lambda segments, window: segments, mix_splash)
