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

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIBRARY = "t2po_jax"

# Unit of the library -> its floor. Files of floor 0 and of floor 4 are one
# unit each: masked builds on types, train calls evaluate.
FLOORS = {
  "": 0,
  "types": 0,
  "masked": 0,
  "processes": 0,
  "sharding": 0,
  "models": 1,
  "control": 1,
  "rollout": 2,
  "learning": 2,
  "checkpoint": 3,
  "metrics": 3,
  "guard": 3,
  "build": 4,
  "checks": 4,
  "cold_start": 4,
  "evaluate": 4,
  "experience": 4,
  "export": 4,
  "improve": 4,
  "play": 4,
  "memory": 4,
  "train": 4,
}
SHARED_FLOORS = (0, 4)
ENTRY_FLOOR = 4

# Folders that no part of the library or the environments builds on.
OUTSIDE = ("experiments", "tests")
CONFIGURATION = ("configs", "ml_collections")
HEAVY = (
  "alfworld",
  "faiss",
  "mlflow",
  "spacy",
  "tensorflow",
  "torch",
  "wandb",
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
  for folder in (LIBRARY, "envs", "configs", "experiments"):
    for path in sorted((root / folder).rglob("*.py")):
      name = path.relative_to(root)
      module = ".".join(name.with_suffix("").parts).removesuffix(".__init__")
      if folder == LIBRARY and _unit(module) not in FLOORS:
        found.append(f"{name}:1: unit {_unit(module)} has no floor")
        continue
      for line, target in imports(path, module):
        if problem := _problem(module, target):
          found.append(f"{name}:{line}: imports {target}: {problem}")
      for line, target in imports(path, module, module_level=True):
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
  source, imported = module.split("."), target.split(".")
  if source[0] not in (LIBRARY, "envs"):
    return None
  if imported[0] in OUTSIDE:
    return f"{source[0]} must not build on {imported[0]}"
  if source[0] == "envs":
    if imported[0] in ("jax", "jaxlib", LIBRARY, *CONFIGURATION):
      return "an environment is only strings and numpy"
    return None
  unit = _unit(module)
  floor = FLOORS[unit]
  if imported[0] in CONFIGURATION and floor < ENTRY_FLOOR:
    return "takes plain arguments; only entry points see the configuration"
  if imported[0] != LIBRARY:
    return None
  other = _unit(target)
  if other not in FLOORS:
    return None if other.startswith("__") else f"no unit {other}"
  if other == unit or FLOORS[other] < floor:
    return None
  if FLOORS[other] == floor and floor in SHARED_FLOORS:
    return None
  return (
    f"floor {floor} ({unit or LIBRARY}) must not import floor "
    f"{FLOORS[other]} ({other})"
  )


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
    found = [t for _, t in imports(ROOT / LIBRARY / "masked.py", "x.masked")]
    self.assertEqual(found, ["jax.numpy", "t2po_jax.types"])

  @parameterized.parameters(
    # Upwards.
    ("t2po_jax/masked.py", "\n\nfrom t2po_jax.models import decoder", 3),
    ("t2po_jax/masked.py", "import t2po_jax.models.decoder as d", 1),
    ("t2po_jax/masked.py", "from .models import decoder", 1),
    ("t2po_jax/models/decoder.py", "from .. import metrics", 1),
    ("t2po_jax/models/decoder.py", "from ..rollout.sampler import draw", 1),
    ("t2po_jax/models/__init__.py", "from ..learning import losses", 1),
    ("t2po_jax/metrics.py", "def f():\n  from t2po_jax import train", 2),
    ("t2po_jax/metrics.py", "if x:\n  import t2po_jax.evaluate", 2),
    ("t2po_jax/__init__.py", "from t2po_jax import train", 1),
    ("t2po_jax/learning/losses.py", "from t2po_jax import checkpoint", 1),
    # Sideways.
    ("t2po_jax/models/decoder.py", "from t2po_jax.control import thinking", 1),
    ("t2po_jax/control/thinking.py", "from t2po_jax import models", 1),
    ("t2po_jax/rollout/collect.py", "from t2po_jax.learning import losses", 1),
    ("t2po_jax/learning/losses.py", "from t2po_jax import rollout", 1),
    ("t2po_jax/metrics.py", "from t2po_jax import checkpoint", 1),
    # Out of the house.
    ("t2po_jax/train.py", "from experiments import main", 1),
    ("envs/toy.py", "from tests import toy_test", 1),
    ("t2po_jax/learning/losses.py", "import ml_collections", 1),
    ("t2po_jax/rollout/collect.py", "from configs import base", 1),
    ("t2po_jax/drawer.py", "import os\nimport jax", 1),
    ("t2po_jax/train.py", "from t2po_jax import drawer", 1),
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
          "from envs import base\n"
          "from t2po_jax.models import decoder\n"
          "from t2po_jax.control import thinking\n"
          "from t2po_jax.rollout import sampler\n"
          "from t2po_jax import types\n"
        ),
        "t2po_jax/train.py": (
          "import ml_collections\n"
          "from t2po_jax import evaluate\n"
          "from t2po_jax import metrics\n"
        ),
        "envs/alfworld/engine.py": "def f():\n  import alfworld",
        "experiments/main.py": "from configs import base\nimport jax",
        "tests/parity_test.py": "import torch",
        "t2po_jax/learning/commons.py": "",
      }
    )
    self.assertEmpty(violations(root))


if __name__ == "__main__":
  absltest.main()
