"""What the project declares: dependencies, extras, the Makefile's names."""

import ast
import json
import re
import subprocess
import sys
import tomllib

from absl.testing import absltest

from tests import places

ROOT = places.ROOT
OWN = {"t2po_jax", "envs", "configs", "experiments", "tests"}

# Import name -> distribution, where they differ.
DISTRIBUTIONS = {
  "absl": "absl-py",
  "orbax": "orbax-checkpoint",
  "Stemmer": "pystemmer",
  "tensorboardX": "tensorboardx",
  "tensorflow_datasets": "tensorflow-datasets",
  "ml_collections": "ml-collections",
  "huggingface_hub": "huggingface-hub",
  # jax brings it, at the version it needs.
  "ml_dtypes": "jax",
}

# Modules that are imported by functions only, with the extra they need.
WITH_EXTRA = {"t2po_jax/serving/app.py": "serve"}


def requirement_names(lines) -> set[str]:
  """Normalised distribution names of requirement lines."""
  names = set()
  for line in lines:
    line = line.split("#")[0].strip()
    if line:
      names.add(re.match(r"[\w.-]+", line)[0].lower().replace("_", "-"))
  return names


def top_imports(tree) -> set[str]:
  """Packages that a module imports when it is itself imported."""
  found = set()
  for node in tree.body:
    if isinstance(node, ast.Import):
      found |= {alias.name.split(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and not node.level:
      found.add(node.module.split(".")[0])
  return found


def oversized(tree: ast.AST) -> list[str]:
  """Functions above 80 lines and classes above 15 public methods."""
  found = []
  for node in ast.walk(tree):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      lines = node.end_lineno - node.lineno + 1
      if lines > 80:
        found.append(f"{node.name} has {lines} lines")
    elif isinstance(node, ast.ClassDef):
      public = [
        item
        for item in node.body
        if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))
        and not item.name.startswith("_")
      ]
      if len(public) > 15:
        found.append(f"{node.name} has {len(public)} public methods")
  return found


def unannotated(*given: str, code: str = "") -> list[str]:
  """What ruff's ANN rules find under the project's settings.

  Args:
    *given: paths to check, or the options for code on the standard input.
    code: that code.
  """
  done = subprocess.run(
    [sys.executable, "-m", "ruff", "check", "--output-format=json", *given],
    cwd=ROOT,
    input=code,
    capture_output=True,
    text=True,
  )
  findings = json.loads(done.stdout)
  return [x["message"] for x in findings if x["code"].startswith("ANN")]


class ProjectTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    text = (ROOT / "requirements.txt").read_text()
    self.requirements = [
      line for line in text.splitlines() if line and line[0] not in "#-"
    ]
    self.project = tomllib.loads((ROOT / "pyproject.toml").read_text())

  def test_every_range_has_both_ends(self):
    for line in self.requirements:
      self.assertRegex(line, r"^[\w.-]+>=[\d.]+,<[\d.]+$")

  def test_heavy_packages_are_extras_only(self):
    core = requirement_names(self.requirements)
    self.assertGreater(len(core), 10)
    heavy = {"torch", "tensorflow", "alfworld", "textworld", "spacy"}
    self.assertEmpty(core & heavy)

  def test_extras_exist(self):
    extras = self.project["project"]["optional-dependencies"]
    self.assertContainsSubset(
      {"alfworld", "dense", "webshop", "gpu", "tpu", "serve", "dev"},
      set(extras),
    )

  def test_the_makefile_pins_the_torch_of_the_extra(self):
    dev = self.project["project"]["optional-dependencies"]["dev"]
    (pin,) = [line for line in dev if line.startswith("torch")]
    self.assertIn(f" {pin}", (ROOT / "Makefile").read_text())

  def test_module_level_imports_are_declared(self):
    core = requirement_names(self.requirements)
    extras = self.project["project"]["optional-dependencies"]
    dev = core | requirement_names(extras["dev"])
    known = OWN | sys.stdlib_module_names
    missing = []
    for folder in sorted(OWN):
      declared = dev if folder == "tests" else core
      for path in sorted((ROOT / folder).rglob("*.py")):
        extra = WITH_EXTRA.get(str(path.relative_to(ROOT)), "dev")
        own = requirement_names(extras[extra]) if extra != "dev" else set()
        for name in sorted(top_imports(ast.parse(path.read_text()))):
          distribution = DISTRIBUTIONS.get(name, name.lower())
          if name not in known and distribution not in declared | own:
            missing.append(f"{path.relative_to(ROOT)}: {name}")
    self.assertEmpty(missing)

  def test_nothing_grows_too_large(self):
    found = []
    for folder in ("t2po_jax", "envs", "configs", "experiments"):
      for path in sorted((ROOT / folder).rglob("*.py")):
        text = path.read_text()
        tree = ast.parse(text)
        reason = "long because" in (ast.get_docstring(tree) or "")
        if text.count("\n") > 600 and not reason:
          found.append(f"{path}: more than 600 lines and no reason on top")
        found += [f"{path}: {line}" for line in oversized(tree)]
    self.assertEmpty(found)

  def test_every_parameter_and_return_value_has_a_type(self):
    self.assertIn("ANN", self.project["tool"]["ruff"]["lint"]["select"])
    self.assertEmpty(unannotated("t2po_jax", "envs", "configs", "experiments"))

  def test_a_missing_type_is_found(self):
    code = """
class A:
  def __init__(self): ...
  def plain(self, x: int, y) -> None: ...
  @staticmethod
  def static(x) -> None: ...
def outer(*args, key: int = 0, **options: int) -> object:
  def inner(x, y: int): ...
  return lambda z: z
"""
    found = unannotated("--stdin-filename=envs/one.py", "-", code=code)
    names = [re.findall(r"`([^`]+)`", line)[-1] for line in found]
    self.assertCountEqual(names, ["__init__", "y", "x", "*args", "x", "inner"])

  def test_what_is_too_large_is_found(self):
    long = "def f():\n" + "  pass\n" * 80
    wide = "class A:\n" + "".join(f"  def f{i}(self): ...\n" for i in range(16))
    self.assertEqual(oversized(ast.parse(long)), ["f has 81 lines"])
    self.assertEqual(oversized(ast.parse(wide)), ["A has 16 public methods"])
    self.assertEmpty(oversized(ast.parse(long.replace("  pass\n", "", 1))))


if __name__ == "__main__":
  absltest.main()
