"""The section `env` of a configuration: a name and its environment's keys."""

import dataclasses
from typing import Any

from ml_collections import config_dict

from t2po_jax import envs, keys


def section(name: str, **changes: Any) -> config_dict.ConfigDict:
  """The section `env` with every key of an environment.

  Args:
    name: of a built-in or installed environment, or `module:class`.
    **changes: values that differ from the environment's own defaults.

  Raises:
    ValueError: if the name or a key is unknown.
  """
  fields = dataclasses.fields(envs.settings(name))
  defaults = {field.name: field.default for field in fields}
  for key in changes:
    if key not in defaults:
      raise ValueError(
        f"env.{key}: {name} has no such key{keys.nearest(key, defaults)}"
      )
  return config_dict.ConfigDict({"name": name, **defaults, **changes})
