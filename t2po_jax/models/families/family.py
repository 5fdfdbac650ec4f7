"""The definition of a model family: how its files are read and written.

A family converts between a `ModelConfig` and `config.json`, and has one table
of tensors: their names in safetensors and GGUF files, and their paths in the
parameters. Code shared by several families is here.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import numpy as np

from t2po_jax.models import config as config_lib

ModelConfig = config_lib.ModelConfig
LayerKind = config_lib.LayerKind
Source = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One row of a family's table.

  `{layer}` and `{expert}` in a name stand for indices into the leading axes
  of the parameter. Kernels, [outputs, inputs] in files, are transposed.

  Attributes:
    name: in a safetensors checkpoint.
    gguf_name: in a GGUF file.
    path: of the parameter, parts joined by `/`.
  """

  name: str
  gguf_name: str
  path: str

  @property
  def transposed(self) -> bool:
    """Whether the file stores the last two axes transposed."""
    return self.path.endswith("/kernel")


def keep(tensor: Tensor, array: np.ndarray, config: ModelConfig) -> np.ndarray:
  """The conversion of GGUF tensors that need none."""
  del tensor, config
  return array


@dataclasses.dataclass(frozen=True)
class Family:
  """How the files of one family are read and written.

  Attributes:
    name: `model_type` in config.json.
    architecture: the class in `architectures`.
    read: contents of config.json -> the config.
    write: a config -> the keys of config.json beyond those common to all
      families; raises if the family cannot express the config.
    tensors: the table; rows without a parameter in a config are skipped.
    gguf: `general.architecture` of GGUF files; None if unsupported.
    gguf_options: (metadata by key, config with the common fields) -> the fields
      of the config specific to the family.
    from_gguf: converts the values of a GGUF tensor to those of a parameter.
  """

  name: str
  architecture: str
  read: Callable[[Source], ModelConfig]
  write: Callable[[ModelConfig], dict[str, Any]]
  tensors: tuple[Tensor, ...]
  gguf: str | None = None
  gguf_options: Callable[[Source, ModelConfig], dict[str, Any]] = (
    lambda metadata, config: {}
  )
  from_gguf: Callable[[Tensor, np.ndarray, ModelConfig], np.ndarray] = keep


@dataclasses.dataclass(frozen=True)
class Wrapper:
  """A model of which only the part that reads and writes text is read.

  Attributes:
    name: `model_type` in config.json; the text's own stands in `text_config`.
    text: the family of the text.
    defaults: what `text_config` means by keys that it leaves out.
    renames: beginnings of tensors' names and what the family has instead,
      None for parts that are left out; the first that fits counts.
  """

  name: str
  text: str
  defaults: Source
  renames: tuple[tuple[str, str | None], ...]

  def unwrap(self, source: Source) -> Source:
    """The part of config.json that describes the text model."""
    around = {
      key: source.get(key)
      for key in ("tie_word_embeddings", "quantization_config")
    }
    given = {**require(source, "text_config"), **_without_nulls(around)}
    return {**self.defaults, **_without_nulls(given)}

  def rename(self, tensor: str) -> str | None:
    """A tensor's name in the family of the text, None for other parts."""
    for beginning, instead in self.renames:
      if tensor.startswith(beginning):
        if instead is None:
          return None
        return instead + tensor.removeprefix(beginning)
    return tensor


def _without_nulls(source: Source) -> Source:
  return {key: value for key, value in source.items() if value is not None}


def _layer(name: str, gguf_name: str, path: str) -> Tensor:
  return Tensor(
    f"model.layers.{{layer}}.{name}",
    f"blk.{{layer}}.{gguf_name}",
    f"layers/{path}",
  )


def _projection(name: str, gguf_name: str, path: str) -> tuple[Tensor, Tensor]:
  """The kernel and the bias of a linear layer."""
  return (
    _layer(f"{name}.weight", f"{gguf_name}.weight", f"{path}/kernel"),
    _layer(f"{name}.bias", f"{gguf_name}.bias", f"{path}/bias"),
  )


def norm(name: str, gguf_name: str, path: str) -> Tensor:
  """The scale of a layer's norm."""
  return _layer(f"{name}.weight", f"{gguf_name}.weight", f"{path}/scale")


