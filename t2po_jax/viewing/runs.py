"""Runs as the viewer reads them: the index of their episodes, and metrics.

Nothing is loaded before it is displayed. The index is read once, and after that
only what has been added to it, so that a run in progress can be watched.
"""

from collections.abc import Mapping, Sequence
import json
import math
import pathlib
import threading
from typing import Any

from t2po_jax import records
from t2po_jax.training import metrics

# Counts that an index line may have.
COUNTS = ("resampled", "intervened", "cut_off")


class Run:
  """One run's folder, or the folder of an evaluation.

  Attributes:
    label: its displayed name.
    folder: where it is.
  """

  def __init__(self, label: str, folder: pathlib.Path) -> None:
    """Opens a folder.

    Raises:
      ValueError: if it contains neither episodes nor metrics.
    """
    self.label = label
    self.folder = folder
    self._lock = threading.Lock()
    self._entries: list[dict[str, Any]] = []
    self._read = 0
    self._by_id: dict[str, dict[str, Any]] = {}
    self._metrics: tuple[float, list[dict[str, Any]]] = (-1.0, [])
    index = folder / records.FOLDER / records.INDEX
    if not index.is_file() and not (folder / metrics.FILE).is_file():
      raise ValueError(
        f"--workdir: {folder} holds neither {records.FOLDER}/{records.INDEX} "
        f"nor {metrics.FILE}; name the folder of a run"
      )

  def entries(self) -> list[dict[str, Any]]:
    """The up-to-date index."""
    path = self.folder / records.FOLDER / records.INDEX
    with self._lock:
      try:
        size = path.stat().st_size
      except OSError:
        return self._entries
      if size < self._read:  # The file was rewritten.
        self._entries, self._by_id, self._read = [], {}, 0
      if size > self._read:
        with path.open("rb") as file:
          file.seek(self._read)
          fresh, read = records.parse_index(file.read(), path)
        self._entries = [*self._entries, *fresh]
        self._by_id |= {entry["id"]: entry for entry in fresh}
        self._read += read
      return self._entries

  def episode(self, name: str) -> dict[str, Any]:
    """One episode together with its index entry.

    Raises:
      ValueError: if it does not exist or cannot be read.
    """
    self.entries()
    entry = self._by_id.get(name)
    if entry is None:
      raise ValueError(f"{self.folder}: no episode {name!r}")
    record = records.read_episode(self.folder / records.FOLDER, entry)
    return entry | {"episode": record}

  def metrics(self) -> list[dict[str, Any]]:
    """The lines of the metrics file, made safe for JSON."""
    path = self.folder / metrics.FILE
    with self._lock:
      try:
        changed = path.stat().st_mtime
      except OSError:
        return []
      if changed != self._metrics[0]:
        lines = [
          {k: v if math.isfinite(v) else None for k, v in line.items()}
          for line in metrics.read(path)
        ]
        self._metrics = changed, lines
      return self._metrics[1]

  def summary(self) -> dict[str, Any]:
    """What the page needs at first."""
    entries = self.entries()
    return {
      "label": self.label,
      "episodes": len(entries),
      "kinds": sorted({entry["kind"] for entry in entries}),
      "categories": sorted({entry["category"] for entry in entries}),
      "updates": sorted({entry["update"] for entry in entries}),
      "steps": len(self.metrics()),
    }


def open_runs(names: Sequence[str]) -> list[Run]:
  """Opens the runs named on a command line, as `folder` or `label=folder`.

  Raises:
    ValueError: if one of them is not a run.
  """
  runs = []
  for name in names:
    label, _, folder = name.rpartition("=")
    path = pathlib.Path(folder).expanduser().absolute()
    runs.append(Run(label or path.name, path))
  return runs


def select(
  entries: Sequence[Mapping[str, Any]], wanted: Mapping[str, str]
) -> list[Mapping[str, Any]]:
  """The episodes that pass all filters.

  Args:
    entries: of an index.
    wanted: `kind`, `category` and `task_id` must match exactly; `update` is a
      number or a range `3-7`; `success` and `aborted` are `yes` or `no`;
      `resampled`, `intervened` and `cut_off` are `yes` for at least one, `no`
      for none. Empty values and other keys are ignored.

  Raises:
    ValueError: for an invalid value.
  """
  low, high = _range(wanted.get("update", ""))
  wishes = {
    key: _yes(key, wanted[key])
    for key in ("success", "aborted", *COUNTS)
    if wanted.get(key)
  }
  exact = {
    key: wanted[key]
    for key in ("kind", "category", "task_id")
    if wanted.get(key)
  }
  return [
    entry
    for entry in entries
    if low <= entry["update"] <= high
    and all(entry[key] == value for key, value in exact.items())
    and all(bool(entry[key]) == wish for key, wish in wishes.items())
  ]


def _yes(key: str, value: str) -> bool:
  if value not in ("yes", "no"):
    raise ValueError(f"{key}: found {value!r}, expected yes or no")
  return value == "yes"


def _range(text: str) -> tuple[float, float]:
  """The bounds of `3` or `3-7`; an empty text means everything."""
  if not text:
    return -math.inf, math.inf
  low, _, high = text.partition("-")
  try:
    return int(low), int(high or low)
  except ValueError:
    raise ValueError(
      f"update: found {text!r}, expected a number or a range such as 3-7"
    ) from None


def same_task(runs: Sequence[Run], task_id: str) -> list[dict[str, Any]]:
  """All episodes of one task, in all runs."""
  return [
    {"run": number, **entry}
    for number, run in enumerate(runs)
    for entry in run.entries()
    if entry["task_id"] == task_id
  ]


def to_json(value: Any) -> bytes:
  """Compact JSON that is safe inside a script element."""
  text = json.dumps(value, allow_nan=False, separators=(",", ":"))
  # Inside strings the escapes are equivalent; elsewhere these never occur.
  for letter in "<>&\u2028\u2029":
    text = text.replace(letter, f"\\u{ord(letter):04x}")
  return text.encode()
