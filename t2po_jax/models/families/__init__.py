"""The supported model families, one file each."""

from collections.abc import Mapping
from typing import Any

from t2po_jax.models import config as config_lib
from t2po_jax.models.families import (
  family,
  gemma2,
  gemma3,
  llama,
  mistral,
  qwen2,
  qwen3,
  qwen3_moe,
  smollm3,
)

FAMILIES: dict[str, family.Family] = {
  each.name: each
  for each in (
    llama.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    qwen3_moe.FAMILY,
    mistral.FAMILY,
    smollm3.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
  )
}


def of(config: config_lib.ModelConfig) -> family.Family:
  """The family of a config.

  Raises:
    ValueError: if the family is unknown.
  """
  return _named(config.family, f"family {config.family!r}")


def _named(name: str, found: str) -> family.Family:
  if name not in FAMILIES:
    raise ValueError(
      f"{found} is not supported; use one of {', '.join(FAMILIES)}"
    )
  return FAMILIES[name]


def read_config(source: Mapping[str, Any]) -> config_lib.ModelConfig:
  """Reads the contents of a Hugging Face `config.json`.

  Args:
    source: the parsed JSON object.

  Returns:
    The config.

  Raises:
    ValueError: if a key is missing, the family is unknown, or a setting is not
      implemented by the decoder.
  """
  name = family.require(source, "model_type")
  return _named(name, f"config.json: model_type {name!r}").read(source)


def write_config(config: config_lib.ModelConfig) -> dict[str, Any]:
  """The inverse of `read_config`.

  Args:
    config: the config; its options must be those of its family.

  Returns:
    The contents of `config.json`.

  Raises:
    ValueError: if the family cannot express the config.
  """
  which = of(config)
  return {
    "architectures": [which.architecture],
    "model_type": which.name,
    **family.write_sizes(config),
    **which.write(config),
  }


def of_gguf(architecture: str) -> family.Family:
  """The family of a GGUF architecture.

  Raises:
    ValueError: if there is none.
  """
  known = {each.gguf: each for each in FAMILIES.values() if each.gguf}
  if architecture not in known:
    raise ValueError(
      f"architecture {architecture!r} is not supported; use one of "
      f"{', '.join(known)}"
    )
  return known[architecture]
