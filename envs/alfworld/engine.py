"""A pure Python twin of the ALFWorld engine.

It plays the same games with the same texts, commands, rewards and endings as
TextWorld's PDDL engine with the ALFRED domain and grammar, but thousands of
times faster and without compiled packages. Quirks of the original are kept on
purpose, because agents see them:

  - An object can be examined only while it is held (a misspelt type in the
    domain makes the other case unreachable).
  - "go to X" is missing when X can be reached from the present pose.
  - The first `look` sees nothing; `use` always reports that the lamp turned
    on; heating and cooling work with the door closed.
  - After an object was moved between receptacles of one pose, `look` lists it
    beside them.
"""

from collections.abc import Sequence

from t2po_jax.envs.alfworld import problem

BANNER = "-= Welcome to TextWorld, ALFRED! =-"
TASK_PREFIX = "Your task is to: "
NOTHING_HAPPENS = "Nothing happens."
MIDDLE = "You are in the middle of a room. Looking quickly around you, you see"
HELP = """Available commands:
  look:                             look around your current location
  inventory:                        check your current inventory
  go to (receptacle):               move to a receptacle
  open (receptacle):                open a receptacle
  close (receptacle):               close a receptacle
  take (object) from (receptacle):  take an object from a receptacle
  move (object) to (receptacle):  place an object in or on a receptacle
  examine (something):              examine a receptacle or an object
  use (object):                     use an object
  heat (object) with (receptacle):  heat an object using a receptacle
  clean (object) with (receptacle): clean an object using a receptacle
  cool (object) with (receptacle):  cool an object using a receptacle
  slice (object) with (object):     slice an object using a sharp object
"""

# Receptacle type -> (verb, predicate the object needs).
_TREATMENTS = {
  "sinkbasintype": ("clean", "cleanable"),
  "sinktype": ("clean", "cleanable"),
  "microwavetype": ("heat", "heatable"),
  "fridgetype": ("cool", "coolable"),
}
_KNIVES = ("knifetype", "butterknifetype")


def _enumerate(names: Sequence[str]) -> str:
  """A list as the grammar writes it: "a, b, and c", or "nothing"."""
  if not names:
    return "nothing"
  if len(names) == 1:
    return names[0]
  return ", ".join(names[:-1]) + ", and " + names[-1]


class Board:
  """The static part of a game; shared by all twins that play it."""

  def __init__(self, game: problem.Game) -> None:
    facts = game.facts
    self.game = game
    self.names = game.names
    self.dialect = game.dialect
    self.start = facts["atlocation"][0][1]
    self.kinds = {
      identity: kind
      for predicate in ("objecttype", "receptacletype")
      for identity, kind in facts.get(predicate, ())
    }
    self.place_of: dict[str, str] = {
      receptacle: place
      for receptacle, place in facts.get("receptacleatlocation", ())
    }
    self.receptacles = sorted(self.place_of)
    self.at: dict[str, list[str]] = {}
    for receptacle in self.receptacles:
      self.at.setdefault(self.place_of[receptacle], []).append(receptacle)
    self.fits = frozenset(facts.get("cancontain", ()))
    self.nested = facts.get("inreceptacleobject", ())
    self.openable = self.unary("openable")
    self.pickupable = self.unary("pickupable")
    self.toggleable = self.unary("toggleable")
    self.sliceable = self.unary("sliceable")
    self.vessels = self.unary("isreceptacleobject")
    self.treatable = {
      verb: self.unary(able) for verb, able in _TREATMENTS.values()
    }
    # What the goal refers to: objects, and receptacles or lamps.
    goal = game.goal
    self.wanted = frozenset(
      identity
      for identity, kind in self.kinds.items()
      if kind == f"{goal.object}type"
    )
    if goal.task_type in problem.TOOLS:
      verb, _ = problem.TOOLS[goal.task_type]
      self.wanted &= self.treatable[verb]
    self.targets = frozenset(
      identity
      for identity, kind in self.kinds.items()
      if kind == f"{goal.target}type"
    )
    self._fixed: dict[str, dict[str, tuple]] = {}

  def unary(self, predicate: str) -> frozenset[str]:
    """The ids for which a unary predicate holds at the start."""
    return frozenset(
      argument for (argument,) in self.game.facts.get(predicate, ())
    )

  def fixed_commands(self, place: str) -> dict[str, tuple]:
    """The commands that are always possible at a place."""
    if place not in self._fixed:
      commands: dict[str, tuple] = {"look": (Twin._look,)}
      commands["inventory"] = (Twin._inventory,)
      if self.dialect.helps:
        commands["help"] = (Twin._help,)
      for receptacle in self.receptacles:
        name = self.names[receptacle]
        if self.place_of[receptacle] == place:
          commands[f"examine {name}"] = (Twin._examine, receptacle)
        else:
          commands[f"go to {name}"] = (Twin._go, receptacle)
      self._fixed[place] = commands
    return self._fixed[place]


