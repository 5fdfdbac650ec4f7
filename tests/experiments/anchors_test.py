"""The measurement of groupings of observations."""

import json
import random
import subprocess
import sys

import pytest

from t2po_jax.experiments.benchmarks import anchors
from tests import places


class TestScore:
  def test_by_hand(self):
    # Equal texts join whatever they show: pair (0, 1) is right, (2, 3) wrong.
    # The pair (0, 2) shows all but one passage, and its texts differ.
    group = (
      ["aaaa", "aaaa", "bbbb", "bbbb"],
      [
        frozenset("xyz"),
        frozenset("xyz"),
        frozenset("xyw"),
        frozenset("uvt"),
      ],
    )
    row = anchors.score([group], 1.0, False)
    assert row["joined"] == pytest.approx(2 / 6)
    assert row["true"] == pytest.approx(3 / 6)  # (0,1), (0,2), (1,2)
    assert row["precision"] == pytest.approx(1 / 2)
    assert row["recall"] == pytest.approx(1 / 3)

  def test_shortened_questions(self):
    draw = random.Random(0)
    question = "who wrote the book of the two hills ?".split()
    for _ in range(20):
      words = anchors.shorten(" ".join(question), draw).split()
      assert len(question) - 3 <= len(words) < len(question)
      rest = iter(question)
      assert all(word in rest for word in words)  # In their order.
    assert anchors.shorten("who", draw) == "who"


def test_from_the_command_line(tmp_path):
  rows = [
    {"id": str(i), "contents": f'"Hill {i}"\nThe hill {i} is {i} miles high.'}
    for i in range(8)
  ]
  (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
  for name, start in (("train", 0), ("eval", 4)):
    questions = [
      {
        "data_source": "nq",
        "question": f"how many miles high is the hill {start + i} ?",
        "reward_model": {"ground_truth": {"target": [str(start + i)]}},
        "extra_info": {"index": i, "split": name, "id": f"{name}{i}"},
      }
      for i in range(4)
    ]
    text = "\n".join(map(json.dumps, questions))
    (tmp_path / f"{name}.jsonl").write_text(text)
  out = tmp_path / "found.json"
  done = subprocess.run(
    [
      sys.executable,
      "experiments/benchmarks/anchors.py",
      f"--data_dir={tmp_path}",
      "--queries=3",
      "--thresholds=0.9",
      f"--json={out}",
    ],
    cwd=places.ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(out.read_text())
  assert [row["autojunk"] for row in found] == [0.0, 1.0]
  assert all(0 < row["joined"] <= 1 for row in found)
