"""A solver, and an expert that plays its solutions.

The solver is A* over single moves, so its solutions are optimal. The expert
replans at every turn; like the experts of the other benchmarks it hesitates,
and each needless round of its thought may end in a wrong move.
"""

from collections.abc import Callable
import heapq
import itertools
import random
from types import ModuleType

from t2po_jax.envs.sokoban import engine

# States to expand before a level counts as unsolvable.
_MOST_STATES = 50_000
_MOST_ROUNDS = 6


def solve(level: engine.Level, state: engine.State) -> tuple[str, ...] | None:
  """A shortest solution; None if there is none, or it is too hard to find."""

  def estimate(state: engine.State) -> int:
    return sum(
      min(abs(r - y) + abs(c - x) for y, x in level.goals)
      for r, c in state.boxes
    )

  order = itertools.count()
  queue: list[tuple[int, int, engine.State, tuple[str, ...]]] = [
    (estimate(state), next(order), state, ())
  ]
  best = {state: 0}
  while queue:
    _, _, here, path = heapq.heappop(queue)
    if engine.solved(level, here):
      return path
    if len(path) > best[here]:
      continue
    if len(best) > _MOST_STATES:
      return None
    for direction in engine.MOVES:
      there = engine.move(level, here, direction)
      if there == here or best.get(there, 1 << 30) <= len(path) + 1:
        continue
      pushed = there.boxes - here.boxes
      if any(engine.cornered(level, cell) for cell in pushed):
        continue
      best[there] = len(path) + 1
      heapq.heappush(
        queue,
        (
          len(path) + 1 + estimate(there),
          next(order),
          there,
          (*path, direction),
        ),
      )
  return None


def next_push(
  level: engine.Level, state: engine.State, path: tuple[str, ...]
) -> tuple[engine.Cell, str] | None:
  """The first push of a path: the player's cell and the direction."""
  for direction in path:
    there = engine.move(level, state, direction)
    if there.boxes != state.boxes:
      return state.player, direction
    state = there
  return None


class ScriptedExpert:
  """Plays shortest solutions, with detours where it is in doubt."""

  def __init__(
    self,
    level: engine.Level,
    read: Callable[[], engine.State],
    wording: ModuleType,
    *,
    hesitation: float,
    doubt: float,
    seed: int,
  ) -> None:
    """Binds the expert to a game.

    Args:
      level: the level.
      read: returns the current state.
      wording: the module that words the responses.
      hesitation: mean number of needless rounds per thought, >= 0.
      doubt: probability per round of a random move.
      seed: seed of the expert's draws.
    """
    self._level = level
    self._read = read
    self._wording = wording
    self._hesitation = hesitation
    self._doubt = doubt
    self._random = random.Random(f"{seed}/sokoban")

  def respond(self) -> str:
    """The response to the current state."""
    state, draw = self._read(), self._random
    possible = engine.possible(self._level, state)
    path = solve(self._level, state)
    if path:
      direction = path[0]
      push = next_push(self._level, state, path)
    else:
      direction, push = draw.choice(possible or tuple(engine.MOVES)), None
    thoughts = [self._wording.plan(push, direction)]
    continued = self._hesitation / (1.0 + self._hesitation)
    for _ in range(_MOST_ROUNDS):
      if draw.random() >= continued:
        break
      if draw.random() < self._doubt:
        direction = draw.choice(possible or tuple(engine.MOVES))
        push = None
      thoughts += [self._wording.AGAIN, self._wording.plan(push, direction)]
    return self._wording.respond(thoughts, direction)
