"""bm25s is imported without JAX, in every state of the process."""

import subprocess
import sys
import textwrap

from absl.testing import absltest, parameterized

from tests import places


def _run(code):
  """The output of a fresh interpreter."""
  return subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code)],
    cwd=places.ROOT,
    capture_output=True,
    text=True,
    check=True,
  ).stdout.strip()


class SparseTest(parameterized.TestCase):
  def test_search_packages_leave_jax_alone(self):
    loaded = _run("""
      import sys
      import t2po_jax.envs.searchqa
      heavy = ("jax", "torch", "tensorflow", "transformers", "faiss")
      print([name for name in sys.modules if name.split(".")[0] in heavy])
    """)
    self.assertEqual(loaded, "[]")

  def test_a_loaded_module_stays_and_backends_sleep(self):
    output = _run("""
      import sys
      import types
      fake = types.ModuleType("jax")
      sys.modules["jax"] = fake
      from t2po_jax.envs import sparse
      print(sys.modules["jax"] is fake, sparse.bm25s.__name__)
      print(sparse.bm25s.selection_np.JAX_IS_AVAILABLE)
    """)
    self.assertEqual(output.split(), ["True", "bm25s", "False"])


if __name__ == "__main__":
  absltest.main()
