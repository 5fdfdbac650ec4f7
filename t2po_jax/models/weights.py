"""Checkpoints in and out: safetensors and GGUF in, safetensors out.

`NAMES` is the whole mapping between checkpoint tensors and parameters. A
checkpoint must have exactly the tensors that its config implies; a missing,
extra or misshapen one is refused by name. Parameters come back as numpy
arrays on the host, layers stacked, so that the caller decides where they go.

GGUF tensors are dequantised. Llama files store query and key rows with the
two halves of each rotary pair interleaved; that is undone here.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import json
import math
import os
import pathlib

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from t2po_jax import types
from t2po_jax.models import config as config_lib
from t2po_jax.models import decoder, sources

ModelConfig = config_lib.ModelConfig
Tensors = dict[str, Callable[[], np.ndarray]]

SHARD_BYTES = 5_000_000_000


def keep(tensor: np.ndarray) -> np.ndarray:
  """The tensor as it is."""
  return tensor


def turn(tensor: np.ndarray) -> np.ndarray:
  """[outputs, inputs] <-> [inputs, outputs]."""
  return tensor.T


_LAYER = "model.layers.{}."
# Safetensors name, GGUF name, path in the parameters, transform (its own
# inverse). {} is the layer.
NAMES = (
  ("model.embed_tokens.weight", "token_embd.weight", "embed/table", keep),
  ("model.norm.weight", "output_norm.weight", "norm/scale", keep),
  ("lm_head.weight", "output.weight", "head/kernel", turn),
  (
    _LAYER + "input_layernorm.weight",
    "blk.{}.attn_norm.weight",
    "layers/attention_norm/scale",
    keep,
  ),
  (
    _LAYER + "self_attn.q_proj.weight",
    "blk.{}.attn_q.weight",
    "layers/attention/query/kernel",
    turn,
  ),
  (
    _LAYER + "self_attn.q_proj.bias",
    "blk.{}.attn_q.bias",
    "layers/attention/query/bias",
    keep,
  ),
  (
    _LAYER + "self_attn.k_proj.weight",
    "blk.{}.attn_k.weight",
    "layers/attention/key/kernel",
    turn,
  ),
  (
    _LAYER + "self_attn.k_proj.bias",
    "blk.{}.attn_k.bias",
    "layers/attention/key/bias",
    keep,
  ),
  (
    _LAYER + "self_attn.v_proj.weight",
    "blk.{}.attn_v.weight",
    "layers/attention/value/kernel",
    turn,
  ),
  (
    _LAYER + "self_attn.v_proj.bias",
    "blk.{}.attn_v.bias",
    "layers/attention/value/bias",
    keep,
  ),
  (
    _LAYER + "self_attn.o_proj.weight",
    "blk.{}.attn_output.weight",
    "layers/attention/out/kernel",
    turn,
  ),
  (
    _LAYER + "self_attn.o_proj.bias",
    "blk.{}.attn_output.bias",
    "layers/attention/out/bias",
    keep,
  ),
  (
    _LAYER + "self_attn.q_norm.weight",
    "blk.{}.attn_q_norm.weight",
    "layers/attention/query_norm/scale",
    keep,
  ),
  (
    _LAYER + "self_attn.k_norm.weight",
    "blk.{}.attn_k_norm.weight",
    "layers/attention/key_norm/scale",
    keep,
  ),
  (
    _LAYER + "post_attention_layernorm.weight",
    "blk.{}.ffn_norm.weight",
    "layers/mlp_norm/scale",
    keep,
  ),
  (
    _LAYER + "mlp.gate_proj.weight",
    "blk.{}.ffn_gate.weight",
    "layers/mlp/gate/kernel",
    turn,
  ),
  (
    _LAYER + "mlp.up_proj.weight",
    "blk.{}.ffn_up.weight",
    "layers/mlp/up/kernel",
    turn,
  ),
  (
    _LAYER + "mlp.down_proj.weight",
    "blk.{}.ffn_down.weight",
    "layers/mlp/down/kernel",
    turn,
  ),
)


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of a checkpoint and where it belongs.

  Attributes:
    name: the tensor's name in a safetensors checkpoint.
    gguf_name: its name in a GGUF file.
    path: of the parameter, parts joined by `/`.
    layer: index into the parameter's leading axis, None if it has none.
    transform: from the tensor to the parameter and back.
  """

  name: str
  gguf_name: str
  path: str
  layer: int | None
  transform: Callable[[np.ndarray], np.ndarray]


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Shape of every parameter by path."""
  leaves = jax.tree.leaves_with_path(decoder.shapes(config))
  return {
    "/".join(part.key for part in path): leaf.shape for path, leaf in leaves
  }


def _entries(config: ModelConfig) -> Iterator[Entry]:
  """The tensors of a model's checkpoint, in order of `NAMES`."""
  present = _shapes(config)
  for name, gguf_name, path, transform in NAMES:
    if path not in present:
      continue
    if path.startswith("layers/"):
      for i in range(config.layers):
        yield Entry(name.format(i), gguf_name.format(i), path, i, transform)
    else:
      yield Entry(name, gguf_name, path, None, transform)


