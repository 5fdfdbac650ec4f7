"""The policy network: the same functions for acting, learning and reference.

A decoder-only transformer (RMSNorm, rotary positions, grouped-query attention,
gated MLPs or experts) with the options of `config.ModelConfig`. The layers are
Flax NNX modules; `Policy` splits them once, and from there on parameters are
plain nested dicts, so that everything jitted is a pure function of arrays.

The same modules run in two ways: `hidden` processes whole packed rows for
training, `extend` processes new tokens against a cache for prefill and
decoding. Training parameters stack the layers on a leading axis, which compiles
fast and allows rematerialisation; `decode_params` unstacks them, because a scan
that slices stacked layers is several times slower on CPU, and transposes every
kernel to [outputs, inputs]: `extend` keeps activations as columns [D, B T],
because with few columns CPUs multiply matrices from the left about twice as
fast as from the right. Products accumulate in float32; norms, rotations and
softmax run in float32.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

from flax import nnx, struct
import jax
from jax.experimental import layout
import jax.numpy as jnp
import numpy as np

from t2po_jax import types
from t2po_jax.distributed import sharding
from t2po_jax.models import attention, layer_math, layers, rope
from t2po_jax.models import config as config_lib

ModelConfig = config_lib.ModelConfig

# Dtypes of matrices.
_ROW_MAJOR = layout.Layout(major_to_minor=(0, 1))

# Axes of hidden states [B, T, D].
_ACTIVATION = ("rows", "length", "activation_width")

REMATS = ("none", "dots", "full")


class Cache(struct.PyTreeNode):
  """Keys and values of every slot, one array per layer.

  Attributes:
    keys: L arrays [B, M, C, H, S/C], with positions last and in C blocks, which
      is faster on CPUs; see `attention.cache_block`.
    values: L arrays [B, M, S, H].
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]


@functools.cache
def _split_block(
  config: ModelConfig, adapted: frozenset[tuple[str, str]] = frozenset()
) -> tuple[nnx.GraphDef, types.Params]:
  """The graph definition of a layer, and the shapes of its parameters."""

  def build() -> layers.Block:
    block = layers.Block(config)
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


def _deviation(
  path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, config: ModelConfig
) -> float:
  """Standard deviation of a kernel's or table's initial values."""
  module, name = path[-2].key, path[-1].key
  if name == "table":
    return leaf.shape[-1] ** -0.5
  into_residual = module in ("out", "down", "expert_down")
  return (leaf.shape[-2] * (2 * config.layers if into_residual else 1)) ** -0.5


