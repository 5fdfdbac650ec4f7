"""Scores by hand, and against plain counting."""

import itertools
import json
import math

from absl.testing import absltest, parameterized
import numpy as np

from t2po_jax.judging import scores, tables


def episode(task="a", *, repeat=0, success=True, **changes):
  known = dict(
    variant="v",
    split="valid",
    task_id=task,
    category="c",
    repeat=repeat,
    success=success,
    aborted=False,
    episode_return=float(success),
    score=math.nan,
    turns=2,
    tokens=10,
    tokens_discarded=0,
    format_valid=1.0,
    prompt_tokens=30,
    completion_tokens=10,
  )
  return scores.Episode(**(known | changes))


class PassTest(parameterized.TestCase):
  @parameterized.parameters((1, 0), (4, 0), (4, 1), (4, 2), (5, 4), (6, 6))
  def test_counts_all_choices(self, tries, solved):
    outcomes = [True] * solved + [False] * (tries - solved)
    for k in range(1, tries + 1):
      chosen = list(itertools.combinations(outcomes, k))
      expected = sum(any(some) for some in chosen) / len(chosen)
      self.assertAlmostEqual(scores.pass_at(tries, solved, k), expected)


class IntervalTest(absltest.TestCase):
  def test_agrees_with_the_normal_approximation(self):
    values = np.random.default_rng(1).random(400)
    low, high = scores.interval(values)
    error = values.std() / 20
    self.assertAlmostEqual(low, values.mean() - 1.96 * error, delta=0.004)
    self.assertAlmostEqual(high, values.mean() + 1.96 * error, delta=0.004)

  def test_degenerate(self):
    self.assertEqual(scores.interval([0.5]), (0.5, 0.5))
    self.assertTrue(all(math.isnan(x) for x in scores.interval([])))

  def test_repeats_of_a_task_are_no_new_tasks(self):
    # Ten tasks, each solved always or never: repeats add no information.
    once = [episode(str(i), success=i < 5) for i in range(10)]
    often = [
      episode(str(i), success=i < 5, repeat=r)
      for i in range(10)
      for r in range(20)
    ]
    first, second = scores.summarise(once), scores.summarise(often)
    self.assertEqual(first["low"], second["low"])
    self.assertEqual(second["pass@16"], 0.5)


class SummaryTest(absltest.TestCase):
  def test_by_hand(self):
    found = scores.summarise(
      [
        episode("a", success=True),
        episode("a", success=False, repeat=1),
        episode("b", success=False, tokens=20),
        episode("b", success=False, repeat=1, format_valid=0.5),
        episode("c", success=True, aborted=True),
      ]
    )
    self.assertEqual(found["tasks"], 2)
    self.assertEqual(found["episodes"], 5)
    self.assertEqual(found["aborted"], 1)
    self.assertEqual(found["success"], 0.25)
    self.assertEqual(found["pass@2"], 0.5)
    self.assertEqual(found["tokens"], 12.5)
    self.assertEqual(found["format"], 0.875)
    self.assertEqual(found["completion_tokens"], 50)
    self.assertTrue(math.isnan(found["score"]))

  def test_lines_come_back(self):
    for one in (episode(), episode(score=0.25)):
      line = json.loads(json.dumps(scores.to_line(one), allow_nan=False))
      self.assertEqual(str(scores.from_line(line)), str(one))
    with self.assertRaisesRegex(ValueError, "not an episode"):
      scores.from_line({"task": "a"})


class TableTest(absltest.TestCase):
  def test_search_averages_the_sets_and_keeps_their_order(self):
    found = tables.of_benchmark(
      "searchqa",
      [
        episode("1", category="musique", success=False),
        episode("2", category="nq"),
        episode("3", category="nq", success=False),
        episode("4", category="nq", success=False),
        episode("5", category="nq", success=False),
        episode("6", category="own"),
      ],
    )
    self.assertEqual(found.head, ("policy", "NQ", "MuSiQue", "own", "Avg."))
    self.assertEqual(found.rows, (("v", "25.0", "0.0", "100.0", "41.7"),))

  def test_alfworld_has_seen_and_unseen(self):
    look, pick = "look_at_obj_in_light", "pick_and_place_simple"
    found = tables.of_benchmark(
      "alfworld",
      [
        episode("1", category=look),
        episode("2", category=pick, success=False),
        episode("3", category=pick, split="test"),
      ],
    )
    self.assertEqual(found.head, ("policy", "Pick", "Look", "All"))
    self.assertEqual(
      found.rows,
      (
        ("v (seen)", "0.0", "100.0", "50.0"),
        ("v (unseen)", "100.0", "-", "100.0"),
      ),
    )

  def test_webshop_scores_nothing_bought_as_0(self):
    found = tables.of_benchmark(
      "webshop",
      [
        episode("1", score=1.0),
        episode("2", score=0.5, success=False),
        episode("3", success=False),
      ],
    )
    self.assertEqual(found.rows, (("v", "50.0", "33.3"),))

  def test_shapes_of_a_table(self):
    table = tables.Table("t", ("a", "n"), (("x", "1"), ("long", "10")))
    self.assertEqual(table.text(), "t\na      n\nx      1\nlong  10")
    self.assertIn("| long | 10 |", table.markdown())


if __name__ == "__main__":
  absltest.main()
