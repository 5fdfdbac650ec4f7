"""Which tasks an update plays and which groups stay, with scripted episodes."""

import dataclasses
from unittest import mock

from absl.testing import absltest
import numpy as np

from t2po_jax import types
from t2po_jax.configs import base
from t2po_jax.configs import base as settings
from t2po_jax.rollout import collect
from t2po_jax.training import experience

SPLIT = tuple(f"task{i}" for i in range(20))


def make_episode(task, group, member, rewards, *, aborted=False, tokens=3):
  """An episode with the given reward of each turn."""
  zeros = np.zeros(tokens, np.float32)
  attempt = types.Attempt(
    tokens=np.arange(tokens, dtype=np.int32),
    logprobs=zeros,
    uncertainty=zeros,
    entropy=zeros,
    confidence=zeros,
    forced=zeros > 0,
    text="",
    finish="stop",
    fired_at=-1,
    thinking_tokens=0,
    phi=0.5,
  )
  turns = tuple(
    types.Turn(
      prompt=np.zeros(2, np.int32),
      response=attempt,
      anchor="",
      action="",
      reward=reward,
      penalty=0.0,
      format_valid=True,
      action_valid=True,
      phi_change=0.0,
      prompt_shortened=False,
    )
    for reward in rewards
  )
  return types.Trajectory(task, "", group, member, turns, False, aborted)


class ScriptedPlay:
  """Plays tasks whose returns a function gives; notes what was asked."""

  def __init__(self, returns):
    self._returns = returns
    self.calls = []

  def __call__(self, tasks, *, group_size, seed, rules, **_):
    self.calls.append((list(tasks), group_size, seed, rules))
    episodes = [
      make_episode(task, group, member, [self._returns(task, member)])
      for group, task in enumerate(tasks)
      for member in range(group_size)
    ]
    some = np.zeros(len(tasks), np.float32)
    return collect.Rollout(episodes, some, some, 0)


def gather(returns, *, cursor=0, **changes):
  """Runs `gather` over the fake; returns the experience and its calls."""
  config = base.get_config()
  config.rollout.tasks, config.rollout.group_size = 4, 2
  config.update_from_flattened_dict(changes)
  actor = mock.Mock()
  actor.benchmark.splits = {"train": SPLIT}
  fake = ScriptedPlay(returns)
  actor.play = fake
  found = experience.gather(
    settings.read(config), actor, update=7, cursor=cursor, epsilon=0.1, eta=0.2
  )
  return found, fake.calls


def order(start, count):
  return experience.tasks_of(SPLIT, start, count, seed=0)


FILTER = {"rollout.filter_groups": True, "rollout.filter_tries": 2}


