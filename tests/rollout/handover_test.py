"""Episodes that two rollouts share: which are used, and how they go on.

The environment pays one for every turn, so an episode's return is its length,
and whoever prefers short episodes prefers bad ones.
"""

import dataclasses
import json
import time

from absl.testing import absltest, parameterized
import numpy as np

from t2po_jax.envs import base, prompts
from t2po_jax.rollout import collect, environments, handover
from tests.rollout import collect_test

TASKS = 4
GROUP = 2
ROLLOUTS = 12
LONGEST = 9


def length_of(task: str) -> int:
  """Turns of an episode: most are short, some are long."""
  drawn = np.random.default_rng(int(task)).random()
  return int(1 + (LONGEST - 1) * drawn**3)


class Walk:
  """Ends after a number of turns; the observation counts them."""

  def __init__(self, seconds: float = 0.0):
    self._seconds = seconds
    self.task, self.turn = "", 0

  def reset(self, task_id):
    self.task, self.turn = task_id, 0
    return base.Observation(task=task_id, text="0")

  def step(self, response):
    time.sleep(self._seconds * (1 + (len(response) + self.turn) % 3))
    self.turn += 1
    return base.StepResult(
      observation=base.Observation(task=self.task, text=str(self.turn)),
      action=response[-1:],
      reward=1.0,
      done=self.turn >= length_of(self.task),
      format_valid=True,
      action_valid=True,
    )

  def expert(self, seed):
    raise NotImplementedError

  def close(self):
    pass


@dataclasses.dataclass
class Walks:
  """The benchmark of these environments."""

  seconds: float = 0.0
  max_turns = LONGEST
  grammar = prompts.Grammar(actions=("action",), closing="</think><action>")

  def env(self):
    return Walk(self.seconds)

  def category(self, task_id):
    return ""

  def render(self, view):
    return [{"role": "user", "content": f"{view.task} {view.observation}"}]


class Slots(collect_test.ScriptedScheduler):
  """Serves as many requests per call as there are slots."""

  def __init__(self, slots):
    super().__init__(lambda prompt, _: (f"<think>{prompt}", 0.5), slots)
    self.cancelled = []
    self.versions = []

  @property
  def held(self):
    return 0

  def cancel(self, ticket):
    self.cancelled.append(ticket)
    self.queue = [one for one in self.queue if one.ticket != ticket]

  def poll(self, sampling, epsilon, *, version=None, refill=True):
    del sampling, epsilon
    if not refill:
      return []
    self.queue.sort(key=lambda request: request.priority)
    mine = [one for one in self.queue if version in (None, one.version)]
    mine = mine[: self._slots]
    self.queue = [one for one in self.queue if one not in mine]
    self.versions += [one.version for one in mine]
    return [self._complete(request) for request in mine]


def names(update):
  return [str(TASKS * update + i) for i in range(TASKS)]


