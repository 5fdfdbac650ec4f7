"""The compact wording: few words, for tiny models trained from scratch.

Cells are given by row and column. A thought names the next push, its cell and
direction, and then the step towards it.
"""

from collections.abc import Sequence

from t2po_jax.envs import prompts
from t2po_jax.envs.sokoban import engine

TASK = "sokoban"
CLOSING = "</think><action>"
AGAIN = "again"


def _list(cells: frozenset[engine.Cell]) -> str:
  return " , ".join(f"{row} {column}" for row, column in sorted(cells))


def show(level: engine.Level, state: engine.State) -> str:
  """Where everything is, except the outer walls."""
  inside = frozenset(
    (row, column)
    for row, column in level.walls
    if 0 < row < level.rows - 1 and 0 < column < level.columns - 1
  )
  parts = [f"wall {_list(inside)}"] if inside else []
  parts.append(f"goal {_list(level.goals)}")
  parts.append(f"box {_list(state.boxes)}")
  parts.append(f"me {state.player[0]} {state.player[1]}")
  return " ".join(parts)


def plan(push: tuple[engine.Cell, str] | None, direction: str) -> str:
  """The thought behind a move."""
  if push is None:
    return f"go {direction}"
  (row, column), way = push
  return f"push {way} from {row} {column} go {direction}"


def respond(thoughts: Sequence[str], direction: str) -> str:
  """A well-formed response; every word follows a space."""
  words = " ".join(thoughts)
  return f"<think> {words}</think><action> {direction}</action>"


def render(view: prompts.View) -> list[prompts.Message]:
  """The last moves, and where everything is."""
  parts = [f"did {done or 'nothing'}" for _, done in view.memory]
  parts.append(view.observation)
  return [{"role": "user", "content": " ".join(parts)}]
