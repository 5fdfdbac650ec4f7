"""The search library must not start JAX."""

import subprocess
import sys

from absl.testing import absltest

_ALONE = """
import sys
from envs import bm25
assert not any(name.split(".")[0] == "jax" for name in sys.modules)
assert bm25.BM25
import jax.lax
"""
_BESIDE = """
import jax.lax
from envs import bm25
from jax._src import xla_bridge
import sys
assert sys.modules["jax.lax"] is jax.lax
assert not xla_bridge.backends_are_initialized()
"""


class Bm25Test(absltest.TestCase):
  def test_import_leaves_jax_alone(self):
    for program in (_ALONE, _BESIDE):
      done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
      )
      self.assertEqual(done.returncode, 0, done.stderr)


if __name__ == "__main__":
  absltest.main()
