"""Environments: strings in, strings out.

An environment is found by its name: a built-in one, one that an installed
package registers in the entry-point group `t2po_jax.environments`, or
`my_package.my_module:MyBenchmark`. The class has an attribute `Settings`, a
dataclass whose fields are the keys of `config.env`.
"""

import dataclasses
import importlib
from importlib import metadata
import os
import sys
from typing import Any

from t2po_jax import keys
from t2po_jax.envs import base, tool_calls

GROUP = "t2po_jax.environments"

# Name -> module and class. The module is imported on demand, so that a missing
# extra of one environment never breaks another.
BUILT_IN = {
  "toy": "t2po_jax.envs.toy:ToyBenchmark",
  "gridworld": "t2po_jax.envs.gridworld:Gridworld",
  "searchqa": "t2po_jax.envs.searchqa:SearchQA",
  "webshop": "t2po_jax.envs.webshop:WebShop",
  "alfworld": "t2po_jax.envs.alfworld:ALFWorld",
  "sokoban": "t2po_jax.envs.sokoban:Sokoban",
  "gymnasium": "t2po_jax.envs.adapters.gymnasium:Gymnasium",
  "mcp": "t2po_jax.envs.adapters.mcp:Tools",
  "openenv": "t2po_jax.envs.adapters.openenv:OpenEnv",
  "textarena": "t2po_jax.envs.adapters.textarena:TextArena",
}


def known() -> dict[str, str]:
  """Name -> `module:class` of all built-in and installed environments."""
  offered = {
    point.name: point.value for point in metadata.entry_points(group=GROUP)
  }
  return offered | BUILT_IN


def find(name: str) -> type[base.Benchmark]:
  """The class of an environment.

  Args:
    name: of a built-in or installed environment, or `module:class`; a module
      is also looked for in the working directory.

  Raises:
    ValueError: if there is none.
  """
  place = name
  if ":" not in name:
    places = known()
    if name not in places:
      raise ValueError(
        f"env.name: unknown environment {name!r}{keys.nearest(name, places)}; "
        "your own is 'my_package.my_module:MyBenchmark'"
      )
    place = places[name]
  elif os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())
  module, _, attribute = place.partition(":")
  try:
    benchmark = getattr(importlib.import_module(module), attribute)
  except ImportError as error:
    raise ValueError(
      f"env.name: {name!r} cannot be imported: {error}"
    ) from None
  except AttributeError:
    raise ValueError(
      f"env.name: {name!r}: module {module} has no {attribute!r}"
    ) from None
  section = getattr(benchmark, "Settings", None)
  if not isinstance(section, type) or not dataclasses.is_dataclass(section):
    raise ValueError(
      f"env.name: {name!r} has no dataclass `Settings` with its keys"
    )
  return benchmark


def settings(name: str) -> type:
  """The dataclass whose fields are an environment's keys; see `find`."""
  return find(name).Settings


def make(name: str, **values: Any) -> base.Benchmark:
  """Builds a benchmark by name.

  Args:
    name: see `find`.
    **values: settings by key (`config.env` without `name`); the others have
      their defaults.

  Raises:
    ValueError: if the name or a key is unknown, or a value is out of bounds.
  """
  benchmark = find(name)
  fields = [field.name for field in dataclasses.fields(benchmark.Settings)]
  for key in values:
    if key not in fields:
      raise ValueError(
        f"env.{key}: {name} has no such key{keys.nearest(key, fields)}"
      )
  made = benchmark(benchmark.Settings(**values))
  if values.get("grammar") == tool_calls.NAME:
    return tool_calls.ToolCalls(made)
  return made