class Twin:
  """One game in progress.

  Attributes:
    intro: the first observation.
    won: whether the goal holds.
  """

  def __init__(self, board: Board) -> None:
    """Starts a game on a board."""
    self._board = board
    self.won = False
    self._commands: dict[str, tuple] | None = None
    self._admissible: tuple[str, ...] | None = None
    self.intro = self.reset()

  def reset(self) -> str:
    """Starts the game again and returns the first observation."""
    board = self._board
    facts = board.game.facts
    self._place = board.start
    self._held: str | None = None
    self._inside: dict[str, set[str]] = {r: set() for r in board.receptacles}
    for thing, receptacle in facts.get("inreceptacle", ()):
      self._inside.setdefault(receptacle, set()).add(thing)
    self._around: dict[str, set[str]] = {}
    for thing, place in facts.get("objectatlocation", ()):
      self._around.setdefault(place, set()).add(thing)
    # Objects that were taken out of a receptacle and not put back.
    self._left: set[tuple[str, str]] = set()
    self._opened = set(board.unary("opened"))
    self._clean = set(board.unary("isclean"))
    self._hot = set(board.unary("ishot"))
    self._cool = set(board.unary("iscool"))
    self._sliced = set(board.unary("issliced"))
    self._toggled = set(board.unary("istoggled"))
    self._update()
    if self._place in board.at:
      room = self._look()
    else:
      everything = [f"a {board.names[r]}" for r in board.receptacles]
      room = f"{MIDDLE} {_enumerate(everything)}."
    return f"{BANNER}\n\n{room}\n\n{TASK_PREFIX}{board.game.task}."

  def step(self, command: str) -> str:
    """Executes a command and returns the observation."""
    action = self.commands.get(command.strip())
    if action is None:
      return NOTHING_HAPPENS
    return action[0](self, *action[1:])

  @property
  def admissible(self) -> tuple[str, ...]:
    """The admissible commands, sorted."""
    if self._admissible is None:
      self._admissible = tuple(sorted(self.commands))
    return self._admissible

  @property
  def commands(self) -> dict[str, tuple]:
    """The admissible commands with the functions that execute them."""
    if self._commands is None:
      self._commands = self._list_commands()
    return self._commands

  def locate(self, kind: str, able: str = "") -> list[tuple[str, str]]:
    """Where the objects of a kind are, whether or not they can be seen.

    Args:
      kind: e.g. "mug".
      able: a predicate that the objects must satisfy, e.g. "heatable".

    Returns:
      (name of the object, name of its receptacle), sorted by receptacle id.
    """
    board = self._board
    allowed = board.unary(able) if able else None
    return [
      (board.names[thing], board.names[receptacle])
      for receptacle in board.receptacles
      for thing in sorted(self._inside[receptacle])
      if board.kinds.get(thing) == f"{kind}type"
      and (allowed is None or thing in allowed)
    ]

  def _list_commands(self) -> dict[str, tuple]:
    board, held, names = self._board, self._held, self._board.names
    commands = dict(board.fixed_commands(self._place))
    for receptacle in board.at.get(self._place, ()):
      name = names[receptacle]
      kind = board.kinds.get(receptacle)
      accessible = True
      if receptacle in board.openable:
        accessible = receptacle in self._opened
        if accessible:
          commands[f"close {name}"] = (Twin._close, receptacle)
        else:
          commands[f"open {name}"] = (Twin._open, receptacle)
      for thing in self._inside[receptacle]:
        if thing in board.toggleable:
          commands[f"use {names[thing]}"] = (Twin._use, thing)
        if accessible and held is None and thing in board.pickupable:
          command = f"take {names[thing]} from {name}"
          commands[command] = (Twin._take, thing, receptacle)
      if held is None:
        continue
      if accessible and (kind, board.kinds.get(held)) in board.fits:
        command = board.dialect.move.format(o=names[held], r=name)
        commands[command] = (Twin._move, held, receptacle)
      verb, _ = _TREATMENTS.get(kind or "", ("", ""))
      if verb and held in board.treatable[verb]:
        command = f"{verb} {names[held]} with {name}"
        commands[command] = (Twin._treat, verb, held, receptacle)
    if held is not None:
      commands[f"examine {names[held]}"] = (Twin._inspect, held)
      if board.kinds.get(held) in _KNIVES:
        for thing in self._around.get(self._place, ()):
          if thing in board.sliceable:
            command = f"slice {names[thing]} with {names[held]}"
            commands[command] = (Twin._slice, thing, held)
    return commands

  def _update(self) -> None:
    """Drops what was computed from the state before a change."""
    self._commands = self._admissible = None
    self.won = self._check_goal()

  def _check_goal(self) -> bool:
    board, task_type = self._board, self._board.game.goal.task_type
    if task_type == problem.LOOK:
      return self._held in board.wanted and any(
        thing in board.targets
        and thing in board.toggleable
        and thing in self._toggled
        for receptacle in board.at.get(self._place, ())
        for thing in self._inside[receptacle]
      )
    fit = board.wanted
    if task_type == problem.CLEAN:
      fit = fit & self._clean
    elif task_type == problem.HEAT:
      fit = fit & self._hot
    elif task_type == problem.COOL:
      fit = fit & self._cool
    need = 2 if task_type == problem.TWO else 1
    return any(
      len(fit.intersection(self._inside.get(target, ()))) >= need
      for target in board.targets
    )

  def _describe(self, receptacle: str) -> str:
    """What an agent in front of a receptacle sees of it."""
    board = self._board
    name = board.names[receptacle]
    opening = f"On the {name}"
    if receptacle in board.openable:
      if receptacle not in self._opened:
        return f"The {name} is closed."
      opening = f"The {name} is open. In it"
    things = [f"a {board.names[o]}" for o in sorted(self._inside[receptacle])]
    return f"{opening}, you see {_enumerate(things)}."

  # The actions. Each returns the observation.

  def _look(self) -> str:
    """Looks around at the present pose."""
    board, place = self._board, self._place
    facing = board.at.get(place, ())
    if not facing:
      return f"{MIDDLE} nothing."
    beside = [
      f"a {board.names[thing]}"
      for thing in sorted(self._around.get(place, ()))
      for receptacle in facing
      if (thing, receptacle) in self._left
    ]
    names = _enumerate([board.names[receptacle] for receptacle in facing])
    return (
      f"You are facing the {names}. Next to it, you see {_enumerate(beside)}."
    )

  def _inventory(self) -> str:
    """Tells what is held."""
    if self._held is None:
      return "You are not carrying anything."
    return f"You are carrying: a {self._board.names[self._held]}."

  def _help(self) -> str:
    """Lists the kinds of commands."""
    return HELP

  def _examine(self, receptacle: str) -> str:
    """Looks at a receptacle."""
    return self._describe(receptacle)

  def _inspect(self, thing: str) -> str:
    """Looks at the object in the hand."""
    board = self._board
    name = board.names[thing]
    if thing in board.vessels:
      # Some games nest an object in itself, which the grammar never lists.
      inner = sorted(o for o, outer in board.nested if outer == thing != o)
      contents = _enumerate([f"a {board.names[o]}" for o in inner])
      return f"This is a normal {name}. In it, you see {contents}."
    clean, hot = thing in self._clean, thing in self._hot
    cool, sliced = thing in self._cool, thing in self._sliced
    if clean and (hot or cool):
      words = ["hot and clean" if hot else "cool and clean"]
    elif clean and sliced:
      words = ["clean"]
    elif hot:
      words = ["hot"]
    elif clean:
      words = ["clean"]
    elif cool:
      words = ["cool" if sliced else "cold"]
    elif thing in board.toggleable and thing in self._toggled:
      return f"This {name} is on."
    else:
      words = []
    if sliced and (words or thing in board.sliceable):
      words.append("sliced")
    if not words:
      return f"There's nothing special about {name}."
    return f"This is a {' '.join(words)} {name}."

  def _go(self, receptacle: str) -> str:
    """Walks to a receptacle."""
    board = self._board
    place = self._place = board.place_of[receptacle]
    self._update()
    shown = place if board.dialect.arrive_at_location else receptacle
    return f"You arrive at {board.names[shown]}. {self._describe(receptacle)}"

  def _open(self, receptacle: str) -> str:
    """Opens a receptacle."""
    self._opened.add(receptacle)
    self._update()
    name = self._board.names[receptacle]
    return f"You open the {name}. {self._describe(receptacle)}"

  def _close(self, receptacle: str) -> str:
    """Closes a receptacle."""
    self._opened.discard(receptacle)
    self._update()
    return f"You close the {self._board.names[receptacle]}."

  def _take(self, thing: str, receptacle: str) -> str:
    """Takes an object into the hand."""
    self._inside[receptacle].discard(thing)
    self._left.add((thing, receptacle))
    self._around.get(self._place, set()).discard(thing)
    self._held = thing
    self._update()
    names = self._board.names
    return f"You pick up the {names[thing]} from the {names[receptacle]}."

  def _move(self, thing: str, receptacle: str) -> str:
    """Puts down the object in the hand."""
    self._inside[receptacle].add(thing)
    self._left.discard((thing, receptacle))
    self._around.setdefault(self._place, set()).add(thing)
    self._held = None
    self._update()
    names = self._board.names
    return self._board.dialect.moved.format(o=names[thing], r=names[receptacle])

  def _treat(self, verb: str, thing: str, receptacle: str) -> str:
    """Cleans, heats or cools the object in the hand."""
    if verb == "clean":
      self._clean.add(thing)
    elif verb == "heat":
      self._hot.add(thing)
      self._cool.discard(thing)
    else:
      self._cool.add(thing)
      self._hot.discard(thing)
    self._update()
    names = self._board.names
    return f"You {verb} the {names[thing]} using the {names[receptacle]}."

  def _use(self, thing: str) -> str:
    """Switches a lamp; the original always reports that it is on."""
    self._toggled.add(thing)
    self._update()
    return f"You turn on the {self._board.names[thing]}."

  def _slice(self, thing: str, knife: str) -> str:
    """Cuts an object with the knife in the hand."""
    self._sliced.add(thing)
    self._update()
    names = self._board.names
    return f"You sliced the {names[thing]} with the {names[knife]}."