EMBEDDINGS = (
  Tensor("model.embed_tokens.weight", "token_embd.weight", "embed/table"),
  Tensor("model.norm.weight", "output_norm.weight", "norm/scale"),
  Tensor("lm_head.weight", "output.weight", "head/kernel"),
)
ATTENTION = (
  norm("input_layernorm", "attn_norm", "attention_norm"),
  *_projection("self_attn.q_proj", "attn_q", "attention/query"),
  *_projection("self_attn.k_proj", "attn_k", "attention/key"),
  *_projection("self_attn.v_proj", "attn_v", "attention/value"),
  *_projection("self_attn.o_proj", "attn_output", "attention/out"),
  norm("self_attn.q_norm", "attn_q_norm", "attention/query_norm"),
  norm("self_attn.k_norm", "attn_k_norm", "attention/key_norm"),
)
MLP_NORM = (norm("post_attention_layernorm", "ffn_norm", "mlp_norm"),)
MLP = (
  *_projection("mlp.gate_proj", "ffn_gate", "mlp/gate"),
  *_projection("mlp.up_proj", "ffn_up", "mlp/up"),
  *_projection("mlp.down_proj", "ffn_down", "mlp/down"),
)
EXPERTS = (
  *_projection("mlp.gate", "ffn_gate_inp", "mlp/router"),
  *(
    Tensor(
      f"model.layers.{{layer}}.mlp.experts.{{expert}}.{part}_proj.weight",
      f"blk.{{layer}}.ffn_{part}_exps.weight",
      f"layers/mlp/expert_{part}/kernel",
    )
    for part in ("gate", "up", "down")
  ),
)
# The names of Llama and of its many descendants.
PLAIN = (*EMBEDDINGS, *ATTENTION, *MLP_NORM, *MLP)


def require(source: Source, key: str) -> Any:
  """Returns a required key of config.json."""
  if source.get(key) is None:
    raise ValueError(f"config.json: key {key!r} is missing")
  return source[key]


def refuse_other(source: Source, supported: Source) -> None:
  """Raises an error for settings that the decoder does not implement."""
  for key, value in supported.items():
    given = source.get(key)
    if given is not None and given != value:
      raise ValueError(
        f"config.json: {key} = {given!r} is not supported, only {value!r}"
      )


def read_rope(
  source: Source, max_positions: int, theta: float = 10_000.0
) -> tuple[float, config_lib.RopeScaling | None]:
  """Reads (theta, scaling) from `rope_parameters` or the two older keys.

  Args:
    source: contents of config.json.
    max_positions: the original length if it is not given.
    theta: the family's default.
  """
  rope = dict(source.get("rope_scaling") or {})
  rope.update(source.get("rope_parameters") or {})
  theta = rope.get("rope_theta") or source.get("rope_theta") or theta
  kind = rope.get("rope_type") or rope.get("type") or "default"
  if kind == "default":
    return float(theta), None
  for key in ("mscale", "mscale_all_dim", "short_factor"):
    if rope.get(key):
      raise ValueError(f"config.json: rope scaling by {key!r} is not supported")
  if rope.get("truncate") is False:
    raise ValueError("config.json: yarn with truncate = false is not supported")
  original = rope.get("original_max_position_embeddings") or max_positions
  given = {
    key: float(rope[key])
    for key in (
      "low_freq_factor",
      "high_freq_factor",
      "beta_fast",
      "beta_slow",
      "attention_factor",
    )
    if rope.get(key) is not None
  }
  return float(theta), config_lib.RopeScaling(
    kind=kind,
    factor=float(require(rope, "factor")),
    original_max_positions=0 if kind == "linear" else int(original),
    **given,
  )


