"""Which grouping of observations GiGPO should use on real Search QA.

  python experiments/benchmarks/anchors.py --data_dir=DIR

GiGPO compares turns that start from similar observations: those whose `difflib`
ratio reaches `advantage.similarity`. The reference code leaves on difflib's
shortcut for texts of 200 characters or more (`advantage.autojunk`). Here every
question of `DIR/eval.jsonl` is searched with `--queries` queries, the question
itself and the question without a few random words, as the episodes of a task
group would search. Two observations belong together if they show the same
passages with at most one exception. For each threshold, the table shows how
many pairs each grouping joins, the precision and recall of the joined pairs,
and the time in seconds.
"""

from collections.abc import Sequence
import itertools
import json
import pathlib
import random
import time
from typing import Any

from absl import flags
import numpy as np

from t2po_jax.envs.searchqa import benchmark
from t2po_jax.experiments import command_line
from t2po_jax.learning.estimators import anchored


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
  """All flags of this program."""
  own: dict[str, Any] = {"flag_values": given}
  flags.DEFINE_string(
    "data_dir", None, "Folder with eval.jsonl and the corpus.", **own
  )
  flags.DEFINE_integer("queries", 8, "Queries per question.", 2, **own)
  flags.DEFINE_integer("questions", 200, "The most questions.", 1, **own)
  flags.DEFINE_integer("topk", 3, "Passages per search.", 1, **own)
  flags.DEFINE_list(
    "thresholds", ["0.7", "0.8", "0.9"], "Similarities to compare.", **own
  )
  flags.DEFINE_string("json", "", "File for the numbers.", **own)
  flags.mark_flag_as_required("data_dir", given)


def shorten(question: str, draw: random.Random) -> str:
  """A question without one to three of its words; at least one word is left."""
  words = question.split()
  kept = max(1, len(words) - draw.randint(1, 3))
  return " ".join(
    words[i] for i in sorted(draw.sample(range(len(words)), kept))
  )


def observe(
  suite: benchmark.SearchQA, question: str, queries: int, seed: int
) -> tuple[list[str], list[frozenset[str]]]:
  """The observations of the searches of one task group.

  Args:
    suite: the benchmark, which searches and words the results.
    question: the question.
    queries: number of queries.
    seed: seed of the words left out.

  Returns:
    The observations, and the passages in each.
  """
  draw = random.Random(seed)
  searched = [question] + [shorten(question, draw) for _ in range(queries - 1)]
  hits = suite.retriever.search(searched, suite.settings.topk)
  passages = [[passage for passage, _ in results] for results in hits]
  texts = [suite.wording.show(shown) for shown in passages]
  return texts, [frozenset(p.id for p in shown) for shown in passages]


def score(
  groups: Sequence[tuple[list[str], list[frozenset[str]]]],
  similarity: float,
  autojunk: bool,
) -> dict[str, float]:
  """Precision and recall of the pairs that a grouping joins.

  Args:
    groups: observations and passages per question.
    similarity: the least ratio.
    autojunk: whether difflib's shortcut is on.

  Returns:
    Values by name: fractions of all pairs, or of the joined or true ones.
  """
  joined, true, both, pairs = 0, 0, 0, 0
  begin = time.perf_counter()
  for texts, shown in groups:
    labels = anchored.cluster_anchors(
      texts, similarity=similarity, autojunk=autojunk
    )
    for a, b in itertools.combinations(range(len(texts)), 2):
      together = bool(labels[a] == labels[b])
      same = len(shown[a] & shown[b]) >= max(len(shown[a]), len(shown[b])) - 1
      pairs, joined, true = pairs + 1, joined + together, true + same
      both += together and same
  return {
    "similarity": similarity,
    "autojunk": float(autojunk),
    "joined": joined / pairs,
    "true": true / pairs,
    "precision": both / joined if joined else float("nan"),
    "recall": both / true if true else float("nan"),
    "seconds": time.perf_counter() - begin,
  }


def compare(given: flags.FlagValues) -> None:
  """Prints the table."""
  settings = benchmark.SearchQA.Settings(
    data_dir=given.data_dir, topk=given.topk
  )
  suite = benchmark.SearchQA(settings)
  tasks = [t for split in ("valid", "test") for t in suite.splits[split]]
  groups = [
    observe(suite, suite.tasks[task].text, given.queries, seed)
    for seed, task in enumerate(tasks[: given.questions])
  ]
  lengths = [len(text) for texts, _ in groups for text in texts]
  print(f"{len(groups)} questions, median {np.median(lengths):.0f} characters")
  print("similarity  autojunk  joined  true  precision  recall  seconds")
  rows = []
  for threshold in given.thresholds:
    for autojunk in (False, True):
      row = score(groups, float(threshold), autojunk)
      rows.append(row)
      print(
        f"{row['similarity']:10.2f}  {autojunk!s:8}  {row['joined']:6.3f}  "
        f"{row['true']:.3f}  {row['precision']:9.3f}  {row['recall']:6.3f}  "
        f"{row['seconds']:7.1f}",
        flush=True,
      )
  if given.json:
    pathlib.Path(given.json).write_text(json.dumps(rows, indent=2))


def run() -> None:
  """Runs this program."""
  command_line.run(compare, define_flags)


if __name__ == "__main__":
  run()
