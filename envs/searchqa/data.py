"""Questions and passages from files: the real Search QA data.

Question rows have the format of Search-R1's data (`data_source`, `question`,
`reward_model.ground_truth.target`), as JSON lines or parquet; corpus rows are
`{id, contents}` with the quoted title on the first line, as JSON lines, gzipped
or not. Question sets of TensorFlow Datasets are read through
`tfds.data_source`, which needs no TensorFlow. A row that cannot be read ends
the run at once with an error that names its file and line.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import gzip
import json
import logging
import pathlib
import random
from typing import Any
import zlib

from t2po_jax import keys
from t2po_jax.envs import base
from t2po_jax.envs.searchqa import retrieval, score

_QUESTION_SUFFIXES = (".jsonl", ".parquet")
_CORPUS_SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclasses.dataclass(frozen=True)
class Task:
  """One question.

  Attributes:
    task_id: unique name.
    text: the question.
    targets: the accepted answers.
    category: the question set it belongs to.
  """

  task_id: str
  text: str
  targets: tuple[str, ...]
  category: str


def _read_lines(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
  """Yields (file:line, row) of a JSON lines file; empty lines are skipped."""
  opener = gzip.open if path.suffix == ".gz" else open
  number = 0
  try:
    with opener(path, "rb") as file:
      for number, line in enumerate(file, 1):
        if not line.strip():
          continue
        try:
          row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
          raise ValueError(
            f"{path}:{number}: no JSON ({error}); "
            "each line must be one JSON object"
          ) from None
        yield f"{path}:{number}", row
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise ValueError(
      f"{path}:{number + 1}: broken gzip data ({error}); "
      "the file must be a whole gzip file"
    ) from None


def _read_parquet(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
  """Yields (file:row, row) of a parquet file, rows counted from 1."""
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError:
    raise ValueError(
      f"{path}: reading parquet needs pyarrow; install it, or give .jsonl"
    ) from None
  try:
    rows = parquet.read_table(path).to_pylist()
  except pyarrow.ArrowInvalid as error:
    raise ValueError(
      f"{path}: no parquet ({str(error).splitlines()[0]}); "
      "the file must be a whole parquet file"
    ) from None
  for number, row in enumerate(rows, 1):
    yield f"{path}:{number}", row


def _take(row: Any, path: Sequence[str], where: str) -> Any:
  """The value under nested keys, which must exist and not be empty."""
  name, value = ".".join(path), row
  for key in path:
    value = value.get(key) if isinstance(value, dict) else None
  if not value:
    raise ValueError(
      f"{where}: {name!r} is missing or empty in {str(row)!r:.60}"
    )
  return value


def _take_text(row: Any, key: str, where: str) -> str:
  """The string under a key."""
  value = _take(row, (key,), where)
  if not isinstance(value, str) or not value.strip():
    raise ValueError(
      f"{where}: {key!r} is {value!r:.60}; it must be a string with text"
    )
  return value


def _read_question(row: Any, where: str, name: str) -> Task:
  """One question row; `name` is used if the row has no id of its own."""
  question = _take_text(row, "question", where)
  category = _take_text(row, "data_source", where)
  path = ("reward_model", "ground_truth", "target")
  targets = _take(row, path, where)
  if isinstance(targets, str):
    targets = [targets]
  if not isinstance(targets, list) or not all(
    isinstance(text, str) and text.strip() for text in targets
  ):
    raise ValueError(
      f"{where}: {'.'.join(path)!r} is {targets!r:.60}; "
      "it must be a string or a list of strings with text"
    )
  extra = row.get("extra_info")
  own = extra.get("id") if isinstance(extra, dict) else None
  task_id = own if isinstance(own, str) and own else name
  return Task(task_id, question.strip(), tuple(targets), category)


def load_questions(path: pathlib.Path) -> list[Task]:
  """Reads a question file.

  Args:
    path: a `.jsonl` or `.parquet` file in Search-R1's row format.

  Raises:
    ValueError: if a row is corrupt or an id appears twice.
  """
  read = _read_parquet if path.suffix == ".parquet" else _read_lines
  tasks: dict[str, Task] = {}
  for where, row in read(path):
    task = _read_question(row, where, f"{path.stem}-{len(tasks)}")
    if task.task_id in tasks:
      raise ValueError(
        f"{where}: id {task.task_id!r} for the second time; ids must differ"
      )
    tasks[task.task_id] = task
  if not tasks:
    raise ValueError(f"{path}: no questions; at least one row is needed")
  return list(tasks.values())


def load_corpus(path: pathlib.Path) -> list[retrieval.Passage]:
  """Reads a corpus of `{id, contents}` rows, `.jsonl` or `.jsonl.gz`.

  Raises:
    ValueError: if a row is corrupt, or there are none.
  """
  passages = []
  for where, row in _read_lines(path):
    contents = _take_text(row, "contents", where)
    if not isinstance(row.get("id"), str | int):
      raise ValueError(
        f"{where}: 'id' is {row.get('id')!r:.60}; it must be a string"
      )
    passages.append(retrieval.split_contents(str(row["id"]), contents))
  if not passages:
    raise ValueError(f"{path}: no passages; at least one row is needed")
  return passages


def load_tfds(name: str, split: str, *, tfds_dir: str = "") -> list[Task]:
  """Reads a question set of TensorFlow Datasets, without TensorFlow.

  Args:
    name: e.g. `natural_questions_open` or `trivia_qa/unfiltered.nocontext`.
    split: e.g. `train` or `validation`.
    tfds_dir: where the datasets are prepared; empty: the library's default.

  Raises:
    ValueError: if the library is missing, or the set has no answers.
  """
  try:
    import tensorflow_datasets as tfds
  except ImportError:
    raise ValueError(
      f"env.tfds: {name!r} needs the package tensorflow-datasets"
    ) from None
  if name.split("/")[0] not in (
    sets := tfds.list_builders(with_community_datasets=False)
  ):
    raise ValueError(
      f"env.tfds: {name!r} is no set of TensorFlow Datasets"
      f"{keys.suggestion(name, sets)}"
    )
  tasks = []
  try:
    source = tfds.data_source(name, split=split, data_dir=tfds_dir or None)
  except Exception as error:
    # The library raises many kinds of errors, with long messages.
    reason = next(iter(str(error).strip().splitlines()), repr(error))
    raise ValueError(f"env.tfds: {name!r}, split {split!r}: {reason}") from None
  for index, example in enumerate(source):
    task_id = f"{name}-{split}-{index}"
    tasks.append(read_tfds_example(example, task_id, name))
  return tasks


def read_tfds_example(example: Any, task_id: str, name: str) -> Task:
  """One example of a question set: `question` and `answer`.

  An answer is a list of strings (natural_questions_open), or a dictionary
  with `value` and `aliases` (trivia_qa); strings may come as bytes.

  Raises:
    ValueError: if there is no answer.
  """
  answer = example["answer"]
  if isinstance(answer, dict):
    answer = [answer["value"], *answer.get("aliases", ())]
  targets = dict.fromkeys(text for text in map(_decode, answer) if text)
  if not targets:
    raise ValueError(
      f"{task_id}: no answer; use a split of {name!r} that has answers"
    )
  category = name.split("/")[0]
  return Task(task_id, _decode(example["question"]), tuple(targets), category)


def _decode(text: str | bytes) -> str:
  return text.decode() if isinstance(text, bytes) else str(text)


def find_file(
  folder: pathlib.Path, stem: str, suffixes: Sequence[str]
) -> pathlib.Path:
  """The one file of a folder with this stem.

  Raises:
    ValueError: if the folder or the file is missing.
  """
  if not folder.is_dir():
    raise ValueError(f"env.data_dir: {str(folder)!r} is no directory")
  names = [stem + suffix for suffix in suffixes]
  for name in names:
    if (folder / name).is_file():
      return folder / name
  raise ValueError(
    f"env.data_dir: {str(folder)!r} has no file {' or '.join(names)}"
  )


def find_corpus(folder: pathlib.Path) -> pathlib.Path:
  """The corpus file of a data directory."""
  return find_file(folder, "corpus", _CORPUS_SUFFIXES)


def cut_evaluation(
  tasks: Sequence[Task], valid_tasks: int
) -> tuple[list[Task], list[Task]]:
  """Splits evaluation questions into a valid and a test part, both shuffled.

  Every category gives the same fraction of its questions to the valid part.

  Args:
    tasks: the questions.
    valid_tasks: requested size of the valid part; at most half of each category
      is taken, and at least one question if there are two.
  """
  share = min(0.5, valid_tasks / len(tasks))
  categories: dict[str, list[Task]] = {}
  for task in sorted(tasks, key=lambda task: task.task_id):
    categories.setdefault(task.category, []).append(task)
  valid, test = [], []
  for members in categories.values():
    random.Random(base.SPLIT_SEED).shuffle(members)
    size = min(max(round(share * len(members)), 1), len(members) // 2)
    valid.extend(members[:size])
    test.extend(members[size:])
  for part in (valid, test):
    random.Random(base.SPLIT_SEED).shuffle(part)
  return valid, test


def draw_splits(
  train: Sequence[Task], evaluation: Sequence[Task], valid_tasks: int
) -> dict[str, list[Task]]:
  """The three splits, disjoint by id and by question.

  Training questions that also occur in the evaluation are dropped.
  """
  evaluated = {score.normalize(task.text) for task in evaluation}
  kept = [task for task in train if score.normalize(task.text) not in evaluated]
  if len(kept) < len(train):
    logging.info(
      "searchqa: %d training questions dropped, the evaluation asks them too",
      len(train) - len(kept),
    )
  both = {task.task_id for task in kept} & {task.task_id for task in evaluation}
  if both:
    raise ValueError(
      f"env.data_dir: id {min(both)!r} names a training and an evaluation "
      "question; ids must differ"
    )
  valid, test = cut_evaluation(evaluation, valid_tasks)
  return {"train": kept, "valid": valid, "test": test}


def load_splits(
  folder: pathlib.Path, valid_tasks: int
) -> dict[str, list[Task]]:
  """The splits of a data directory: `train.*` and `eval.*`.

  Raises:
    ValueError: if a file is missing or corrupt.
  """
  train, evaluation = (
    load_questions(find_file(folder, stem, _QUESTION_SUFFIXES))
    for stem in ("train", "eval")
  )
  return draw_splits(train, evaluation, valid_tasks)
