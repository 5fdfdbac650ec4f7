"""The layers of the decoder as Flax NNX modules.

Every module has two modes: on rows [B, T, D] for training, and on columns [D, B
T] against a cache for decoding, where kernels are transposed to [outputs,
inputs]; see `decoder`.
"""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from t2po_jax import types
from t2po_jax.models import attention, layer_math, rope
from t2po_jax.models import config as config_lib

ModelConfig = config_lib.ModelConfig

# Logical axis names by the end of a parameter's path. In stacked layers,
# "layers" is prepended.
LOGICAL_AXES = {
  "embed/table": ("vocab", "width"),
  "head/kernel": ("width", "vocab"),
  "norm/scale": ("width",),
  "attention_norm/scale": ("width",),
  "attention_post_norm/scale": ("width",),
  "mlp_norm/scale": ("width",),
  "mlp_post_norm/scale": ("width",),
  "query/kernel": ("width", "heads"),
  "query/bias": ("heads",),
  "key/kernel": ("width", "kv_heads"),
  "key/bias": ("kv_heads",),
  "value/kernel": ("width", "kv_heads"),
  "value/bias": ("kv_heads",),
  "query_norm/scale": ("head_width",),
  "key_norm/scale": ("head_width",),
  "out/kernel": ("heads", "width"),
  "out/bias": ("width",),
  "gate/kernel": ("width", "mlp"),
  "up/kernel": ("width", "mlp"),
  "down/kernel": ("mlp", "width"),
  "router/kernel": ("width", None),
  "expert_gate/kernel": ("experts", "width", "expert_mlp"),
  "expert_up/kernel": ("experts", "width", "expert_mlp"),
  "expert_down/kernel": ("experts", "expert_mlp", "width"),
}


def low_rank(x: types.Array, a: types.Array, b: types.Array) -> types.Array:
  """x @ a @ b in the dtype of x, for a [inputs, rank] and b [rank, outputs]."""
  return jnp.dot(jnp.dot(x, a.astype(x.dtype)), b.astype(x.dtype))


def rows_of(columns: types.Array) -> types.Array:
  """Columns [D, P] -> rows [P, D].

  The barrier keeps XLA from folding the transposition into the product that
  computed the columns, which would multiply from the right again.
  """
  return jax.lax.optimization_barrier(columns).T


def softcap(x: types.Array, cap: float) -> types.Array:
  """cap tanh(x / cap), or x itself for a cap of 0."""
  return cap * jnp.tanh(x / cap) if cap else x


class RMSNorm(nnx.Module):
  """`layer_math.rms_norm` with a learned scale, or with 1 + scale."""

  def __init__(self, width: int, config: ModelConfig) -> None:
    self.eps = config.norm_eps
    self.offset = config.norm_offset
    self.scale = nnx.Param(jnp.ones(width))

  def _scale(self) -> types.Array:
    scale = self.scale[...]
    return 1.0 + scale if self.offset else scale

  def __call__(self, x: types.Array) -> types.Array:
    return layer_math.rms_norm(x, self._scale(), self.eps)

  def columns(self, x: types.Array) -> types.Array:
    """The same for columns [D, P]."""
    return layer_math.rms_norm(x, self._scale(), self.eps, 0)


class Linear(nnx.Module):
  """x @ kernel + bias in the dtype of x, and x @ lora_a @ lora_b if adapted."""

  def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
    self.kernel = nnx.Param(jnp.zeros((inputs, outputs)))
    if bias:
      self.bias = nnx.Param(jnp.zeros(outputs))
    self.biased = bias
    self.adapted = False

  def adapt(self) -> None:
    """Adds parameters for a low-rank adapter; the arrays determine its rank."""
    inputs, outputs = self.kernel.shape
    self.lora_a = nnx.Param(jnp.zeros((inputs, 1)))
    self.lora_b = nnx.Param(jnp.zeros((1, outputs)))
    self.adapted = True

  def __call__(self, x: types.Array) -> types.Array:
    y = layer_math.matmul(x, self.kernel[...].astype(x.dtype))
    if self.adapted:
      y = y + low_rank(x, self.lora_a[...], self.lora_b[...])
    if not self.biased:
      return y
    return y + layer_math.along_last(self.bias[...].astype(x.dtype), y)

  def columns(self, x: types.Array) -> types.Array:
    """The same for columns [inputs, P]; the kernel is [outputs, inputs]."""
    y = jnp.dot(self.kernel[...].astype(x.dtype), x)
    if not self.biased:
      return y
    return y + self.bias[...].astype(x.dtype)[:, None]


