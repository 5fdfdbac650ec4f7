"""One game as data: read from and written to the fields of `game.tw-pddl`.

A game file contains the rules (a PDDL domain and a text grammar), which are the
same in every game, and the problem, which is the game's own. `parse` checks
the rules by a fingerprint, because the twin engine has them built in, and
reads the problem into sets of facts. Everything is lower-cased, as in the
planner behind the original engine.

There are two dialects: older files have "put X in/on Y" and "You arrive at loc
3", newer ones "move X to Y", "You arrive at desk 1", and `help`.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import hashlib
import json
import re
import textwrap

PLACE = "pick_and_place_simple"
LOOK = "look_at_obj_in_light"
CLEAN = "pick_clean_then_place_in_recep"
HEAT = "pick_heat_then_place_in_recep"
COOL = "pick_cool_then_place_in_recep"
TWO = "pick_two_obj_and_place"
TASK_TYPES = (PLACE, LOOK, CLEAN, HEAT, COOL, TWO)


def _changed_goal(able: str, changed: str) -> str:
  return (
    "(exists (?r - receptacle) (exists (?o - object) (and"
    f" ({able} ?o) (objectType ?o @object) (receptacleType ?r @target)"
    f" ({changed} ?o) (inReceptacle ?o ?r))))"
  )


# The goal formula of each task type; @object and @target stand for types.
GOALS = {
  PLACE: (
    "(exists (?r - receptacle) (exists (?o - object) (and"
    " (inReceptacle ?o ?r) (objectType ?o @object)"
    " (receptacleType ?r @target))))"
  ),
  LOOK: (
    "(exists (?ot - object ?r - receptacle ?a - agent ?l - location) (and"
    " (objectType ?ot @target) (toggleable ?ot) (isToggled ?ot)"
    " (receptacleAtLocation ?r ?l) (atLocation ?a ?l) (inReceptacle ?ot ?r)))"
    " (exists (?o - object ?a - agent) (and (objectType ?o @object)"
    " (holds ?a ?o)))"
  ),
  CLEAN: _changed_goal("cleanable", "isClean"),
  HEAT: _changed_goal("heatable", "isHot"),
  COOL: _changed_goal("coolable", "isCool"),
  TWO: (
    "(exists (?r - receptacle) (exists (?o1 - object) (and"
    " (objectType ?o1 @object) (receptacleType ?r @target)"
    " (inReceptacle ?o1 ?r) (exists (?o2 - object) (and (not (= ?o1 ?o2))"
    " (objectType ?o2 @object) (receptacleType ?r @target)"
    " (inReceptacle ?o2 ?r))))))"
  ),
}

# How a task type requires the object to be treated: verb, kind of receptacle.
TOOLS = {
  CLEAN: ("clean", "sinkbasin"),
  HEAT: ("heat", "microwave"),
  COOL: ("cool", "fridge"),
}

# SHA-256 of the rules after `_canonical_*`, the only ones the twin knows.
_DOMAIN = "b0b8259a4e11c9f4"
_GRAMMAR = "5102a0330767c554"

# Predicates that no text, command or goal depends on.
_IGNORED = frozenset(
  (
    "=",
    "checked",
    "distance",
    "examined",
    "full",
    "ison",
    "isreceptacleobjectfull",
    "moveable",
    "total-cost",
    "wasinreceptacle",
  )
)
_KNOWN = frozenset(
  (
    "atlocation",
    "cancontain",
    "cleanable",
    "coolable",
    "heatable",
    "inreceptacle",
    "inreceptacleobject",
    "isclean",
    "iscool",
    "ishot",
    "isreceptacleobject",
    "issliced",
    "istoggled",
    "objectatlocation",
    "objecttype",
    "openable",
    "opened",
    "pickupable",
    "receptacleatlocation",
    "receptacletype",
    "sliceable",
    "toggleable",
  )
)


@dataclasses.dataclass(frozen=True)
class Dialect:
  """The texts that differ between dialects.

  Attributes:
    move: the command that puts an object down, with fields `o` and `r`.
    moved: the answer to it.
    arrive_at_location: whether the text on arrival names the location ("loc 3")
      instead of the receptacle.
    helps: whether the command `help` exists.
  """

  move: str = "move {o} to {r}"
  moved: str = "You move the {o} to the {r}."
  arrive_at_location: bool = False
  helps: bool = True


NEW_DIALECT = Dialect()
OLD_DIALECT = Dialect(
  move="put {o} in/on {r}",
  moved="You put the {o} in/on the {r}.",
  arrive_at_location=True,
  helps=False,
)


@dataclasses.dataclass(frozen=True)
class Goal:
  """The goal of a game.

  Attributes:
    task_type: one of `TASK_TYPES`.
    object: kind of the object, e.g. "mug".
    target: kind of the receptacle, or of the lamp in `LOOK`.
  """

  task_type: str
  object: str
  target: str


@dataclasses.dataclass(frozen=True)
class GameFile:
  """The fields of a `game.tw-pddl`, as text.

  Attributes:
    problem: the PDDL problem.
    task: the task in words, without the full stop.
    domain: the PDDL domain; empty means the standard one.
    grammar: the text grammar; empty means the standard one.
    walkthrough: a solution; empty if the file has none.
  """

  problem: str
  task: str
  domain: str = ""
  grammar: str = ""
  walkthrough: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Game:
  """A parsed game.

  Attributes:
    task: the task in words, without the full stop.
    goal: the goal.
    facts: predicate -> arguments of its initial facts, lower-case ids.
    names: id -> name shown to the player, e.g. "mug 1".
    dialect: the wording.
    walkthrough: a solution; empty if unknown.
  """

  task: str
  goal: Goal
  facts: Mapping[str, tuple[tuple[str, ...], ...]]
  names: Mapping[str, str]
  dialect: Dialect
  walkthrough: tuple[str, ...] = ()


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _tokens(text: str) -> str:
  """PDDL in lower case without comments, tokens separated by one space."""
  text = re.sub(r";[^\n]*", "", text).lower()
  return " ".join(re.findall(r"[()]|[^\s()]+", text))


def _canonical_domain(text: str) -> str:
  """A domain without the parts in which the known versions differ."""
  text = re.sub(r"\( :action help .*\) \)$", ")", _tokens(text))
  return text.replace("( receptacletype ?r sinktype ) ", "")


def _canonical_grammar(text: str) -> str:
  """A grammar without its task, in the new dialect and without `help`."""
  text = re.sub(r"\naction help \{.*?\n\}", "", text, flags=re.DOTALL)
  text = re.sub(r'Your task is to: [^"]*', "", text)
  for old, new in (
    ("You arrive at {lend.name}.", "You arrive at {r.name}."),
    ("put {o} in/on {r}", "move {o} to {r}"),
    ("You put the {o.name} in/on the", "You move the {o.name} to the"),
  ):
    text = text.replace(old, new)
  return " ".join(text.split())


_CHECKED_DOMAINS: set[str] = set()


def _check_domain(text: str, source: str) -> None:
  """Rejects a domain that the twin does not know."""
  if not text or text in _CHECKED_DOMAINS:
    return
  if _digest(_canonical_domain(text)) != _DOMAIN:
    raise ValueError(
      f"{source}: pddl_domain is not the ALFRED domain that the engine `twin` "
      "plays; set env.engine to `cached`"
    )
  _CHECKED_DOMAINS.add(text)


def _read_dialect(text: str, source: str) -> Dialect:
  """The dialect of a grammar; rejects one that the twin does not know."""
  if not text:
    return NEW_DIALECT
  if _digest(_canonical_grammar(text)) != _GRAMMAR:
    raise ValueError(
      f"{source}: grammar is not the ALFWorld grammar that the engine `twin` "
      "plays; set env.engine to `cached`"
    )
  old = "put {o} in/on {r}" in text
  dialect = OLD_DIALECT if old else NEW_DIALECT
  return dataclasses.replace(
    dialect,
    arrive_at_location="You arrive at {lend.name}." in text,
    helps="action help {" in text,
  )


def _goal_patterns() -> dict[str, re.Pattern[str]]:
  """A regular expression over `_tokens` for each goal formula."""
  patterns = {}
  for task_type, formula in GOALS.items():
    pattern = re.escape(_tokens(f"(:goal (and {formula}))"))
    for field in ("object", "target"):
      pattern = pattern.replace(
        f"@{field}", rf"(?P<{field}>[a-z]+)type", 1
      ).replace(f"@{field}", rf"(?P={field})type")
    patterns[task_type] = re.compile(pattern)
  return patterns


_GOAL_PATTERNS = _goal_patterns()


def _read_goal(text: str, source: str) -> Goal:
  """The goal of a problem; `text` begins at its goal section."""
  tokens = _tokens(text)
  for task_type, pattern in _GOAL_PATTERNS.items():
    match = pattern.match(tokens)
    if match:
      return Goal(task_type, match["object"], match["target"])
  raise ValueError(
    f"{source}: the goal is none of the six task types "
    f"({', '.join(TASK_TYPES)}), found {tokens[:80]!r}"
  )


def _read_facts(
  text: str, source: str
) -> dict[str, tuple[tuple[str, ...], ...]]:
  """The facts of an init section, by predicate."""
  facts: dict[str, dict[tuple[str, ...], None]] = {}
  for atom in re.findall(r"\(([^()]+)\)", text):
    predicate, *arguments = atom.lower().split()
    if predicate not in _KNOWN:
      if predicate in _IGNORED:
        continue
      raise ValueError(
        f"{source}: the engine `twin` cannot start from the fact "
        f"({atom}); set env.engine to `cached`"
      )
    facts.setdefault(predicate, {})[tuple(arguments)] = None
  return {
    predicate: tuple(of_predicate) for predicate, of_predicate in facts.items()
  }


def name_entities(ids: Iterable[str]) -> dict[str, str]:
  """The names the player sees: kind and number, e.g. "desk 2".

  Within a kind, numbers decrease along the sorted ids, as in the benchmark.

  Args:
    ids: lower-case ids of everything that occurs in a fact.

  Returns:
    id -> name.
  """
  kinds: dict[str, list[str]] = {}
  for identity in sorted(ids):
    kind, mark, _ = identity.partition("_bar_")
    if mark:
      kind += "basin" if "basin" in identity else ""
      kinds.setdefault(kind, []).append(identity)
  return {
    identity: f"{kind} {len(members) - index}"
    for kind, members in kinds.items()
    for index, identity in enumerate(members)
  }


def parse(file: GameFile, source: str) -> Game:
  """Reads a game for the twin engine.

  Args:
    file: the texts of the game file.
    source: the name of the file for error messages.

  Returns:
    The game.

  Raises:
    ValueError: if the twin cannot play it: unknown rules, goal or facts.
  """
  _check_domain(file.domain, source)
  dialect = _read_dialect(file.grammar, source)
  text = file.problem
  if ";" in text:
    text = re.sub(r";[^\n]*", "", text)
  init, goal = text.find("(:init"), text.find("(:goal")
  if not 0 <= init < goal:
    raise ValueError(
      f"{source}: pddl_problem must have an (:init ...) and then a "
      "(:goal ...) section"
    )
  facts = _read_facts(text[init + len("(:init") : goal], source)
  if len(facts.get("atlocation", ())) != 1:
    raise ValueError(
      f"{source}: pddl_problem must place exactly one agent, found "
      f"{len(facts.get('atlocation', ()))}"
    )
  places = facts.get("receptacleatlocation", ())
  receptacles = [receptacle for receptacle, _ in places]
  if len(set(receptacles)) != len(receptacles):
    raise ValueError(f"{source}: a receptacle stands at two locations")
  ids = {
    argument
    for of_predicate in facts.values()
    for arguments in of_predicate
    for argument in arguments
  }
  return Game(
    task=file.task,
    goal=_read_goal(text[goal:], source),
    facts=facts,
    names=name_entities(ids),
    dialect=dialect,
    walkthrough=file.walkthrough,
  )


def load(text: str, source: str) -> GameFile:
  """Splits the JSON of a game file into its fields.

  Args:
    text: the content of a `game.tw-pddl`.
    source: the name of the file for error messages.

  Returns:
    The fields.

  Raises:
    ValueError: if the text is not JSON or a field is missing.
  """
  try:
    data = json.loads(text)
  except json.JSONDecodeError as error:
    raise ValueError(
      f"{source}: not a JSON game file: {error.msg} at line {error.lineno}"
    ) from None
  if not isinstance(data, dict) or "pddl_problem" not in data:
    raise ValueError(f"{source}: the game file has no field pddl_problem")
  grammar = data.get("grammar", "")
  task = data.get("task", "")
  if not task:
    match = re.search(r'Your task is to: ([^"]*)"', grammar)
    if not match:
      raise ValueError(f"{source}: the grammar states no task")
    task = match[1].removesuffix(".")
  return GameFile(
    problem=data["pddl_problem"],
    task=task,
    domain=data.get("pddl_domain", ""),
    grammar=grammar,
    walkthrough=tuple(data.get("walkthrough") or ()),
  )


def dump(file: GameFile) -> str:
  """The JSON of a game file.

  The rules may be missing; then the twin can play the file, and the original
  engine can do so after the package's rules have been filled in.
  """
  data = {
    "pddl_domain": file.domain,
    "grammar": file.grammar,
    "pddl_problem": file.problem,
    "solvable": True,
    "walkthrough": list(file.walkthrough),
  }
  if not file.grammar:
    data["task"] = file.task
  return json.dumps({key: value for key, value in data.items() if value})


def write_goal(goal: Goal, types: Mapping[str, str]) -> str:
  """The goal section of a PDDL problem.

  Args:
    goal: the goal, with lower-case kinds.
    types: kind -> its class name in CamelCase.
  """
  formula = GOALS[goal.task_type]
  formula = formula.replace("@object", f"{types[goal.object]}Type")
  formula = formula.replace("@target", f"{types[goal.target]}Type")
  lines = textwrap.wrap(formula, 76, break_on_hyphens=False)
  return "(:goal (and\n" + "\n".join(f"  {line}" for line in lines) + "))"
