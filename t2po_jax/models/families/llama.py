"""Llama, and models with its architecture: SmolLM2, TinyLlama, many others."""

from typing import Any

from t2po_jax.models.families import family


def _read(source: family.Source) -> family.ModelConfig:
  family.refuse_other(source, {"hidden_act": "silu"})
  config = family.read_sizes(source, family="llama", max_positions=2048)
  return family.with_bias(source, config)


def _write(config: family.ModelConfig) -> dict[str, Any]:
  biases = (config.attention_bias,)
  family.require_options(config, attention_bias=biases, output_bias=biases)
  return {"hidden_act": "silu", "attention_bias": config.attention_bias}


FAMILY = family.Family(
  "llama",
  "LlamaForCausalLM",
  _read,
  _write,
  family.PLAIN,
  gguf="llama",
  from_gguf=family.deinterleave,
)
