"""Embedded scenes: games generated from a seed, in the benchmark's own format.

A scene is a room with receptacles and objects, and one of the six tasks. It
is written as the PDDL problem of a game file and is solvable by construction;
the solution is found and played before the scene is used. Everything is
determined by the key `seed/split/task type/index`, so a task is the same on
every machine and no two splits share a key.
"""

import dataclasses
import json
import pathlib
import random

from t2po_jax.envs.alfworld import data, engine, expert, problem, rooms

# The wording of each task, as in the benchmark.
_TASKS = {
  problem.PLACE: (
    "put a {object} in {target}",
    "put some {object} on {target}",
  ),
  problem.LOOK: (
    "look at {object} under the {target}",
    "examine the {object} with the {target}",
  ),
  problem.CLEAN: (
    "put a clean {object} in {target}",
    "clean some {object} and put it in {target}",
  ),
  problem.HEAT: (
    "put a hot {object} in {target}",
    "heat some {object} and put it in {target}",
  ),
  problem.COOL: (
    "put a cool {object} in {target}",
    "cool some {object} and put it in {target}",
  ),
  problem.TWO: (
    "put two {object} in {target}",
    "find two {object} and put them in {target}",
  ),
}
_MANGLE = (("|", "_bar_"), ("-", "_minus_"), ("+", "_plus_"), (".", "_dot_"))
_ATTEMPTS = 100


@dataclasses.dataclass(frozen=True)
class Scene:
  """A generated scene.

  Attributes:
    folder: the name of its task folder, e.g. "pick_and_place_simple-Mug-
      None-Desk-301".
    file: its game file, without the rules.
    parameters: object, target and lamp classes, as in `traj_data.json`.
  """

  folder: str
  file: problem.GameFile
  parameters: dict[str, str]


@dataclasses.dataclass
class _Room:
  """A room while it is furnished; instances are (class, id)."""

  name: str
  size: rooms.Size
  receptacles: list[tuple[str, str]]
  poses: dict[str, str]
  start: str
  openable: list[str]
  contents: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
  used: set[str] = dataclasses.field(default_factory=set)

  def classes(self) -> set[str]:
    return {kind for kind, _ in self.receptacles}

  def put(
    self, draw: random.Random, kind: str, homes: tuple[str, ...]
  ) -> str | None:
    """Puts a new object into a random receptacle with space; None if full."""
    count = {identity: 0 for _, identity in self.receptacles}
    for _, _, receptacle in self.contents:
      count[receptacle] += 1
    free = [
      (name, identity)
      for name, identity in self.receptacles
      if name in homes and count[identity] < self.size.capacity
    ]
    if not free:
      return None
    name, home = draw.choice(free)
    self.contents.append((kind, _name(draw, kind, self.used), home))
    return name


def _mangle(text: str) -> str:
  for old, new in _MANGLE:
    text = text.replace(old, new)
  return text


def _name(draw: random.Random, kind: str, used: set[str]) -> str:
  """A fresh id with random coordinates."""
  while True:
    x, y, z = (draw.randrange(-399, 400) / 100 for _ in range(3))
    identity = f"{kind}|{x:+06.2f}|{abs(y):+06.2f}|{z:+06.2f}"
    if kind.endswith("Basin"):
      # A basin is named after what it belongs to.
      identity = f"{identity.removeprefix(kind)}|{kind}"
      identity = kind.removesuffix("Basin") + identity
    identity = _mangle(identity)
    if identity not in used:
      used.add(identity)
      return identity


def _furnish(draw: random.Random, name: str, size: rooms.Size) -> _Room:
  """A room without objects: receptacles, poses, doors."""
  used: set[str] = set()
  kinds = [
    kind
    for kind, (least, most) in size.receptacles[name].items()
    for _ in range(draw.randint(least, most))
  ]
  spots: set[str] = set()
  while len(spots) <= len(kinds):
    x, z = draw.randint(-12, 12), draw.randint(-12, 12)
    turn, tilt = draw.randrange(4), draw.choice((-30, 0, 15, 30, 45, 60))
    spots.add(_mangle(f"loc|{x}|{z}|{turn}|{tilt}"))
  start, *free = sorted(spots)
  draw.shuffle(free)
  poses: dict[str, str] = {}
  receptacles: list[tuple[str, str]] = []
  for kind, pose in zip(kinds, free, strict=True):
    identity = _name(draw, kind, used)
    if receptacles and receptacles[-1][0] == kind in rooms.SHARED_POSE:
      if draw.random() < size.shared_pose:
        pose = poses[receptacles[-1][1]]
    poses[identity] = pose
    receptacles.append((kind, identity))
  openable = [
    identity
    for kind, identity in receptacles
    if kind in rooms.ALWAYS_OPENABLE
    or kind in rooms.OPENABLE
    and (size.always_openable or draw.random() < 0.7)
  ]
  return _Room(name, size, receptacles, poses, start, openable, used=used)


