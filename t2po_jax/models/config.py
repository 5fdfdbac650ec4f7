"""The shape of a policy network.

One frozen record describes the three decoder families that the code knows:
Llama, Qwen2 and Qwen3. They differ in biases, in the normalisation of queries
and keys, and in RoPE scaling. The record reads and writes the `config.json`
of Hugging Face checkpoints; a setting that would change the mathematics and
is not supported is refused by name instead of being ignored.
"""

from collections.abc import Mapping
import dataclasses
import difflib
from typing import Any

FAMILIES = ("llama", "qwen2", "qwen3")
ROPE_SCALINGS = ("linear", "llama3", "yarn")

_ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched beyond the trained length.

  Attributes:
    kind: `linear` (all frequencies divided by the factor), `llama3` or `yarn`
      (arXiv 2309.00071): low frequencies divided, high ones kept, a ramp
      between them.
    factor: how much longer the context becomes, >= 1.
    original_max_positions: length of the original training; llama3 and yarn.
    low_freq_factor: llama3; wavelengths above original / this are divided.
    high_freq_factor: llama3; wavelengths below original / this are kept.
    beta_fast: yarn; rotations over the original length that are kept.
    beta_slow: yarn; rotations over the original length that are divided.
    attention_factor: yarn; scale of the rotary cosines and sines, None for
      the paper's 0.1 ln(factor) + 1.
  """

  kind: str
  factor: float
  original_max_positions: int = 0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None

  def __post_init__(self):
    if self.kind not in ROPE_SCALINGS:
      raise ValueError(
        f"rope_scaling type {self.kind!r} is not supported; use one of "
        f"{', '.join(ROPE_SCALINGS)}"
      )
    if self.kind != "linear" and self.original_max_positions < 1:
      raise ValueError(
        f"rope_scaling {self.kind!r} needs original_max_position_embeddings "
        f">= 1, found {self.original_max_positions}"
      )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The sizes and options of a decoder.

  Attributes:
    family: `llama`, `qwen2` or `qwen3`.
    vocab_size: V, rows of the embedding table.
    width: D, width of the residual stream.
    layers: L.
    heads: N, query heads.
    kv_heads: M, key/value heads; divides N.
    head_width: H, even.
    mlp_width: F, inner width of the gated MLP.
    rope_theta: base of the rotary frequencies.
    rope_scaling: stretching of the rotary frequencies, None for none.
    qk_norm: RMS-normalise queries and keys per head (Qwen3).
    attention_bias: biases on query, key and value projections.
    tied_embeddings: the vocabulary projection is the embedding table.
    norm_eps: epsilon of the RMS norms.
    max_positions: longest sequence the model was made for, in tokens.
  """

  family: str
  vocab_size: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_width: int
  mlp_width: int
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  qk_norm: bool = False
  attention_bias: bool = False
  tied_embeddings: bool = True
  norm_eps: float = 1e-6
  max_positions: int = 2048

  def __post_init__(self):
    if self.family not in FAMILIES:
      raise ValueError(
        f"family {self.family!r} is not supported; use one of "
        f"{', '.join(FAMILIES)}"
      )
    for name in (
      "vocab_size",
      "width",
      "layers",
      "heads",
      "kv_heads",
      "head_width",
      "mlp_width",
      "max_positions",
    ):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} must be >= 1, found {getattr(self, name)}")
    if self.heads % self.kv_heads:
      raise ValueError(
        f"kv_heads must divide heads = {self.heads}, found {self.kv_heads}"
      )
    if self.head_width % 2:
      raise ValueError(f"head_width must be even, found {self.head_width}")

  @property
  def output_bias(self) -> bool:
    """Whether the attention's output projection has a bias as well."""
    return self.attention_bias and self.family != "qwen2"


_SIZES = {
  # For models trained here; replace vocab_size by the tokenizer's.
  "nano": ModelConfig("llama", 1024, 64, 2, 2, 1, 32, 192),
  "tiny": ModelConfig("llama", 1024, 128, 4, 4, 2, 32, 384),
  "smollm2-135m": ModelConfig(
    "llama",
    49_152,
    576,
    30,
    9,
    3,
    64,
    1536,
    rope_theta=100_000.0,
    norm_eps=1e-5,
    max_positions=8192,
  ),
  "smollm2-360m": ModelConfig(
    "llama",
    49_152,
    960,
    32,
    15,
    5,
    64,
    2560,
    rope_theta=100_000.0,
    norm_eps=1e-5,
    max_positions=8192,
  ),
  "llama3.2-1b": ModelConfig(
    "llama",
    128_256,
    2048,
    16,
    32,
    8,
    64,
    8192,
    rope_theta=500_000.0,
    rope_scaling=RopeScaling("llama3", 32.0, 8192, 1.0, 4.0),
    norm_eps=1e-5,
    max_positions=131_072,
  ),
  "qwen2.5-0.5b": ModelConfig(
    "qwen2",
    151_936,
    896,
    24,
    14,
    2,
    64,
    4864,
    rope_theta=1e6,
    attention_bias=True,
    max_positions=32_768,
  ),
  "qwen2.5-1.5b": ModelConfig(
    "qwen2",
    151_936,
    1536,
    28,
    12,
    2,
    128,
    8960,
    rope_theta=1e6,
    attention_bias=True,
    max_positions=32_768,
  ),
  "qwen3-0.6b": ModelConfig(
    "qwen3",
    151_936,
    1024,
    28,
    16,
    8,
    128,
    3072,
    rope_theta=1e6,
    qk_norm=True,
    max_positions=40_960,
  ),
  "qwen3-1.7b": ModelConfig(
    "qwen3",
    151_936,
    2048,
    28,
    16,
    8,
    128,
    6144,
    rope_theta=1e6,
    qk_norm=True,
    max_positions=40_960,
  ),
  "qwen3-4b": ModelConfig(
    "qwen3",
    151_936,
    2560,
    36,
    32,
    8,
    128,
    9728,
    rope_theta=1e6,
    qk_norm=True,
    max_positions=40_960,
  ),
}


