"""Qwen3: queries and keys are normalised per head."""

import dataclasses
from typing import Any

from t2po_jax.models.families import family


def _read(source: family.Source) -> family.ModelConfig:
  family.refuse_other(
    source, {"hidden_act": "silu", "use_sliding_window": False}
  )
  config = family.read_sizes(
    source, family="qwen3", max_positions=32_768, head_width=128
  )
  config = dataclasses.replace(config, qk_norm=True)
  return family.with_bias(source, config)


def _write(config: family.ModelConfig) -> dict[str, Any]:
  biases = (config.attention_bias,)
  family.require_options(
    config, qk_norm=(True,), attention_bias=biases, output_bias=biases
  )
  return {"hidden_act": "silu", "attention_bias": config.attention_bias}


FAMILY = family.Family(
  "qwen3",
  "Qwen3ForCausalLM",
  _read,
  _write,
  family.PLAIN,
  gguf="qwen3",
  gguf_options=lambda metadata, config: {"qk_norm": True},
)
