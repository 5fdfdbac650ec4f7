"""The common part of games, so that a new one only defines its rules.

An action is one piece of text per turn. `Game` extracts it from the response,
counts turns, ends the episode and rejects steps after the end; a subclass
defines how an episode begins and what an action does. `Table` is the benchmark
around it: tasks, splits, prompts.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import random
from typing import Any

from t2po_jax.envs import base, prompts


@dataclasses.dataclass(frozen=True)
class Move:
  """The effect of an action.

  Attributes:
    observation: the observation after it.
    reward: the reward of the move.
    done: whether the game has ended.
    possible: whether the action was possible.
    success: whether the game is won.
    info: further metrics by name.
  """

  observation: base.Observation
  reward: float = 0.0
  done: bool = False
  possible: bool = True
  success: bool = False
  info: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Scripted:
  """An expert defined by a function that returns the next action."""

  def __init__(
    self,
    choose: Callable[[], str | tuple[str, str]],
    grammar: prompts.Grammar,
  ) -> None:
    """Binds the function.

    Args:
      choose: returns the action, or (thought, action).
      grammar: the format of the response.
    """
    self._choose = choose
    self._grammar = grammar

  def respond(self) -> str:
    """A well-formed response; every word follows a space."""
    chosen = self._choose()
    thought, action = (chosen, chosen) if isinstance(chosen, str) else chosen
    tag = self._grammar.actions[0]
    between = self._grammar.closing.removeprefix("</think>")
    between = between.removesuffix(f"<{tag}>")
    space = "" if between else " "
    return (
      f"<think>{space}{thought}</think>{between}<{tag}>{space}{action}</{tag}>"
    )


def cut_splits(
  tasks: Sequence[str], sizes: Mapping[str, int] | None = None
) -> dict[str, tuple[str, ...]]:
  """Shuffles tasks with the fixed seed and divides them into splits.

  Args:
    tasks: all task ids.
    sizes: number of tasks per split; by default a fifth is `test`, a tenth
      `valid` (at least one each) and the rest `train`.

  Raises:
    ValueError: if there are not enough tasks.
  """
  if sizes is None:
    valid, test = max(len(tasks) // 10, 1), max(len(tasks) // 5, 1)
    sizes = {
      "valid": valid,
      "test": test,
      "train": max(len(tasks) - valid - test, 1),
    }
  if sum(sizes.values()) > len(tasks):
    raise ValueError(
      f"splits: {sum(sizes.values())} tasks asked for, there are {len(tasks)}"
    )
  shuffled = list(tasks)
  random.Random(base.SPLIT_SEED).shuffle(shuffled)
  splits, start = {}, 0
  for name, size in sizes.items():
    splits[name] = tuple(shuffled[start : start + size])
    start += size
  return splits


class Table(base.Benchmark):
  """A benchmark whose episodes are games; a subclass defines tasks and game.

  Attributes:
    settings: its settings.
    game: the class of its games.
  """

  grammar = prompts.Grammar(closing="</think><action>")
  threadsafe = True
  game: "type[Game]"

  def __init__(self, settings: Any) -> None:
    """Creates the splits; a game lasts at most `settings.max_turns` turns."""
    self.settings = settings
    self.max_turns = settings.max_turns
    self.splits = cut_splits(self.list_tasks())

  def list_tasks(self) -> Sequence[str]:
    """All task ids, in a fixed order."""
    raise NotImplementedError(f"{type(self).__name__} lists no tasks")

  def env(self) -> "Game":
    """A new game."""
    return self.game(self)

  def render(self, view: prompts.View) -> list[prompts.Message]:
    """The task, the last actions and the observation, in few words."""
    did = [f"did {action or 'nothing'}" for _, action in view.memory]
    text = " ".join((view.task, *did, view.observation))
    return [{"role": "user", "content": text}]


class Game(base.Env):
  """An environment for games; a subclass implements `begin` and `act`.

  Attributes:
    table: the benchmark.
    task_id: the current task.
    turn: the number of turns played.
    over: whether the episode has ended.
  """

  def __init__(self, table: Any) -> None:
    self.table = table
    self.task_id = ""
    self.turn = 0
    self.over = True

  def begin(self, task_id: str) -> base.Observation:
    """Sets up the game of a task."""
    raise NotImplementedError(f"{type(self).__name__} cannot begin")

  def act(self, action: str) -> Move:
    """Executes an action, which may be any text, or empty."""
    raise NotImplementedError(f"{type(self).__name__} cannot act")

  def reset(self, task_id: str) -> base.Observation:
    """Starts a game; see `envs.base.Env.reset`."""
    if not any(task_id in tasks for tasks in self.table.splits.values()):
      raise KeyError(f"{type(self).__name__}: unknown task {task_id!r}")
    self.over = True  # If `begin` fails, there is no running episode.
    first = self.begin(task_id)
    self.task_id, self.turn, self.over = task_id, 0, False
    return first

  def step(self, response: str) -> base.StepResult:
    """Plays one move; see `envs.base.Env.step`."""
    if self.over:
      raise RuntimeError(
        f"{type(self).__name__}: the episode is over; call reset first"
      )
    parsed = prompts.parse(response, self.table.grammar)
    try:
      move = self.act(parsed.content)
    except base.EnvError:
      self.over = True
      raise
    self.turn += 1
    self.over = move.done or self.turn >= self.table.max_turns
    return base.StepResult(
      observation=move.observation,
      action=parsed.content,
      reward=move.reward,
      done=self.over,
      format_valid=parsed.format_valid,
      action_valid=parsed.format_valid and move.possible,
      success=move.success,
      info=move.info,
    )

  def script(self, choose: Callable[[], Any]) -> Scripted:
    """An expert defined by a function; see `Scripted`."""
    return Scripted(choose, self.table.grammar)
