"""Importing WebShop, with JAX or without, starts no accelerator."""

import subprocess
import sys

from absl.testing import absltest, parameterized

from tests import places

_ALONE = """
import sys
import t2po_jax.envs.webshop
assert not any(name.split(".")[0] == "jax" for name in sys.modules)
"""
_BESIDE = """
import jax.lax
import t2po_jax.envs.webshop
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""


class ImportTest(parameterized.TestCase):
  @parameterized.parameters(_ALONE, _BESIDE)
  def test_accelerator_sleeps(self, program):
    done = subprocess.run(
      [sys.executable, "-c", program],
      cwd=places.ROOT,
      capture_output=True,
      text=True,
    )
    self.assertEqual(done.returncode, 0, done.stderr)


if __name__ == "__main__":
  absltest.main()