def _nest(flat: dict[str, np.ndarray]) -> types.Params:
  nested = {}
  for path, leaf in flat.items():
    *parents, last = path.split("/")
    tree = nested
    for key in parents:
      tree = tree.setdefault(key, {})
    tree[last] = leaf
  return nested


def _fill(
  config: ModelConfig,
  tensors: Tensors,
  place: pathlib.Path,
  dtype,
  name_of: Callable[[Entry], str],
) -> types.Params:
  """Reads every tensor into its parameter; refuses any difference."""
  entries = list(_entries(config))
  names = {name_of(entry) for entry in entries}
  if missing := sorted(names - tensors.keys()):
    raise ValueError(
      f"{place}: tensor {missing[0]!r} is missing ({len(missing)} of "
      f"{len(names)} are); the config asks for it"
    )
  if extra := sorted(tensors.keys() - names):
    raise ValueError(
      f"{place}: tensor {extra[0]!r} is not part of a {config.family} model "
      f"of {config.layers} layers ({len(extra)} such); check the config"
    )
  flat = {
    path: np.empty(shape, jnp.dtype(dtype))
    for path, shape in _shapes(config).items()
  }
  for entry in entries:
    leaf = flat[entry.path]
    target = leaf if entry.layer is None else leaf[entry.layer]
    tensor = entry.transform(tensors[name_of(entry)]())
    if tensor.shape != target.shape:
      raise ValueError(
        f"{place}: tensor {name_of(entry)!r} has shape "
        f"{entry.transform(tensor).shape}, the config asks for "
        f"{entry.transform(target).shape}"
      )
    target[...] = tensor
  return _nest(flat)


def _safetensors_files(directory: pathlib.Path) -> list[pathlib.Path]:
  """The weight files of a directory, all of them present."""
  index = directory / "model.safetensors.index.json"
  if index.is_file():
    shards = sources.read_json(index).get("weight_map") or {}
    files = [directory / name for name in sorted(set(shards.values()))]
  else:
    files = [directory / "model.safetensors"]
  for file in files:
    if not file.is_file():
      found = ", ".join(sorted(p.name for p in directory.iterdir())[:6])
      raise ValueError(
        f"{directory}: {file.name} is missing, found {found or 'nothing'}; "
        "weights must be model.safetensors or shards with an index"
      )
  return files


