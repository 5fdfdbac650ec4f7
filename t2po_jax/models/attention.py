"""Grouped-query attention: one reference, and the kernels of accelerators.

`attend` is the reference, plain batched products; decoding uses it everywhere,
whole packed rows wherever no kernel fits. `select` says what whole rows use:
cuDNN's fused attention on GPUs, JAX's Pallas splash attention on TPUs, both
without ever holding the scores of a row, [heads, T, T], in memory.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from t2po_jax import sharding, types

KINDS = ("auto", "einsum")

# Finite, so that a row without any allowed key still has a gradient.
MASKED = -1e30

# Positions that a splash kernel takes at once, the largest that fits; a TPU's
# vector registers have 128 lanes.
_LANES = 128
_BLOCKS = (512, 256, _LANES)


@dataclasses.dataclass(frozen=True)
class Attention:
  """How the tokens of whole packed rows attend to each other.

  Attributes:
    context: segments [B, T] int32 -> what `mix` needs of them; computed once
      for all layers.
    mix: (queries [B, T, M, N/M, H], keys [B, T, M, H], values [B, T, M, H],
      context) -> [B, T, M, N/M, H].
  """

  context: Callable[[types.Array], Any]
  mix: Callable[..., types.Array]


def select(
  kind: str, *, length: int, head_width: int, dtype: Any, backend: str
) -> Attention:
  """What rows of one shape use.

  Args:
    kind: `auto` takes a kernel where there is one, `einsum` never does.
    length: T, tokens of a row.
    head_width: H.
    dtype: of queries, keys and values.
    backend: of the devices, as JAX names it.

  Returns:
    The attention of such rows.
  """
  if kind == "auto" and backend == "gpu":
    if (
      dtype == jnp.bfloat16
      and length % 2 == 0
      and head_width % 8 == 0
      and head_width <= 128
    ):
      return CUDNN
  if kind == "auto" and backend == "tpu":
    # The partitioner cannot split the kernel's heads.
    whole = sharding.current_size("tensor") == 1
    if whole and length % _LANES == 0:
      return SPLASH
  return EINSUM


def _product(left, right) -> types.Array:
  """Batched matrix product in float32; CPUs lack one of bfloat16."""
  if jax.default_backend() == "cpu":
    left, right = left.astype(jnp.float32), right.astype(jnp.float32)
  return jnp.matmul(left, right, preferred_element_type=jnp.float32)


def attend(queries, keys, values, allowed) -> types.Array:
  """Softmax attention of grouped queries, the softmax in float32.

  The queries of a group are rows of one matrix, on the left of both products:
  what multiplies few rows is several times faster on CPUs than its transpose,
  which an einsum over all axes becomes.

  Args:
    queries: [B, T, M, N/M, H].
    keys: [B, M, H, S].
    values: [B, M, S, H].
    allowed: [B, T, S] bool, True where a query may look.

  Returns:
    [B, T, M, N/M, H] in the dtype of the queries.
  """
  rows, length, heads, share, width = queries.shape
  left = queries.transpose(0, 2, 3, 1, 4).reshape(rows, heads, -1, width)
  scores = _product(left * width**-0.5, keys)
  scores = scores.reshape(rows, heads, share, length, -1)
  scores = jnp.where(allowed[:, None, None], scores, MASKED)
  largest = jnp.max(scores, axis=-1, keepdims=True)
  weights = jnp.exp(scores - jax.lax.stop_gradient(largest))
  # Normed at the end, where there are fewer numbers.
  total = jnp.sum(weights, axis=-1, keepdims=True)
  weights = weights.reshape(rows, heads, share * length, -1)
  mixed = _product(weights.astype(values.dtype), values)
  mixed = mixed.reshape(rows, heads, share, length, width) / total
  return mixed.transpose(0, 3, 1, 2, 4).astype(queries.dtype)


def allowed_in(segments: types.Array) -> types.Array:
  """[B, T, T] bool: itself and earlier tokens of the same segment [B, T]."""
  causal = jnp.tril(jnp.ones((segments.shape[1],) * 2, bool))
  return causal[None] & (segments[:, :, None] == segments[:, None, :])


def _mix_by_einsum(queries, keys, values, allowed) -> types.Array:
  return attend(
    queries, keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3), allowed
  )


def _mix_cudnn(queries, keys, values, allowed) -> types.Array:
  """The same by cuDNN's fused kernel. Not yet run on a GPU."""
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
  queries, keys, values, segments, *, interpret: bool = False
) -> types.Array:
  """The same by Pallas' splash attention. Run only in its interpreter so far.

  Args:
    queries: [B, T, M, N/M, H], T a multiple of 128.
    keys: [B, T, M, H].
    values: [B, T, M, H].
    segments: [B, T] int32.
    interpret: whether to interpret the kernel, on any backend.

  Returns:
    [B, T, M, N/M, H].
  """
  # Its module is slow to import and of no use elsewhere.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  rows, length, *_, width = queries.shape
  size = next(block for block in _BLOCKS if length % block == 0)
  blocks = ("block_q", "block_kv", "block_kv_compute")
  blocks += tuple(f"{name}_dkv" for name in ("block_q", "block_kv"))
  blocks += ("block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
  scaled = (queries * width**-0.5).reshape(rows, length, -1, width)
  heads = scaled.shape[2]
  kernel = splash.make_splash_mha_single_device(
    splash.MultiHeadMask([splash.CausalMask((length, length))] * heads),
    block_sizes=splash.BlockSizes(**dict.fromkeys(blocks, size)),
    interpret=interpret,
  )
  mixed = jax.vmap(kernel)(
    scaled.swapaxes(1, 2),
    keys.swapaxes(1, 2),
    values.swapaxes(1, 2),
    splash.SegmentIds(segments, segments),
  )
  return mixed.swapaxes(1, 2).reshape(queries.shape).astype(queries.dtype)


EINSUM = Attention(allowed_in, _mix_by_einsum)
CUDNN = Attention(allowed_in, _mix_cudnn)
SPLASH = Attention(lambda segments: segments, mix_splash)
