"""Mistral: Llama with an optional sliding window in every layer."""

import dataclasses
from typing import Any

from t2po_jax.models.families import family


def _read(source: family.Source) -> family.ModelConfig:
  family.refuse_other(source, {"hidden_act": "silu"})
  config = family.read_sizes(source, family="mistral", max_positions=131_072)
  # A missing key means the window of the first version; null means none.
  window = source.get("sliding_window", 4096)
  kinds = (family.LayerKind(window),) * config.layers if window else ()
  return dataclasses.replace(config, kinds=kinds)


def _write(config: family.ModelConfig) -> dict[str, Any]:
  window = config.layer_kinds[0].window
  kinds = (family.LayerKind(window),) * config.layers if window else ()
  family.require_options(config, kinds=(kinds,))
  return {"hidden_act": "silu", "sliding_window": window or None}


# GGUF files of Mistral name the architecture llama.
FAMILY = family.Family(
  "mistral", "MistralForCausalLM", _read, _write, family.PLAIN
)
