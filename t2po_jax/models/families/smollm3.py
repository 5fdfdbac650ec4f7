"""SmolLM3: Llama with no rotary positions in every fourth layer."""

import dataclasses
from typing import Any

from t2po_jax.models.families import family


def _kinds(rotated: list[int]) -> tuple[family.LayerKind, ...]:
  kinds = tuple(
    family.LayerKind(rope="global" if each else "none") for each in rotated
  )
  return kinds if set(kinds) != {family.LayerKind()} else ()


def _every(interval: int, layers: int) -> list[int]:
  return [int((layer + 1) % interval != 0) for layer in range(layers)]


def _read(source: family.Source) -> family.ModelConfig:
  family.refuse_other(
    source, {"hidden_act": "silu", "use_sliding_window": False}
  )
  config = family.read_sizes(
    source, family="smollm3", max_positions=32_768, theta=2e6, tied=True
  )
  rotated = source.get("no_rope_layers")
  if rotated is None:
    interval = source.get("no_rope_layer_interval") or 4
    rotated = _every(interval, config.layers)
  kinds = _kinds(rotated[: config.layers])
  return family.with_bias(source, dataclasses.replace(config, kinds=kinds))


def _write(config: family.ModelConfig) -> dict[str, Any]:
  biases = (config.attention_bias,)
  rotated = [int(kind.rope != "none") for kind in config.layer_kinds]
  family.require_options(
    config,
    attention_bias=biases,
    output_bias=biases,
    kinds=(_kinds(rotated),),
  )
  return {
    "hidden_act": "silu",
    "attention_bias": config.attention_bias,
    "no_rope_layers": rotated,
    "no_rope_layer_interval": 4,
    "use_sliding_window": False,
    # The defaults may exceed a small vocabulary.
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
  }


def _gguf_options(
  metadata: family.Source, config: family.ModelConfig
) -> dict[str, Any]:
  del metadata  # llama.cpp hard-codes the interval.
  return {"kinds": _kinds(_every(4, config.layers))}


FAMILY = family.Family(
  "smollm3",
  "SmolLM3ForCausalLM",
  _read,
  _write,
  family.PLAIN,
  gguf="smollm3",
  gguf_options=_gguf_options,
  from_gguf=family.deinterleave,
)
