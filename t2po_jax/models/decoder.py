"""The policy network: one apply function for acting, learning and reference.

A decoder-only transformer of the Llama, Qwen2 and Qwen3 families (RMSNorm,
rotary positions, grouped-query attention, SwiGLU). The layers are Flax NNX
modules; `Policy` splits them once and from there on parameters are plain
nested dicts, so that whatever is jitted is a pure function of arrays.

There are two ways through the same modules: `hidden` runs whole packed rows
for training, `extend` runs new tokens against a cache for prefill and
decoding. Training parameters stack the layers on a leading axis, which
compiles fast and allows rematerialisation; `decode_params` unstacks them,
because a scan that slices stacked layers is several times slower on CPU, and
turns every kernel to [outputs, inputs]: `extend` keeps activations as columns
[D, B T], because with few columns CPUs multiply matrices from the left about
twice as fast as from the right.
Products accumulate in float32; norms, rotations and softmax run in float32.
"""

from collections.abc import Callable
import dataclasses
import functools
import math

from flax import nnx
import flax.struct
import jax
from jax.experimental import layout
import jax.numpy as jnp
import numpy as np

from t2po_jax import types
from t2po_jax.distributed import sharding
from t2po_jax.models import attention, layer_math
from t2po_jax.models import config as config_lib

ModelConfig = config_lib.ModelConfig

# Of matrices.
_ROW_MAJOR = layout.Layout(major_to_minor=(0, 1))

# Axes of hidden states [B, T, D].
_ACTIVATION = ("rows", "length", "activation_width")

REMATS = ("none", "dots", "full")

# Logical axis names by the end of a parameter's path. Parameters of the
# stacked layers have "layers" in front.
LOGICAL_AXES = {
  "embed/table": ("vocab", "width"),
  "head/kernel": ("width", "vocab"),
  "norm/scale": ("width",),
  "attention_norm/scale": ("width",),
  "mlp_norm/scale": ("width",),
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
}


@flax.struct.dataclass
class Cache:
  """Keys and values of every slot, one array per layer.

  Attributes:
    keys: L arrays [B, M, C, H, S/C], positions in C blocks and last, which CPUs
      read faster; see `attention.cache_block`.
    values: L arrays [B, M, S, H].
  """

  keys: tuple[types.Array, ...]
  values: tuple[types.Array, ...]


