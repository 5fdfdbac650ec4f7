"""The common part of game adapters: tasks are seeds, hooks are functions.

What a library lacks can be given as functions, by `module:function`: `describe`
puts an observation into words, `expert` returns the next action for a cold
start; both get the library's own object.
"""

from collections.abc import Callable
import dataclasses
import importlib
import os
import random
import sys
from typing import Any

from t2po_jax import keys
from t2po_jax.envs import base, games, prompts
from t2po_jax.envs.adapters.wordings import compact, full

WORDINGS = {"compact": compact, "full": full}
# Seeds to try per requested task when equal openings are left out.
_PATIENCE = 20


@dataclasses.dataclass(frozen=True)
class Settings(base.Settings):
  """The keys that all adapters share."""

  wording: str = base.wording_key(*WORDINGS, default="full")
  describe: str = keys.key(
    "",
    "`module:function` that puts an observation into words and may list the "
    "admissible actions: returns text, or (text, actions). Empty: the "
    "library's text.",
  )
  expert: str = keys.key(
    "",
    "`module:function` that returns the next action for demonstrations; empty: "
    "none.",
  )
  actions: tuple[str, ...] = keys.key(
    (),
    "The actions to list as admissible, where the library lists none.",
  )
  max_turns: int = keys.key(20, "Turns until an episode ends.", least=1)
  reward_scale: float = keys.key(1.0, "Factor on the library's rewards.")
  success_from: float = keys.key(
    1.0, "Unscaled return from which on an episode is a success."
  )
  first_seed: int = keys.key(0, "The first seed.", least=0)
  distinct: bool = keys.key(
    False,
    "Whether to skip seeds whose first observation equals that of another, so "
    "that no level is in two splits; not for games that hide the difference.",
  )
  train_tasks: int = keys.key(500, "Seeds to train on.", least=1)
  valid_tasks: int = keys.key(50, "Seeds to validate on.", least=1)
  test_tasks: int = keys.key(100, "Seeds to test on.", least=1)
  expert_hesitation: float = base.hesitation_key(0.0)
  expert_doubt: float = base.doubt_key(
    0.0, "to choose any of `actions` instead"
  )


def load_function(place: str, key: str) -> Callable[..., Any]:
  """Imports a function by `module:function`.

  Args:
    place: `module:function`; the working directory is searched as well.
    key: the configuration key, for error messages.

  Raises:
    ValueError: if there is no such function.
  """
  module, colon, name = place.partition(":")
  if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())
  try:
    if not colon:
      raise ImportError("expected module:function")
    function = getattr(importlib.import_module(module), name, None)
  except ImportError as error:
    raise ValueError(f"{key}: found {place!r}: {error}") from None
  if not callable(function):
    raise ValueError(f"{key}: found {place!r}: module has no such function")
  return function


class SeededTable(games.Table):
  """A benchmark whose task ids are `seed-NUMBER`.

  Attributes:
    describe: puts an observation into words, or None.
    choose: the expert's function, or None.
  """

  # Thread safety of other libraries is unknown; processes always work.
  threadsafe = False

  def __init__(self, settings: Any) -> None:
    """Imports the functions and lists the seeds.

    Raises:
      ValueError: if a function cannot be found, or too few seeds differ.
    """
    self.settings = settings
    self.max_turns = settings.max_turns
    self.wording = WORDINGS[settings.wording]
    self.grammar = prompts.Grammar(("action",), self.wording.CLOSING)
    self.describe = self.choose = None
    if settings.describe:
      self.describe = load_function(settings.describe, "env.describe")
    if settings.expert:
      self.choose = load_function(settings.expert, "env.expert")
    sizes = base.split_sizes(settings)
    seeds = self._list_seeds(sum(sizes.values()))
    self.splits, start = {}, 0
    for name, size in sizes.items():
      part = seeds[start : start + size]
      self.splits[name] = tuple(f"seed-{seed}" for seed in part)
      start += size

  def _list_seeds(self, count: int) -> list[int]:
    """The seeds of all splits; also checks that the first can be played."""
    game = self.env()
    try:
      return self._look_at_seeds(game, count)
    finally:
      game.close()

  def _look_at_seeds(self, game: games.Game, count: int) -> list[int]:
    """The seeds; only ones with different openings if so configured."""
    first = self.settings.first_seed
    try:
      opening = game.begin(f"seed-{first}")
    except base.EnvError as error:
      raise ValueError(
        f"env: the first task cannot be played: {error}"
      ) from None
    if not self.settings.distinct:
      return list(range(first, first + count))
    openings = {(opening.task, opening.text): first}
    for seed in range(first + 1, first + _PATIENCE * count):
      if len(openings) == count:
        break
      opening = game.begin(f"seed-{seed}")
      openings.setdefault((opening.task, opening.text), seed)
    if len(openings) < count:
      raise ValueError(
        f"env.train_tasks: {count} different tasks in all splits asked for, "
        f"found {len(openings)} openings; ask for fewer, or set "
        "env.distinct=False"
      )
    return list(openings.values())

  def see(
    self, task: str, env: Any, shown: Any, actions: tuple[str, ...]
  ) -> base.Observation:
    """Puts an observation into words.

    Args:
      task: the task in words.
      env: the library's own environment.
      shown: the library's observation.
      actions: the admissible actions, unless `describe` lists them.
    """
    text: Any = shown
    if self.describe is not None:
      text = self.describe(env, shown)
      if isinstance(text, tuple):
        text, actions = text
    return base.Observation(task, str(text), tuple(actions))

  def demonstrate(self, env: Any, seed: int) -> "Demonstrator":
    """An expert that calls the function given as `env.expert`.

    Args:
      env: the library's own environment.
      seed: seed of the expert's draws.

    Raises:
      NotImplementedError: if no function is given.
    """
    choose = self.choose
    if choose is None:
      raise NotImplementedError("env.expert: found none")
    return Demonstrator(self, lambda draw: choose(env, draw), seed)

  def render(self, view: prompts.View) -> list[prompts.Message]:
    """The prompt of a turn in the chosen wording."""
    return self.wording.render(view)


def read_seed(task_id: str) -> int:
  """The seed in a task id."""
  return int(task_id.removeprefix("seed-"))


class Demonstrator:
  """An expert defined by a function; hesitates and errs as configured."""

  def __init__(
    self,
    table: SeededTable,
    choose: Callable[[random.Random], str],
    seed: int,
  ) -> None:
    """Binds the expert.

    Args:
      table: the benchmark, whose settings define hesitation and errors.
      choose: returns the right action; gets a random generator.
      seed: seed of its draws.
    """
    self._table = table
    self._choose = choose
    self._random = random.Random(f"{seed}/expert")
    self._script = games.Scripted(self._decide, table.grammar)

  def _decide(self) -> tuple[str, str]:
    settings, draw = self._table.settings, self._random
    action = self._choose(draw)
    thoughts = [f"go {action}"]
    hesitation = settings.expert_hesitation
    while len(thoughts) < 8 and draw.random() < hesitation / (1 + hesitation):
      if settings.actions and draw.random() < settings.expert_doubt:
        action = draw.choice(settings.actions)
      thoughts.append(f"again go {action}")
    return " ".join(thoughts), action

  def respond(self) -> str:
    """The response to the current state."""
    return self._script.respond()
