"""Files that cannot be written, by everything that writes files here."""

import contextlib
import pathlib
import resource
import tempfile

from absl.testing import absltest, parameterized
import numpy as np
import safetensors.numpy
import tokenizers

from t2po_jax import files


@contextlib.contextmanager
def full_disk():
  """No file gets longer than 256 bytes, as on a disk without room."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (256, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class WritingTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    place = tempfile.TemporaryDirectory()
    self.addCleanup(place.cleanup)
    self.path = pathlib.Path(place.name) / "file"

  def write_text(self):
    self.path.write_text("x" * 1000)

  def write_array(self):
    with self.path.open("wb") as file:
      np.save(file, np.zeros(1000))

  def write_tensors(self):
    safetensors.numpy.save_file({"x": np.zeros(1000)}, self.path)

  def write_tokenizer(self):
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(self.path))

  @parameterized.parameters(
    "write_text", "write_array", "write_tensors", "write_tokenizer"
  )
  def test_the_file_is_named(self, how):
    with (
      self.assertRaisesRegex(OSError, "^my/place could not be written: ") as e,
      files.writing("somewhere/else"),
      files.writing("my/place"),
      full_disk(),
    ):
      getattr(self, how)()
    self.assertNotIn("\n", str(e.exception))

  def test_other_errors_stay_what_they_are(self):
    for kind in (ValueError, KeyError, KeyboardInterrupt):
      with self.assertRaises(kind), files.writing("place"):
        raise kind("no")


class DraftTest(absltest.TestCase):
  def test_all_or_nothing(self):
    with tempfile.TemporaryDirectory() as folder:
      place = pathlib.Path(folder) / "new" / "place"
      with self.assertRaises(KeyboardInterrupt), files.draft(place) as draft:
        (draft / "half").write_text("x")
        raise KeyboardInterrupt
      self.assertEmpty(list(place.parent.iterdir()))
      with files.draft(place) as draft:
        (draft / "whole").write_text("x")
        draft.rename(place)
      self.assertEqual([p.name for p in place.parent.iterdir()], ["place"])
      self.assertEqual((place / "whole").read_text(), "x")


if __name__ == "__main__":
  absltest.main()
