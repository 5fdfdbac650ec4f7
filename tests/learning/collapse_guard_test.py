"""The collapse guard on made-up metrics."""

from absl.testing import absltest

from t2po_jax.learning import collapse_guard

FINE = {"learn/entropy": 0.5, "train/format_valid": 0.9}


def watch(patience=2, **limits):
  return collapse_guard.Guard(limits, patience=patience)


class GuardTest(absltest.TestCase):
  def test_fine_numbers_pass_nothing(self):
    verdict = watch(min_entropy=0.1, min_format=0.5).judge(FINE)
    self.assertEqual(verdict, collapse_guard.Verdict((), ()))

  def test_an_alarm_needs_patience(self):
    watcher = watch(patience=3, min_entropy=0.1)
    low = FINE | {"learn/entropy": 0.05}
    found = [watcher.judge(low) for _ in range(6)]
    self.assertEqual([len(v.passed) for v in found], [1] * 6)
    self.assertEqual([len(v.alarms) for v in found], [0, 0, 1, 0, 0, 1])
    self.assertIn("learn/entropy is 0.05", found[2].alarms[0])
    self.assertIn("guard.min_entropy is 0.1", found[2].alarms[0])

  def test_one_good_update_breaks_the_streak(self):
    watcher = watch(patience=2, max_entropy=0.6)
    high = FINE | {"learn/entropy": 0.7}
    for numbers in (high, FINE, high, FINE):
      self.assertEmpty(watcher.judge(numbers).alarms)

  def test_zero_turns_a_limit_off_and_missing_metrics_are_no_offence(self):
    watcher = watch(patience=1, min_entropy=0.0, max_kl=0.1)
    self.assertEmpty(watcher.judge({"learn/entropy": -1.0}).passed)
    self.assertEmpty(watcher.judge({"learn/kl_old": float("nan")}).passed)
    self.assertLen(watcher.judge({"learn/kl_old": 0.2}).alarms, 1)

  def test_a_missing_metric_neither_counts_nor_clears(self):
    watcher = watch(patience=2, min_entropy=1.0)
    self.assertEmpty(watcher.judge(FINE).alarms)
    self.assertEmpty(watcher.judge({}).passed)
    self.assertLen(watcher.judge(FINE).alarms, 1)

  def test_goes_on_from_its_state(self):
    one, other = watch(min_entropy=1.0), watch(min_entropy=1.0, max_kl=1.0)
    one.judge(FINE)
    other.load(one.state_dict())
    self.assertLen(other.judge(FINE).alarms, 1)
    other.forget()
    self.assertEmpty(other.judge(FINE).alarms)

  def test_refuses_what_it_does_not_know(self):
    with self.assertRaisesRegex(ValueError, "guard.min_luck"):
      watch(min_luck=1.0)
    with self.assertRaisesRegex(ValueError, "guard.patience: found 0"):
      watch(patience=0)


if __name__ == "__main__":
  absltest.main()
