"""The collapse guard on made-up metrics."""

import json
import math

from absl.testing import absltest, parameterized
import numpy as np

from t2po_jax.learning import collapse_guard

FINE = {"learn/entropy": 0.5, "train/format_valid": 0.9}


def watch(patience=2, window=3, **limits):
  return collapse_guard.Guard(limits, patience=patience, window=window)


def rollout(mean, *, std=0.4, group=0.3, dependence=0.6):
  return {
    "train/return": mean,
    "train/return_std": std,
    "train/group_std": group,
    "train/prompt_dependence": dependence,
  }


def evaluation(score, episodes=100):
  return {"eval/success": score, "eval/episodes": float(episodes)}


class LimitTest(absltest.TestCase):
  def test_fine_numbers_violate_nothing(self):
    verdict = watch(min_entropy=0.1, min_format=0.5).check(FINE)
    self.assertEqual(verdict, collapse_guard.Verdict((), ()))

  def test_an_alarm_needs_patience(self):
    watcher = watch(patience=3, min_entropy=0.1)
    low = FINE | {"learn/entropy": 0.05}
    found = [watcher.check(low) for _ in range(6)]
    self.assertEqual([len(v.violations) for v in found], [1] * 6)
    self.assertEqual([len(v.alarms) for v in found], [0, 0, 1, 0, 0, 1])
    self.assertIn("learn/entropy is 0.05", found[2].alarms[0])
    self.assertIn("guard.min_entropy is 0.1", found[2].alarms[0])

  def test_one_good_update_breaks_the_streak(self):
    watcher = watch(patience=2, max_entropy=0.6)
    high = FINE | {"learn/entropy": 0.7}
    for numbers in (high, FINE, high, FINE):
      self.assertEmpty(watcher.check(numbers).alarms)

  def test_zero_turns_a_limit_off_and_missing_metrics_are_no_offence(self):
    watcher = watch(patience=1, min_entropy=0.0, max_kl=0.1)
    self.assertEmpty(watcher.check({"learn/entropy": -1.0}).violations)
    self.assertEmpty(watcher.check({"learn/kl_old": math.nan}).violations)
    self.assertLen(watcher.check({"learn/kl_old": 0.2}).alarms, 1)

  def test_a_missing_metric_neither_counts_nor_clears(self):
    watcher = watch(patience=2, min_entropy=1.0)
    self.assertEmpty(watcher.check(FINE).alarms)
    self.assertEmpty(watcher.check({}).violations)
    self.assertLen(watcher.check(FINE).alarms, 1)

  def test_refuses_what_it_does_not_know(self):
    with self.assertRaisesRegex(ValueError, "guard.min_luck"):
      watch(min_luck=1.0)
    with self.assertRaisesRegex(ValueError, "guard.patience: found 0"):
      watch(patience=0)
    with self.assertRaisesRegex(ValueError, "guard.window: found 0"):
      watch(window=0)


class ScoreTest(parameterized.TestCase):
  @parameterized.parameters(
    # Best, then; 0.4 of 0.32 lost is 0.19, four errors of (0.32, 0.17): 0.24.
    (0.32, 0.03, 100, True),
    (0.32, 0.17, 100, False),
    (0.32, 0.17, 1000, True),
    (0.9, 0.7, 1000, False),
    (0.9, 0.5, 100, True),
    (0.1, 0.0, 30, False),
  )
  def test_a_fall_beyond_the_noise(self, best, score, episodes, lost):
    watcher = watch(max_score_fall=0.4)
    self.assertEmpty(watcher.check(evaluation(best, episodes)).alarms)
    self.assertEmpty(watcher.check(FINE).alarms)
    found = watcher.check(evaluation(score, episodes))
    # One measurement is enough, whatever the patience.
    self.assertLen(found.alarms, int(lost))

  def test_the_best_stays_after_a_rollback(self):
    watcher = watch(max_score_fall=0.4)
    watcher.check(evaluation(0.8))
    watcher.forget()
    found = watcher.check(evaluation(0.2))
    self.assertIn("eval/success is 0.2, its best was 0.8", found.alarms[0])


