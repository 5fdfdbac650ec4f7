"""Which version plays which rollout, whatever the clock says."""

import threading
import time

from absl.testing import absltest, parameterized

from t2po_jax.training import ahead

LAST = 6


def version(update):
  return ahead.Version(update, {"w": update}, epsilon=0.0, eta=0.0)


class Recorder:
  """Plays nothing; every rollout takes as many tasks as its update says."""

  def __init__(self, delay=lambda update: 0.0):
    self.calls = []
    self.threads = set()
    self._delay = delay

  def __call__(self, update, cursor, played_by):
    time.sleep(self._delay(update))
    self.calls.append((update, cursor, played_by.update))
    self.threads.add(threading.get_ident())
    return f"rollout {update}", cursor + update


def train(rollouts, *, start=0, cursor=0, versions=None, delay=0.0, last=LAST):
  """The loop's part of a run; returns (update, version) of what it took."""
  taken = []
  rollouts.begin(start, cursor, versions or [version(start)])
  for update in range(start + 1, last + 1):
    played = rollouts.take(update)
    taken.append((played.result, played.version))
    time.sleep(delay)
    rollouts.publish(version(update))
  return taken


class RolloutsTest(parameterized.TestCase):
  @parameterized.parameters(
    (0, [0, 1, 2, 3, 4, 5]), (1, [0, 0, 1, 2, 3, 4]), (2, [0, 0, 0, 1, 2, 3])
  )
  def test_a_rollout_is_played_by_the_version_of_its_number(self, k, wanted):
    for of_rollout, of_update in ((0.0, 0.01), (0.01, 0.0)):
      play = Recorder(lambda update, seconds=of_rollout: seconds)
      rollouts = ahead.Rollouts(play, ahead=k, last=LAST)
      taken = train(rollouts, delay=of_update)
      rollouts.close()
      names = [f"rollout {update}" for update in range(1, LAST + 1)]
      self.assertEqual(taken, list(zip(names, wanted, strict=True)))
      cursors = [0, 1, 3, 6, 10, 15]
      updates = list(range(1, LAST + 1))
      self.assertEqual(
        play.calls, list(zip(updates, cursors, wanted, strict=True))
      )
      here = threading.get_ident()
      self.assertEqual(play.threads == {here}, k == 0)

  def test_rollouts_are_played_while_the_learner_is_busy(self):
    started = threading.Event()

    def play(update, cursor, played_by):
      del cursor, played_by
      if update == 2:
        started.set()
      return update, 0

    rollouts = ahead.Rollouts(play, ahead=1, last=2)
    rollouts.begin(0, 0, [version(0)])
    self.assertEqual(rollouts.take(1).result, 1)
    # Version 1 does not exist yet: this is inside update 1.
    self.assertTrue(started.wait(10))
    rollouts.close()

  @parameterized.parameters(0, 1, 2)
  def test_a_run_that_is_resumed_plays_the_same(self, k):
    whole = Recorder()
    rollouts = ahead.Rollouts(whole, ahead=k, last=LAST)
    train(rollouts)
    rollouts.close()
    for stop in range(1, LAST):
      first = ahead.Rollouts(Recorder(), ahead=k, last=LAST)
      train(first, last=stop)
      first.close()
      kept = first.versions
      self.assertLessEqual(len(kept), k + 1)
      resumed = Recorder()
      second = ahead.Rollouts(resumed, ahead=k, last=LAST)
      cursor = sum(range(stop + 1))
      train(second, start=stop, cursor=cursor, versions=kept)
      second.close()
      self.assertEqual(resumed.calls, whole.calls[stop:])

  def test_after_a_rollback_only_the_restored_policy_plays(self):
    play = Recorder()
    rollouts = ahead.Rollouts(play, ahead=1, last=LAST)
    train(rollouts, last=3)
    # Update 3 was undone: its tasks are spent, what was under way is not.
    taken = train(rollouts, start=3, cursor=6, versions=[version(3)])
    rollouts.close()
    self.assertEqual([number for _, number in taken], [3, 3, 4])
    after = [call for call in play.calls if call[2] >= 3]
    self.assertEqual(after, [(4, 6, 3), (5, 10, 3), (6, 15, 4)])

  def test_other_work_waits_for_the_rollouts_before_it(self):
    play = Recorder(lambda update: 0.02)
    rollouts = ahead.Rollouts(play, ahead=2, last=LAST)
    rollouts.begin(0, 0, [version(0)])
    done = rollouts.between(lambda: len(play.calls))
    self.assertEqual(done, 3)
    rollouts.close()

  def test_an_error_of_a_rollout_reaches_the_learner(self):
    def play(update, cursor, played_by):
      raise ValueError(f"rollout {update} failed")

    for k in (0, 1):
      rollouts = ahead.Rollouts(play, ahead=k, last=LAST)
      rollouts.begin(0, 0, [version(0)])
      with self.assertRaisesRegex(ValueError, "rollout 1 failed"):
        rollouts.take(1)
      rollouts.close()


if __name__ == "__main__":
  absltest.main()
