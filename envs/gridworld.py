"""A text grid with loops: walk to the goal, around walls, past holes.

The agent sees the direction of the goal as the crow flies and its four
neighbouring cells, never the map: walking straight ahead ends at a wall, and
walking into a wall gives exactly the same observation. So there are loops that
trap a policy that repeats itself: a step into a wall changes nothing and only
costs a turn, and a detour may lead back to the same place. The only reward is
for reaching the goal. With `slip` and `holes` it is a FrozenLake (Gymnasium's
slips with probability 2/3); the maps are our own, drawn from one seed, and
every task is a map whose shortest path has between `shortest` and `longest`
steps.

The scripted expert knows the map. `expert_loop` makes it repeat its last turn
word for word, whatever it sees, and a policy cloned from it does the same;
`expert_hesitation` makes it repeat its thought before acting.
"""

import collections
from collections.abc import Mapping
import dataclasses
import random

from t2po_jax import keys
from t2po_jax.envs import base, prompts

# Direction -> step in (row, column).
MOVES = {"north": (-1, 0), "east": (0, 1), "south": (1, 0), "west": (0, -1)}
TASK = "walk to the goal ."
# The most needless rounds in a thought.
MAX_ROUNDS = 5

Place = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Settings(base.Settings):
  """The keys of `config.env` for the grid."""

  size: int = keys.key(6, "Rows and columns of a map.", least=3, most=12)
  walls: float = keys.key(
    0.25, "Fraction of cells that are walls.", least=0.0, most=0.5
  )
  holes: float = keys.key(
    0.0, "Fraction of cells that end the episode.", least=0.0, most=0.4
  )
  slip: float = keys.key(
    0.0,
    "Probability that a step goes to its left or right instead, half each.",
    least=0.0,
    most=1.0,
  )
  shortest: int = keys.key(4, "Least length of a shortest path.", least=1)
  longest: int = keys.key(8, "Greatest length of a shortest path.", least=1)
  max_turns: int = keys.key(12, "Turns until the episode ends.", least=1)
  seed: int = keys.key(0, "Seed of the maps.", least=0)
  train_tasks: int = keys.key(600, "Training maps.", least=1)
  valid_tasks: int = keys.key(100, "Validation maps.", least=1)
  test_tasks: int = keys.key(100, "Test maps.", least=1)
  expert_loop: float = keys.key(
    0.0,
    "Probability per turn that the expert repeats its last turn.",
    least=0.0,
    most=1.0,
  )
  expert_hesitation: float = base.hesitation_key(0.0)


@dataclasses.dataclass(frozen=True)
class Map:
  """One task.

  Attributes:
    size: rows and columns.
    walls: cells that cannot be entered.
    holes: cells that end the episode.
    start: the agent's initial cell.
    goal: the cell to reach.
  """

  size: int
  walls: frozenset[Place]
  holes: frozenset[Place]
  start: Place
  goal: Place

  def is_free(self, place: Place) -> bool:
    """Whether a cell can be entered, including holes."""
    row, column = place
    inside = 0 <= row < self.size and 0 <= column < self.size
    return inside and place not in self.walls

  def distances(self) -> dict[Place, int]:
    """Steps to the goal from every cell from which it can be reached."""
    steps = {self.goal: 0}
    waiting = collections.deque([self.goal])
    while waiting:
      place = waiting.popleft()
      for step in MOVES.values():
        before = (place[0] - step[0], place[1] - step[1])
        if before in steps or not self.is_free(before) or before in self.holes:
          continue
        steps[before] = steps[place] + 1
        waiting.append(before)
    return steps


