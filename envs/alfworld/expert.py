"""A scripted agent with bad habits to unlearn.

It works with any engine: it decides from the list of admissible commands and
from its own past commands. In the mode `explore` it searches by visiting the
receptacles in the order of that list, starting from where it is, and opens what
is closed, so the next step can be inferred from a prompt that shows two past
turns. In the mode `walkthrough` it knows where everything is.

Two knobs degrade it. `hesitation` makes it repeat its thought word for word
before it acts; the repetition carries no information, and is what a thinking
intervention should cut. `doubt` makes it change its mind in such a round and do
something else. A policy cloned from the degraded agent hesitates and fails in
the same way.
"""

from collections.abc import Sequence
import dataclasses
import random
import re
from typing import Protocol

from t2po_jax.envs.alfworld import engine, problem

MODES = ("explore", "walkthrough")
# The most needless rounds per turn, so that responses stay bounded.
MAX_ROUNDS = 3
# More steps than any sensible solution has.
_MAX_STEPS = 200
_PUT_DOWN = re.compile(r"(?:move (.+) to|put (.+) in/on) (.+)")
_REACHABLE = re.compile(r"take (.+) from .+|use (.+)")
_IDLE = ("look", "inventory", "help", "examine ")


class Wording(Protocol):
  """The parts of a wording that the agent uses."""

  AGAIN: str
  SEPARATOR: str

  def look(self, seen: Sequence[str]) -> str:
    """What is in sight."""
    ...

  def plan(self, aim: str, thing: str, command: str) -> str:
    """The thought behind a command."""
    ...

  def think(self, thought: str) -> str:
    """A thinking segment."""
    ...

  def act(self, command: str) -> str:
    """An action as the agent writes it."""
    ...


@dataclasses.dataclass(frozen=True)
class Intention:
  """What to do next and why.

  Attributes:
    aim: `find`, `clean`, `heat`, `cool`, `put`, `light` or `drop`.
    thing: the object concerned, e.g. "mug" or, once in the hand, "mug 1".
    command: the command.
  """

  aim: str
  thing: str
  command: str


def _number(name: str) -> tuple[str, int]:
  """A name as kind and number, for sorting."""
  kind, _, number = name.rpartition(" ")
  return kind, int(number)


def put_down(command: str) -> tuple[str, str] | None:
  """The object and receptacle of a command that puts something down."""
  match = _PUT_DOWN.fullmatch(command)
  return (match[1] or match[2], match[3]) if match else None


def find_reachable(admissible: Sequence[str]) -> list[str]:
  """Names of what the commands could take or use, in their order."""
  matches = [_REACHABLE.fullmatch(command) for command in admissible]
  return [match[1] or match[2] for match in matches if match]


class Decider:
  """Chooses the next command of a game."""

  def __init__(
    self,
    goal: problem.Goal,
    receptacles: Sequence[str],
    informant: engine.Twin | None,
  ) -> None:
    """Binds the decider to a game.

    Args:
      goal: the goal of the game.
      receptacles: the names of all receptacles.
      informant: a twin in the same state, which knows where things are; None to
        explore.
    """
    self._goal = goal
    self._receptacles = frozenset(receptacles)
    self._informant = informant
    targets = sorted(
      (name for name in receptacles if _number(name)[0] == goal.target),
      key=_number,
    )
    self._target = targets[0] if targets else ""

  def decide(self, admissible: Sequence[str], trace: list[str]) -> Intention:
    """The next command.

    Args:
      admissible: the admissible commands.
      trace: the commands executed so far, oldest first.

    Returns:
      What to do, always one of `admissible`.
    """
    goal, held = self._goal, self._find_held(admissible)
    if not held:
      return Intention("find", goal.object, self._seek(admissible, trace))
    if _number(held)[0] != goal.object:
      return Intention("drop", held, self._drop(admissible, trace))
    if goal.task_type == problem.LOOK:
      return Intention("light", held, self._light(admissible, trace))
    if goal.task_type in problem.TOOLS:
      verb, tool = problem.TOOLS[goal.task_type]
      if not self._is_treated(verb, held, trace):
        return Intention(verb, held, self._treat(admissible, verb, tool))
    return Intention("put", held, self._deliver(admissible, held, trace))

  def _find_held(self, admissible: Sequence[str]) -> str:
    """The object in the hand, the only one that can be examined."""
    for command in admissible:
      name = command.removeprefix("examine ")
      if name != command and name not in self._receptacles:
        return name
    return ""

  def _is_treated(self, verb: str, held: str, trace: list[str]) -> bool:
    """Whether the object was treated since it was taken."""
    for command in reversed(trace):
      if command.startswith(f"take {held} "):
        return False
      if command.startswith(f"{verb} {held} "):
        return True
    return False

  def _seek(self, admissible: Sequence[str], trace: list[str]) -> str:
    """Looks for the object of the task while nothing is held."""
    goal = self._goal
    for command in admissible:
      match = re.fullmatch(r"take (.+) from (.+)", command)
      if match and _number(match[1])[0] == goal.object:
        if goal.task_type != problem.TWO or match[2] != self._target:
          return command
    if self._informant is None:
      return self._explore(admissible, trace)
    able = {
      problem.CLEAN: "cleanable",
      problem.HEAT: "heatable",
      problem.COOL: "coolable",
    }.get(goal.task_type, "pickupable")
    homes = [
      receptacle
      for _, receptacle in self._informant.locate(goal.object, able)
      if goal.task_type != problem.TWO or receptacle != self._target
    ]
    return self._approach(admissible, trace, homes)

  def _light(self, admissible: Sequence[str], trace: list[str]) -> str:
    """Looks for the lamp and switches it on."""
    for command in admissible:
      if command.startswith(f"use {self._goal.target} "):
        return command
    if self._informant is None:
      return self._explore(admissible, trace)
    lamps = self._informant.locate(self._goal.target, "toggleable")
    return self._approach(admissible, trace, [home for _, home in lamps])

  def _treat(self, admissible: Sequence[str], verb: str, tool: str) -> str:
    """Goes to the tool and uses it."""
    for start in (f"{verb} ", f"go to {tool} "):
      for command in admissible:
        if command.startswith(start):
          return command
    return admissible[0]

  def _deliver(
    self, admissible: Sequence[str], held: str, trace: list[str]
  ) -> str:
    """Brings the object to its target."""
    for command in admissible:
      if put_down(command) == (held, self._target):
        return command
    for command in (f"open {self._target}", f"go to {self._target}"):
      if command in admissible:
        return command
    return self._next_stop(admissible, trace)

  def _drop(self, admissible: Sequence[str], trace: list[str]) -> str:
    """Puts down an object that the task does not need."""
    for command in admissible:
      if put_down(command):
        return command
    return self._explore(admissible, trace)

  def _approach(
    self, admissible: Sequence[str], trace: list[str], homes: list[str]
  ) -> str:
    """Goes to the first of some receptacles and opens it."""
    for start in ("open", "go to"):
      for home in homes:
        if f"{start} {home}" in admissible:
          return f"{start} {home}"
    return self._next_stop(admissible, trace)

  def _explore(self, admissible: Sequence[str], trace: list[str]) -> str:
    """Opens what is closed here, or moves on."""
    for command in admissible:
      if command.startswith("open "):
        return command
    return self._next_stop(admissible, trace)

  def _next_stop(self, admissible: Sequence[str], trace: list[str]) -> str:
    """Goes to the receptacle after the present one in the sorted list."""
    stops = sorted(c for c in admissible if c.startswith("go to "))
    visits = [c for c in trace if c.startswith("go to ")]
    if not stops:
      return admissible[0]
    later = [stop for stop in stops if visits and stop > visits[-1]]
    return later[0] if later else stops[0]


