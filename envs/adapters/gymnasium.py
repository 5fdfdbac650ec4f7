"""Gymnasium environments with text observations, or described in words.

An action is the name of a discrete action, or any text if the action space is
`Text`. The adapter guarantees that `reset(seed=...)` defines a task, so tasks
are reproducible if the environment uses its own generator. It does not know
which actions are admissible (unless all named ones are), or whether the
environment is thread-safe.
"""

import contextlib
import dataclasses
import importlib
import json
from typing import Any

from t2po_jax import keys
from t2po_jax.envs import base, games
from t2po_jax.envs.adapters import seeded


@dataclasses.dataclass(frozen=True)
class GymnasiumSettings(seeded.Settings):
  """The keys of `config.env` for a Gymnasium environment."""

  id: str = keys.key(
    "FrozenLake-v1",
    "Id of a registered environment; `module:Name-v0` imports a module first.",
  )
  options: str = keys.key(
    "", 'Options of `gymnasium.make` as JSON, e.g. `{"is_slippery": false}`.'
  )
  task: str = keys.key(
    "Reach the goal.", "The task in words, as shown by the full wording."
  )


class Gymnasium(seeded.SeededTable):
  """Tasks of one Gymnasium environment; implements `envs.base.Benchmark`."""

  Settings = GymnasiumSettings

  def __init__(self, settings: GymnasiumSettings) -> None:
    """Creates one environment to check that it can be described.

    Raises:
      ValueError: if it cannot be created or described, or has other actions.
    """
    self.game = Play
    try:
      library: Any = importlib.import_module("gymnasium")
    except ImportError:
      raise ValueError(
        "env.name: 'gymnasium' needs the package gymnasium; install the extra "
        "'gymnasium'"
      ) from None
    self._library = library
    try:
      self._options = json.loads(settings.options or "{}")
      if not isinstance(self._options, dict):
        raise ValueError("expected a JSON object")
    except ValueError as error:
      raise ValueError(
        f"env.options: found {settings.options!r}: {error}"
      ) from None
    self.settings = settings
    probe = self.make()
    spaces = library.spaces
    self.names: tuple[str, ...] = ()
    if isinstance(probe.action_space, spaces.Discrete):
      count = int(probe.action_space.n)
      self.names = settings.actions or tuple(map(str, range(count)))
      if len(self.names) != count:
        raise ValueError(
          f"env.actions: found {len(self.names)} names, expected {count}, one "
          f"for each action of {settings.id}"
        )
    elif not isinstance(probe.action_space, spaces.Text):
      raise ValueError(
        f"env.id: {settings.id} has actions of {probe.action_space}; expected "
        "Discrete or Text"
      )
    known = (spaces.Text, spaces.Discrete)
    if not settings.describe and not isinstance(probe.observation_space, known):
      raise ValueError(
        f"env.describe: {settings.id} shows {probe.observation_space}; give "
        "'module:function' that puts it into words: (env, observation) -> str"
      )
    probe.close()
    super().__init__(settings)

  def make(self) -> Any:
    """A new environment of the library."""
    try:
      return self._library.make(self.settings.id, **self._options)
    except (self._library.error.Error, TypeError, ImportError) as error:
      reason = str(error).splitlines()[0]
      raise ValueError(f"env.id: {self.settings.id!r}: {reason}") from None


class Play(games.Game):
  """Episodes of one environment."""

  table: Gymnasium

  def __init__(self, table: Gymnasium) -> None:
    super().__init__(table)
    self._env = table.make()
    self._total = 0.0
    self._last = base.Observation("", "")

  def begin(self, task_id: str) -> base.Observation:
    """Resets the environment with the task's seed."""
    self._total = 0.0
    observation, _ = self._env.reset(seed=seeded.read_seed(task_id))
    return self._see(observation)

  def _see(self, observation: Any) -> base.Observation:
    table = self.table
    self._last = table.see(
      table.settings.task, self._env, observation, table.names
    )
    return self._last

  def act(self, action: str) -> games.Move:
    """Executes a named action, or passes on the text."""
    settings, names = self.table.settings, self.table.names
    if names and action not in names:
      return games.Move(self._last, possible=False)
    observation, reward, ended, cut, info = self._env.step(
      names.index(action) if names else action
    )
    self._total += float(reward)
    won = bool(info.get("is_success", self._total >= settings.success_from))
    return games.Move(
      self._see(observation),
      reward=settings.reward_scale * float(reward),
      done=bool(ended or cut),
      success=won,
    )

  def expert(self, seed: int) -> base.Expert:
    """The function given as `env.expert`: (env, generator) -> action."""
    return self.table.demonstrate(self._env, seed)

  def close(self) -> None:
    """Closes the environment."""
    with contextlib.suppress(Exception):
      self._env.close()
