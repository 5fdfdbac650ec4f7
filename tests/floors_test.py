"""The house's floors: who may import whom, checked on the parsed sources.

A unit imports only itself and lower floors, so `models` and `control`, or
`rollout` and `learning`, never see each other. Environments know neither JAX
nor the library; only entry points see the configuration; heavy packages are
imported where they are used. The rules are also tried on small trees that
break them, one by one.
"""

import ast
from collections.abc import Iterator
import pathlib
import tempfile

from absl.testing import absltest, parameterized

from tests import places

ROOT = places.ROOT
LIBRARY = "t2po_jax"

# Unit of the library -> its floor. Floor 0 is one unit: masked builds on types.
FLOORS = {
  "": 0,
  "keys": 0,
  "types": 0,
  "files": 0,
  "masked": 0,
  "distributed": 0,
  "models": 1,
  "control": 1,
  "records": 1,
  "rollout": 2,
  "learning": 2,
  "setup": 3,
  # The protocol over the sampler; knows nothing of configurations.
  "serving": 3,
  "training": 4,
  # Scores and pages over what training wrote; nothing builds on them.
  "judging": 5,
  # Pages and reports over all of it.
  "viewing": 6,
}
SHARED_FLOORS = (0,)
# Folders that lie beside the library and are linked into it.
LINKED = ("envs", "configs", "experiments")
# The lowest floor that sees the configuration.
ENTRY_FLOOR = 3

# Folders that no part of the library or the environments builds on.
OUTSIDE = ("t2po_jax.experiments", "tests")
CONFIGURATION = ("t2po_jax.configs", "ml_collections")
HEAVY = (
  "alfworld",
  "faiss",
  "gymnasium",
  "mcp",
  "mlflow",
  "spacy",
  "tensorflow",
  "textarena",
  "torch",
  "wandb",
  "websockets",
)
DRAWERS = ("common", "helpers", "misc", "utils")


def imports(
  path: pathlib.Path, module: str, *, module_level: bool = False
) -> Iterator[tuple[int, str]]:
  """Yields line and absolute dotted name of everything a file imports.

  Args:
    path: the source file.
    module: its dotted name, to resolve relative imports.
    module_level: whether to leave out what functions import.
  """
  is_package = path.name == "__init__.py"
  package = module.split(".") if is_package else module.split(".")[:-1]
  for node in _walk(ast.parse(path.read_text()), module_level):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield node.lineno, alias.name
    elif isinstance(node, ast.ImportFrom):
      base = package[: len(package) - node.level + 1] if node.level else []
      base = base + ([node.module] if node.module else [])
      for alias in node.names:
        yield node.lineno, ".".join([*base, alias.name])
    elif (
      isinstance(node, ast.Call)
      and ast.unparse(node.func) in ("importlib.import_module", "__import__")
      and node.args
      and isinstance(node.args[0], ast.Constant)
    ):
      yield node.lineno, str(node.args[0].value)


def violations(root: pathlib.Path) -> list[str]:
  """All broken rules of a source tree, each `file:line: what is wrong`."""
  found = []
  for folder in (LIBRARY, *LINKED):
    for path in sorted((root / folder).rglob("*.py")):
      name = path.relative_to(root)
      if folder == LIBRARY and name.parts[1] in LINKED:
        continue
      module = ".".join(name.with_suffix("").parts).removesuffix(".__init__")
      if folder in LINKED:
        module = f"{LIBRARY}.{module}"
      elif _unit(module) not in FLOORS:
        found.append(f"{name}:1: unit {_unit(module)} has no floor")
        continue
      for line, target in imports(path, module):
        if problem := _problem(module, target):
          found.append(f"{name}:{line}: imports {target}: {problem}")
      for line, target in imports(path, module, module_level=True):
        if target.split(".")[0] in LINKED:
          found.append(
            f"{name}:{line}: imports {target}: it is {LIBRARY}.{target}"
          )
        if target.split(".")[0] in HEAVY:
          found.append(
            f"{name}:{line}: imports {target} at module level: import it in "
            "the function that needs it"
          )
  for folder in (LIBRARY, "envs", "configs", "experiments", "tests"):
    for path in sorted((root / folder).rglob("*")):
      if path.stem in DRAWERS and (path.is_dir() or path.suffix == ".py"):
        found.append(
          f"{path.relative_to(root)}:1: name the file after what it does"
        )
  return found


def _problem(module: str, target: str) -> str | None:
  """What is wrong with one import, None if nothing is."""
  unit, top = _unit(module), target.split(".")[0]
  if unit in ("configs", "experiments"):
    return None
  if _is_in(target, OUTSIDE):
    return f"{unit or LIBRARY} must not build on {target}"
  if unit == "envs":
    inside = _is_in(target, (f"{LIBRARY}.envs", f"{LIBRARY}.keys"))
    if top in ("jax", "jaxlib", LIBRARY, *CONFIGURATION) and not inside:
      return "an environment is only strings and numpy"
    return None
  floor = FLOORS[unit]
  if _is_in(target, CONFIGURATION) and floor < ENTRY_FLOOR:
    return "takes plain arguments; only entry points see the configuration"
  if top != LIBRARY:
    return None
  other = _unit(target)
  if other not in FLOORS:
    free = other.startswith("__") or other in ("envs", "configs")
    return None if free else f"no unit {other}"
  if other == unit or FLOORS[other] < floor:
    return None
  if FLOORS[other] == floor and floor in SHARED_FLOORS:
    return None
  return (
    f"floor {floor} ({unit or LIBRARY}) must not import floor "
    f"{FLOORS[other]} ({other})"
  )


def _is_in(target: str, packages: tuple[str, ...]) -> bool:
  """Whether a dotted name is one of the packages or lies in one."""
  return any(target == p or target.startswith(f"{p}.") for p in packages)


