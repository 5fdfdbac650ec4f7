"""Checkpoints in and out: safetensors and GGUF in, safetensors out.

The table of a family (`models.families`) is the whole mapping between tensors
and parameters. A checkpoint must have exactly the tensors that its config
implies; a missing, extra or misshapen one is refused by name, and so is one
with a number that is not finite. Parameters come back as numpy arrays on the
host, layers stacked, so that the caller decides where they go.

GGUF tensors are dequantised.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from t2po_jax import types
from t2po_jax.models import config as config_lib
from t2po_jax.models import decoder, families, rope, sources
from t2po_jax.models.families import family as family_lib

ModelConfig = config_lib.ModelConfig
Tensors = dict[str, Callable[[], np.ndarray]]

SHARD_BYTES = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of a checkpoint and where it belongs.

  Attributes:
    name: of the tensor in the checkpoint.
    tensor: the row of the family's table.
    index: into the leading axes of the parameter.
  """

  name: str
  tensor: family_lib.Tensor
  index: tuple[int, ...]

  def read(self, array: np.ndarray) -> np.ndarray:
    """From the tensor to the parameter; its own inverse."""
    return array.mT if self.tensor.transposed else array


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Shape of every parameter by path."""
  leaves = jax.tree.leaves_with_path(decoder.shapes(config))
  return {
    "/".join(part.key for part in path): leaf.shape for path, leaf in leaves
  }


def _entries(config: ModelConfig, *, gguf: bool = False) -> Iterator[Entry]:
  """The tensors of a model's checkpoint, in order of the family's table."""
  present = _shapes(config)
  for tensor in families.of(config).tensors:
    if tensor.path not in present:
      continue
    name = tensor.gguf_name if gguf else tensor.name
    counts = [
      range(count)
      for part, count in (
        ("{layer}", config.layers),
        ("{expert}", config.experts),
      )
      if part in name
    ]
    for index in itertools.product(*counts):
      named = dict(zip(("layer", "expert"), index, strict=False))
      yield Entry(name.format(**named), tensor, index)


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
  dtype: Any,
  *,
  gguf: bool = False,
) -> types.Params:
  """Reads every tensor into its parameter; refuses any difference."""
  entries = list(_entries(config, gguf=gguf))
  names = {entry.name for entry in entries}
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
  fix = families.of(config).from_gguf if gguf else family_lib.keep
  for entry in entries:
    target = flat[entry.tensor.path][entry.index]
    tensor = tensors[entry.name]()
    array = entry.read(tensor)
    if array.shape != target.shape:
      raise ValueError(
        f"{place}: tensor {entry.name!r} has shape {tensor.shape}, the config "
        f"asks for {entry.read(target).shape}"
      )
    array = entry.read(fix(entry.tensor, tensor, config))
    if not np.isfinite(array).all():
      broken = np.count_nonzero(~np.isfinite(array))
      raise ValueError(
        f"{place}: tensor {entry.name!r} holds {broken} numbers that are NaN "
        "or infinite; fetch or export the model again"
      )
    target[...] = array
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


def _load_directory(
  directory: pathlib.Path, dtype: Any
) -> tuple[ModelConfig, types.Params]:
  described = sources.read_json(directory / "config.json")
  try:
    config = families.read_config(described)
  except (AttributeError, TypeError) as error:
    raise ValueError(f"{directory}/config.json: {error}") from None
  tensors = {
    renamed: read
    for name, read in _open_safetensors(directory).items()
    if (renamed := families.rename(described, name)) is not None
  }
  if config.tied_embeddings:
    # Some writers store the embedding table a second time under this name.
    tensors.pop("lm_head.weight", None)
  return config, _fill(config, tensors, directory, dtype)


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
  before, _ = rope.frequencies(plain)
  after, _ = rope.frequencies(dataclasses.replace(plain, rope_scaling=scaling))
  if not np.allclose(before / after, factors[0].data, rtol=1e-3):
    raise ValueError(
      f"{place}: rope_freqs.weight is not the scaling of Llama 3; only that "
      "is supported"
    )
  return scaling


def _gguf_config(reader: gguf.GGUFReader, place: pathlib.Path) -> ModelConfig:
  """Reads a model's config from the metadata of a GGUF file."""
  kind = reader.fields["general.architecture"].contents()
  try:
    family = families.of_gguf(kind)
  except ValueError as error:
    raise ValueError(f"{place}: {error}") from None
  metadata = {
    name.removeprefix(f"{kind}."): field.contents()
    for name, field in reader.fields.items()
    if name.startswith(f"{kind}.")
  }

  def get(key: str, default: Any = None) -> Any:
    if metadata.get(key, default) is None:
      raise ValueError(f"{place}: metadata key {kind}.{key} is missing")
    return metadata.get(key, default)

  names = {tensor.name: tensor for tensor in reader.tensors}
  if "token_embd.weight" not in names:
    raise ValueError(f"{place}: tensor 'token_embd.weight' is missing")
  width, heads = get("embedding_length"), get("attention.head_count")
  biased = "blk.0.attn_q.bias" in names
  config = ModelConfig(
    family=family.name,
    vocab_size=int(names["token_embd.weight"].shape[1]),
    width=width,
    layers=get("block_count"),
    heads=heads,
    kv_heads=get("attention.head_count_kv", heads),
    head_width=get("attention.key_length", width // heads),
    mlp_width=get("feed_forward_length"),
    rope_theta=float(get("rope.freq_base", 10_000.0)),
    rope_scaling=_gguf_rope_scaling(reader, get, place),
    attention_bias=biased,
    output_bias="blk.0.attn_output.bias" in names,
    tied_embeddings="output.weight" not in names,
    norm_eps=round(float(get("attention.layer_norm_rms_epsilon")), 12),
    max_positions=get("context_length"),
  )
  try:
    return dataclasses.replace(config, **family.gguf_options(metadata, config))
  except KeyError as error:
    raise ValueError(
      f"{place}: metadata key {kind}.{error.args[0]} is missing"
    ) from None


def _load_gguf(
  path: pathlib.Path, dtype: Any
) -> tuple[ModelConfig, types.Params]:
  reader = sources.read_gguf(path)
  config = _gguf_config(reader, path)

  def read(tensor: Any) -> np.ndarray:
    return gguf.dequantize(tensor.data, tensor.tensor_type)

  tensors = {
    tensor.name: functools.partial(read, tensor)
    for tensor in reader.tensors
    if tensor.name != "rope_freqs.weight"
  }
  return config, _fill(config, tensors, path, dtype, gguf=True)


def load(
  source: str | os.PathLike, dtype: Any = jnp.float32
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
    leaf = _lookup(params, entry.tensor.path)
    size = math.prod(leaf.shape[len(entry.index) :]) * leaf.dtype.itemsize
    if size > room and shards[-1]:
      shards.append([])
      room = shard_bytes
    shards[-1].append(entry)
    room -= size
  return shards


def _lookup(params: types.Params, path: str) -> types.Array:
  return functools.reduce(lambda tree, key: tree[key], path.split("/"), params)


def _tensor(params: types.Params, entry: Entry) -> np.ndarray:
  leaf = np.asarray(_lookup(params, entry.tensor.path)[entry.index])
  return np.ascontiguousarray(entry.read(leaf))


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
  described = families.write_config(config) | {"torch_dtype": dtype}
  _write_json(place / "config.json", described)


def _write_json(path: pathlib.Path, value: dict) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n")
