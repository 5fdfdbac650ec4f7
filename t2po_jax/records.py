"""Episodes on disk: every token with its measurements, and an index.

A folder of episodes holds compressed files, `train-00003.jsonl.gz` for the
episodes of one update, and `index.jsonl` with one short line per episode. Each
episode is a separate gzip member: `zcat` reads the whole file, while a reader
that knows a member's offset reads that episode alone. So ten thousand episodes
can be listed and filtered through the index, and an episode is only read when
it is displayed.

The file is complete before the index refers to it. A killed process leaves at
most a truncated last line, which readers skip and the next writer removes.
"""

import codecs
from collections.abc import Callable, Iterable, Mapping, Sequence
import gzip
import json
import math
import os
import pathlib
from typing import Any

import numpy as np

from t2po_jax import files, types

FOLDER = "trajectories"
INDEX = "index.jsonl"
# The measurements of every token, as named in a record.
MEASURES = ("logprobs", "uncertainty", "entropy", "confidence")


def pieces_of(
  tokens: Iterable[int], token_bytes: Sequence[bytes], *, final: bool = True
) -> list[str]:
  """The text that each token adds; joined, they are the decoded text.

  A multi-byte character belongs to the token that completes it.

  Args:
    tokens: token ids; those beyond the vocabulary add nothing.
    token_bytes: the bytes that each id adds to the text.
    final: whether the text ends here; if not, an incomplete character at the
      end is held back.
  """
  decoder = codecs.getincrementaldecoder("utf-8")("replace")
  pieces = [
    decoder.decode(token_bytes[token] if token < len(token_bytes) else b"")
    for token in tokens
  ]
  if pieces and final:
    pieces[-1] += decoder.decode(b"", final=True)
  return pieces


def to_record(
  trajectory: types.Trajectory,
  decode: Callable[[list[int]], str],
  token_bytes: Sequence[bytes],
  *,
  advantages: Sequence[float] | None = None,
) -> dict[str, Any]:
  """A trajectory as a JSON-able dict, for reading and later analysis.

  Args:
    trajectory: the episode.
    decode: token ids -> text, for the prompts.
    token_bytes: the bytes that each token id adds to the text.
    advantages: one per turn; None if there are none.

  Returns:
    Everything recorded, discarded attempts included; arrays as lists, NaN as
    None. A response that was not sampled here has empty lists of measurements.
  """

  def attempt(response: types.Attempt) -> dict:
    tokens = response.tokens.tolist()
    return {
      "text": response.text,
      "finish": response.finish,
      "fired_at": response.fired_at,
      "thinking_tokens": response.thinking_tokens,
      "phi": _rounded(response.phi, 6),
      "tokens": tokens,
      "pieces": pieces_of(tokens, token_bytes),
      "forced": np.flatnonzero(response.forced).tolist(),
      **{
        name: [_rounded(x, 5) for x in getattr(response, name).tolist()]
        for name in MEASURES
      },
    }

  return {
    "task_id": trajectory.task_id,
    "category": trajectory.category,
    "group": trajectory.group,
    "member": trajectory.member,
    "success": trajectory.success,
    "aborted": trajectory.aborted,
    "return": trajectory.episode_return,
    "turns": [
      {
        "prompt": decode(turn.prompt.tolist()),
        **attempt(turn.response),
        "action": turn.action,
        "observation": turn.anchor,
        "reward": turn.reward,
        "penalty": turn.penalty,
        "advantage": (
          None if advantages is None else _rounded(advantages[number], 5)
        ),
        "format_valid": turn.format_valid,
        "action_valid": turn.action_valid,
        "phi_change": _rounded(turn.phi_change, 6),
        "discarded": [attempt(other) for other in turn.discarded],
        **({"info": turn.info} if turn.info else {}),
      }
      for number, turn in enumerate(trajectory.turns)
    ],
  }


def _rounded(value: float, digits: int) -> float | None:
  """A number that JSON can hold; None for NaN and infinities."""
  return round(float(value), digits) if math.isfinite(value) else None


def summarise(record: Mapping[str, Any]) -> dict[str, Any]:
  """The summary of an episode that the index holds, without its offset."""
  turns = record["turns"]
  attempts = [a for turn in turns for a in (turn, *turn["discarded"])]
  return {
    "task_id": record["task_id"],
    "category": record["category"],
    "group": record["group"],
    "member": record["member"],
    "success": record["success"],
    "aborted": record["aborted"],
    "return": _rounded(record["return"], 6),
    "turns": len(turns),
    "tokens": sum(len(turn["tokens"]) for turn in turns),
    "resampled": sum(len(turn["discarded"]) for turn in turns),
    "intervened": sum(a["fired_at"] >= 0 for a in attempts),
    "cut_off": sum(turn["finish"] == "length" for turn in turns),
  }


