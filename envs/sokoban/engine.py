"""The rules of Sokoban.

A level is a grid in the usual notation, rows joined by `/`: `#` wall, `.`
floor, `o` goal, `x` box, `*` box on a goal, `@` player, `+` player on a goal.
The player walks one cell and pushes one box; nothing can be pulled, so a box
in a corner stays there.
"""

import dataclasses

Cell = tuple[int, int]

# Row and column; rows are counted downwards.
MOVES: dict[str, Cell] = {
  "up": (-1, 0),
  "down": (1, 0),
  "left": (0, -1),
  "right": (0, 1),
}


@dataclasses.dataclass(frozen=True)
class Level:
  """The static part of a level.

  Attributes:
    rows: height.
    columns: width.
    walls: cells that cannot be entered.
    goals: the target cells of the boxes.
  """

  rows: int
  columns: int
  walls: frozenset[Cell]
  goals: frozenset[Cell]


@dataclasses.dataclass(frozen=True)
class State:
  """The moving part of a level: the player and the boxes."""

  player: Cell
  boxes: frozenset[Cell]


def parse(text: str) -> tuple[Level, State]:
  """Reads a level.

  Raises:
    ValueError: if it is not a level, or the numbers of goals and boxes differ.
  """
  cells = {
    (row, column): symbol
    for row, line in enumerate(text.split("/"))
    for column, symbol in enumerate(line)
  }
  players = [cell for cell, symbol in cells.items() if symbol in "@+"]
  boxes = frozenset(cell for cell, symbol in cells.items() if symbol in "x*")
  goals = frozenset(cell for cell, symbol in cells.items() if symbol in "o*+")
  if set(cells.values()) - set("#.ox*@+") or len(players) != 1:
    raise ValueError(f"sokoban: {text!r} is no level with one player")
  if not boxes or len(boxes) != len(goals):
    raise ValueError(
      f"sokoban: {text!r} has {len(boxes)} boxes and {len(goals)} goals"
    )
  level = Level(
    rows=1 + max(row for row, _ in cells),
    columns=1 + max(column for _, column in cells),
    walls=frozenset(cell for cell, symbol in cells.items() if symbol == "#"),
    goals=goals,
  )
  return level, State(players[0], boxes)


def draw(level: Level, state: State) -> list[str]:
  """A state in the notation of the module; the inverse of `parse`."""

  def symbol(cell: Cell) -> str:
    if cell in level.walls:
      return "#"
    on_goal = cell in level.goals
    if cell == state.player:
      return "+" if on_goal else "@"
    if cell in state.boxes:
      return "*" if on_goal else "x"
    return "o" if on_goal else "."

  return [
    "".join(symbol((row, column)) for column in range(level.columns))
    for row in range(level.rows)
  ]


def shift(cell: Cell, move: str) -> Cell:
  """The next cell in a direction."""
  rows, columns = MOVES[move]
  return cell[0] + rows, cell[1] + columns


def move(level: Level, state: State, direction: str) -> State:
  """The state after a move; unchanged if the move is invalid."""
  target = shift(state.player, direction)
  if target in level.walls:
    return state
  if target not in state.boxes:
    return State(target, state.boxes)
  behind = shift(target, direction)
  if behind in level.walls or behind in state.boxes:
    return state
  return State(target, state.boxes - {target} | {behind})


def possible(level: Level, state: State) -> tuple[str, ...]:
  """The moves that change the state."""
  return tuple(d for d in MOVES if move(level, state, d) != state)


def solved(level: Level, state: State) -> bool:
  """Whether every box is on a goal."""
  return state.boxes == level.goals


def cornered(level: Level, cell: Cell) -> bool:
  """Whether a box in a cell can never move again and is not on a goal."""
  if cell in level.goals:
    return False
  row, column = cell
  vertical = (row - 1, column) in level.walls or (
    row + 1,
    column,
  ) in level.walls
  sideways = (row, column - 1) in level.walls or (
    row,
    column + 1,
  ) in level.walls
  return vertical and sideways