class Attention(nnx.Module):
  """Grouped-query attention; keys and values are never repeated."""

  def __init__(self, config: ModelConfig) -> None:
    self.config = config
    queries = config.heads * config.head_width
    keys = config.kv_heads * config.head_width
    bias = config.attention_bias
    self.query = Linear(config.width, queries, bias=bias)
    self.key = Linear(config.width, keys, bias=bias)
    self.value = Linear(config.width, keys, bias=bias)
    self.out = Linear(queries, config.width, bias=config.output_bias)
    if config.qk_norm:
      self.query_norm = RMSNorm(config.head_width, config)
      self.key_norm = RMSNorm(config.head_width, config)

  def project(
    self, x: types.Array, angles: rope.Angles
  ) -> tuple[types.Array, types.Array, types.Array]:
    """Rotated queries [B, T, M, N/M, H], keys and values [B, T, M, H]."""
    return self.split(self.query(x), self.key(x), self.value(x), angles)

  def split(
    self,
    queries: types.Array,
    keys: types.Array,
    values: types.Array,
    angles: rope.Angles,
  ) -> tuple[types.Array, types.Array, types.Array]:
    """The heads of projections [B, T, heads x H], normalised and rotated."""
    config = self.config
    lead = queries.shape[:2]
    queries = queries.reshape(*lead, config.heads, config.head_width)
    keys = keys.reshape(*lead, config.kv_heads, config.head_width)
    values = values.reshape(keys.shape)
    if config.qk_norm:
      queries, keys = self.query_norm(queries), self.key_norm(keys)
    queries, keys = rope.rotate(queries, angles), rope.rotate(keys, angles)
    if config.query_scalar not in (0, config.head_width):
      # Attention divides by sqrt(H).
      queries *= (config.head_width / config.query_scalar) ** 0.5
    grouped = (*lead, config.kv_heads, -1, config.head_width)
    return queries.reshape(grouped), keys, values

  def output(self, mixed: types.Array) -> types.Array:
    """Projects mixed values [B, T, M, N/M, H] back to [B, T, D]."""
    return self.out(mixed.reshape(*mixed.shape[:2], -1))

  def __call__(
    self, x: types.Array, angles: rope.Angles, context: Any, mix: Callable
  ) -> types.Array:
    queries, keys, values = self.project(x, angles)
    return self.output(mix(queries, keys, values, context))

  def extend(
    self,
    x: types.Array,
    angles: rope.Angles,
    keys: jax.Array,
    values: jax.Array,
    slots: types.Array,
    live: int,
    window: int,
  ) -> tuple[types.Array, jax.Array, jax.Array]:
    """Writes new keys and values into the cache and attends to it.

    Args:
      x: [D, B T].
      angles: of the new positions.
      keys: [B, M, C, H, S/C].
      values: [B, M, S, H].
      slots: [B, T] cache offsets of the new tokens; those beyond S are dropped.
      live: positions that may be attended to, a multiple of the block size.
      window: how many of these a token attends to; 0 for all.

    Returns:
      [D, B T] and the updated keys and values.
    """
    queries, new_keys, new_values = (
      rows_of(part.columns(x)).reshape(*slots.shape, -1)
      for part in (self.query, self.key, self.value)
    )
    queries, new_keys, new_values = self.split(
      queries, new_keys, new_values, angles
    )
    softcap = self.config.attention_softcap
    if not window and not softcap and attention.takes_one(keys, slots.shape[1]):
      mixed, keys, values = attention.extend_one(
        queries, new_keys, new_values, keys, values, slots[:, 0], live=live
      )
      mixed = mixed.astype(x.dtype).reshape(x.shape[1], -1)
      return self.out.columns(mixed.T), keys, values
    rows, size = jnp.arange(slots.shape[0])[:, None], keys.shape[-1]
    keys = keys.at[rows, :, slots // size, :, slots % size].set(
      new_keys.astype(keys.dtype), mode="drop", unique_indices=True
    )
    values = values.at[rows, :, slots].set(
      new_values.astype(values.dtype), mode="drop", unique_indices=True
    )
    mixed = attention.attend_cache(
      queries,
      keys,
      values,
      slots,
      live=live,
      window=window,
      softcap=softcap,
    )
    mixed = mixed.astype(x.dtype).reshape(x.shape[1], -1)
    return self.out.columns(mixed.T), keys, values


def gated(
  gate: types.Array, up: types.Array, config: ModelConfig
) -> types.Array:
  """activation(gate) * up, the first factor in float32."""
  if config.activation == "silu":
    return layer_math.swiglu(gate, up)
  active = jax.nn.gelu(gate.astype(jnp.float32), approximate=True)
  return active.astype(up.dtype) * up