def _choose_goal(
  draw: random.Random, task_type: str, room: _Room
) -> tuple[str, str, tuple[str, ...]] | None:
  """Object class, target class, and the object's possible initial places."""
  classes = room.classes()
  tool, treatable = rooms.TREATABLE.get(task_type, ("", frozenset()))
  if tool and tool not in classes:
    return None
  if task_type == problem.LOOK:
    lamps = [kind for kind in rooms.LAMP_HOMES if kind in classes]
    if not lamps:
      return None
  options: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
  for kind, homes in room.size.homes(room.name).items():
    if tool and kind not in treatable:
      continue
    present = [home for home in homes if home in classes and home != tool]
    if task_type == problem.LOOK and present:
      options[kind] = [(rooms.LAMP, tuple(present))]
    elif len(present) > 1:
      options[kind] = [
        (target, tuple(home for home in present if home != target))
        for target in present
      ]
  if not options:
    return None
  kind = draw.choice(sorted(options))
  target, sources = draw.choice(options[kind])
  return kind, target, sources


def _attempt(
  draw: random.Random, task_type: str, size: rooms.Size
) -> tuple[_Room, str, str] | None:
  """A room with its objects, the object class and the target class."""
  name = draw.choice(rooms.TASK_ROOMS[task_type])
  room = _furnish(draw, name, size)
  choice = _choose_goal(draw, task_type, room)
  if choice is None:
    return None
  kind, target, sources = choice
  need = 2 if task_type == problem.TWO else 1
  for _ in range(need + draw.randint(0, size.extra)):
    if room.put(draw, kind, sources) is None:
      return None
  if task_type == problem.LOOK:
    openable = set(room.openable)
    surfaces = tuple(
      home
      for home, identity in room.receptacles
      if home in rooms.LAMP_HOMES and identity not in openable
    )
    if room.put(draw, rooms.LAMP, surfaces) is None:
      return None
  homes = size.homes(name)
  others = [other for other in sorted(homes) if other != kind]
  for _ in range(draw.randint(*size.objects)):
    other = draw.choice(others)
    room.put(draw, other, homes[other])
  return room, kind, target


def _write_problem(room: _Room, goal: problem.Goal, types: dict) -> str:
  """The PDDL problem of a furnished room."""
  homes = room.size.homes(room.name)
  objects = sorted(identity for _, identity, _ in room.contents)
  kinds = sorted({kind for kind, _, _ in room.contents})
  classes = sorted(room.classes())
  poses = sorted({*room.poses.values(), room.start})
  declared = [("agent1", "agent")]
  declared += [(f"{kind}Type", "otype") for kind in kinds]
  declared += [(f"{kind}Type", "rtype") for kind in classes]
  declared += [(identity, "object") for identity in objects]
  declared += [(identity, "receptacle") for _, identity in room.receptacles]
  declared += [(pose, "location") for pose in poses]
  facts = [f"atLocation agent1 {room.start}"]
  for kind, identity in room.receptacles:
    facts.append(f"receptacleType {identity} {kind}Type")
    facts.append(f"receptacleAtLocation {identity} {room.poses[identity]}")
  facts += [f"openable {identity}" for identity in room.openable]
  for receptacle in classes:
    for kind in kinds:
      allowed = rooms.LAMP_HOMES if kind == rooms.LAMP else homes[kind]
      if receptacle in allowed:
        facts.append(f"canContain {receptacle}Type {kind}Type")
  for kind, identity, home in room.contents:
    facts.append(f"objectType {identity} {kind}Type")
    facts.append(f"inReceptacle {identity} {home}")
    facts.append(f"objectAtLocation {identity} {room.poses[home]}")
    lamp = kind == rooms.LAMP
    facts.append(f"{'toggleable' if lamp else 'pickupable'} {identity}")
    for predicate, able in (
      ("cleanable", rooms.CLEANABLE),
      ("heatable", rooms.HEATABLE),
      ("coolable", rooms.COOLABLE),
      ("isReceptacleObject", rooms.VESSELS),
    ):
      if kind in able:
        facts.append(f"{predicate} {identity}")
  lines = ["(define (problem scene)", "(:domain alfred)", "(:objects"]
  lines += [f"  {identity} - {kind}" for identity, kind in declared]
  lines += [")", "(:init"]
  lines += [f"  ({fact})" for fact in facts]
  lines += [")", problem.write_goal(goal, types), ")"]
  return "\n".join(lines)


