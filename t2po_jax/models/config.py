"""The shape of a policy network: one frozen record for every family.

Families differ in biases, norms, rotary positions, attention windows and
feed-forward layers; each such difference is a field here, so that the decoder
never checks the name of a family. `models.families` reads the record from the
files of Hugging Face and llama.cpp, and writes it back.
"""

import dataclasses

from t2po_jax import keys

ROPE_SCALINGS = ("linear", "llama3", "yarn")
ROPES = ("global", "local", "none")
ACTIVATIONS = ("silu", "gelu_tanh")


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

  def __post_init__(self) -> None:
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
class LayerKind:
  """How the attention of a layer differs from that of other layers.

  Attributes:
    window: keys that a query attends to, its own included; 0: all up to its
      own.
    rope: one of `ROPES`: rotation by `rope_theta` with scaling, by
      `local_rope_theta` without scaling, or none.
  """

  window: int = 0
  rope: str = "global"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The sizes and options of a decoder.

  Attributes:
    family: a name from `families.FAMILIES`; only determines the file format.
    vocab_size: V, rows of the embedding table.
    width: D, width of the residual stream.
    layers: L.
    heads: N, query heads.
    kv_heads: M, key/value heads; divides N.
    head_width: H, even.
    mlp_width: F, inner width of the gated MLP, or of one expert.
    rope_theta: base of the rotary frequencies.
    rope_scaling: scaling of the rotary frequencies; None for none.
    qk_norm: RMS-normalise queries and keys per head.
    attention_bias: biases on query, key and value projections.
    tied_embeddings: whether the vocabulary projection is the embedding table.
    norm_eps: epsilon of the RMS norms.
    max_positions: longest sequence the model supports, in tokens.
    output_bias: a bias on the attention's output projection as well.
    kinds: the kind of every layer, at least L; empty if all are plain.
    local_rope_theta: base of the rotary frequencies in `local` layers.
    activation: of the gated MLP, one of `ACTIVATIONS`.
    query_scalar: scores are divided by its square root; 0 for H.
    attention_softcap: scores s become cap tanh(s / cap); 0 for none.
    logit_softcap: the same for the logits.
    norm_offset: norms multiply by 1 + scale instead of scale.
    post_norms: the outputs of attention and MLP are normalised too.
    scaled_embeddings: embeddings are multiplied by sqrt(D).
    experts: E, experts per layer, of which each token is routed to some; 0: one
      MLP per layer.
    experts_per_token: how many experts a token is routed to.
    normalised_routing: the routing weights of a token sum to 1.
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
  output_bias: bool = False
  kinds: tuple[LayerKind, ...] = ()
  local_rope_theta: float = 10_000.0
  activation: str = "silu"
  query_scalar: float = 0.0
  attention_softcap: float = 0.0
  logit_softcap: float = 0.0
  norm_offset: bool = False
  post_norms: bool = False
  scaled_embeddings: bool = False
  experts: int = 0
  experts_per_token: int = 0
  normalised_routing: bool = True

  def __post_init__(self) -> None:
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
    if self.kinds and len(self.kinds) < self.layers:
      raise ValueError(
        f"kinds must name all layers = {self.layers}, found {len(self.kinds)}"
      )
    if self.activation not in ACTIVATIONS:
      raise ValueError(
        f"activation {self.activation!r} is not supported; use one of "
        f"{', '.join(ACTIVATIONS)}"
      )
    if self.experts and not 1 <= self.experts_per_token <= self.experts:
      raise ValueError(
        f"experts_per_token must be within 1 and experts = {self.experts}, "
        f"found {self.experts_per_token}"
      )

  @property
  def layer_kinds(self) -> tuple[LayerKind, ...]:
    """The kind of every layer."""
    return self.kinds[: self.layers] or (LayerKind(),) * self.layers

  @property
  def distinct_kinds(self) -> tuple[LayerKind, ...]:
    """The distinct kinds, in order of their first layer."""
    return tuple(dict.fromkeys(self.layer_kinds))


_SIZES = {
  # For models trained from scratch; replace vocab_size by the tokenizer's.
  "nano": ModelConfig("llama", 1024, 64, 2, 2, 1, 32, 192),
  "tiny": ModelConfig("llama", 1024, 128, 4, 4, 2, 32, 384),
  "small": ModelConfig("llama", 1024, 256, 8, 8, 4, 32, 768),
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
    raise ValueError(
      f"model size {name!r} is unknown{keys.nearest(name, _SIZES)}"
    )
  return _SIZES[name]