def rope_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
  """Angular frequencies of the rotary pairs, stretched as configured.

  theta^(-2i/H) for pair i; llama3 divides the frequencies whose wavelength
  exceeds the original length by the factor, yarn does so by the number of
  rotations (arXiv 2309.00071, section 3.2).

  Args:
    config: the model's config.

  Returns:
    [H/2] float32 radians per position, and the scale of cosine and sine.
  """
  half = np.arange(config.head_width // 2)
  plain = config.rope_theta ** (-2.0 * half / config.head_width)
  scaling = config.rope_scaling
  if scaling is None:
    return plain.astype(np.float32), 1.0
  slow = plain / scaling.factor
  if scaling.kind == "linear":
    return slow.astype(np.float32), 1.0
  rotations = scaling.original_max_positions * plain / (2 * np.pi)
  if scaling.kind == "llama3":
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((rotations - low) / (high - low), 0, 1)
    return (keep * plain + (1 - keep) * slow).astype(np.float32), 1.0

  def pair_with(count: float) -> float:
    wavelength = scaling.original_max_positions / (2 * np.pi * count)
    return half.size * math.log(wavelength) / math.log(config.rope_theta)

  first = max(math.floor(pair_with(scaling.beta_fast)), 0)
  last = min(math.ceil(pair_with(scaling.beta_slow)), config.head_width - 1)
  ramp = np.clip((half - first) / max(last - first, 1e-3), 0, 1)
  scale = scaling.attention_factor
  if scale is None:
    scale = 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0
  return ((1 - ramp) * plain + ramp * slow).astype(np.float32), scale


def rotary_angles(
  positions: types.Array, config: ModelConfig
) -> tuple[types.Array, types.Array]:
  """Cosines and sines, each [B, T, H/2] float32, of positions [B, T]."""
  frequencies, scale = rope_frequencies(config)
  angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
  return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(
  x: types.Array, angles: tuple[types.Array, types.Array]
) -> types.Array:
  """Rotates pair (i, i + H/2) of each head of `x` [B, T, heads, H]."""
  cosine, sine = (part[:, :, None, :] for part in angles)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = (
    first * cosine - second * sine,
    second * cosine + first * sine,
  )
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def low_rank(x: types.Array, a: types.Array, b: types.Array) -> types.Array:
  """x @ a @ b in the dtype of x, for a [inputs, rank] and b [rank, outputs]."""
  return jnp.dot(jnp.dot(x, a.astype(x.dtype)), b.astype(x.dtype))


def rms_norm_columns(
  x: types.Array, scale: types.Array, eps: float
) -> types.Array:
  """`layer_math.rms_norm` over the first axis, of columns [D, P]."""
  wide = x.astype(jnp.float32)
  mean = jnp.mean(jnp.square(wide), axis=0, keepdims=True)
  normed = wide * jax.lax.rsqrt(mean + eps)
  return (normed * scale[:, None]).astype(x.dtype)


def rows_of(columns: types.Array) -> types.Array:
  """Columns [D, P] -> rows [P, D].

  The barrier keeps XLA from folding the transposition into the product that
  made the columns: that would multiply from the right again.
  """
  return jax.lax.optimization_barrier(columns).T


class RMSNorm(nnx.Module):
  """`layer_math.rms_norm` with a learned scale."""

  def __init__(self, width: int, eps: float):
    self.eps = eps
    self.scale = nnx.Param(jnp.ones(width))

  def __call__(self, x: types.Array) -> types.Array:
    return layer_math.rms_norm(x, self.scale[...], self.eps)

  def columns(self, x: types.Array) -> types.Array:
    """The same for columns [D, P]."""
    return rms_norm_columns(x, self.scale[...], self.eps)


class Linear(nnx.Module):
  """x @ kernel + bias in the dtype of x, and x @ lora_a @ lora_b if adapted."""

  def __init__(self, inputs: int, outputs: int, *, bias: bool = False):
    self.kernel = nnx.Param(jnp.zeros((inputs, outputs)))
    if bias:
      self.bias = nnx.Param(jnp.zeros(outputs))
    self.biased = bias
    self.adapted = False

  def adapt(self) -> None:
    """Makes room for a low-rank adapter; its rank is that of the arrays."""
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

  def __init__(self, config: ModelConfig):
    self.config = config
    queries = config.heads * config.head_width
    keys = config.kv_heads * config.head_width
    bias = config.attention_bias
    self.query = Linear(config.width, queries, bias=bias)
    self.key = Linear(config.width, keys, bias=bias)
    self.value = Linear(config.width, keys, bias=bias)
    self.out = Linear(queries, config.width, bias=config.output_bias)
    if config.qk_norm:
      self.query_norm = RMSNorm(config.head_width, config.norm_eps)
      self.key_norm = RMSNorm(config.head_width, config.norm_eps)

  def project(self, x, angles):
    """Rotated queries [B, T, M, N/M, H], keys and values [B, T, M, H]."""
    projected = self.query(x), self.key(x), self.value(x)
    return self.split(*projected, angles)

  def split(self, queries, keys, values, angles):
    """Heads of projections [B, T, heads x H], normed and rotated."""
    config = self.config
    lead = queries.shape[:2]
    queries = queries.reshape(*lead, config.heads, config.head_width)
    keys = keys.reshape(*lead, config.kv_heads, config.head_width)
    values = values.reshape(keys.shape)
    if config.qk_norm:
      queries, keys = self.query_norm(queries), self.key_norm(keys)
    queries, keys = rotate(queries, angles), rotate(keys, angles)
    grouped = (*lead, config.kv_heads, -1, config.head_width)
    return queries.reshape(grouped), keys, values

  def output(self, mixed):
    """Projects mixed values [B, T, M, N/M, H] back to [B, T, D]."""
    return self.out(mixed.reshape(*mixed.shape[:2], -1))

  def __call__(self, x, angles, context, mix):
    return self.output(mix(*self.project(x, angles), context))

  def extend(self, x, angles, keys, values, slots, allowed):
    """Writes new keys and values into the cache and attends to it.

    Args:
      x: [D, B T].
      angles: of the new positions.
      keys: [B, M, C, H, S/C].
      values: [B, M, S, H].
      slots: [B, T] cache offsets of the new tokens; beyond S is dropped.
      allowed: [B, T, live] bool, of whole blocks.

    Returns:
      [D, B T] and the updated keys and values.
    """
    projected = (
      rows_of(part.columns(x)).reshape(*slots.shape, -1)
      for part in (self.query, self.key, self.value)
    )
    queries, new_keys, new_values = self.split(*projected, angles)
    rows = jnp.arange(slots.shape[0])[:, None]
    size, live = keys.shape[-1], allowed.shape[-1]
    keys = keys.at[rows, :, slots // size, :, slots % size].set(
      new_keys.astype(keys.dtype), mode="drop", unique_indices=True
    )
    values = values.at[rows, :, slots].set(
      new_values.astype(values.dtype), mode="drop", unique_indices=True
    )
    mixed = attention.attend(
      queries, keys[:, :, : live // size], values[:, :, :live], allowed
    )
    mixed = mixed.astype(x.dtype).reshape(x.shape[1], -1)
    return self.out.columns(mixed.T), keys, values


class MLP(nnx.Module):
  """down(silu(gate(x)) * up(x))."""

  def __init__(self, config: ModelConfig):
    self.gate = Linear(config.width, config.mlp_width)
    self.up = Linear(config.width, config.mlp_width)
    self.down = Linear(config.mlp_width, config.width)

  def __call__(self, x: types.Array) -> types.Array:
    return self.down(layer_math.swiglu(self.gate(x), self.up(x)))

  def columns(self, x: types.Array) -> types.Array:
    """The same for columns [D, P]; kernels are turned."""
    gate, up = self.gate.columns(x), self.up.columns(x)
    return self.down.columns(layer_math.swiglu(gate, up))


class Block(nnx.Module):
  """One layer: attention, then the MLP, each on a normed residual."""

  def __init__(self, config: ModelConfig):
    self.attention_norm = RMSNorm(config.width, config.norm_eps)
    self.attention = Attention(config)
    self.mlp_norm = RMSNorm(config.width, config.norm_eps)
    self.mlp = MLP(config)

  def __call__(self, x, angles, context, mix):
    x = x + self.attention(self.attention_norm(x), angles, context, mix)
    return x + self.mlp(self.mlp_norm(x))

  def extend(self, x, angles, keys, values, slots, allowed):
    """As `Attention.extend`, for the whole layer."""
    mixed, keys, values = self.attention.extend(
      self.attention_norm.columns(x), angles, keys, values, slots, allowed
    )
    x = x + mixed
    return x + self.mlp.columns(self.mlp_norm.columns(x)), keys, values


@functools.cache
def _split_block(
  config: ModelConfig, adapted: frozenset[tuple[str, str]] = frozenset()
) -> tuple[nnx.GraphDef, types.Params]:
  """A layer's structure, and the shapes of its parameters."""

  def build() -> Block:
    block = Block(config)
    for part, name in adapted:
      getattr(getattr(block, part), name).adapt()
    return block

  graph, state = nnx.split(nnx.eval_shape(build))
  return graph, nnx.to_pure_dict(state)


def shapes(config: ModelConfig) -> types.Params:
  """Shapes and dtypes of a policy's parameters.

  Args:
    config: the model's config.

  Returns:
    The tree of `Policy.init` with `jax.ShapeDtypeStruct` leaves.
  """

  def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)

  params = {
    "embed": {"table": shape(config.vocab_size, config.width)},
    "layers": jax.tree.map(
      lambda leaf: shape(config.layers, *leaf.shape), _split_block(config)[1]
    ),
    "norm": {"scale": shape(config.width)},
  }
  if not config.tied_embeddings:
    params["head"] = {"kernel": shape(config.width, config.vocab_size)}
  return params


def _deviation(path, leaf: jax.ShapeDtypeStruct, config: ModelConfig) -> float:
  """Standard deviation of a kernel's or table's initial values."""
  module, name = path[-2].key, path[-1].key
  if name == "table":
    return leaf.shape[-1] ** -0.5
  into_residual = module in ("out", "down")
  return (leaf.shape[-2] * (2 * config.layers if into_residual else 1)) ** -0.5


@dataclasses.dataclass(frozen=True)
class Policy:
  """A decoder as pure functions of its parameters.

  Parameters are nested dicts: `embed/table`, `layers/...`, `norm/scale` and,
  unless tied, `head/kernel`. Everything under `layers` has a leading axis L.
  Beside a kernel there may be `lora_a` and `lora_b`, see `learning.lora`.

  Attributes:
    config: the sizes.
    dtype: dtype of the computation; parameters are cast where they are used.
    remat: what the backward pass recomputes: `none`, `full` (each layer from
      its input) or `dots` (all but the products with weights).
    scan_layers: one compiled layer in a loop, or all layers written out.
    attention: of whole rows; `auto` takes the accelerator's kernel for what it
      supports, `einsum` never does.
  """

  config: ModelConfig
  dtype: jnp.dtype = jnp.float32
  remat: str = "none"
  scan_layers: bool = True
  attention: str = "auto"

  def __post_init__(self):
    for name, known in (("remat", REMATS), ("attention", attention.KINDS)):
      if getattr(self, name) not in known:
        raise ValueError(
          f"{name} {getattr(self, name)!r} is unknown; use one of "
          f"{', '.join(known)}"
        )

  def init(self, key: types.Array) -> types.Params:
    """Random float32 parameters.

    Kernels have deviation 1/sqrt(inputs), those that write into the residual
    stream divided by sqrt(2 L) as well.

    Args:
      key: a PRNG key.

    Returns:
      The parameters.
    """
    leaves, tree = jax.tree.flatten_with_path(shapes(self.config))
    drawn = [path[-1].key in ("kernel", "table") for path, _ in leaves]
    sizes = [
      math.prod(leaf.shape) if draw else 0
      for draw, (_, leaf) in zip(drawn, leaves, strict=True)
    ]
    # One draw for all: on CPU every draw costs half a second of compilation.
    noise = jax.random.normal(key, (sum(sizes),))
    pieces = jnp.split(noise, np.cumsum(sizes)[:-1])
    params = []
    for draw, piece, (path, leaf) in zip(drawn, pieces, leaves, strict=True):
      if draw:
        deviation = _deviation(path, leaf, self.config)
        params.append(deviation * piece.reshape(leaf.shape))
      else:
        params.append(jnp.full(leaf.shape, float(path[-1].key == "scale")))
    return jax.tree.unflatten(tree, params)

  def _block(self, layer: types.Params) -> Block:
    adapted = frozenset(
      (part, name)
      for part in ("attention", "mlp")
      for name, linear in layer[part].items()
      if "lora_a" in linear
    )
    return nnx.merge(_split_block(self.config, adapted)[0], layer)

  def _embed(self, params, tokens):
    return params["embed"]["table"][tokens].astype(self.dtype)

  def _final_norm(self, params, x):
    return layer_math.rms_norm(x, params["norm"]["scale"], self.config.norm_eps)

  def _layer_function(self, mix: Callable) -> Callable:
    """(x, layer params, angles, context) -> x, with the remat option."""

    def run(x, layer, angles, context):
      return self._block(layer)(x, angles, context, mix)

    if self.remat == "full":
      return jax.checkpoint(run)
    if self.remat == "dots":
      policies = jax.checkpoint_policies
      saved = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable,
        policies.save_only_these_names(attention.KEPT),
      )
      return jax.checkpoint(run, policy=saved)
    return run

  def hidden(
    self,
    params: types.Params,
    tokens: types.Array,
    positions: types.Array,
    segments: types.Array,
  ) -> types.Array:
    """Hidden states of whole packed rows.

    A token attends to itself and to earlier tokens of its own segment.
    Padding (segment 0) sees only padding, so nothing else depends on it.

    Args:
      params: as from `init`.
      tokens: [B, T] int32.
      positions: [B, T] int32, position inside the segment, from 0.
      segments: [B, T] int32, 0 is padding.

    Returns:
      [B, T, D] final-normed hidden states in `dtype`.
    """
    angles = rotary_angles(positions, self.config)
    attends = attention.select(
      self.attention,
      length=tokens.shape[1],
      head_width=self.config.head_width,
      dtype=self.dtype,
      backend=jax.default_backend(),
    )
    context = attends.context(segments)
    run = self._layer_function(attends.mix)

    def step(x, layer):
      x = run(x, layer, angles, context)
      return sharding.constrain(x, *_ACTIVATION), None

    x = sharding.lookup(params["embed"]["table"], tokens, self.dtype)
    x = sharding.constrain(x, *_ACTIVATION)
    if self.scan_layers:
      x, _ = jax.lax.scan(step, x, params["layers"])
    else:
      for layer in unstack_layers(params["layers"]):
        x, _ = step(x, layer)
    return self._final_norm(params, x)

  def head(self, params: types.Params) -> types.Params:
    """The part of the parameters that `logits` reads."""
    name = "embed" if self.config.tied_embeddings else "head"
    return {name: params[name]}

  def logits(self, params: types.Params, hidden: types.Array) -> types.Array:
    """Logits [..., V] float32 of hidden states [..., D]."""
    hidden = hidden.astype(self.dtype)
    if self.config.tied_embeddings:
      table = params["embed"]["table"].astype(self.dtype)
      return jnp.einsum(
        "...d,vd->...v", hidden, table, preferred_element_type=jnp.float32
      )
    head = params["head"]
    kernel = head["kernel"].astype(self.dtype)
    logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
    if "lora_a" in head:
      logits += low_rank(hidden, head["lora_a"], head["lora_b"])
    return logits

  def decode_params(self, params: types.Params) -> types.Params:
    """The layout for `extend`: a list of layers, matrices cast to `dtype`.

    Kernels are turned to [outputs, inputs]. Norm scales and biases keep their
    dtype, as they do in `hidden`.

    Args:
      params: as from `init`.

    Returns:
      The same tree with `layers` as a list of L trees.
    """

    params = {**params, "layers": unstack_layers(params["layers"])}

    def turn(path, leaf):
      return leaf.T if path[-1].key == "kernel" else leaf

    return jax.tree.map_with_path(turn, self.cast_matrices(params))

  def cast_matrices(self, params: types.Params) -> types.Params:
    """Parameters as the computation uses them: matrices in `dtype`.

    Norm scales and biases keep their dtype, as they do in `hidden`.

    Args:
      params: in any layout.

    Returns:
      The same tree.
    """

    def cast(path, leaf):
      matrix = path[-1].key in ("kernel", "table")
      return jnp.asarray(leaf, self.dtype if matrix else None)

    return jax.tree.map_with_path(cast, params)

  def decode_logits(
    self, decode_params: types.Params, hidden: types.Array
  ) -> types.Array:
    """Logits [B, V] float32 of hidden states [B, D], in the decoding layout."""
    if self.config.tied_embeddings:
      kernel = decode_params["embed"]["table"]
    else:
      kernel = decode_params["head"]["kernel"]
    columns = hidden.astype(self.dtype).T
    logits = jnp.dot(kernel, columns, preferred_element_type=jnp.float32)
    # Turned here, once; left to choose a layout, XLA lets them lie as columns,
    # and each of those who read them turns them again.
    rows = layout.with_layout_constraint(rows_of(logits), _ROW_MAJOR)
    return jax.lax.optimization_barrier(rows)

  def init_cache(self, slots: int, length: int, dtype=None) -> Cache:
    """An empty cache.

    Args:
      slots: B.
      length: S, rounded up to whole blocks of keys.
      dtype: of keys and values; the policy's own if None.

    Returns:
      The cache, zeros.
    """
    config, dtype = self.config, self.dtype if dtype is None else dtype
    size = attention.cache_block(length, backend=jax.default_backend())
    blocks = -(-length // size)
    keys = (slots, config.kv_heads, blocks, config.head_width, size)
    values = (slots, config.kv_heads, blocks * size, config.head_width)
    layers = range(config.layers)
    return Cache(
      keys=tuple(jnp.zeros(keys, dtype) for _ in layers),
      values=tuple(jnp.zeros(values, dtype) for _ in layers),
    )

  def extend(
    self,
    decode_params: types.Params,
    cache: Cache,
    tokens: types.Array,
    start: types.Array,
    *,
    live: int,
  ) -> tuple[types.Array, Cache]:
    """Runs T new tokens per row against the cache.

    Row b's tokens get the positions start[b], start[b] + 1, ... and are
    written to the cache at the same offsets; offsets of S or more are
    dropped. A token attends to keys at offsets up to its own.

    Args:
      decode_params: as from `decode_params`.
      cache: of B slots.
      tokens: [B, T] int32; T = 1 decodes, longer rows prefill. Padding on
        the right leaves entries that later writes replace.
      start: [B] int32, tokens already in each slot.
      live: static; only the first `live` offsets, rounded up to whole blocks
        of keys, are attended to: every start + T that matters must be <= live
        <= S.

    Returns:
      [B, T, D] final-normed hidden states, and the cache.
    """
    size = cache.keys[0].shape[-1]
    live = -(-live // size) * size
    slots = start[:, None] + jnp.arange(tokens.shape[1])[None]
    angles = rotary_angles(slots, self.config)
    angles = tuple(map(layer_math.computed_once, angles))
    allowed = jnp.arange(live)[None, None] <= slots[:, :, None]
    x = self._embed(decode_params, tokens.reshape(-1)).T
    all_keys, all_values = [], []
    for layer, keys, values in zip(
      decode_params["layers"], cache.keys, cache.values, strict=True
    ):
      x, keys, values = self._block(layer).extend(
        x, angles, keys, values, slots, allowed
      )
      all_keys.append(keys)
      all_values.append(values)
    cache = Cache(keys=tuple(all_keys), values=tuple(all_values))
    scale = decode_params["norm"]["scale"]
    x = rms_norm_columns(x, scale, self.config.norm_eps)
    return x.T.reshape(*tokens.shape, -1), cache


def unstack_layers(layers: types.Params) -> list[types.Params]:
  """Stacked layers -> one tree per layer."""
  count = jax.tree.leaves(layers)[0].shape[0]
  return [jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(count)]


def stack_layers(layers: list[types.Params]) -> types.Params:
  """One tree per layer -> stacked layers."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def cache_axes(cache: Cache) -> Cache:
  """Names of the axes of every array of a cache, for sharding."""
  return jax.tree.map(
    lambda x: ("rows", "kv_heads", *[None] * (x.ndim - 2)), cache
  )


def logical_axes(params: types.Params) -> types.Params:
  """Names of every parameter's axes, for sharding.

  Args:
    params: as from `Policy.init` or `Policy.decode_params`, or their shapes.

  Returns:
    The same structure with a tuple of axis names from `LOGICAL_AXES` for
    every array, preceded by `layers` where layers are stacked; reversed for
    the kernels of the decoding layout. The factors of an adapter share the
    axes of their kernel.
  """
  decoding = isinstance(params.get("layers"), list)

  def names(path, leaf):
    keys = [str(part.key) for part in path if hasattr(part, "key")]
    module, name = keys[-2:]
    if name == "lora_a":
      axes = (LOGICAL_AXES[f"{module}/kernel"][0], "rank")
    elif name == "lora_b":
      axes = ("rank", LOGICAL_AXES[f"{module}/kernel"][1])
    else:
      axes = LOGICAL_AXES[f"{module}/{name}"]
    if decoding and name == "kernel":
      return axes[::-1]
    return ("layers", *axes) if len(leaf.shape) > len(axes) else axes

  return jax.tree.map_with_path(names, params)
