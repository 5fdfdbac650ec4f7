"""FrozenLake for tiny models: few words, and an expert that knows the map.

Functions for `env.describe` and `env.expert`, for TextArena's game and for
Gymnasium's.
"""

import collections
import random
from typing import Any

MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


def _read(env: Any) -> tuple[list[str], tuple[int, int], tuple[int, int]]:
  """Extracts rows (`H` for holes), player and goal, for either library."""
  inner = env.unwrapped if hasattr(env, "unwrapped") else env
  if hasattr(inner, "desc"):
    rows = ["".join(cell.decode() for cell in row) for row in inner.desc]
    player = divmod(int(inner.s), len(rows[0]))
    goal = next((r, row.index("G")) for r, row in enumerate(rows) if "G" in row)
    return rows, player, goal
  state = inner.state.game_state
  rows = ["".join(cell or " " for cell in row) for row in state["grid"]]
  return rows, tuple(state["player_pos"]), tuple(state["goal_pos"])


def describe(env: Any, observation: Any) -> tuple[str, tuple[str, ...]]:
  """All positions, by row and column, and the moves that stay on the map."""
  del observation
  rows, player, goal = _read(env)
  holes = " , ".join(
    f"{r} {c}"
    for r, row in enumerate(rows)
    for c, cell in enumerate(row)
    if cell == "H"
  )
  text = f"holes {holes} goal {goal[0]} {goal[1]} me {player[0]} {player[1]}"
  inside = tuple(
    name
    for name, (dr, dc) in MOVES.items()
    if 0 <= player[0] + dr < len(rows) and 0 <= player[1] + dc < len(rows[0])
  )
  return text, inside


def expert(env: Any, draw: random.Random) -> str:
  """The first step of a shortest path around the holes."""
  rows, player, goal = _read(env)
  first: dict[tuple[int, int], str] = {player: ""}
  queue = collections.deque([player])
  while queue:
    here = queue.popleft()
    if here == goal:
      return first[here] or draw.choice(list(MOVES))
    for name, (dr, dc) in MOVES.items():
      r, c = there = here[0] + dr, here[1] + dc
      inside = 0 <= r < len(rows) and 0 <= c < len(rows[0])
      if inside and there not in first and rows[r][c] != "H":
        first[there] = first[here] or name
        queue.append(there)
  return draw.choice(list(MOVES))