def draw_scene(key: str, task_type: str, size: str) -> Scene:
  """Draws a scene.

  Args:
    key: determines everything; equal keys give equal scenes.
    task_type: one of `problem.TASK_TYPES`.
    size: one of `rooms.SIZES`.

  Returns:
    The scene, whose walkthrough was played to its end.

  Raises:
    RuntimeError: if no solvable scene was found, which would be a bug.
  """
  draw = random.Random(key)
  for _ in range(_ATTEMPTS):
    drawn = _attempt(draw, task_type, rooms.SIZES[size])
    if drawn is None:
      continue
    room, kind, target = drawn
    goal = problem.Goal(task_type, kind.lower(), target.lower())
    words = draw.choice(_TASKS[task_type])
    file = problem.GameFile(
      problem=_write_problem(
        room, goal, {goal.object: kind, goal.target: target}
      ),
      task=words.format(object=goal.object, target=goal.target),
    )
    board = engine.Board(problem.parse(file, key))
    if engine.Twin(board).won:
      continue
    walkthrough = expert.solve(board)
    if not walkthrough:
      continue
    number = rooms.SCENE_NUMBERS[room.name] + draw.randrange(30)
    lamp = task_type == problem.LOOK
    return Scene(
      folder=f"{task_type}-{kind}-None-{target}-{number}",
      file=dataclasses.replace(file, walkthrough=walkthrough),
      parameters={
        "object_target": kind,
        "parent_target": "" if lamp else target,
        "toggle_target": target if lamp else "",
      },
    )
  raise RuntimeError(f"alfworld: no solvable scene for the key {key!r}")


class Scenes:
  """All embedded tasks of one seed; the counterpart of `data.Tree`.

  Task ids read `split/task type/index`; the task types alternate.

  Attributes:
    splits: split -> task ids.
  """

  def __init__(
    self,
    seed: int,
    size: str,
    task_types: tuple[str, ...],
    counts: dict[str, int],
  ) -> None:
    """Names the tasks; each scene is drawn when it is read.

    Args:
      seed: seed of the whole collection.
      size: one of `rooms.SIZES`.
      task_types: the types that alternate.
      counts: split -> number of tasks.
    """
    self._seed = seed
    self._size = size
    self.splits = {
      split: tuple(
        f"{split}/{task_types[index % len(task_types)]}/{index}"
        for index in range(count)
      )
      for split, count in counts.items()
    }
    self._ids = frozenset(i for ids in self.splits.values() for i in ids)

  def task_type(self, task_id: str) -> str:
    """The task type, as given in the id."""
    return task_id.split("/")[1]

  def draw(self, task_id: str) -> Scene:
    """The scene of a task.

    Raises:
      KeyError: if the task is unknown.
    """
    if task_id not in self._ids:
      raise KeyError(f"alfworld: unknown task {task_id!r}")
    key = f"{self._seed}/{self._size}/{task_id}"
    return draw_scene(key, self.task_type(task_id), self._size)

  def read(self, task_id: str) -> problem.GameFile:
    """The game file of a task; see `draw`."""
    return self.draw(task_id).file


def write_tree(
  scenes: Scenes, folder: str, rules: tuple[str, str] = ("", "")
) -> None:
  """Writes all scenes as a tree of game files that `data.Tree` reads.

  With the rules of the package (`original.read_rules`) the tree is complete
  and other ALFWorld programs can play it.

  Args:
    scenes: the scenes to write.
    folder: the folder for the split folders.
    rules: PDDL domain and text grammar, or empty strings.
  """
  domain, grammar = rules
  for split, ids in scenes.splits.items():
    for task_id in ids:
      scene = scenes.draw(task_id)
      file = dataclasses.replace(
        scene.file,
        domain=domain,
        grammar=grammar.replace("UNKNOWN GOAL", scene.file.task),
      )
      trial = f"trial_{int(task_id.split('/')[-1]):05d}"
      path = pathlib.Path(folder) / data.FOLDERS[split][0] / scene.folder
      (path / trial).mkdir(parents=True, exist_ok=True)
      (path / trial / data.FILE).write_text(problem.dump(file))
      fields = {
        "task_id": trial,
        "task_type": scenes.task_type(task_id),
        "pddl_params": {
          "mrecep_target": "",
          "object_sliced": False,
          **scene.parameters,
        },
        "turk_annotations": {"anns": [{"task_desc": file.task}]},
      }
      (path / trial / "traj_data.json").write_text(json.dumps(fields))
