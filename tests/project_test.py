"""What the project declares: dependencies, extras, the Makefile's names."""

import ast
import re
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
      {"alfworld", "dense", "webshop", "gpu", "tpu", "dev"}, set(extras)
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
        for name in sorted(top_imports(ast.parse(path.read_text()))):
          distribution = DISTRIBUTIONS.get(name, name.lower())
          if name not in known and distribution not in declared:
            missing.append(f"{path.relative_to(ROOT)}: {name}")
    self.assertEmpty(missing)


if __name__ == "__main__":
  absltest.main()
