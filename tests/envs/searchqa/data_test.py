"""Loaders: every row arrives, every corrupt line is named."""

import collections
import gzip
import json
import pathlib
import tempfile

from absl.testing import absltest, parameterized
import pyarrow
from pyarrow import parquet

from t2po_jax.envs.searchqa import data, retrieval, score
from tests import places

_REAL = places.DATA / "searchqa"


def _row(index, source="nq", **changes):
  row = {
    "data_source": source,
    "question": f"what is {source} {index}?",
    "reward_model": {"ground_truth": {"target": [f"answer {index}", "other"]}},
    "extra_info": {"id": f"{source}_{index}"},
  }
  return {**row, **changes}


class _FolderCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )

  def _write(self, name, rows):
    path = self.folder / name
    lines = [
      row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)
      for row in rows
    ]
    opener = gzip.open if name.endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8") as file:
      file.write("\n".join(lines))
    return path


class QuestionsTest(_FolderCase):
  def test_rows(self):
    path = self._write("train.jsonl", [_row(0), "", _row(1, "popqa")])
    self.assertEqual(
      data.load_questions(path),
      [
        data.Task("nq_0", "what is nq 0?", ("answer 0", "other"), "nq"),
        data.Task(
          "popqa_1", "what is popqa 1?", ("answer 1", "other"), "popqa"
        ),
      ],
    )

  def test_parquet_equals_jsonl(self):
    rows = [_row(index) for index in range(3)]
    path = self.folder / "train.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    expected = data.load_questions(self._write("train.jsonl", rows))
    self.assertEqual(data.load_questions(path), expected)

  def test_single_target_and_missing_id(self):
    row = _row(0, reward_model={"ground_truth": {"target": "one"}})
    del row["extra_info"]
    (task,) = data.load_questions(self._write("train.jsonl", [row]))
    self.assertEqual((task.task_id, task.targets), ("train-0", ("one",)))

  @parameterized.named_parameters(
    ("cut off", '{"question": "wh', "no JSON"),
    ("not an object", "[1, 2]", "'question' is missing"),
    ("no question", {"data_source": "nq"}, "'question' is missing"),
    ("blank question", _row(1, question="  "), "'question' is '  '"),
    ("number", _row(1, question=3), "'question' is 3"),
    ("no source", _row(1, data_source=""), "'data_source' is missing"),
    ("no truth", _row(1, reward_model=None), "ground_truth.target' is missing"),
    (
      "no targets",
      _row(1, reward_model={"ground_truth": {"target": []}}),
      "target' is missing or empty",
    ),
    (
      "wrong targets",
      _row(1, reward_model={"ground_truth": {"target": ["a", 3]}}),
      r"target' is \['a', 3\]; it must be a string or a list",
    ),
    ("same id", _row(0), "id 'nq_0' for the second time"),
  )
  def test_corrupt_line_is_named(self, row, message):
    path = self._write("train.jsonl", [_row(0), row, _row(2)])
    with self.assertRaisesRegex(ValueError, rf"train\.jsonl:2: .*{message}"):
      data.load_questions(path)

  def test_corrupt_parquet_row_is_named(self):
    rows = [_row(0), _row(1, question="")]
    path = self.folder / "eval.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with self.assertRaisesRegex(ValueError, r"eval\.parquet:2: 'question'"):
      data.load_questions(path)

  def test_no_parquet(self):
    path = self._write("eval.parquet", ["hello"])
    with self.assertRaisesRegex(ValueError, "eval.parquet: no parquet"):
      data.load_questions(path)

  def test_bad_encoding(self):
    path = self.folder / "train.jsonl"
    path.write_bytes(b'{"question": "\xff"}\n')
    with self.assertRaisesRegex(ValueError, r"train\.jsonl:1: no JSON"):
      data.load_questions(path)

  def test_empty(self):
    with self.assertRaisesRegex(ValueError, "no questions"):
      data.load_questions(self._write("train.jsonl", []))


