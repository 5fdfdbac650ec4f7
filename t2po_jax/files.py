"""Writing files: what goes wrong is one line that names the file.

A full disk shows in many ways: Python names no file, libraries raise errors of
their own. Whoever writes does it inside `writing`.
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil
import tempfile

import safetensors


class WriteError(OSError):
  """A file could not be written; the message is one line."""


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
  """Names the file or folder that could not be written.

  Args:
    path: what is written inside the block.

  Raises:
    WriteError: if the block raises an `OSError`, or what safetensors and
      tokenizers raise when they cannot write.
  """
  try:
    yield
  except WriteError:
    raise
  except (OSError, safetensors.SafetensorError) as error:
    raise _named(path, error) from error
  except Exception as error:
    if type(error) is not Exception:  # All that tokenizers raise.
      raise
    raise _named(path, error) from error


@contextlib.contextmanager
def draft(place: pathlib.Path) -> Iterator[pathlib.Path]:
  """A new folder beside `place`, to be written, then renamed to it.

  Args:
    place: the folder to be; its parents are made.

  Yields:
    The draft. What has not been renamed by the end of the block is removed.

  Raises:
    WriteError: as `writing` does.
  """
  with writing(place):
    place.parent.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(tempfile.mkdtemp(dir=place.parent))
    try:
      yield folder
    finally:
      shutil.rmtree(folder, ignore_errors=True)


def _named(path: str | os.PathLike[str], error: Exception) -> WriteError:
  reason = getattr(error, "strerror", None) or str(error) or repr(error)
  return WriteError(
    f"{os.fspath(path)} could not be written: {reason.splitlines()[0]}"
  )