class MLP(nnx.Module):
  """down(activation(gate(x)) * up(x)) (arXiv 2002.05202)."""

  def __init__(self, config: ModelConfig) -> None:
    self.config = config
    self.gate = Linear(config.width, config.mlp_width)
    self.up = Linear(config.width, config.mlp_width)
    self.down = Linear(config.mlp_width, config.width)

  def __call__(self, x: types.Array) -> types.Array:
    return self.down(gated(self.gate(x), self.up(x), self.config))

  def columns(self, x: types.Array) -> types.Array:
    """The same for columns [D, P]; kernels are transposed."""
    gate, up = self.gate.columns(x), self.up.columns(x)
    return self.down.columns(gated(gate, up, self.config))


class ExpertKernels(nnx.Module):
  """One matrix per expert: `kernel` [E, inputs, outputs]."""

  def __init__(self, experts: int, inputs: int, outputs: int) -> None:
    self.kernel = nnx.Param(jnp.zeros((experts, inputs, outputs)))


class Experts(nnx.Module):
  """A mixture of gated MLPs; each token is routed to the most probable ones.

  p = softmax(router(x)); the result is sum p_e expert_e(x) over the
  `experts_per_token` largest p_e, normalised to sum to 1 if
  `normalised_routing`. Every expert is computed for every token and multiplied
  by 0 where not chosen: exact, but as much work as a dense layer of all
  experts.
  """

  def __init__(self, config: ModelConfig) -> None:
    self.config = config
    sizes = config.width, config.mlp_width
    self.router = Linear(config.width, config.experts)
    self.expert_gate = ExpertKernels(config.experts, *sizes)
    self.expert_up = ExpertKernels(config.experts, *sizes)
    self.expert_down = ExpertKernels(config.experts, *sizes[::-1])

  def routing(self, scores: types.Array) -> types.Array:
    """Routing weights [..., E] float32 of the experts, 0 where not chosen."""
    probabilities = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
    top, indices = jax.lax.top_k(probabilities, self.config.experts_per_token)
    if self.config.normalised_routing:
      top /= jnp.sum(top, axis=-1, keepdims=True)
    taken = jax.nn.one_hot(indices, self.config.experts, dtype=top.dtype)
    return jnp.einsum("...k,...ke->...e", top, taken)

  def __call__(self, x: types.Array) -> types.Array:
    weights = self.routing(self.router(x)).astype(x.dtype)
    gate, up, down = (
      part.kernel[...].astype(x.dtype)
      for part in (self.expert_gate, self.expert_up, self.expert_down)
    )
    inner = gated(
      jnp.einsum("...d,edf->...ef", x, gate),
      jnp.einsum("...d,edf->...ef", x, up),
      self.config,
    )
    return jnp.einsum("...ef,efd->...d", inner * weights[..., None], down)

  def columns(self, x: types.Array) -> types.Array:
    """The same for columns [D, P]; kernels are [E, outputs, inputs]."""
    weights = self.routing(self.router.columns(x).T).astype(x.dtype)
    gate, up, down = (
      part.kernel[...].astype(x.dtype)
      for part in (self.expert_gate, self.expert_up, self.expert_down)
    )
    inner = gated(
      jnp.einsum("efd,dp->efp", gate, x),
      jnp.einsum("efd,dp->efp", up, x),
      self.config,
    )
    return jnp.einsum("edf,efp->dp", down, inner * weights.T[:, None])


class Block(nnx.Module):
  """One layer: attention, then the MLP, each on the normalised residual."""

  def __init__(self, config: ModelConfig) -> None:
    self.post_norms = config.post_norms
    self.attention_norm = RMSNorm(config.width, config)
    self.attention = Attention(config)
    self.mlp_norm = RMSNorm(config.width, config)
    self.mlp = Experts(config) if config.experts else MLP(config)
    if config.post_norms:
      self.attention_post_norm = RMSNorm(config.width, config)
      self.mlp_post_norm = RMSNorm(config.width, config)

  def __call__(
    self, x: types.Array, angles: rope.Angles, context: Any, mix: Callable
  ) -> types.Array:
    mixed = self.attention(self.attention_norm(x), angles, context, mix)
    x = x + (self.attention_post_norm(mixed) if self.post_norms else mixed)
    mixed = self.mlp(self.mlp_norm(x))
    return x + (self.mlp_post_norm(mixed) if self.post_norms else mixed)

  def extend(
    self,
    x: types.Array,
    angles: rope.Angles,
    keys: jax.Array,
    values: jax.Array,
    slots: types.Array,
    live: int,
    window: int,
  ) -> tuple[types.Array, jax.Array, jax.Array]:
    """As `Attention.extend`, for the whole layer."""
    normed = self.attention_norm.columns(x)
    mixed, keys, values = self.attention.extend(
      normed, angles, keys, values, slots, live, window
    )
    if self.post_norms:
      mixed = self.attention_post_norm.columns(mixed)
    x = x + mixed
    mixed = self.mlp.columns(self.mlp_norm.columns(x))
    if self.post_norms:
      mixed = self.mlp_post_norm.columns(mixed)
    return x + mixed, keys, values