class GatherTest(absltest.TestCase):
  def test_without_filtering_everything_stays(self):
    found, calls = gather(lambda task, member: 0.0, cursor=3)
    self.assertLen(calls, 1)
    self.assertEqual(calls[0][:3], (order(3, 4), 2, (0, 7)))
    self.assertEqual(found.cursor, 7)
    self.assertLen(found.trajectories, 8)
    self.assertEqual(found.scalars, {})
    self.assertIsNone(found.baselines)

  def test_equal_groups_are_replaced_by_fresh_tasks(self):
    # Two of the first four tasks teach something, then every one does.
    first = order(0, 4)
    dull = {first[0], first[2]}
    found, calls = gather(
      lambda task, member: 0.0 if task in dull else float(member), **FILTER
    )
    self.assertEqual(
      [call[:3] for call in calls],
      [(first, 2, (0, 7)), (order(4, 2), 2, (0, 7, 1))],
    )
    self.assertEqual(found.cursor, 6)
    self.assertEqual(
      [(t.task_id, t.group, t.member) for t in found.trajectories],
      [
        (task, group, member)
        for group, task in enumerate([first[1], first[3], *order(4, 2)])
        for member in range(2)
      ],
    )
    self.assertLen(found.played, 12)
    self.assertEqual(
      sorted({t.group for t in found.played}), [0, 1, 2, 3, 4, 5]
    )
    self.assertEqual(
      found.scalars,
      {
        "filter/tries": 2.0,
        "filter/groups_left": 4.0,
        "filter/episodes_left_out": 4.0,
        "filter/tokens_left_out": 12.0,
      },
    )
    self.assertLen(found.deltas, 6)

  def test_gives_up_after_the_last_try(self):
    lucky = order(4, 4)[1]
    found, calls = gather(
      lambda task, member: float(member) if task == lucky else 1.0, **FILTER
    )
    self.assertEqual([len(call[0]) for call in calls], [4, 4, 3])
    self.assertEqual({t.task_id for t in found.trajectories}, {lucky})
    self.assertEqual(found.cursor, 11)
    self.assertEqual(found.scalars["filter/groups_left"], 1.0)

  def test_without_any_lesson_the_last_try_is_returned(self):
    found, calls = gather(lambda task, member: 1.0, **FILTER)
    self.assertLen(calls, 3)
    self.assertEqual([t.task_id for t in found.trajectories[::2]], order(8, 4))

  def test_groups_with_little_variance_are_left_out(self):
    first = order(0, 4)
    spread = dict(zip(first, (0.1, 3.0, 0.0, 2.0), strict=True))
    found, calls = gather(
      lambda task, member: spread[task] * member,
      **{"rollout.variance_kept": 0.9},
    )
    self.assertLen(calls, 1)  # Nothing is sampled in their place.
    self.assertEqual(
      [(t.task_id, t.group) for t in found.trajectories[::2]],
      [(first[1], 0), (first[3], 1)],
    )
    self.assertLen(found.played, 8)
    self.assertEqual(found.scalars["filter/groups_left"], 2.0)
    self.assertEqual(found.scalars["filter/tokens_left_out"], 12.0)

  def test_left_out_groups_need_no_greedy_episode(self):
    first = order(0, 4)
    _, calls = gather(
      lambda task, member: float(member) if task == first[2] else 1.0,
      **{
        "advantage.estimator": "remax",
        "advantage.discount": 1.0,
        "rollout.variance_kept": 0.5,
      },
    )
    self.assertEqual([call[0] for call in calls], [first, [first[2]]])

  def test_the_horizon_grows_with_the_updates(self):
    for text, turns in (("2:6", 0), ("2:7", 2), ("2:6,3:9", 3), ("", 0)):
      found, calls = gather(
        lambda task, member: 0.0, **{"rollout.horizon": text}
      )
      self.assertEqual(calls[0][3].max_turns, turns, text)
      self.assertEqual(found.scalars.get("train/horizon", 0.0), turns)

  def test_a_greedy_episode_per_task_for_remax(self):
    # Member 0 of the greedy round has return 3, whatever was sampled.
    found, calls = gather(
      lambda task, member: 3.0 + member,
      **{"advantage.estimator": "remax", "advantage.discount": 1.0},
    )
    tasks, size, seed, rules = calls[1]
    self.assertEqual((tasks, size), (calls[0][0], 1))
    self.assertNotEqual(seed, calls[0][2])
    self.assertEqual(rules.sampling.temperature, 0.0)
    self.assertEqual(rules.max_tries, 0)
    np.testing.assert_array_equal(found.baselines, np.full(8, 3.0))
    self.assertLen(found.played, 8)


class GreedyBaselinesTest(absltest.TestCase):
  def test_discounts_as_the_estimator_does(self):
    sampled = [make_episode("a", 0, m, [0.0]) for m in range(2)]
    greedy = [make_episode("a", 0, 0, [1.0, 0.0, 2.0])]
    found = experience.greedy_baselines(sampled, greedy, discount=0.5)
    np.testing.assert_allclose(found, [1.5, 1.5])

  def test_an_aborted_episode_gives_way_to_the_mean_of_its_group(self):
    sampled = [
      make_episode("a", 0, 0, [1.0]),
      make_episode("a", 0, 1, [2.0]),
      make_episode("a", 0, 2, [9.0], aborted=True),
      make_episode("b", 1, 0, [5.0]),
    ]
    greedy = [
      dataclasses.replace(make_episode("a", 0, 0, []), aborted=True),
      make_episode("b", 1, 0, [4.0]),
    ]
    found = experience.greedy_baselines(sampled, greedy, discount=1.0)
    np.testing.assert_allclose(found, [1.5, 1.5, 1.5, 4.0])


class TaskOrderTest(absltest.TestCase):
  def test_every_task_once_before_one_comes_again(self):
    drawn = experience.tasks_of(SPLIT, 0, 40, seed=1)
    self.assertSameElements(drawn[:20], SPLIT)
    self.assertLen(set(drawn[:20]), 20)
    self.assertLen(set(drawn[20:]), 20)
    self.assertNotEqual(drawn[:20], drawn[20:])

  def test_goes_on_where_it_stopped(self):
    pieces = [
      experience.tasks_of(SPLIT, start, count, seed=2)
      for start, count in ((0, 3), (3, 15), (18, 22))
    ]
    whole = experience.tasks_of(SPLIT, 0, 40, seed=2)
    self.assertEqual(sum(pieces, []), whole)


if __name__ == "__main__":
  absltest.main()