def _unit(module: str) -> str:
  """The file or folder of the library that a dotted name lies in."""
  return (module.split(".") + [""])[1]


def _walk(tree: ast.AST, module_level: bool) -> Iterator[ast.AST]:
  """All nodes, or those that run when the module is imported."""
  for node in ast.iter_child_nodes(tree):
    yield node
    is_function = isinstance(
      node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    )
    if not (module_level and is_function):
      yield from _walk(node, module_level)


class FloorsTest(parameterized.TestCase):
  def tree(self, files):
    """A folder with the given sources, by path."""
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    root = pathlib.Path(folder.name)
    for name, text in files.items():
      (root / name).parent.mkdir(parents=True, exist_ok=True)
      (root / name).write_text(text)
    return root

  def test_the_house_stands(self):
    self.assertEmpty(violations(ROOT), "\n" + "\n".join(violations(ROOT)))

  def test_the_house_was_looked_at(self):
    names = {p.stem for p in (ROOT / LIBRARY).rglob("*.py")}
    self.assertContainsSubset({"types", "masked", "metrics"}, names)
    for name in LINKED:
      self.assertTrue((ROOT / LIBRARY / name).is_symlink())
    found = [t for _, t in imports(ROOT / LIBRARY / "masked.py", "x.masked")]
    self.assertEqual(found, ["jax.numpy", "t2po_jax.types"])

  @parameterized.parameters(
    # Upwards.
    ("t2po_jax/masked.py", "\n\nfrom t2po_jax.models import decoder", 3),
    ("t2po_jax/masked.py", "import t2po_jax.models.decoder as d", 1),
    ("t2po_jax/masked.py", "from .models import decoder", 1),
    ("t2po_jax/models/decoder.py", "from ..training import metrics", 1),
    ("t2po_jax/models/decoder.py", "from ..rollout.sampler import draw", 1),
    ("t2po_jax/models/__init__.py", "from ..learning import losses", 1),
    ("t2po_jax/setup/build.py", "def f():\n  from t2po_jax import training", 2),
    ("t2po_jax/setup/build.py", "if x:\n  import t2po_jax.training.loop", 2),
    ("t2po_jax/__init__.py", "from t2po_jax import training", 1),
    ("t2po_jax/learning/losses.py", "from t2po_jax.setup import build", 1),
    # Sideways.
    ("t2po_jax/models/decoder.py", "from t2po_jax.control import thinking", 1),
    ("t2po_jax/control/thinking.py", "from t2po_jax import models", 1),
    ("t2po_jax/rollout/collect.py", "from t2po_jax.learning import losses", 1),
    ("t2po_jax/learning/losses.py", "from t2po_jax import rollout", 1),
    # Out of the house.
    ("t2po_jax/training/loop.py", "from t2po_jax.experiments import main", 1),
    ("t2po_jax/training/loop.py", "from t2po_jax import experiments", 1),
    ("envs/toy.py", "from tests import toy_test", 1),
    ("t2po_jax/learning/losses.py", "import ml_collections", 1),
    ("t2po_jax/rollout/collect.py", "from t2po_jax.configs import base", 1),
    ("t2po_jax/drawer.py", "import os\nimport jax", 1),
    ("t2po_jax/training/loop.py", "from t2po_jax import drawer", 1),
    # By a name that is not installed.
    ("t2po_jax/rollout/collect.py", "from envs import base", 1),
    ("experiments/main.py", "import os\nimport configs", 2),
    # Environments.
    ("envs/toy.py", "import jax.numpy as jnp", 1),
    ("envs/searchqa/world.py", "def f():\n  import jax", 2),
    ("envs/searchqa/world.py", "from t2po_jax import types", 1),
    ("envs/toy.py", 'import importlib\nimportlib.import_module("jax")', 2),
    # Heavy packages.
    ("t2po_jax/models/weights.py", "import torch.nn as nn", 1),
    ("envs/alfworld/engine.py", "if 1:\n  from alfworld import a", 2),
    ("experiments/bench.py", "class A:\n  import tensorflow", 2),
    ("configs/base.py", "import wandb", 1),
    # Drawers.
    ("t2po_jax/models/utils.py", "", 1),
    ("tests/helpers.py", "", 1),
    ("envs/common/words.py", "", 1),
  )  # fmt: skip
  def test_a_broken_rule_is_found_with_its_place(self, name, text, line):
    found = violations(self.tree({name: text}))
    self.assertLen(found, 1, found)
    place, at, _ = found[0].split(":", 2)
    self.assertStartsWith(name, place)
    self.assertEqual(int(at), line)

  def test_what_is_allowed_passes(self):
    root = self.tree(
      {
        "t2po_jax/masked.py": "from t2po_jax import types",
        "t2po_jax/models/decoder.py": "from . import config\nimport jax",
        "t2po_jax/rollout/collect.py": (
          "from t2po_jax.envs import base\n"
          "from t2po_jax.models import decoder\n"
          "from t2po_jax.control import thinking\n"
          "from t2po_jax.rollout import sampler\n"
          "from t2po_jax import types\n"
        ),
        "t2po_jax/training/loop.py": (
          "import ml_collections\n"
          "from t2po_jax.training import evaluate\n"
          "from t2po_jax.setup import build\n"
        ),
        "envs/searchqa/data.py": "from t2po_jax.envs import base",
        "envs/alfworld/engine.py": "def f():\n  import alfworld",
        "experiments/main.py": "from t2po_jax.configs import base\nimport jax",
        "tests/parity_test.py": "import torch",
        "t2po_jax/learning/commons.py": "",
      }
    )
    self.assertEmpty(violations(root))


if __name__ == "__main__":
  absltest.main()
