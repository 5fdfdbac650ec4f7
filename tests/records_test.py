"""Episodes on disk: whole, by place, after a kill, and rewritten."""

import gzip
import json
import pathlib
import tempfile

from absl.testing import absltest
import numpy as np

from t2po_jax import records, types

BYTES = [b"a", b"b", " é".encode()[:2], " é".encode()[2:], b"</x>"]


def attempt(tokens, *, phi=0.5, fired_at=-1, finish="stop"):
  """A response of the given tokens over `BYTES`."""
  size = len(tokens)
  text = b"".join(BYTES[t] for t in tokens).decode(errors="replace")
  return types.Attempt(
    tokens=np.asarray(tokens, np.int32),
    logprobs=np.full(size, -0.25, np.float32),
    uncertainty=np.linspace(0, 1, size, dtype=np.float32),
    entropy=np.full(size, np.nan, np.float32),
    confidence=np.ones(size, np.float32),
    forced=np.arange(size) == 1,
    text=text,
    finish=finish,
    fired_at=fired_at,
    thinking_tokens=1,
    phi=phi,
  )


def trajectory(member=0, *, tokens=(0, 1, 4), success=True):
  """An episode of two turns; the second was sampled twice."""
  turns = [
    types.Turn(
      prompt=np.asarray([0, 1], np.int32),
      response=attempt(tokens, fired_at=1, finish="length"),
      anchor="a <b>place</b>",
      action="look",
      reward=float(k),
      penalty=0.25,
      format_valid=True,
      action_valid=False,
      phi_change=float("nan") if not k else 0.125,
      prompt_shortened=False,
      discarded=(attempt([0]),) if k else (),
      info={"score": 0.5},
    )
    for k in range(2)
  ]
  return types.Trajectory("task", "kind", 3, member, tuple(turns), success)


def record(*args, **kwargs):
  """The record of `trajectory`."""
  return records.to_record(
    trajectory(*args, **kwargs),
    lambda ids: b"".join(BYTES[i] for i in ids).decode(errors="replace"),
    BYTES,
    advantages=[0.5, -0.5],
  )


class RecordTest(absltest.TestCase):
  def test_pieces_join_to_the_text_across_a_split_character(self):
    found = records.pieces_of([0, 2, 3, 4, 99], BYTES)
    self.assertEqual(found, ["a", " ", "é", "</x>", ""])
    self.assertEqual(records.pieces_of([0, 2], BYTES), ["a", " \ufffd"])
    self.assertEqual(records.pieces_of([], BYTES), [])

  def test_record_says_everything_and_is_json(self):
    found = json.loads(json.dumps(record(), allow_nan=False))
    first, second = found["turns"]
    self.assertIsNone(first["phi_change"])
    self.assertEqual(second["phi_change"], 0.125)
    self.assertEqual(first["entropy"], [None, None, None])
    self.assertEqual(first["uncertainty"], [0, 0.5, 1])
    self.assertEqual(first["forced"], [1])
    self.assertEqual(first["prompt"], "ab")
    self.assertEqual("".join(first["pieces"]), first["text"])
    self.assertEqual([t["advantage"] for t in found["turns"]], [0.5, -0.5])
    self.assertEqual(second["discarded"][0]["text"], "a")

  def test_summary_counts(self):
    found = records.summarise(record())
    self.assertEqual(found["turns"], 2)
    self.assertEqual(found["tokens"], 6)
    self.assertEqual(found["return"], 0.5)  # 0 - 0.25 + 1 - 0.25.
    self.assertEqual(
      [found[n] for n in ("resampled", "intervened", "cut_off")], [1, 2, 2]
    )


class FolderTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name) / "trajectories"

  def test_one_episode_is_read_alone_and_all_as_one_file(self):
    episodes = [record(i, tokens=(0,) * (i + 1)) for i in range(5)]
    records.Writer(self.folder).write("train", 7, episodes)
    index = records.read_index(self.folder)
    self.assertLen(index, 5)
    self.assertEqual(index[3]["id"], "train-00007-3")
    self.assertEqual(records.read_episode(self.folder, index[3]), episodes[3])
    with gzip.open(self.folder / "train-00007.jsonl.gz", "rt") as file:
      self.assertEqual([json.loads(line) for line in file], episodes)

  def test_a_resumed_run_replaces_what_comes_again(self):
    writer = records.Writer(self.folder)
    for update in range(3):
      writer.write("train", update, [record()])
    with (self.folder / records.INDEX).open("a") as file:
      file.write('{"id": "torn')
    self.assertLen(records.read_index(self.folder), 3)
    writer = records.Writer(self.folder, resume_update=2)
    writer.write("train", 2, [record(), record(1)])
    found = [e["id"] for e in records.read_index(self.folder)]
    self.assertEqual(
      found,
      ["train-00000-0", "train-00001-0", "train-00002-0", "train-00002-1"],
    )

  def test_episodes_are_added_one_by_one_and_after_a_kill(self):
    writer = records.Writer(self.folder)
    for i in range(2):
      writer.append("valid", 0, record(i))
    with (self.folder / "valid-00000.jsonl.gz").open("ab") as file:
      file.write(b"half a member")
    writer = records.Writer(self.folder, resume_update=1)
    writer.append("valid", 0, record(2))
    index = records.read_index(self.folder)
    self.assertEqual([e["id"][-1] for e in index], ["0", "1", "2"])
    found = [records.read_episode(self.folder, e)["member"] for e in index]
    self.assertEqual(found, [0, 1, 2])
    with gzip.open(self.folder / "valid-00000.jsonl.gz", "rt") as file:
      self.assertLen(file.readlines(), 3)

  def test_what_cannot_be_read_is_said(self):
    with self.assertRaisesRegex(ValueError, "log.trajectories"):
      records.read_index(self.folder)
    records.Writer(self.folder).write("eval", 1, [record()])
    entry = records.read_index(self.folder)[0] | {"offset": 5}
    with self.assertRaisesRegex(ValueError, "eval-00001-0 cannot be read"):
      records.read_episode(self.folder, entry)
    path = self.folder / records.INDEX
    path.write_text("nonsense\n" + path.read_text())
    with self.assertRaisesRegex(ValueError, "index.jsonl:1"):
      records.read_index(self.folder)


if __name__ == "__main__":
  absltest.main()
