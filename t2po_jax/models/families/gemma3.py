"""Gemma 3, text: five layers with a sliding window per layer without.

Layers with a window have a separate rotary base. Otherwise see `gemma2`.
The larger models have a vision tower as well, which is not read.
"""

import dataclasses
from typing import Any

from t2po_jax.models.families import family, gemma2


def _kinds(
  types: gemma2.Sequence[str], window: int
) -> tuple[family.LayerKind, ...]:
  return tuple(
    family.LayerKind(window, "local")
    if each == gemma2.SLIDING
    else family.LayerKind()
    for each in types
  )


def _ropes(source: family.Source) -> tuple[family.Source, float]:
  """The older form of full layers' rotary settings, and the local base."""
  nested = source.get("rope_parameters") or {}
  if "rope_theta" in nested or "rope_type" in nested:
    raise ValueError(
      "config.json: rope_parameters of gemma3_text must be by type of layer, "
      f"{gemma2.FULL!r} and {gemma2.SLIDING!r}"
    )
  local = nested.get(gemma2.SLIDING) or {}
  if local.get("rope_type", "default") != "default":
    raise ValueError(
      "config.json: rope scaling of sliding_attention is not supported"
    )
  theta = local.get("rope_theta") or source.get("rope_local_base_freq")
  full = {"rope_parameters": nested.get(gemma2.FULL) or {}}
  return {**source, **full}, float(theta or 10_000.0)


def _read(source: family.Source) -> family.ModelConfig:
  # Inherited from Gemma 2: Gemma 3 has the key but does not apply it.
  family.refuse_other(source, {"attn_logit_softcapping": None})
  full, local_theta = _ropes(source)
  config = family.read_sizes(
    full,
    family="gemma3_text",
    max_positions=131_072,
    head_width=256,
    theta=1e6,
    tied=True,
  )
  config = gemma2.read_options(source, config)
  every = source.get("sliding_window_pattern") or source.get(
    "_sliding_window_pattern", 6
  )
  types = gemma2.layer_types(source, config, every)
  return dataclasses.replace(
    config,
    qk_norm=True,
    kinds=_kinds(types, source.get("sliding_window") or 4096),
    local_rope_theta=local_theta,
    logit_softcap=float(source.get("final_logit_softcapping") or 0),
  )


def _write(config: family.ModelConfig) -> dict[str, Any]:
  written = gemma2.write_options(
    config,
    qk_norm=(True,),
    local_rope_theta=(config.local_rope_theta,),
    logit_softcap=(config.logit_softcap,),
  )
  kinds = _kinds(written["layer_types"], written["sliding_window"])
  if kinds != config.layer_kinds:
    raise ValueError(
      "kinds cannot be written as 'gemma3_text': layers with a window have "
      "the local rope, others the global one"
    )
  return written | {
    "rope_local_base_freq": config.local_rope_theta,
    "rope_parameters": {
      gemma2.FULL: family.write_rope(config.rope_theta, config.rope_scaling),
      gemma2.SLIDING: family.write_rope(config.local_rope_theta, None),
    },
  }


def _gguf_options(
  metadata: family.Source, config: family.ModelConfig
) -> dict[str, Any]:
  types = gemma2.layer_types({}, config, 6)
  # Only the 27B model divides by width / heads.
  large = config.layers == 62
  return gemma2.OPTIONS | {
    "qk_norm": True,
    "kinds": _kinds(types, metadata.get("attention.sliding_window", 4096)),
    "query_scalar": float(
      config.width / config.heads if large else config.head_width
    ),
  }


FAMILY = family.Family(
  "gemma3_text",
  "Gemma3ForCausalLM",
  _read,
  _write,
  gemma2.TENSORS,
  gguf="gemma3",
  gguf_options=_gguf_options,
  from_gguf=gemma2.from_gguf,
)

# Both spellings of the names, those on the hub and those that newer
# transformers write. Published configs leave out what has its default.
WRAPPER = family.Wrapper(
  "gemma3",
  "gemma3_text",
  {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
  },
  (
    ("language_model.", ""),
    ("model.language_model.", "model."),
    ("vision_tower.", None),
    ("model.vision_tower.", None),
    ("multi_modal_projector.", None),
    ("model.multi_modal_projector.", None),
  ),
)