def solve(board: engine.Board) -> tuple[str, ...]:
  """A solution of a game.

  Args:
    board: the game.

  Returns:
    The commands; empty if none was found.
  """
  player = engine.Twin(board)
  receptacles = [board.names[receptacle] for receptacle in board.receptacles]
  decider = Decider(board.game.goal, receptacles, player)
  trace: list[str] = []
  while not player.won:
    if len(trace) == _MAX_STEPS:
      return ()
    command = decider.decide(player.admissible, trace).command
    player.step(command)
    trace.append(command)
  return tuple(trace)


class Episode(Protocol):
  """What the expert sees of the current episode.

  Attributes:
    trace: the commands executed so far.
  """

  trace: list[str]

  @property
  def admissible(self) -> Sequence[str]:
    """The admissible commands."""
    ...


class ScriptedExpert:
  """Plays an episode; see `envs.base.Expert`."""

  def __init__(
    self,
    episode: Episode,
    decider: Decider,
    wording: Wording,
    *,
    hesitation: float,
    doubt: float,
    seed: int,
  ) -> None:
    """Binds the expert to the current episode.

    Args:
      episode: the episode.
      decider: chooses the commands.
      wording: the module that words the episode.
      hesitation: mean number of needless rounds per turn, >= 0; the number
        is geometric, truncated at `MAX_ROUNDS`.
      doubt: probability per round to change its mind, in [0, 1].
      seed: seed of the expert's draws.
    """
    self._episode = episode
    self._decider = decider
    self._wording = wording
    self._hesitation = hesitation
    self._doubt = doubt
    self._random = random.Random(seed)

  def respond(self) -> str:
    """The response to the episode's current state."""
    wording, admissible = self._wording, self._episode.admissible
    intention = self._decider.decide(admissible, self._episode.trace)
    aim, thing = intention.aim, intention.thing
    line = wording.plan(aim, thing, intention.command)
    thought = [wording.look(find_reachable(admissible)), line]
    continued = self._hesitation / (1.0 + self._hesitation)
    for _ in range(MAX_ROUNDS):
      if self._random.random() >= continued:
        break
      thought.append(wording.AGAIN)
      if self._random.random() < self._doubt:
        command = self._derail(intention.command)
        thought.append(wording.plan(aim, thing, command))
        return self._compose(thought, command)
      thought.append(line)
    return self._compose(thought, intention.command)

  def _derail(self, right: str) -> str:
    """Another admissible command that changes something."""
    wrong = [
      command
      for command in self._episode.admissible
      if command != right and not command.startswith(_IDLE)
    ]
    return self._random.choice(wrong) if wrong else right

  def _compose(self, thought: list[str], command: str) -> str:
    """The words of a response."""
    wording = self._wording
    segment = wording.think(" ".join(thought))
    return segment + wording.SEPARATOR + wording.act(command)