def named(name: str) -> ModelConfig:
  """The config of a known size; change fields with `dataclasses.replace`.

  Args:
    name: e.g. `tiny` or `qwen3-4b`.

  Returns:
    The config.

  Raises:
    ValueError: if the name is unknown.
  """
  if name not in _SIZES:
    near = difflib.get_close_matches(name, _SIZES, 1, 0.0)[0]
    raise ValueError(
      f"model size {name!r} is unknown, did you mean {near!r}? Known: "
      f"{', '.join(_SIZES)}"
    )
  return _SIZES[name]


def _require(source: Mapping[str, Any], key: str) -> Any:
  if source.get(key) is None:
    raise ValueError(f"config.json: key {key!r} is missing")
  return source[key]


def _refuse_unsupported(source: Mapping[str, Any]) -> None:
  """Raises for settings that would change the mathematics."""
  supported = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
  }
  for key, value in supported.items():
    found = source.get(key)
    if found is not None and found != value:
      raise ValueError(
        f"config.json: {key} = {found!r} is not supported, only {value!r}"
      )


def _read_rope(
  source: Mapping[str, Any], max_positions: int
) -> tuple[float, RopeScaling | None]:
  """(theta, scaling) from `rope_parameters` or the older two keys."""
  rope = dict(source.get("rope_scaling") or {})
  rope.update(source.get("rope_parameters") or {})
  theta = rope.get("rope_theta") or source.get("rope_theta") or 10_000.0
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
  return float(theta), RopeScaling(
    kind=kind,
    factor=float(_require(rope, "factor")),
    original_max_positions=0 if kind == "linear" else int(original),
    **given,
  )


def from_hugging_face(source: Mapping[str, Any]) -> ModelConfig:
  """Reads the contents of a Hugging Face `config.json`.

  Args:
    source: the parsed JSON object.

  Returns:
    The config.

  Raises:
    ValueError: if a key is missing, or the model is of another family, or has
      a setting that the decoder does not implement.
  """
  family = _require(source, "model_type")
  if family not in FAMILIES:
    raise ValueError(
      f"config.json: model_type {family!r} is not supported; use one of "
      f"{', '.join(FAMILIES)}"
    )
  _refuse_unsupported(source)
  width = _require(source, "hidden_size")
  heads = _require(source, "num_attention_heads")
  head_width = source.get("head_dim")
  if head_width is None:
    head_width = 128 if family == "qwen3" else width // heads
  max_positions = source.get("max_position_embeddings") or (
    2048 if family == "llama" else 32_768
  )
  theta, scaling = _read_rope(source, max_positions)
  return ModelConfig(
    family=family,
    vocab_size=_require(source, "vocab_size"),
    width=width,
    layers=_require(source, "num_hidden_layers"),
    heads=heads,
    kv_heads=source.get("num_key_value_heads") or heads,
    head_width=head_width,
    mlp_width=_require(source, "intermediate_size"),
    rope_theta=theta,
    rope_scaling=scaling,
    qk_norm=family == "qwen3",
    attention_bias=(
      family == "qwen2" or bool(source.get("attention_bias", False))
    ),
    tied_embeddings=bool(source.get("tie_word_embeddings", False)),
    norm_eps=float(source.get("rms_norm_eps") or 1e-6),
    max_positions=max_positions,
  )


def _write_rope(config: ModelConfig) -> dict[str, Any]:
  scaling = config.rope_scaling
  if scaling is None:
    return {"rope_type": "default", "rope_theta": config.rope_theta}
  written = {
    "rope_type": scaling.kind,
    "rope_theta": config.rope_theta,
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


def to_hugging_face(config: ModelConfig) -> dict[str, Any]:
  """The inverse of `from_hugging_face`.

  Both spellings of the rotary settings are written, so that older and newer
  readers understand the file.

  Args:
    config: the config; its options must be those of its family.

  Returns:
    What belongs into `config.json`.

  Raises:
    ValueError: if the family cannot express the config.
  """
  if config.qk_norm != (config.family == "qwen3"):
    raise ValueError(
      f"qk_norm = {config.qk_norm} cannot be written as {config.family!r}; "
      "qk_norm belongs to 'qwen3'"
    )
  if config.family == "qwen2" and not config.attention_bias:
    raise ValueError(
      "attention_bias = False cannot be written as 'qwen2'; use 'llama'"
    )
  rope = _write_rope(config)
  return {
    "architectures": [_ARCHITECTURES[config.family]],
    "model_type": config.family,
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "num_hidden_layers": config.layers,
    "num_attention_heads": config.heads,
    "num_key_value_heads": config.kv_heads,
    "head_dim": config.head_width,
    "intermediate_size": config.mlp_width,
    "hidden_act": "silu",
    "attention_bias": config.attention_bias,
    "tie_word_embeddings": config.tied_embeddings,
    "rms_norm_eps": config.norm_eps,
    "max_position_embeddings": config.max_positions,
    "rope_theta": config.rope_theta,
    "rope_scaling": None if config.rope_scaling is None else rope,
    "rope_parameters": rope,
  }
