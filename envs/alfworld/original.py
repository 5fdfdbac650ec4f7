"""The original engine: TextWorld's PDDL environment, behind an extra.

It is the reference for the twin, and plays games whose rules the twin does not
know. It needs the packages of the extra `alfworld`, which compile native code.
As published it takes about a second per load and per reset and a tenth of a
second per step, because it translates the problem and parses every text
template again and again; `memoize` caches those results and changes nothing
else.

The native planner is not thread-safe: a process uses it from one thread only.
Engines are expensive to create and leave files in the temporary directory, so
one engine plays many games, one after another.
"""

import copy
import functools
import sys
from typing import Any

from t2po_jax.envs.alfworld import problem

_INSTALL = (
  "env.engine: {engine!r} needs the optional packages of ALFWorld; install "
  "them in the project's folder with: pip install -e '.[alfworld]'"
)
# Number of translated problems to keep; one takes about a megabyte.
_TRANSLATIONS = 64


def require(engine: str) -> None:
  """Checks that the packages can be imported.

  Args:
    engine: the name of the requested engine.

  Raises:
    ValueError: if they are not installed; the message says how to install them.
      Also on a Python version that TextWorld does not support, because it
      writes to `locals()`.
  """
  if sys.version_info >= (3, 13):
    raise ValueError(
      f"env.engine: {engine!r} runs on Python up to 3.12, found "
      f"{sys.version_info[0]}.{sys.version_info[1]}; the twin runs on both"
    )
  arguments = list(sys.argv)
  try:
    import alfworld.agents.utils.misc  # noqa: F401
    import fast_downward.translate  # noqa: F401
    import textworld.envs.pddl  # noqa: F401
  except ImportError:
    raise ValueError(_INSTALL.format(engine=engine)) from None
  finally:
    sys.argv = arguments


def read_rules() -> tuple[str, str]:
  """The domain and the grammar that the package ships.

  The grammar contains "UNKNOWN GOAL" where a game states its task.
  """
  require("cached")
  import alfworld.info

  with open(alfworld.info.ALFRED_PDDL_PATH, encoding="utf-8") as file:
    domain = file.read()
  with open(alfworld.info.ALFRED_TWL2_PATH, encoding="utf-8") as file:
    return domain, file.read()


@functools.cache
def memoize() -> None:
  """Caches, process-wide, what the engine would otherwise compute again."""
  import fast_downward
  import textworld.envs.pddl.textgen as textgen
  import textworld.logic

  translate = functools.lru_cache(_TRANSLATIONS)(fast_downward.pddl2sas)

  def pddl2sas(
    domain: str, problem: str, verbose: bool = False, optimize: bool = False
  ) -> Any:
    del verbose
    return translate(domain, problem, False, optimize)

  fast_downward.pddl2sas = pddl2sas
  parse_text = functools.cache(textgen._parse_and_convert)

  def parse_template(start: str, rule_name: str, trace: bool = False) -> Any:
    del trace
    # Symbols refer to their context, so every caller needs its own copy.
    return copy.deepcopy(parse_text(start, rule_name=rule_name))

  textgen._parse_and_convert = parse_template

  def copy_context(context: dict[str, Any]) -> dict[str, Any]:
    # The original copies every entity as well; nothing ever changes them.
    shared = dict(context)
    shared["variables"] = dict(context["variables"])
    shared["mapping"] = dict(context["mapping"])
    return shared

  textgen.copy_context = copy_context
  rule = textworld.logic.Rule
  rule.parse_conjunctive_query = functools.cache(rule.parse_conjunctive_query)


class Original:
  """The original engine with the interface of the twin.

  Attributes:
    won: whether the goal holds.
    admissible: the admissible commands, sorted.
  """

  def __init__(self, *, cached: bool) -> None:
    """Creates an engine; `load` a game before anything else.

    Args:
      cached: whether to keep translations and parsed templates.

    Raises:
      ValueError: if the packages are not installed.
    """
    require("cached" if cached else "stock")
    if cached:
      memoize()
    import textworld
    from textworld.envs.pddl import pddl

    infos = textworld.EnvInfos(won=True, admissible_commands=True)
    self._environment = pddl.PddlEnv(infos)
    self.won = False
    self.admissible: tuple[str, ...] = ()

  def load(self, file: problem.GameFile) -> None:
    """Loads a game; missing rules are filled in from the package."""
    from alfworld.agents.utils import misc

    domain, grammar = file.domain, file.grammar
    if not domain or not grammar:
      domain, grammar = read_rules()
      grammar = grammar.replace("UNKNOWN GOAL", file.task)
    environment = self._environment
    arguments = list(sys.argv)
    try:
      environment.load(
        {
          "pddl_domain": domain,
          "grammar": grammar,
          "pddl_problem": file.problem,
        }
      )
    finally:
      # The translator overwrites the arguments of the process.
      sys.argv = arguments
    entities = environment._entity_infos
    names = misc.Demangler(game_infos=entities)
    for entity in entities.values():
      entity.name = names.demangle_alfred_name(entity.id)

  def reset(self) -> str:
    """Starts the loaded game and returns the first observation."""
    arguments = list(sys.argv)
    try:
      state = self._environment.reset()
    finally:
      sys.argv = arguments
    return self._read(state)

  def step(self, command: str) -> str:
    """Executes a command and returns the observation."""
    return self._read(self._environment.step(command)[0])

  def _read(self, state: Any) -> str:
    self.won = bool(state["won"])
    self.admissible = tuple(state["admissible_commands"])
    return state.feedback
