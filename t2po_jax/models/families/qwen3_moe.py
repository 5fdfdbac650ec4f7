"""Qwen3-MoE: Qwen3 with a mixture of experts in every layer."""

import dataclasses
from typing import Any

from t2po_jax.models.families import family


def _read(source: family.Source) -> family.ModelConfig:
  family.refuse_other(
    source,
    {
      "hidden_act": "silu",
      "use_sliding_window": False,
      "decoder_sparse_step": 1,
      "mlp_only_layers": [],
    },
  )
  config = family.read_sizes(source, family="qwen3_moe", max_positions=32_768)
  # The newer of the two names comes first.
  experts = source.get("num_local_experts") or source.get("num_experts") or 128
  config = dataclasses.replace(
    config,
    qk_norm=True,
    mlp_width=source.get("moe_intermediate_size") or 768,
    experts=experts,
    experts_per_token=source.get("num_experts_per_tok") or 8,
    normalised_routing=bool(source.get("norm_topk_prob", False)),
  )
  return family.with_bias(source, config)


def _write(config: family.ModelConfig) -> dict[str, Any]:
  biases = (config.attention_bias,)
  family.require_options(
    config,
    qk_norm=(True,),
    attention_bias=biases,
    output_bias=biases,
    experts=(config.experts or 1,),
    experts_per_token=(config.experts_per_token,),
    normalised_routing=(True, False),
  )
  return {
    "hidden_act": "silu",
    "attention_bias": config.attention_bias,
    "moe_intermediate_size": config.mlp_width,
    "num_experts": config.experts,
    "num_local_experts": config.experts,
    "num_experts_per_tok": config.experts_per_token,
    "norm_topk_prob": config.normalised_routing,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
  }


def _gguf_options(
  metadata: family.Source, config: family.ModelConfig
) -> dict[str, Any]:
  return {
    "qk_norm": True,
    "mlp_width": metadata["expert_feed_forward_length"],
    "experts": metadata["expert_count"],
    "experts_per_token": metadata["expert_used_count"],
    "normalised_routing": True,
  }


FAMILY = family.Family(
  "qwen3_moe",
  "Qwen3MoeForCausalLM",
  _read,
  _write,
  (*family.EMBEDDINGS, *family.ATTENTION, *family.MLP_NORM, *family.EXPERTS),
  gguf="qwen3moe",
  gguf_options=_gguf_options,
)
