"""Programs: their flags, defined when they run and not when imported."""

import importlib
import subprocess
import sys
import tempfile
import tomllib

from absl import flags
from absl.testing import absltest, parameterized

from t2po_jax.experiments import command_line
from tests import places

COMMANDS = tomllib.loads((places.ROOT / "pyproject.toml").read_text())[
  "project"
]["scripts"]
PROGRAMS = sorted(
  str(path.relative_to(places.ROOT).with_suffix("")).replace("/", ".")
  for path in (places.ROOT / "experiments").rglob("*.py")
  if "command_line.run(" in path.read_text()
)


def load(name):
  return importlib.import_module(f"t2po_jax.{name}")


class FlagsTest(parameterized.TestCase):
  def test_every_command_is_a_program(self):
    self.assertGreater(len(PROGRAMS), 12)
    for target in COMMANDS.values():
      module, _, name = target.partition(":")
      folder, _, program = module.removeprefix("t2po_jax.").partition(".")
      if folder == "experiments":
        self.assertIn(f"experiments.{program}", PROGRAMS)
        self.assertEqual(name, "run")

  def test_importing_defines_nothing(self):
    modules = list(map(load, PROGRAMS))
    owners = flags.FLAGS.flags_by_module_dict()
    for module in modules:
      self.assertNotIn(module.__name__, owners)

  @parameterized.parameters(*PROGRAMS)
  def test_flags_are_defined_apart(self, name):
    module, values = load(name), flags.FlagValues()
    module.define_flags(values)
    self.assertNotEmpty(list(values))
    self.assertIn(module.__name__, values.flags_by_module_dict())
    self.assertNotIn(module.__name__, flags.FLAGS.flags_by_module_dict())


class FrameTest(absltest.TestCase):
  def run_program(self, *arguments, body, **options):
    code = (
      "import sys\nfrom absl import flags\n"
      "from t2po_jax.experiments import command_line\n"
      "def define_flags(given):\n"
      "  flags.DEFINE_integer('port', 1, 'A port.', flag_values=given)\n"
      f"def program(given, *rest):\n  {body}\n"
      f"command_line.run(program, define_flags, **{options!r})\n"
    )
    return subprocess.run(
      [sys.executable, "-c", code, *arguments],
      cwd=places.ROOT,
      capture_output=True,
      text=True,
    )

  def test_one_line_for_what_is_wrong(self):
    body = "raise ValueError('--port: found it')"
    failed = self.run_program("--port=2", body=body)
    self.assertEqual(failed.returncode, 1)
    self.assertEqual(failed.stderr, "error: --port: found it\n")
    unknown = self.run_program("--prot=2", body=body)
    self.assertEqual(unknown.returncode, 1)
    self.assertRegex(unknown.stderr, r"^error: .*'prot'.*\n$")

  def test_a_configuration_that_does_not_exist(self):
    folder = places.ROOT / "configs"
    with self.assertRaises(SystemExit) as raised:
      command_line.parse_flags(["x", f"--config={folder}/serchqa.py:smollm2"])
    self.assertRegex(
      str(raised.exception),
      r"found no file '\S+serchqa.py'; did you mean 'searchqa'\? \(known: alf",
    )
    self.assertNotIn("\n", str(raised.exception))
    with self.assertRaisesRegex(SystemExit, "found no file 'none/such.py'$"):
      command_line.parse_flags(["x", "--config=none/such.py"])

  def test_a_search_server_that_is_not_there(self):
    with tempfile.TemporaryDirectory() as folder:
      failed = subprocess.run(
        [
          *(sys.executable, "experiments/main.py"),
          "--config=configs/searchqa.py",
          "--config.env.retriever=http",
          "--config.env.url=http://127.0.0.1:9/retrieve",
          *("--config.env.tries=1", f"--workdir={folder}/run"),
        ],
        cwd=places.ROOT,
        capture_output=True,
        text=True,
      )
    self.assertEqual(failed.returncode, 1)
    self.assertNotIn("Traceback", failed.stderr)
    self.assertRegex(
      failed.stderr, r"error: search server http\S+:9/retrieve: "
    )

  def test_positional_arguments_only_where_allowed(self):
    body = "print(given.port, *rest)"
    refused = self.run_program("here", body=body)
    self.assertNotEqual(refused.returncode, 0)
    self.assertIn("unexpected argument 'here'", refused.stderr)
    passed = self.run_program("a", "--port=7", "b", body=body, positional=True)
    self.assertEqual(passed.stdout, "7 a b\n")


if __name__ == "__main__":
  absltest.main()
