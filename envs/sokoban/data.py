"""Levels: generated from a seed, solvable, each in one split only."""

from collections.abc import Iterator, Mapping
import itertools
import random
from typing import Any

from t2po_jax.envs import base
from t2po_jax.envs.sokoban import engine, expert

# Attempts per requested level before giving up on the settings.
_PATIENCE = 50


def draw_levels(
  seed: int,
  *,
  size: int,
  boxes: int,
  walls: int,
  moves: tuple[int, int],
) -> Iterator[str | None]:
  """Generates levels endlessly; yields None for every failed attempt.

  Args:
    seed: seed of the generator.
    size: rows and columns, including the outer walls.
    boxes: number of boxes, and of goals.
    walls: maximum number of inner walls; their number is uniform.
    moves: least and most moves of the shortest solution.
  """
  random_ = random.Random(f"{base.SPLIT_SEED}/sokoban/{seed}")
  inner = range(1, size - 1)
  inside = [(row, column) for row in inner for column in inner]
  around = frozenset(
    (row, column)
    for row in range(size)
    for column in range(size)
    if row in (0, size - 1) or column in (0, size - 1)
  )
  while True:
    blocks = random_.randint(0, walls)
    cells = random_.sample(inside, blocks + 2 * boxes + 1)
    level = engine.Level(
      rows=size,
      columns=size,
      walls=around | frozenset(cells[:blocks]),
      goals=frozenset(cells[blocks : blocks + boxes]),
    )
    state = engine.State(cells[-1], frozenset(cells[blocks + boxes : -1]))
    solution = expert.solve(level, state)
    if solution is None or not moves[0] <= len(solution) <= moves[1]:
      yield None
    else:
      yield "/".join(engine.draw(level, state))


def draw_splits(
  seed: int, sizes: Mapping[str, int], **options: Any
) -> dict[str, tuple[str, ...]]:
  """Different levels for every split; the levels are the task ids.

  Args:
    seed: seed of the generator.
    sizes: number of levels per split.
    **options: see `draw_levels`.

  Raises:
    ValueError: if there are not enough different levels.
  """
  wanted = sum(sizes.values())
  distinct: dict[str, None] = {}
  drawn = draw_levels(seed, **options)
  for level in itertools.islice(drawn, _PATIENCE * wanted):
    if level is not None:
      distinct[level] = None
      if len(distinct) == wanted:
        break
  else:
    raise ValueError(
      f"env.train_tasks: {wanted} different levels in all splits asked for, "
      f"found {len(distinct)} with these settings; ask for fewer, or raise "
      "env.size, env.walls or env.most_moves"
    )
  levels = iter(distinct)
  return {
    name: tuple(itertools.islice(levels, size)) for name, size in sizes.items()
  }
