"""The benchmark's own game files, from a folder or an archive.

The layout is `<split>/<task>/<trial>/game.tw-pddl`, where the name of the
task begins with its type. A game is used if its file says `"solvable": true`
and it requires neither moving receptacles nor slicing, as in the original
loader. An archive is unpacked once into the cache folder.
"""

import hashlib
import os
import pathlib
import shutil
import tarfile
import tempfile
from typing import IO
import zipfile

from t2po_jax.envs.alfworld import problem

FILE = "game.tw-pddl"
# Our split -> its folder; the first that exists is used.
FOLDERS = {
  "train": ("train", "valid_train"),
  "valid": ("valid_seen",),
  "test": ("valid_unseen",),
}
_KNOWN = frozenset(name for names in FOLDERS.values() for name in names)
_ARCHIVES = (".tar.gz", ".tgz", ".tar", ".zip")
_LAYOUT = "json_2.1.1/<split>/<task>/<trial>/game.tw-pddl"
# The flags come after the long fields; this many bytes contain them.
_TAIL_BYTES = 4096


def _has_splits(folder: pathlib.Path) -> bool:
  return any((folder / name).is_dir() for name in _KNOWN)


def _find(data_dir: str, cache_dir: str) -> pathlib.Path:
  """The folder that contains the split folders; unpacks an archive."""
  expanded = os.path.expandvars(os.path.expanduser(data_dir))
  if "$" in expanded:
    raise ValueError(
      f"env.data_dir: the variable in {data_dir!r} is not set; point it at "
      f"the folder or archive with {_LAYOUT}"
    )
  path = pathlib.Path(expanded)
  if path.is_file():
    return _unpack(path, cache_dir)
  if path.is_dir():
    children = sorted(child for child in path.iterdir())
    for folder in (path, *children):
      if folder.is_dir() and _has_splits(folder):
        return folder
    for child in children:
      if child.name.startswith("json_") and child.name.endswith(_ARCHIVES):
        return _unpack(child, cache_dir)
    raise ValueError(f"env.data_dir: {path} holds no {_LAYOUT}")
  raise ValueError(
    f"env.data_dir: {path} does not exist; expected the folder or archive "
    f"with {_LAYOUT}"
  )


def _default_cache() -> pathlib.Path:
  given = os.environ.get("T2PO_CACHE", "")
  return pathlib.Path(given or "~/.cache/t2po_jax").expanduser()


def _unpack(archive: pathlib.Path, cache_dir: str) -> pathlib.Path:
  """Unpacks the game files of an archive, once."""
  status = archive.stat()
  key = f"{archive.resolve()} {status.st_size} {status.st_mtime_ns}"
  cache = pathlib.Path(cache_dir) if cache_dir else _default_cache()
  digest = hashlib.sha256(key.encode()).hexdigest()[:16]
  target = cache / f"alfworld-{digest}"
  if target.is_dir():
    return target
  cache.mkdir(parents=True, exist_ok=True)
  draft = pathlib.Path(tempfile.mkdtemp(prefix="alfworld-", dir=cache))
  try:
    _copy_games(archive, draft)
    if not _has_splits(draft):
      raise ValueError(f"env.data_dir: {archive} holds no {_LAYOUT}")
    try:
      draft.rename(target)
    except OSError:
      # Another process was faster; its copy is the same.
      if not target.is_dir():
        raise
  finally:
    shutil.rmtree(draft, ignore_errors=True)
  return target


def _copy_games(archive: pathlib.Path, target: pathlib.Path) -> None:
  """Copies every game file of an archive to its place in a folder."""

  def copy(name: str, source: IO[bytes]) -> None:
    parts = pathlib.PurePosixPath(name).parts[-4:]
    if len(parts) == 4 and parts[0] in _KNOWN and ".." not in parts:
      path = target.joinpath(*parts)
      path.parent.mkdir(parents=True, exist_ok=True)
      with open(path, "wb") as file:
        shutil.copyfileobj(source, file)

  try:
    if archive.name.endswith(".zip"):
      with zipfile.ZipFile(archive) as bundle:
        for entry in bundle.namelist():
          if entry.endswith(FILE):
            with bundle.open(entry) as source:
              copy(entry, source)
    else:
      with tarfile.open(archive) as tar:
        for member in tar:
          if member.isfile() and member.name.endswith(FILE):
            source = tar.extractfile(member)
            if source is not None:
              copy(member.name, source)
  except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
    raise ValueError(
      f"env.data_dir: {archive} cannot be unpacked: {error}"
    ) from None


def _is_solvable(path: pathlib.Path) -> bool:
  """Whether a game file is marked as solvable."""
  with open(path, "rb") as file:
    file.seek(max(path.stat().st_size - _TAIL_BYTES, 0))
    text = file.read()
    if b'"solvable"' not in text:
      file.seek(0)
      text = file.read()
  return b'"solvable":true' in text.replace(b" ", b"")


class Tree:
  """The game files in one folder.

  Attributes:
    splits: split -> task ids `<folder>/<task>/<trial>`, sorted.
  """

  def __init__(self, data_dir: str, cache_dir: str = "") -> None:
    """Lists the games.

    Args:
      data_dir: folder or archive; `~` and `$VARIABLES` are expanded. A folder
        may contain the splits, or one folder or archive that does.
      cache_dir: where archives are unpacked; empty for `$T2PO_CACHE`
        or `~/.cache/t2po_jax`.

    Raises:
      ValueError: if there are no games to train on, or their type is unknown.
    """
    self._root = _find(data_dir, cache_dir)
    self.splits = {
      split: self._list(folders) for split, folders in FOLDERS.items()
    }
    if not self.splits["train"]:
      raise ValueError(
        f"env.data_dir: {self._root} holds no solvable game in "
        f"{' or '.join(FOLDERS['train'])}"
      )

  def _list(self, folders: tuple[str, ...]) -> tuple[str, ...]:
    for name in folders:
      if (self._root / name).is_dir():
        break
    else:
      return ()
    ids = []
    for path in sorted((self._root / name).glob(f"*/*/{FILE}")):
      task, trial = path.parts[-3:-1]
      if "movable" in task or "Sliced" in task or not _is_solvable(path):
        continue
      if self.task_type(f"{name}/{task}/{trial}") not in problem.TASK_TYPES:
        raise ValueError(
          f"env.data_dir: {path.parent} names no known task type; expected "
          f"one of {', '.join(problem.TASK_TYPES)}"
        )
      ids.append(f"{name}/{task}/{trial}")
    return tuple(ids)

  def task_type(self, task_id: str) -> str:
    """The task type, as given in the id."""
    return task_id.split("/")[-2].split("-")[0]

  def read(self, task_id: str) -> problem.GameFile:
    """The game file of a task.

    Raises:
      KeyError: if there is no such file.
      ValueError: if the file cannot be read.
    """
    path = self._root / task_id / FILE
    try:
      text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
      raise KeyError(f"alfworld: no game file for task {task_id!r}") from None
    return problem.load(text, str(path))
