"""What is noted of the machine."""

import json
import pathlib
import subprocess
import tempfile
from unittest import mock

from absl.testing import absltest

import t2po_jax
from t2po_jax.training import machine


class MachineTest(absltest.TestCase):
  def note(self):
    folder = pathlib.Path(tempfile.mkdtemp())
    machine.note(folder)
    return json.loads((folder / machine.FILE).read_text())

  def test_says_what_it_ran_on(self):
    found = self.note()
    self.assertEqual(found["version"], t2po_jax.__version__)
    self.assertRegex(found["devices"], r"^\d+ \S")
    self.assertNotEmpty(found["processor"])

  def test_the_commit_is_that_of_the_checkout(self):
    folder = pathlib.Path(tempfile.mkdtemp())
    (folder / "t2po_jax").mkdir()
    code = folder / "t2po_jax" / "__init__.py"
    code.write_text("a")
    with mock.patch.object(t2po_jax, "__file__", str(code)):
      self.assertEqual(self.note()["commit"], "unknown")
      for command in (
        "git init -q .",
        "git add -A",
        "git -c user.name=a -c user.email=a@b.c commit -qm one",
      ):
        subprocess.run(command.split(), cwd=folder, check=True)
      self.assertRegex(self.note()["commit"], r"^[0-9a-f]{7,}$")
      code.write_text("b")
      self.assertRegex(self.note()["commit"], r"^[0-9a-f]{7,} with changes$")


if __name__ == "__main__":
  absltest.main()