def _open_safetensors(directory: pathlib.Path) -> Tensors:
  tensors = {}
  for file in _safetensors_files(directory):
    try:
      opened = safetensors.safe_open(file, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
      raise ValueError(
        f"{file}: not a complete safetensors file ({error}); fetch it again"
      ) from error
    for name in opened.keys():
      tensors[name] = functools.partial(opened.get_tensor, name)
  return {
    name: read
    for name, read in tensors.items()
    if not name.endswith("rotary_emb.inv_freq")
  }


def _load_directory(directory: pathlib.Path, dtype):
  config = config_lib.from_hugging_face(
    sources.read_json(directory / "config.json")
  )
  tensors = _open_safetensors(directory)
  if config.tied_embeddings:
    # Some writers store the embedding table a second time under this name.
    tensors.pop("lm_head.weight", None)
  return config, _fill(
    config, tensors, directory, dtype, lambda entry: entry.name
  )


def _gguf_rope_scaling(
  reader: gguf.GGUFReader, get: Callable, place: pathlib.Path
) -> config_lib.RopeScaling | None:
  """Rotary scaling from the metadata, or from the factors of Llama 3."""
  kind = get("rope.scaling.type", "none")
  if kind != "none":
    return config_lib.RopeScaling(
      kind,
      float(get("rope.scaling.factor")),
      int(get("rope.scaling.original_context_length", 0))
      if kind != "linear"
      else 0,
    )
  factors = [t for t in reader.tensors if t.name == "rope_freqs.weight"]
  if not factors:
    return None
  scaling = config_lib.RopeScaling(
    "llama3", float(np.max(factors[0].data)), 8192
  )
  plain = config_lib.ModelConfig(
    "llama",
    1,
    1,
    1,
    1,
    1,
    2 * factors[0].data.size,
    1,
    rope_theta=float(get("rope.freq_base", 10_000.0)),
  )
  before, _ = decoder.rope_frequencies(plain)
  after, _ = decoder.rope_frequencies(
    dataclasses.replace(plain, rope_scaling=scaling)
  )
  if not np.allclose(before / after, factors[0].data, rtol=1e-3):
    raise ValueError(
      f"{place}: rope_freqs.weight is not the scaling of Llama 3; only that "
      "is supported"
    )
  return scaling


def _gguf_config(reader: gguf.GGUFReader, place: pathlib.Path) -> ModelConfig:
  """Reads a model's config from the metadata of a GGUF file."""
  family = reader.fields["general.architecture"].contents()
  if family not in config_lib.FAMILIES:
    raise ValueError(
      f"{place}: architecture {family!r} is not supported; use one of "
      f"{', '.join(config_lib.FAMILIES)}"
    )

  def get(key, default=None):
    field = reader.fields.get(f"{family}.{key}")
    if field is None and default is None:
      raise ValueError(f"{place}: metadata key {family}.{key} is missing")
    return default if field is None else field.contents()

  names = {tensor.name: tensor for tensor in reader.tensors}
  if "token_embd.weight" not in names:
    raise ValueError(f"{place}: tensor 'token_embd.weight' is missing")
  width, heads = get("embedding_length"), get("attention.head_count")
  return ModelConfig(
    family=family,
    vocab_size=int(names["token_embd.weight"].shape[1]),
    width=width,
    layers=get("block_count"),
    heads=heads,
    kv_heads=get("attention.head_count_kv", heads),
    head_width=get("attention.key_length", width // heads),
    mlp_width=get("feed_forward_length"),
    rope_theta=float(get("rope.freq_base", 10_000.0)),
    rope_scaling=_gguf_rope_scaling(reader, get, place),
    qk_norm=family == "qwen3",
    attention_bias="blk.0.attn_q.bias" in names,
    tied_embeddings="output.weight" not in names,
    norm_eps=round(float(get("attention.layer_norm_rms_epsilon")), 12),
    max_positions=get("context_length"),
  )


def _read_gguf_tensor(tensor, config: ModelConfig) -> np.ndarray:
  """Dequantises a tensor and undoes the row order of llama's rotary pairs."""
  array = gguf.dequantize(tensor.data, tensor.tensor_type)
  rotary = tensor.name.split(".")[-2] in ("attn_q", "attn_k")
  if config.family == "llama" and rotary:
    pairs = array.reshape(-1, config.head_width // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
  return array


def _load_gguf(path: pathlib.Path, dtype):
  reader = sources.read_gguf(path)
  config = _gguf_config(reader, path)
  tensors = {
    tensor.name: functools.partial(_read_gguf_tensor, tensor, config)
    for tensor in reader.tensors
    if tensor.name != "rope_freqs.weight"
  }
  return config, _fill(
    config, tensors, path, dtype, lambda entry: entry.gguf_name
  )


def load(
  source: str | os.PathLike, dtype=jnp.float32
) -> tuple[ModelConfig, types.Params]:
  """Loads a model.

  Args:
    source: a directory with config.json and safetensors, a GGUF file, a known
      name or a hub id; see `sources`.
    dtype: of the parameters.

  Returns:
    The config, and the parameters as numpy arrays in the layout of
    `decoder.Policy.init`.

  Raises:
    ValueError: if there is no such model, or its files are incomplete or do
      not fit its config.
  """
  path = sources.locate(source, sources.WEIGHT_FILES)
  read = _load_directory if path.is_dir() else _load_gguf
  return read(path, dtype)


def _plan_shards(
  entries: list[Entry], params: types.Params, shard_bytes: int
) -> list[list[Entry]]:
  """Splits tensors, in order, into files of at most `shard_bytes`."""
  shards, room = [[]], shard_bytes
  for entry in entries:
    leaf = _lookup(params, entry.path)
    rows = 1 if entry.layer is None else leaf.shape[0]
    size = math.prod(leaf.shape) * leaf.dtype.itemsize // rows
    if size > room and shards[-1]:
      shards.append([])
      room = shard_bytes
    shards[-1].append(entry)
    room -= size
  return shards


def _lookup(params: types.Params, path: str) -> types.Array:
  return functools.reduce(lambda tree, key: tree[key], path.split("/"), params)


def _tensor(params: types.Params, entry: Entry) -> np.ndarray:
  leaf = _lookup(params, entry.path)
  leaf = leaf if entry.layer is None else leaf[entry.layer]
  return np.ascontiguousarray(entry.transform(np.asarray(leaf)))


def save(
  params: types.Params,
  config: ModelConfig,
  directory: str | os.PathLike,
  *,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes config.json and safetensors that `transformers` loads.

  Args:
    params: in the layout of `decoder.Policy.init`; their dtype is kept.
    config: the model's config.
    directory: where to write; older weights in it are replaced.
    shard_bytes: size above which the weights are split into several files.
  """
  place = pathlib.Path(directory)
  place.mkdir(parents=True, exist_ok=True)
  shards = _plan_shards(list(_entries(config)), params, shard_bytes)
  count = len(shards)
  names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
  names = names if count > 1 else ["model.safetensors"]
  weight_map, total = {}, 0
  for name, shard in zip(names, shards, strict=True):
    tensors = {entry.name: _tensor(params, entry) for entry in shard}
    safetensors.numpy.save_file(tensors, place / name, {"format": "pt"})
    weight_map |= dict.fromkeys(tensors, name)
    total += sum(tensor.nbytes for tensor in tensors.values())
  for stale in place.glob("model*.safetensors*"):
    if stale.name not in names:
      stale.unlink()
  if count > 1:
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(place / "model.safetensors.index.json", index)
  dtype = jax.tree.leaves(params)[0].dtype.name
  described = config_lib.to_hugging_face(config) | {"torch_dtype": dtype}
  _write_json(place / "config.json", described)


def _write_json(path: pathlib.Path, value: dict) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n")