class CorpusTest(_FolderCase):
  @parameterized.parameters("corpus.jsonl", "corpus.jsonl.gz")
  def test_rows(self, name):
    path = self._write(
      name, [{"id": "7", "contents": '"Ä b"\ntext'}, {"id": 8, "contents": "c"}]
    )
    self.assertEqual(data.find_corpus(self.folder), path)
    self.assertEqual(
      data.load_corpus(path),
      [retrieval.Passage("7", "Ä b", "text"), retrieval.Passage("8", "", "c")],
    )

  @parameterized.parameters(
    ({"id": "1"}, "'contents' is missing"),
    ({"id": "1", "contents": ["a"]}, "'contents' is"),
    ({"contents": "a"}, "'id' is None"),
    ("{", "no JSON"),
  )
  def test_corrupt_line_is_named(self, row, message):
    path = self._write("corpus.jsonl.gz", [{"id": "0", "contents": "a"}, row])
    with self.assertRaisesRegex(ValueError, rf"jsonl\.gz:2: {message}"):
      data.load_corpus(path)

  def test_broken_gzip(self):
    path = self._write(
      "corpus.jsonl.gz", [{"id": str(i), "contents": "a"} for i in range(99)]
    )
    whole = path.read_bytes()
    for broken in (b"plain text", whole[: len(whole) // 2]):
      path.write_bytes(broken)
      with self.assertRaisesRegex(ValueError, r"gz:\d+: broken gzip"):
        data.load_corpus(path)

  def test_empty(self):
    with self.assertRaisesRegex(ValueError, "no passages"):
      data.load_corpus(self._write("corpus.jsonl", []))


class SplitsTest(_FolderCase):
  def _tasks(self, sizes):
    return [
      data.Task(f"{name}_{i}", f"{name} {i}?", ("x",), name)
      for name, size in sizes.items()
      for i in range(size)
    ]

  def test_each_category_gives_its_share(self):
    tasks = self._tasks({"a": 100, "b": 50, "c": 3, "d": 1})
    valid, test = data.cut_evaluation(tasks, 31)
    self.assertCountEqual(valid + test, tasks)
    counts = collections.Counter(task.category for task in valid)
    # 31 of 154 is about a fifth; one of `c`, and `d` cannot be cut.
    self.assertEqual(counts, {"a": 20, "b": 10, "c": 1})

  def test_order_of_rows_does_not_matter(self):
    tasks = self._tasks({"a": 40, "b": 20})
    self.assertEqual(
      data.cut_evaluation(tasks, 10), data.cut_evaluation(tasks[::-1], 10)
    )

  def test_at_least_one_where_there_are_two(self):
    valid, _ = data.cut_evaluation(self._tasks({"a": 99, "b": 2, "c": 1}), 1)
    self.assertEqual(sorted(task.category for task in valid), ["a", "b"])

  def test_at_most_half(self):
    valid, test = data.cut_evaluation(self._tasks({"a": 10}), 1000)
    self.assertEqual((len(valid), len(test)), (5, 5))

  def test_files_to_splits(self):
    self._write("train.jsonl", [_row(i) for i in range(5)])
    clash = _row(9, question="What is NQ 3", extra_info={"id": "other"})
    self._write("eval.jsonl", [_row(i, "popqa") for i in range(9)] + [clash])
    splits = data.load_splits(self.folder, 4)
    # Question 3 is asked in the evaluation too.
    self.assertEqual(
      [task.task_id for task in splits["train"]],
      ["nq_0", "nq_1", "nq_2", "nq_4"],
    )
    self.assertLen(splits["valid"] + splits["test"], 10)

  def test_clashing_ids(self):
    self._write("train.jsonl", [_row(0)])
    self._write("eval.jsonl", [_row(0, question="another?"), _row(1)])
    with self.assertRaisesRegex(ValueError, "id 'nq_0' names a training and"):
      data.load_splits(self.folder, 1)

  def test_missing_files(self):
    with self.assertRaisesRegex(ValueError, "no file train.jsonl or train.par"):
      data.load_splits(self.folder, 1)
    with self.assertRaisesRegex(ValueError, "nowhere' is no directory"):
      data.load_splits(self.folder / "nowhere", 1)
    with self.assertRaisesRegex(ValueError, "no file corpus.jsonl or"):
      data.find_corpus(self.folder)


class TfdsTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"question": b"who?", "answer": [b"A", b"B", b"A"]}, ("A", "B")),
    ({"question": "who?", "answer": ["A"]}, ("A",)),
    (
      {
        "question": b"who?",
        "answer": {"value": b"A", "aliases": [b"A", b"B"], "type": b"x"},
      },
      ("A", "B"),
    ),
  )
  def test_examples(self, example, targets):
    task = data.read_tfds_example(example, "id-0", "trivia_qa/rc")
    self.assertEqual(task, data.Task("id-0", "who?", targets, "trivia_qa"))

  def test_hidden_answer(self):
    example = {"question": b"q", "answer": {"value": b"", "aliases": []}}
    with self.assertRaisesRegex(ValueError, "id-0: no answer"):
      data.read_tfds_example(example, "id-0", "trivia_qa")


@absltest.skipUnless(_REAL.is_dir(), f"no real data in {_REAL}")
class RealDataTest(absltest.TestCase):
  def test_splits(self):
    splits = data.load_splits(_REAL, 100)
    asked = {
      name: {score.normalize(task.text) for task in tasks}
      for name, tasks in splits.items()
    }
    self.assertEmpty(asked["train"] & (asked["valid"] | asked["test"]))
    self.assertEmpty(asked["valid"] & asked["test"])
    # One of the 2,248 training questions is asked in the evaluation too.
    self.assertLen(splits["train"], 2247)
    self.assertLen(splits["valid"] + splits["test"], 1049)
    self.assertLen({task.category for task in splits["valid"]}, 7)
    self.assertLen({task.category for task in splits["test"]}, 7)

  def test_titles_find_their_passages(self):
    passages = data.load_corpus(data.find_corpus(_REAL))
    self.assertLen(passages, 33306)
    self.assertTrue(all(p.title and p.text for p in passages))
    # A part of the corpus, to be quick.
    part = passages[:4000]
    index = retrieval.BM25(part)
    titles = [passage.title for passage in part[::40]]
    found = index.search(titles, 3)
    hits = sum(
      title in [passage.title for passage, _ in three]
      for title, three in zip(titles, found, strict=True)
    )
    self.assertGreater(hits, 0.9 * len(titles))


if __name__ == "__main__":
  absltest.main()