class FallTest(parameterized.TestCase):
  def test_return_by_hand(self):
    # Best mean of three: 0.3, deviation 0.4; 0.16 below it is the limit.
    watcher = watch(patience=1, max_return_fall=0.4)
    for mean in (0.2, 0.3, 0.4):
      self.assertEmpty(watcher.check(rollout(mean)).violations)
    # Means 0.3, 0.2: not yet below 0.14; then 0.1.
    self.assertEmpty(watcher.check(rollout(0.2, std=9.0)).violations)
    self.assertEmpty(watcher.check(rollout(0.0, std=9.0)).violations)
    found = watcher.check(rollout(0.1, std=9.0))
    self.assertIn("train/return is 0.1, 0.5 deviations", found.alarms[0])

  def test_a_fall_within_the_noise_says_nothing(self):
    for error, alarmed in ((0.05, True), (0.1, False)):
      watcher = watch(patience=1, window=1, max_return_fall=0.4)
      watcher.check(rollout(0.5) | {"train/return_error": error})
      # 0.4 below the best: eight or four errors.
      found = watcher.check(rollout(0.1) | {"train/return_error": 0.01})
      self.assertLen(found.alarms, int(alarmed), msg=str(error))

  @parameterized.parameters(
    # Chances of success at update 0 and from 25 on, and alarms in 8 runs.
    (0.3, 0.9, 0),
    (0.6, 0.6, 0),
    (0.85, 0.85, 0),
    (0.5, 0.05, 8),
  )
  def test_simulated_runs(self, first, last, wanted):
    """Tasks differ in difficulty, so episodes of a group are alike."""
    limits = {"max_score_fall": 0.4, "max_return_fall": 0.4}
    limits |= {"max_deviation_fall": 0.6}
    alarmed = 0
    for seed in range(8):
      rng, watcher = np.random.default_rng(seed), watch(patience=3, **limits)
      alarms = []
      for update in range(40):
        p = first + (last - first) * min(update / 25, 1.0)
        chances = rng.beta(1.5 * p, 1.5 * (1 - p), (16, 1))
        won = rng.random((16, 8)) < chances
        scalars = {
          "train/return": won.mean(),
          "train/return_std": won.std(),
          "train/return_error": won.mean(1).std(ddof=1) / 4,
          "train/group_std": won.std(1).mean(),
        }
        if update % 5 == 0:
          scalars |= evaluation(float((rng.random(100) < p).mean()))
        alarms += watcher.check(scalars).alarms
      alarmed += bool(alarms)
    self.assertEqual(alarmed, wanted)

  def test_alike_returns_alarm_only_while_the_task_is_not_solved(self):
    for last, alarmed in ((0.9, False), (0.1, True)):
      watcher = watch(patience=1, window=1, max_deviation_fall=0.6)
      watcher.check(rollout(0.3))
      found = watcher.check(rollout(last, group=0.1))
      self.assertLen(found.alarms, int(alarmed), msg=str(last))

  def test_responses_that_no_longer_depend_on_their_prompt(self):
    watcher = watch(patience=2, window=1, max_dependence_fall=0.7)
    watcher.check(rollout(0.3))
    self.assertEmpty(watcher.check(rollout(0.3, dependence=0.2)).violations)
    self.assertEmpty(watcher.check(rollout(0.3, dependence=0.1)).alarms)
    self.assertLen(watcher.check(rollout(0.3, dependence=0.1)).alarms, 1)
    # Where they never did, nothing is lost.
    watcher = watch(patience=1, window=1, max_dependence_fall=0.7)
    watcher.check(rollout(0.3, dependence=0.05))
    self.assertEmpty(watcher.check(rollout(0.3, dependence=0.0)).violations)

  def test_a_rollback_begins_anew(self):
    watcher = watch(patience=1, window=1, max_return_fall=0.4)
    watcher.check(rollout(0.9))
    watcher.forget()
    self.assertEmpty(watcher.check(rollout(0.1)).violations)
    self.assertEmpty(watcher.check(rollout(0.0)).violations)

  def test_goes_on_from_its_state(self):
    limits = {name: 0.4 for name in collapse_guard.FALLS} | {"min_format": 0.5}
    one, other = watch(**limits), watch(**limits, max_kl=1.0)
    story = [rollout(0.5) | {"train/format_valid": 0.4}, rollout(0.6)]
    story += [rollout(0.6) | evaluation(0.6), rollout(0.0), rollout(0.0)]
    story += [rollout(0.0, group=0.0, dependence=0.0) | evaluation(0.1)] * 2
    for numbers in story[:4]:
      one.check(numbers)
    other.load(json.loads(json.dumps(one.state_dict())))
    for numbers in story[4:]:
      self.assertEqual(one.check(numbers), other.check(numbers))
    self.assertLen(other.check(story[-1]).violations, 4)


class EscalationTest(absltest.TestCase):
  def test_by_hand(self):
    steps = dict(rate_factor=0.5, reuse_factor=0.5, kl=0.05)
    none = collapse_guard.escalate(0, **steps)
    self.assertEqual(none, collapse_guard.Caution(1.0, 1.0, 0.0))
    self.assertEqual(none.steps(4), 4)
    twice = collapse_guard.escalate(2, **steps)
    self.assertEqual(twice, collapse_guard.Caution(0.25, 0.25, 0.1))
    self.assertEqual([twice.steps(n) for n in (8, 4, 3, 1)], [2, 1, 1, 1])


if __name__ == "__main__":
  absltest.main()