class Run:
  """Rollouts one after the other, as the training loop plays them."""

  def __init__(self, *, oversample, seconds=0.0, refresh=True, calls=0):
    benchmark = Walks(seconds)
    threads = 8 if seconds else 0
    self.pool = environments.EnvironmentPool(benchmark.env, threads=threads)
    self.under = Slots(3)
    self.actor = collect_test.scripted(benchmark, self.pool, self.under)
    self.rules = collect.Rules(
      memory=1, max_prompt=50, max_response=50, env_calls=calls
    )
    self.oversample, self.refresh = oversample, refresh
    # Responses that each episode handed on has had, by rollout.
    self.said: list[list[int]] = []

  def play(self, update, handed):
    depth = -(-self.oversample // TASKS)
    early = [
      handover.Early(
        [
          (task, group, member)
          for group, task in enumerate(
            names(update + later)[: self.oversample - (later - 1) * TASKS]
          )
          for member in range(GROUP)
        ],
        seed=(0, update + later),
      )
      for later in range(1, depth + 1)
    ]
    older = {} if self.refresh else self.earlier(update, depth)
    return self.actor.play(
      names(update),
      group_size=GROUP,
      rules=self.rules,
      seed=(0, update),
      version=update,
      early=early,
      handed=handed,
      older=older if handed else {},
    )

  def earlier(self, update, depth):
    """The rules of the versions that go on with episodes."""
    return {u: self.rules for u in range(max(update - depth, 0), update)}

  def all(self, *, again=()):
    """Every rollout; before some of them what is carried is played again."""
    handed, rollouts = (), []
    for update in range(ROLLOUTS):
      if update in again:
        written = [handover.write_down(one) for one in handed]
        handover.drop(handed, self.pool)
        text = json.dumps(handover.to_json(written))
        read = handover.from_json(json.loads(text))
        handed = handover.replay(read, self.pool)
      rollouts.append(self.play(update, handed))
      handed = rollouts[-1].handed_on
      self.said.append(
        [
          len(one.episode.turns) + (one.episode.attempt is not None)
          for one in handed
        ]
      )
    return rollouts


def comparable(rollouts):
  """What is learned from, without the version that spoke."""
  return [
    (
      update,
      t.task_id,
      t.group,
      t.member,
      [(turn.response.text, turn.reward) for turn in t.turns],
      [turn.response.tokens.tolist() for turn in t.turns],
    )
    for update, rollout in enumerate(rollouts)
    for t in rollout.trajectories
  ]


class BiasTest(parameterized.TestCase):
  @parameterized.parameters(1, 3, 4, 6, 12)
  def test_what_is_used_is_what_was_begun(self, oversample):
    plain = Run(oversample=0).all()
    found = Run(oversample=oversample).all()
    # Every update has the groups of its number, whole, in order; so the mean
    # over what is used is that over what is begun, to the last bit.
    self.assertEqual(comparable(found), comparable(plain))
    used = [len(t.turns) for r in found for t in r.trajectories]
    begun = [length_of(task) for u in range(ROLLOUTS) for task in names(u)]
    self.assertEqual(np.mean(used), np.mean(begun))
    # It was not in vain: the next rollout found work that was done.
    ended = [one.answer is None for r in found[:-1] for one in r.handed_on]
    self.assertGreater(np.mean(ended), 0.04)
    turns = [
      len(one.episode.turns)
      for r in found[:-1]
      for one in r.handed_on
      if one.answer is not None
    ]
    self.assertNotEmpty(turns)

  def test_taking_what_ends_first_would_be_biased(self):
    # The same episodes, all begun together, but the first to end are taken
    # and the others dropped, as a naive scheme does.
    kept, begun = [], []
    for update in range(ROLLOUTS):
      tasks = (names(update) + names(update + ROLLOUTS))[: TASKS + 3]
      lengths = [length_of(task) for task in tasks for _ in range(GROUP)]
      kept += sorted(lengths)[: TASKS * GROUP]
      begun += lengths
    self.assertLess(np.mean(kept), 0.8 * np.mean(begun))


class GoOnTest(parameterized.TestCase):
  @parameterized.product(oversample=(3, 6, 12), refresh=(True, False))
  def test_an_episode_that_is_played_again_goes_on_the_same(
    self, oversample, refresh
  ):
    wanted = Run(oversample=oversample, refresh=refresh).all()
    again = Run(oversample=oversample, refresh=refresh)
    found = again.all(again=range(1, ROLLOUTS))
    self.assertEqual(comparable(found), comparable(wanted))
    for one, other in zip(found, wanted, strict=True):
      np.testing.assert_array_equal(one.deltas, other.deltas)
      np.testing.assert_array_equal(one.phi_changes, other.phi_changes)
      for t, u in zip(one.trajectories, other.trajectories, strict=True):
        self.assertEqual(
          [turn.version for turn in t.turns], [turn.version for turn in u.turns]
        )

  def test_latency_changes_nothing_in_logical_time(self):
    wanted = Run(oversample=3, seconds=1e-6, calls=2).all()
    found = Run(oversample=3, seconds=2e-3, calls=2).all()
    self.assertEqual(comparable(found), comparable(wanted))
    versions = [
      [
        turn.version
        for r in rollouts
        for t in r.trajectories
        for turn in t.turns
      ]
      for rollouts in (found, wanted)
    ]
    self.assertEqual(*versions)

  def test_new_weights_speak_between_turns_or_not_at_all(self):
    for refresh in (True, False):
      run = Run(oversample=4, refresh=refresh)
      rollouts = run.all()
      spoken = [
        [turn.version for turn in t.turns]
        for rollout in rollouts
        for t in rollout.trajectories
      ]
      self.assertTrue(all(v == sorted(v) for v in spoken))
      mixed = [v for v in spoken if len(set(v)) > 1]
      self.assertEqual(bool(mixed), refresh)
      # What was said before the new weights came is recorded as the old ones'.
      waited = [
        (update + 1, one.episode.group, one.episode.member, said)
        for update, rollout in enumerate(rollouts[:-1])
        for one, said in zip(rollout.handed_on, run.said[update], strict=True)
      ]
      for update, group, member, said in waited:
        (turns,) = (
          [turn.version for turn in t.turns]
          for t in rollouts[update].trajectories
          if (t.group, t.member) == (group, member)
        )
        self.assertEqual(set(turns[:said]) - {update - 1}, set())
        if refresh:
          self.assertEqual(set(turns[said:]) - {update}, set())
      for update, rollout in enumerate(rollouts):
        for t in rollout.trajectories:
          self.assertLessEqual(
            {turn.version for turn in t.turns}, {update - 1, update}
          )

  def test_no_policy_is_older_than_the_groups_are_early(self):
    for refresh in (True, False):
      run = Run(oversample=6, refresh=refresh)
      lags = [
        {update - turn.version for turn in t.turns}
        for update, rollout in enumerate(run.all())
        for t in rollout.trajectories
      ]
      # New weights may speak before an early episode's first response.
      self.assertContainsSubset(
        {0, 1} if refresh else {0, 1, 2}, set.union(*lags)
      )
      self.assertLessEqual(set.union(*lags), {0, 1, 2})
      self.assertEqual(any(len(lag) > 1 for lag in lags), refresh)

  def test_every_seat_is_given_back(self):
    run = Run(oversample=4)
    rollouts = run.all(again=[2])
    handover.drop(rollouts[-1].handed_on, run.pool)
    self.assertLessEqual(len(run.pool._free), (TASKS + 4) * GROUP)
    self.assertLen(set(map(id, run.pool._free)), len(run.pool._free))

  def answer_of(self, handed):
    assert handed.answer is not None
    return handed.answer.result()

  def test_an_environment_that_answers_otherwise_ends_the_episode(self):
    run = Run(oversample=4)
    handed = run.play(0, ()).handed_on
    written = [handover.write_down(one) for one in handed]
    number = next(
      i for i, one in enumerate(written) if one.turns and one.result is None
    )
    turn = dataclasses.replace(written[number].turns[0], anchor="elsewhere")
    written[number] = dataclasses.replace(
      written[number], turns=(turn, *written[number].turns[1:])
    )
    again = handover.replay(written, run.pool)
    with self.assertRaisesRegex(base.EnvError, "turn 1 began differently"):
      self.answer_of(again[number])
    rollout = run.play(1, again)
    self.assertEqual(rollout.aborted, 1)


if __name__ == "__main__":
  absltest.main()
