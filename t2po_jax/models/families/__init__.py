"""The supported model families, one file each."""

from collections.abc import Iterable, Mapping
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

WRAPPERS: dict[str, family.Wrapper] = {
  each.name: each for each in (gemma3.WRAPPER,)
}


def of(config: config_lib.ModelConfig) -> family.Family:
  """The family of a config.

  Raises:
    ValueError: if the family is unknown.
  """
  return _named(config.family, f"family {config.family!r}")


def _named(
  name: str, found: str, known: Iterable[str] = FAMILIES
) -> family.Family:
  if name not in FAMILIES:
    raise ValueError(f"{found} is not supported; use one of {', '.join(known)}")
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
  wrapper = WRAPPERS.get(name)
  if wrapper is not None:
    return FAMILIES[wrapper.text].read(wrapper.unwrap(source))
  known = [*FAMILIES, *WRAPPERS]
  return _named(name, f"config.json: model_type {name!r}", known).read(source)


def rename(source: Mapping[str, Any], tensor: str) -> str | None:
  """The name that a tensor of a checkpoint has in the family's table.

  Args:
    source: contents of its `config.json`.
    tensor: the name in the file.

  Returns:
    The name; None for what is no part of the model of the text.
  """
  wrapper = WRAPPERS.get(source.get("model_type", ""))
  return tensor if wrapper is None else wrapper.rename(tensor)


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