def read_sizes(
  source: Source,
  *,
  family: str,
  max_positions: int,
  head_width: int | None = None,
  theta: float = 10_000.0,
  tied: bool = False,
) -> ModelConfig:
  """Reads the keys common to all families.

  Args:
    source: contents of config.json.
    family: the family's name.
    max_positions: default of `max_position_embeddings`.
    head_width: default of `head_dim`; None for width / heads.
    theta: default of the rotary base.
    tied: default of `tie_word_embeddings`.

  Returns:
    A config of plain layers.

  Raises:
    ValueError: if a key is missing or its value is not supported.
  """
  refuse_other(
    source,
    {
      "mlp_bias": False,
      "partial_rotary_factor": 1.0,
      "quantization_config": None,
    },
  )
  width = require(source, "hidden_size")
  heads = require(source, "num_attention_heads")
  longest = source.get("max_position_embeddings") or max_positions
  theta, scaling = read_rope(source, longest, theta)
  given = source.get("tie_word_embeddings")
  return ModelConfig(
    family=family,
    vocab_size=require(source, "vocab_size"),
    width=width,
    layers=require(source, "num_hidden_layers"),
    heads=heads,
    kv_heads=source.get("num_key_value_heads") or heads,
    head_width=source.get("head_dim") or head_width or width // heads,
    mlp_width=require(source, "intermediate_size"),
    rope_theta=theta,
    rope_scaling=scaling,
    tied_embeddings=tied if given is None else bool(given),
    norm_eps=float(source.get("rms_norm_eps") or 1e-6),
    max_positions=longest,
  )


def with_bias(source: Source, config: ModelConfig) -> ModelConfig:
  """Adds biases to all four projections, if the file says so."""
  bias = bool(source.get("attention_bias", False))
  return dataclasses.replace(config, attention_bias=bias, output_bias=bias)


def write_rope(
  theta: float, scaling: config_lib.RopeScaling | None
) -> dict[str, Any]:
  """The rotary settings in the form of `rope_parameters`."""
  if scaling is None:
    return {"rope_type": "default", "rope_theta": theta}
  written = {
    "rope_type": scaling.kind,
    "rope_theta": theta,
    "factor": scaling.factor,
  }
  if scaling.kind != "linear":
    written["original_max_position_embeddings"] = scaling.original_max_positions
  if scaling.kind == "llama3":
    written["low_freq_factor"] = scaling.low_freq_factor
    written["high_freq_factor"] = scaling.high_freq_factor
  if scaling.kind == "yarn":
    written["beta_fast"] = scaling.beta_fast
    written["beta_slow"] = scaling.beta_slow
    if scaling.attention_factor is not None:
      written["attention_factor"] = scaling.attention_factor
  return written


def write_sizes(config: ModelConfig) -> dict[str, Any]:
  """The inverse of `read_sizes`.

  Both spellings of the rotary settings are written, so that older and newer
  readers understand the file.
  """
  rope = write_rope(config.rope_theta, config.rope_scaling)
  return {
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "num_hidden_layers": config.layers,
    "num_attention_heads": config.heads,
    "num_key_value_heads": config.kv_heads,
    "head_dim": config.head_width,
    "intermediate_size": config.mlp_width,
    "tie_word_embeddings": config.tied_embeddings,
    "rms_norm_eps": config.norm_eps,
    "max_position_embeddings": config.max_positions,
    "rope_theta": config.rope_theta,
    "rope_scaling": None if config.rope_scaling is None else rope,
    "rope_parameters": rope,
  }


def require_options(config: ModelConfig, **allowed: tuple[Any, ...]) -> None:
  """Raises an error for options that a family cannot express.

  Args:
    config: the config to be written.
    **allowed: by config field, the values that the family supports. All other
      fields must have their default.
  """
  for field in dataclasses.fields(ModelConfig):
    if field.default is dataclasses.MISSING or field.name in _SHARED:
      continue
    chosen = getattr(config, field.name)
    if chosen not in allowed.get(field.name, (field.default,)):
      raise ValueError(
        f"{field.name} = {chosen!r} cannot be written as {config.family!r}"
      )


# Options that `write_sizes` writes for every family.
_SHARED = (
  "rope_theta",
  "rope_scaling",
  "tied_embeddings",
  "norm_eps",
  "max_positions",
)


def deinterleave(
  tensor: Tensor, array: np.ndarray, config: ModelConfig
) -> np.ndarray:
  """Undoes the interleaving of rotary pairs in query and key rows of GGUF
  files.

  For some families llama.cpp stores the two halves of each pair next to each
  other.
  """
  if tensor.path.split("/")[-2] not in ("query", "key"):
    return array
  pairs = array.reshape(-1, config.head_width // 2, 2, *array.shape[1:])
  return pairs.swapaxes(1, 2).reshape(array.shape)
