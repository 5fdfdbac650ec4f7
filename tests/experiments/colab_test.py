"""The notebook, executed from top to bottom on a CPU with tiny settings."""

import importlib.util
import os
import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest

from tests import places

PATH = places.ROOT / "experiments" / "colab.ipynb"
RUNNERS = ("nbclient", "ipykernel", "matplotlib")


@absltest.skipUnless(
  all(map(importlib.util.find_spec, RUNNERS)), f"needs {', '.join(RUNNERS)}"
)
class NotebookTest(absltest.TestCase):
  def test_runs_from_top_to_bottom(self):
    import nbclient
    import nbformat

    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
      self.assertFalse(cell.get("outputs"))  # It is kept without results.
    work = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    settings = {
      "T2PO_ROOT": str(places.ROOT),
      "T2PO_WORK": str(work),
      "T2PO_CACHE": str(work / "cache"),
      "T2PO_QUICK": "1",
      "JAX_PLATFORMS": "cpu",
      "MPLBACKEND": "agg",
      "IPYTHONDIR": str(work / "ipython"),
    }
    with mock.patch.dict(os.environ, settings):
      nbclient.NotebookClient(notebook, timeout=600).execute()
    self.assertTrue((work / "agent" / "model.safetensors").is_file())
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printed = ["".join(map(str, cell.outputs)) for cell in cells]
    self.assertIn("CpuDevice", printed[1])
    self.assertIn("background:", printed[-2])
    self.assertIn("config.json", printed[-1])


if __name__ == "__main__":
  absltest.main()