class Writer:
  """Writes the episodes of a run into one folder."""

  def __init__(
    self, folder: str | os.PathLike, *, resume_update: int = 0
  ) -> None:
    """Creates the folder; drops index lines that will be written again.

    Args:
      folder: where files and index are kept.
      resume_update: lines of this update and of later ones are dropped.
    """
    self.folder = pathlib.Path(folder)
    self.folder.mkdir(parents=True, exist_ok=True)
    index = self.folder / INDEX
    # File -> episodes in it, and its size as the index knows it.
    self._ends: dict[str, tuple[int, int]] = {}
    if index.is_file():
      kept = [e for e in read_index(self.folder) if e["update"] < resume_update]
      text = "".join(json.dumps(entry) + "\n" for entry in kept)
      _replace(index, text.encode())
      for entry in kept:
        number, _ = self._ends.get(entry["file"], (0, 0))
        end = entry["offset"] + entry["size"]
        self._ends[entry["file"]] = number + 1, end

  def write(
    self, kind: str, update: int, episodes: Iterable[Mapping[str, Any]]
  ) -> None:
    """Writes the episodes of one update, replacing earlier ones.

    Args:
      kind: `train` or `eval`; part of the file name, with the update.
      update: number of the update.
      episodes: records, see `to_record`.
    """
    name = _file(kind, update)
    data, lines, offset = [], [], 0
    for number, episode in enumerate(episodes):
      member, line = _pack(kind, update, number, episode, offset)
      data.append(member)
      lines.append(line)
      offset += len(member)
    if not data:
      return
    _replace(self.folder / name, b"".join(data))
    self._note("".join(lines))
    self._ends[name] = len(data), offset

  def append(self, kind: str, update: int, episode: Mapping[str, Any]) -> None:
    """Appends one finished episode to those of an update."""
    name = _file(kind, update)
    number, end = self._ends.get(name, (0, 0))
    member, line = _pack(kind, update, number, episode, end)
    path = self.folder / name
    with files.writing(path), path.open("ab") as file:
      file.truncate(end)  # Leftovers of a killed process are not in the index.
      file.write(member)
    self._note(line)
    self._ends[name] = number + 1, end + len(member)

  def _note(self, lines: str) -> None:
    path = self.folder / INDEX
    with files.writing(path), path.open("a", encoding="utf-8") as file:
      file.write(lines)


def _file(kind: str, update: int) -> str:
  return f"{kind}-{update:05d}.jsonl.gz"


def _pack(
  kind: str, update: int, number: int, episode: Mapping[str, Any], offset: int
) -> tuple[bytes, str]:
  """The compressed episode, and its line of the index."""
  text = json.dumps(episode, allow_nan=False) + "\n"
  member = gzip.compress(text.encode(), compresslevel=6, mtime=0)
  entry = {"id": f"{kind}-{update:05d}-{number}", "kind": kind}
  entry |= {"update": update} | summarise(episode)
  entry |= {"file": _file(kind, update), "offset": offset, "size": len(member)}
  return member, json.dumps(entry, allow_nan=False) + "\n"


def _replace(path: pathlib.Path, data: bytes) -> None:
  """Writes a file atomically."""
  draft = path.with_suffix(".tmp")
  with files.writing(path):
    draft.write_bytes(data)
    os.replace(draft, path)


def read_index(folder: str | os.PathLike) -> list[dict[str, Any]]:
  """All complete lines of a folder's index, in the order of writing.

  Args:
    folder: of a `Writer`.

  Raises:
    ValueError: if there is no index, or a line inside it is damaged.
  """
  path = pathlib.Path(folder) / INDEX
  try:
    data = path.read_bytes()
  except OSError as error:
    raise ValueError(
      f"{path}: cannot be read ({error.strerror}); expected the episodes of a "
      "run that had log.trajectories above 0"
    ) from None
  return parse_index(data, path)[0]


def parse_index(
  data: bytes, path: pathlib.Path
) -> tuple[list[dict[str, Any]], int]:
  """Complete lines of an index, and how many bytes they take."""
  size = data.rfind(b"\n") + 1
  entries = []
  for number, line in enumerate(data[:size].splitlines(), 1):
    try:
      entries.append(json.loads(line))
    except ValueError:
      raise ValueError(
        f"{path}:{number}: found {line[:40]!r}, expected a JSON object"
      ) from None
  return entries, size


def read_episode(
  folder: str | os.PathLike, entry: Mapping[str, Any]
) -> dict[str, Any]:
  """The record that an index line refers to.

  Raises:
    ValueError: if the file is missing or does not contain it.
  """
  path = pathlib.Path(folder) / pathlib.Path(entry["file"]).name
  try:
    with path.open("rb") as file:
      file.seek(entry["offset"])
      return json.loads(gzip.decompress(file.read(entry["size"])))
  except (OSError, EOFError, ValueError) as error:
    raise ValueError(
      f"{path}: episode {entry['id']} cannot be read ({error})"
    ) from None
