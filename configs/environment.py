"""The section `env` of a configuration: a name and its environment's keys.

Also what a rollout is set to for environments that take their time, a preset of
every task: `--config=configs/own.py:my_module:MyBenchmark,slow_env`.
"""

from collections.abc import Callable, Mapping
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


def slow_env(c: config_dict.ConfigDict) -> None:
  """Environments that answer in 50 ms or more, such as servers and browsers.

  All episodes of an update and of the next one are in progress at once, each
  update's started one rollout early; results do not depend on when environments
  answer. Comes after presets that change the number of episodes. Where groups
  are filtered none can be started early, so the next rollout is played beside
  the update instead.
  """
  rollout: Any = c.rollout
  rollout.one_size = True
  rollout.env_calls = 0
  rollout.refresh = False
  rollout.oversample = 0 if rollout.filter_groups else rollout.tasks
  rollout.ahead = 1 if rollout.filter_groups else 0
  if not rollout.env_workers:
    rollout.env_threads = 2 * rollout.tasks * rollout.group_size


PRESETS: Mapping[str, Callable[[config_dict.ConfigDict], None]] = {
  "slow_env": slow_env
}