def draw_map(settings: Settings, generator: random.Random) -> Map:
  """Draws a map whose shortest path has the requested length.

  Raises:
    ValueError: if a thousand attempts give none.
  """
  size = settings.size
  cells = [(row, column) for row in range(size) for column in range(size)]
  for _ in range(1000):
    order = generator.sample(cells, len(cells))
    walls = round(settings.walls * len(cells))
    holes = walls + round(settings.holes * len(cells))
    start, goal = order[-1], order[-2]
    drawn = Map(
      size,
      frozenset(order[:walls]),
      frozenset(order[walls:holes]),
      start,
      goal,
    )
    if holes > len(cells) - 2:
      break
    steps = drawn.distances().get(start, 0)
    if settings.shortest <= steps <= settings.longest:
      return drawn
  raise ValueError(
    f"env: no map of size {size} with walls {settings.walls:g} and holes "
    f"{settings.holes:g} has a walk of {settings.shortest} to "
    f"{settings.longest} steps; ask for shorter walks or fewer obstacles"
  )


class Gridworld:
  """The grid; implements `envs.base.Benchmark`.

  Attributes:
    maps: the map of every task.
  """

  Settings = Settings
  threadsafe = True
  grammar = prompts.Grammar(actions=("action",), closing="</think><action>")

  def __init__(self, settings: Settings | None = None) -> None:
    """Draws the maps.

    Raises:
      ValueError: if no map satisfies the settings.
    """
    settings = settings or Settings()
    self.settings = settings
    if settings.longest < settings.shortest:
      raise ValueError(
        f"env.longest: found {settings.longest}, expected at least "
        f"env.shortest = {settings.shortest}"
      )
    self.max_turns = settings.max_turns
    generator = random.Random(f"{base.SPLIT_SEED} {settings.seed}")
    sizes = base.split_sizes(settings)
    self.maps: dict[str, Map] = {}
    splits: dict[str, tuple[str, ...]] = {}
    drawn: set[Map] = set()
    for split, count in sizes.items():
      names = []
      while len(names) < count:
        grid = draw_map(settings, generator)
        if grid in drawn:
          continue
        drawn.add(grid)
        names.append(f"{split}-{len(names)}")
        self.maps[names[-1]] = grid
      splits[split] = tuple(names)
    self.splits: Mapping[str, tuple[str, ...]] = splits

  def env(self) -> "GridEnv":
    """A new environment."""
    return GridEnv(self)

  def render(self, view: prompts.View) -> list[prompts.Message]:
    """The last observations and actions, then the current observation."""
    parts = ["G"]
    for observation, done in view.memory:
      parts.append(f" {observation}")
      parts.append(f"<action> {done}</action>" if done else " nothing .")
    parts.append(f" {view.observation}")
    return [{"role": "user", "content": "".join(parts)}]

  def category(self, task_id: str) -> str:
    """The length of the shortest path, e.g. `6 steps`."""
    grid = self.maps[task_id]
    return f"{grid.distances()[grid.start]} steps"

  def corpus(self) -> list[str]:
    """Prompts and responses of the expert's episodes."""
    return [
      text
      for number, task in enumerate(self.splits["train"][:200])
      for text in base.transcribe(self, task, number, memory=4)
    ]


