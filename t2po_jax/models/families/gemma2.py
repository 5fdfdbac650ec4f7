"""Gemma 2: sliding windows in every other layer, soft-capped scores and logits.

All Gemma models scale their embeddings, multiply by 1 + scale in norms, also
normalise the outputs of attention and MLP, and use GELU gates.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from t2po_jax.models.families import family

TENSORS = (
  *family.EMBEDDINGS,
  *family.ATTENTION,
  *family.MLP,
  family.norm(
    "post_attention_layernorm", "post_attention_norm", "attention_post_norm"
  ),
  family.norm("pre_feedforward_layernorm", "ffn_norm", "mlp_norm"),
  family.norm("post_feedforward_layernorm", "post_ffw_norm", "mlp_post_norm"),
)
OPTIONS = {
  "activation": "gelu_tanh",
  "norm_offset": True,
  "post_norms": True,
  "scaled_embeddings": True,
}
SLIDING, FULL = "sliding_attention", "full_attention"


def read_options(
  source: family.Source, config: family.ModelConfig
) -> family.ModelConfig:
  """The options that all Gemma models share, apart from the layer kinds."""
  family.refuse_other(
    source,
    {
      "hidden_act": "gelu_pytorch_tanh",
      "hidden_activation": "gelu_pytorch_tanh",
      "use_bidirectional_attention": False,
    },
  )
  config = dataclasses.replace(
    config,
    **OPTIONS,
    query_scalar=float(source.get("query_pre_attn_scalar") or 256),
  )
  return family.with_bias(source, config)


def layer_types(
  source: family.Source, config: family.ModelConfig, every: int
) -> Sequence[str]:
  """The type of every layer: all but every `every`-th have a window."""
  given = source.get("layer_types") or [
    FULL if (layer + 1) % every == 0 else SLIDING
    for layer in range(config.layers)
  ]
  if unknown := set(given) - {SLIDING, FULL}:
    raise ValueError(
      f"config.json: layer_types holds {min(unknown)!r}, only {SLIDING!r} and "
      f"{FULL!r} are supported"
    )
  return given


def write_options(
  config: family.ModelConfig, **allowed: tuple[Any, ...]
) -> dict[str, Any]:
  """The inverse of `read_options` and of the layers' kinds."""
  biases = (config.attention_bias,)
  windows = {kind.window for kind in config.layer_kinds} - {0}
  family.require_options(
    config,
    **{name: (value,) for name, value in OPTIONS.items()},
    **allowed,
    attention_bias=biases,
    output_bias=biases,
    query_scalar=(config.query_scalar,),
    kinds=(config.kinds,) if len(windows) <= 1 else (),
  )
  scalar = config.query_scalar or config.head_width
  return {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": config.attention_bias,
    # Some readers require an integer.
    "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
    "sliding_window": max(windows, default=4096),
    "layer_types": [
      SLIDING if kind.window else FULL for kind in config.layer_kinds
    ],
    "attn_logit_softcapping": config.attention_softcap or None,
    "final_logit_softcapping": config.logit_softcap or None,
  }


def from_gguf(
  tensor: family.Tensor, array: np.ndarray, config: family.ModelConfig
) -> np.ndarray:
  """GGUF files of Gemma store 1 + scale."""
  del config
  return array - 1 if tensor.path.endswith("/scale") else array


def _read(source: family.Source) -> family.ModelConfig:
  config = family.read_sizes(
    source, family="gemma2", max_positions=8192, head_width=256, tied=True
  )
  config = read_options(source, config)
  window = source.get("sliding_window") or 4096
  return dataclasses.replace(
    config,
    kinds=tuple(
      family.LayerKind(window if each == SLIDING else 0)
      for each in layer_types(source, config, 2)
    ),
    attention_softcap=float(source.get("attn_logit_softcapping", 50.0) or 0),
    logit_softcap=float(source.get("final_logit_softcapping", 30.0) or 0),
  )


def _write(config: family.ModelConfig) -> dict[str, Any]:
  if any(kind.rope != "global" for kind in config.layer_kinds):
    raise ValueError("layers of several ropes cannot be written as 'gemma2'")
  return write_options(
    config,
    attention_softcap=(config.attention_softcap,),
    logit_softcap=(config.logit_softcap,),
  )


def _gguf_options(
  metadata: family.Source, config: family.ModelConfig
) -> dict[str, Any]:
  window = metadata.get("attention.sliding_window", 4096)
  # Only the 27B model divides by width / heads.
  large = config.layers == 46
  return OPTIONS | {
    "kinds": tuple(
      family.LayerKind(0 if layer % 2 else window)
      for layer in range(config.layers)
    ),
    "query_scalar": float(
      config.width / config.heads if large else config.head_width
    ),
    "attention_softcap": float(metadata.get("attn_logit_softcapping", 50.0)),
    "logit_softcap": float(metadata.get("final_logit_softcapping", 30.0)),
  }


FAMILY = family.Family(
  "gemma2",
  "Gemma2ForCausalLM",
  _read,
  _write,
  TENSORS,
  gguf="gemma2",
  gguf_options=_gguf_options,
  from_gguf=from_gguf,
)