@dataclasses.dataclass(frozen=True)
class Policy:
  """A decoder as pure functions of its parameters.

  Parameters are nested dicts: `embed/table`, `layers/...`, `norm/scale` and,
  unless tied, `head/kernel`. Everything under `layers` has a leading axis L.
  Next to a kernel there may be `lora_a` and `lora_b`, see `learning.lora`.

  Attributes:
    config: the sizes.
    dtype: dtype of the computation; parameters are cast where they are used.
    remat: what the backward pass recomputes: nothing (`none`), each layer from
      its input (`full`), or everything but the products with weights (`dots`).
    scan_layers: whether to compile one layer in a loop, or to unroll all.
    attention: of whole rows; `auto` uses the accelerator's kernel where it is
      supported, `einsum` never does.
  """

  config: ModelConfig
  dtype: jnp.dtype = jnp.float32
  remat: str = "none"
  scan_layers: bool = True
  attention: str = "auto"

  def __post_init__(self) -> None:
    for name, known in (("remat", REMATS), ("attention", attention.KINDS)):
      if getattr(self, name) not in known:
        raise ValueError(
          f"{name} {getattr(self, name)!r} is unknown; use one of "
          f"{', '.join(known)}"
        )

  def init(self, key: types.Array) -> types.Params:
    """Random float32 parameters.

    Kernels have standard deviation 1/sqrt(inputs); those that write to the
    residual stream are also divided by sqrt(2 L).

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
    # A single draw for all: each costs half a second of compilation on CPU.
    noise = jax.random.normal(key, (sum(sizes),))
    pieces = jnp.split(noise, np.cumsum(sizes)[:-1])
    params = []
    for draw, piece, (path, leaf) in zip(drawn, pieces, leaves, strict=True):
      if draw:
        deviation = _deviation(path, leaf, self.config)
        params.append(deviation * piece.reshape(leaf.shape))
      else:
        scale = path[-1].key == "scale" and not self.config.norm_offset
        params.append(jnp.full(leaf.shape, float(scale)))
    return jax.tree.unflatten(tree, params)

  def _block(self, layer: types.Params) -> layers.Block:
    adapted = frozenset(
      (part, name)
      for part in ("attention", "mlp")
      for name, linear in layer[part].items()
      if "lora_a" in linear
    )
    return nnx.merge(_split_block(self.config, adapted)[0], layer)

  def _embed(self, params: types.Params, tokens: types.Array) -> types.Array:
    return self._scaled(params["embed"]["table"][tokens].astype(self.dtype))

  def _scaled(self, embedded: types.Array) -> types.Array:
    if not self.config.scaled_embeddings:
      return embedded
    return embedded * jnp.asarray(self.config.width**0.5, self.dtype)

  def _final_norm(
    self, params: types.Params, x: types.Array, axis: int = -1
  ) -> types.Array:
    scale, eps = self._final_scale(params), self.config.norm_eps
    normed: Any = layer_math.rms_norm(x, scale, eps, axis)
    return normed

  def _final_scale(self, params: types.Params) -> types.Array:
    scale = params["norm"]["scale"]
    return 1.0 + scale if self.config.norm_offset else scale

  def _layer_function(self, mix: Callable, looped: bool) -> Callable:
    """Returns (x, layer params, kind, parts) -> x, with the remat option.

    `parts` are the angles and contexts of all kinds of layers; stacked if the
    kind is only known inside the compiled loop.
    """

    def run(
      x: types.Array, layer: types.Params, kind: Any, parts: Any
    ) -> types.Array:
      if not isinstance(kind, int):
        parts, kind = [jax.tree.map(lambda part: part[kind], parts)], 0
      angles, context = parts[kind]
      return self._block(layer)(x, angles, context, mix)

    static = () if looped else (2,)
    if self.remat == "full":
      return jax.checkpoint(run, static_argnums=static)
    if self.remat == "dots":
      policies = jax.checkpoint_policies
      saved = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable,
        policies.save_only_these_names(attention.KEPT),
      )
      return jax.checkpoint(run, policy=saved, static_argnums=static)
    return run

  def hidden(
    self,
    params: types.Params,
    tokens: types.Array,
    positions: types.Array,
    segments: types.Array,
  ) -> types.Array:
    """Hidden states of whole packed rows.

    A token attends to itself and to earlier tokens of its own segment. Padding
    (segment 0) only attends to padding, so nothing else depends on it.

    Args:
      params: as from `init`.
      tokens: [B, T] int32.
      positions: [B, T] int32, position inside the segment, from 0.
      segments: [B, T] int32, 0 is padding.

    Returns:
      [B, T, D] final-normed hidden states in `dtype`.
    """
    config = self.config
    kinds = config.distinct_kinds
    attends = attention.select(
      self.attention,
      length=tokens.shape[1],
      head_width=config.head_width,
      dtype=self.dtype,
      backend=sharding.backend(),
      windowed=any(kind.window for kind in kinds),
      softcap=config.attention_softcap,
    )
    angles = {
      name: rope.angles(positions, config, name)
      for name in dict.fromkeys(kind.rope for kind in kinds)
    }
    contexts = {
      window: attends.context(segments, window)
      for window in dict.fromkeys(kind.window for kind in kinds)
    }
    parts: Any = [(angles[kind.rope], contexts[kind.window]) for kind in kinds]
    looped = self.scan_layers and len(kinds) > 1
    run = self._layer_function(attends.mix, looped)

    def step(x: types.Array, layer: types.Params, kind: Any = 0) -> types.Array:
      x = run(x, layer, kind, parts)
      return sharding.constrain(x, *_ACTIVATION)

    x = sharding.lookup(params["embed"]["table"], tokens, self.dtype)
    x = sharding.constrain(self._scaled(x), *_ACTIVATION)
    of_layer = [kinds.index(kind) for kind in config.layer_kinds]
    if looped:
      parts = jax.tree.map(lambda *each: jnp.stack(each), *parts)
      x, _ = jax.lax.scan(
        lambda x, layer: (step(x, *layer), None),
        x,
        (params["layers"], jnp.asarray(of_layer)),
      )
    elif self.scan_layers:
      x, _ = jax.lax.scan(
        lambda x, layer: (step(x, layer), None), x, params["layers"]
      )
    else:
      for layer, kind in zip(
        unstack_layers(params["layers"]), of_layer, strict=True
      ):
        x = step(x, layer, kind)
    return self._final_norm(params, x)

  def head(self, params: types.Params) -> types.Params:
    """The parameters that `logits` uses."""
    name = "embed" if self.config.tied_embeddings else "head"
    return {name: params[name]}

  def logits(self, params: types.Params, hidden: types.Array) -> types.Array:
    """Logits [..., V] float32 of hidden states [..., D]."""
    hidden, cap = hidden.astype(self.dtype), self.config.logit_softcap
    if self.config.tied_embeddings:
      table = params["embed"]["table"].astype(self.dtype)
      logits = jnp.einsum(
        "...d,vd->...v", hidden, table, preferred_element_type=jnp.float32
      )
      return layers.softcap(logits, cap)
    head = params["head"]
    kernel = head["kernel"].astype(self.dtype)
    logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
    if "lora_a" in head:
      logits += layers.low_rank(hidden, head["lora_a"], head["lora_b"])
    return layers.softcap(logits, cap)

  def decode_params(self, params: types.Params) -> types.Params:
    """Converts parameters for `extend`: a list of layers, matrices in `dtype`.

    Kernels are transposed to [outputs, inputs]. Norm scales and biases keep
    their dtype, as in `hidden`.

    Args:
      params: as from `init`.

    Returns:
      The same tree with `layers` as a list of L trees.
    """

    params = {**params, "layers": unstack_layers(params["layers"])}

    def transpose(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
      return leaf.mT if path[-1].key == "kernel" else leaf

    return jax.tree.map_with_path(transpose, self.cast_matrices(params))

  def cast_matrices(self, params: types.Params) -> types.Params:
    """Casts parameters for the computation: matrices to `dtype`.

    Norm scales and biases keep their dtype, as in `hidden`.

    Args:
      params: in any layout.

    Returns:
      The same tree.
    """

    def cast(path: tuple[Any, ...], leaf: types.Array) -> jax.Array:
      matrix = path[-1].key in ("kernel", "table")
      return jnp.asarray(leaf, self.dtype if matrix else None)

    return jax.tree.map_with_path(cast, params)

  def decode_logits(
    self, decode_params: types.Params, hidden: types.Array
  ) -> types.Array:
    """Logits [B, V] float32 of hidden states [B, D], by decoding parameters."""
    if self.config.tied_embeddings:
      kernel = decode_params["embed"]["table"]
    else:
      kernel = decode_params["head"]["kernel"]
    columns = hidden.astype(self.dtype).T
    logits = jnp.dot(kernel, columns, preferred_element_type=jnp.float32)
    # Transposed once, here; otherwise XLA chooses a column layout, and every
    # consumer transposes it again.
    rows = layout.with_layout_constraint(layers.rows_of(logits), _ROW_MAJOR)
    rows = jax.lax.optimization_barrier(rows)
    return layers.softcap(rows, self.config.logit_softcap)

  def init_cache(self, slots: int, length: int, dtype: Any = None) -> Cache:
    """An empty cache.

    Args:
      slots: B.
      length: S, rounded up to whole blocks of keys.
      dtype: of keys and values; by default the policy's.

    Returns:
      The cache, filled with zeros.
    """
    config, dtype = self.config, self.dtype if dtype is None else dtype
    size = attention.cache_block(length, backend=sharding.backend())
    blocks = -(-length // size)
    keys = (slots, config.kv_heads, blocks, config.head_width, size)
    values = (slots, config.kv_heads, blocks * size, config.head_width)
    return Cache(
      keys=tuple(jnp.zeros(keys, dtype) for _ in range(config.layers)),
      values=tuple(jnp.zeros(values, dtype) for _ in range(config.layers)),
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

    Row b's tokens get the positions start[b], start[b] + 1, ... and are written
    to the cache at the same offsets; offsets of S or more are dropped. A token
    attends to keys at offsets up to its own; in layers with a window, only to
    the last of them.

    Args:
      decode_params: as from `decode_params`.
      cache: of B slots.
      tokens: [B, T] int32; T = 1 for decoding, more for prefill. Padding on the
        right leaves entries that later writes replace.
      start: [B] int32, tokens already in each slot.
      live: static; only the first `live` offsets, rounded up to whole blocks of
        keys, are attended to: every relevant start + T must be <= live <= S.

    Returns:
      [B, T, D] final-normed hidden states, and the cache.
    """
    size = cache.keys[0].shape[-1]
    if sharding.backend() == "cpu":
      live = -(-live // size) * size
    slots = start[:, None] + jnp.arange(tokens.shape[1])[None]
    config, angles = self.config, {}
    for kind in config.distinct_kinds:
      if kind.rope not in angles:
        of_slots = rope.angles(slots, config, kind.rope)
        angles[kind.rope] = tuple(map(layer_math.computed_once, of_slots))
    x = self._embed(decode_params, tokens.reshape(-1)).T
    all_keys, all_values = [], []
    for layer, kind, keys, values in zip(
      decode_params["layers"],
      config.layer_kinds,
      cache.keys,
      cache.values,
      strict=True,
    ):
      x, keys, values = self._block(layer).extend(
        x, angles[kind.rope], keys, values, slots, live, kind.window
      )
      all_keys.append(keys)
      all_values.append(values)
    cache = Cache(keys=tuple(all_keys), values=tuple(all_values))
    x = self._final_norm(decode_params, x, 0)
    return x.T.reshape(*tokens.shape, -1), cache


def unstack_layers(stacked: types.Params) -> list[types.Params]:
  """Splits stacked layers into one tree per layer."""
  count = jax.tree.leaves(stacked)[0].shape[0]
  return [
    jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(count)
  ]


def cache_axes(cache: Cache) -> Cache:
  """Logical axis names of every array of a cache, for sharding."""
  return jax.tree.map(
    lambda x: ("rows", "kv_heads", *[None] * (x.ndim - 2)), cache
  )


def logical_axes(params: types.Params) -> types.Params:
  """Logical axis names of every parameter, for sharding.

  Args:
    params: as from `Policy.init` or `Policy.decode_params`, or their shapes.

  Returns:
    The same structure with a tuple of axis names from `layers.LOGICAL_AXES` for
    every array, preceded by `layers` where layers are stacked; transposed for
    kernels in the decoding layout. The factors of an adapter share the axes of
    their kernel.
  """
  decoding = isinstance(params.get("layers"), list)

  def names(path: tuple[Any, ...], leaf: Any) -> tuple[str | None, ...]:
    keys = [str(part.key) for part in path if hasattr(part, "key")]
    module, name = keys[-2:]
    if name == "lora_a":
      axes = (layers.LOGICAL_AXES[f"{module}/kernel"][0], "rank")
    elif name == "lora_b":
      axes = ("rank", layers.LOGICAL_AXES[f"{module}/kernel"][1])
    else:
      axes = layers.LOGICAL_AXES[f"{module}/{name}"]
    if decoding and name == "kernel":
      return (*axes[:-2], axes[-1], axes[-2])
    return ("layers", *axes) if len(leaf.shape) > len(axes) else axes

  return jax.tree.map_with_path(names, params)