class GridEnv:
  """Plays one episode after another; see `envs.base.Env`."""

  def __init__(self, benchmark: Gridworld) -> None:
    self._benchmark = benchmark
    self._task = ""
    self._past = ""
    self._turn = 0
    self._done = True
    # The first task's until an episode begins.
    self.map = next(iter(benchmark.maps.values()))
    self.place: Place = self.map.start

  def reset(self, task_id: str) -> base.Observation:
    """Starts an episode on a task's map.

    Raises:
      KeyError: if the task is unknown.
    """
    if task_id not in self._benchmark.maps:
      raise KeyError(f"gridworld: unknown task {task_id!r}")
    self.map = self._benchmark.maps[task_id]
    self._task = self._past = task_id
    self.place, self._turn, self._done = self.map.start, 0, False
    return self._observe()

  def look(self) -> str:
    """What the agent sees: the direction of the goal, then its neighbours."""
    if self.place == self.map.goal:
      return "goal here ."
    if self.place in self.map.holes:
      return "hole here ."
    open_ways, holes = [], []
    for name, (row, column) in MOVES.items():
      beside = (self.place[0] + row, self.place[1] + column)
      if beside in self.map.holes:
        holes.append(name)
      elif self.map.is_free(beside):
        open_ways.append(name)
    words = [self.aim(), "open", *open_ways, "."]
    if holes:
      words += ["hole", *holes, "."]
    return " ".join(words)

  def aim(self) -> str:
    """Where the goal lies as the crow flies, e.g. `goal east 2 south 1 .`."""
    down = self.map.goal[0] - self.place[0]
    right = self.map.goal[1] - self.place[1]
    words = ["goal"]
    for distance, (less, more) in (
      (right, ("west", "east")),
      (down, ("north", "south")),
    ):
      if distance:
        words += [more if distance > 0 else less, str(abs(distance))]
    return " ".join([*words, "."])

  def _observe(self) -> base.Observation:
    return base.Observation(task=TASK, text=self.look())

  def step(self, response: str) -> base.StepResult:
    """Executes one step; a response without a direction has no effect."""
    if self._done:
      raise RuntimeError("gridworld: the episode is over; call reset first")
    parsed = prompts.parse(response, self._benchmark.grammar)
    action = " ".join(parsed.content.lower().split())
    direction = action.removeprefix("go ")
    valid = parsed.opened == 1 and direction in MOVES and action != direction
    self._turn += 1
    self._past = f"{self._past}|{response}"
    before = self.place
    if valid:
      self._move(direction)
    success = self.place == self.map.goal
    fallen = self.place in self.map.holes
    self._done = success or fallen or self._turn >= self._benchmark.max_turns
    return base.StepResult(
      observation=self._observe(),
      action=action if valid else "",
      reward=float(success),
      done=self._done,
      format_valid=parsed.format_valid,
      action_valid=parsed.format_valid and valid,
      success=success,
      info={"bumped": float(valid and self.place == before)},
    )

  def _move(self, direction: str) -> None:
    """Moves, unless there is a wall.

    Slips are derived from all responses of the episode, so that an episode can
    be replayed while members of a group slip differently.
    """
    slip = self._benchmark.settings.slip
    if slip:
      generator = random.Random(self._past)
      if generator.random() < slip:
        names = list(MOVES)
        turned = names.index(direction) + generator.choice((-1, 1))
        direction = names[turned % len(names)]
    row, column = MOVES[direction]
    beside = (self.place[0] + row, self.place[1] + column)
    if self.map.is_free(beside):
      self.place = beside

  def expert(self, seed: int) -> "GridExpert":
    """An expert that knows the map."""
    return GridExpert(self, self._benchmark.settings, seed)

  def close(self) -> None:
    """Nothing to release."""


class GridExpert:
  """Walks a shortest path, with the configured habits."""

  def __init__(self, env: GridEnv, settings: Settings, seed: int) -> None:
    self._env = env
    self._settings = settings
    self._random = random.Random(seed)
    self._last = ""

  def respond(self) -> str:
    """The response to the environment's current state."""
    if self._last and self._random.random() < self._settings.expert_loop:
      return self._last
    env = self._env
    distances = env.map.distances()
    ways = {}
    for name, (row, column) in MOVES.items():
      beside = (env.place[0] + row, env.place[1] + column)
      if beside in distances:
        ways[name] = distances[beside]
    shortest = min(ways.values())
    chosen = self._random.choice([n for n, d in ways.items() if d == shortest])
    line = f"{env.aim()} {chosen}"
    thought = [line]
    hesitation = self._settings.expert_hesitation
    for _ in range(MAX_ROUNDS):
      if self._random.random() >= hesitation / (1.0 + hesitation):
        break
      thought += ["again", line]
    response = (
      f"<think> {' '.join(thought)}</think><action> go {chosen}</action>"
    )
    self._last = response
    return response
