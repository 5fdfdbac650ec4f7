"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

import dataclasses
from typing import Any

from t2po_jax.models.families import family


def _read(source: family.Source) -> family.ModelConfig:
  family.refuse_other(
    source, {"hidden_act": "silu", "use_sliding_window": False}
  )
  config = family.read_sizes(source, family="qwen2", max_positions=32_768)
  return dataclasses.replace(config, attention_bias=True)


def _write(config: family.ModelConfig) -> dict[str, Any]:
  family.require_options(config, attention_bias=(True,))
  return {"hidden_act": "silu", "attention_bias": True}


FAMILY = family.Family(
  "qwen2", "Qwen2ForCausalLM", _read, _write, family.PLAIN, gguf="qwen2"
)
