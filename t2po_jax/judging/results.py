"""The output of an evaluation: settings, episodes, scores, tables.

A folder with `evaluation.json` (settings and scores), `tables.md`,
`episodes.jsonl` (one line per episode) and `trajectories/` for the trace
viewer. Episodes are written as they end, so that an interrupted evaluation
resumes with the missing ones.
"""

from collections.abc import Callable, Mapping, Sequence
import json
import pathlib
from typing import Any

from t2po_jax import files, records, types
from t2po_jax.judging import scores, tables

EPISODES = "episodes.jsonl"
SUMMARY = "evaluation.json"


class Results:
  """The folder of one evaluation.

  Attributes:
    folder: where it is.
    episodes: all finished episodes, those of earlier starts included.
  """

  def __init__(self, folder: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Opens or creates the folder and reads its contents.

    Args:
      folder: where it is.
      settings: of the evaluation; anything that JSON can represent.

    Raises:
      ValueError: if it contains another evaluation, or a damaged line.
    """
    self.folder = folder
    self._settings = json.loads(json.dumps(settings))
    self.episodes: list[scores.Episode] = []
    folder.mkdir(parents=True, exist_ok=True)
    self._check()
    self._read()
    self._lines = (folder / EPISODES).open("a", encoding="utf-8")
    self._traces = records.Writer(
      folder / records.FOLDER, resume_update=1 << 60
    )

  def _check(self) -> None:
    path = self.folder / SUMMARY
    if path.is_file():
      earlier = json.loads(path.read_text())["settings"]
      for key in sorted(earlier.keys() | self._settings.keys()):
        if earlier.get(key) != self._settings.get(key):
          raise ValueError(
            f"--out: {self.folder} holds an evaluation with {key} "
            f"{earlier.get(key)!r}, not {self._settings.get(key)!r}; name "
            "another folder"
          )
    self._write_summary({})

  def _read(self) -> None:
    path = self.folder / EPISODES
    if not path.is_file():
      return
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines(), 1):
      try:
        self.episodes.append(scores.from_line(json.loads(line)))
      except ValueError as error:
        raise ValueError(f"{path}:{number}: {error}") from None
    if whole != data:
      path.write_bytes(whole)

  def done(self) -> set[tuple[str, str, str, int]]:
    """Variant, split, task and repeat of every episode that was not aborted."""
    return {
      (e.variant, e.split, e.task_id, e.repeat)
      for e in self.episodes
      if not e.aborted
    }

  def forget_aborted(self) -> None:
    """Drops aborted episodes, so that they are played again."""
    self.episodes = [e for e in self.episodes if not e.aborted]
    self._lines.close()
    text = "".join(json.dumps(scores.to_line(e)) + "\n" for e in self.episodes)
    path = self.folder / EPISODES
    with files.writing(path):
      path.write_text(text)
    self._lines = path.open("a", encoding="utf-8")

  def add(
    self,
    episode: scores.Episode,
    trajectory: types.Trajectory,
    *,
    decode: Callable[[Sequence[int]], str],
    token_bytes: Sequence[bytes],
    kind: str,
    step: int,
  ) -> None:
    """Writes one episode.

    Args:
      episode: its scores, a line of `episodes.jsonl`.
      trajectory: the whole episode, for the trace viewer.
      decode: token ids -> text.
      token_bytes: what each token id adds to the text.
      kind: part of the name of its trace file, with `step`.
      step: the evaluated update.
    """
    record = records.to_record(trajectory, decode, token_bytes)
    self._traces.append(kind, step, record)
    self.episodes.append(episode)
    self._note(json.dumps(scores.to_line(episode)) + "\n")

  def add_all(
    self,
    episodes: Sequence[scores.Episode],
    trajectories: Sequence[types.Trajectory],
    *,
    decode: Callable[[Sequence[int]], str],
    token_bytes: Sequence[bytes],
    kind: str,
    step: int,
  ) -> None:
    """Writes episodes that ended together; see `add`."""
    self._traces.write(
      kind,
      step,
      (records.to_record(t, decode, token_bytes) for t in trajectories),
    )
    self.episodes.extend(episodes)
    lines = (json.dumps(scores.to_line(e)) + "\n" for e in episodes)
    self._note("".join(lines))

  def _note(self, lines: str) -> None:
    with files.writing(self.folder / EPISODES):
      self._lines.write(lines)
      self._lines.flush()

  def finish(
    self, benchmark: str, extra: Mapping[str, Any]
  ) -> list[tables.Table]:
    """Writes scores and tables.

    Args:
      benchmark: `config.env.name`, for the paper's table.
      extra: further values, e.g. seconds and calls.

    Returns:
      The tables.
    """
    self._lines.close()
    summary = {
      name: scores.summarise(group)
      for name, group in tables.by_variant(self.episodes).items()
    }
    made = [
      tables.overview(self.episodes),
      tables.of_benchmark(benchmark, self.episodes),
    ]
    self._write_summary(
      {"results": _plain(summary), **_plain(dict(extra))},
    )
    text = "\n\n".join(table.markdown() for table in made)
    path = self.folder / "tables.md"
    with files.writing(path):
      path.write_text(text + "\n")
    return made

  def _write_summary(self, summary: Mapping[str, Any]) -> None:
    text = json.dumps({"settings": self._settings, **summary}, indent=2)
    path = self.folder / SUMMARY
    with files.writing(path):
      path.write_text(text + "\n")


def _plain(value: Any) -> Any:
  """Replaces NaN by None, recursively."""
  if isinstance(value, Mapping):
    return {key: _plain(inner) for key, inner in value.items()}
  if isinstance(value, float) and value != value:
    return None
  return value
