"""The mechanism's numbers on trajectories made by hand."""

import itertools
import math

from absl.testing import absltest, parameterized
import numpy as np

from t2po_jax import types
from t2po_jax.rollout import mechanism


def attempt(tokens=(1, 2, 3), *, text="", fired_at=-1, thinking=0, m=None):
  size = len(tokens)
  zeros = np.zeros(size, np.float32)
  return types.Attempt(
    tokens=np.array(tokens, np.int32),
    logprobs=zeros,
    uncertainty=zeros if m is None else np.array(m, np.float32),
    entropy=zeros,
    confidence=zeros,
    forced=np.zeros(size, bool),
    text=text,
    finish="stop",
    fired_at=fired_at,
    thinking_tokens=thinking,
    phi=0.5,
  )


def turn(anchor, action="go", *, valid=True, reward=0.0, **known):
  discarded = known.pop("discarded", ())
  return types.Turn(
    np.zeros(2, np.int32),
    attempt(**known),
    anchor,
    action,
    reward,
    0.0,
    valid,
    valid,
    math.nan,
    False,
    discarded=discarded,
  )


def episode(*turns, group=0, member=0, success=False):
  return types.Trajectory(f"task{group}", "all", group, member, turns, success)


class TurnTest(absltest.TestCase):
  def test_repeats_are_the_same_action_at_the_same_place(self):
    walk = episode(
      turn("a", "go"), turn("b", "go"), turn("a", "go"), turn("a", "stay")
    )
    self.assertEqual(mechanism.repeats(walk), [False, False, True, False])
    void = episode(turn("a", ""), turn("a", ""))
    self.assertEqual(mechanism.repeats(void), [False, False])

  def test_useless_turns_lead_nowhere_new(self):
    turns = [turn("a"), turn("b"), turn("a"), turn("c", valid=False)]
    walk = episode(*turns, turn("d"))
    # a -> b is new, b -> a is not, a -> c is, an invalid action never is; the
    # last one led to failure.
    wanted = [False, True, False, True, True]
    self.assertEqual(mechanism.useless_turns(walk), wanted)
    won = episode(*turns, turn("d"), success=True)
    self.assertEqual(mechanism.useless_turns(won), [*wanted[:-1], False])


class DescribeTest(absltest.TestCase):
  def test_deviations_by_hand(self):
    def pay(reward, group):
      return episode(turn("a", reward=reward), group=group)

    found = mechanism.describe([pay(0, 0), pay(1, 0), pay(1, 1), pay(1, 1)])
    self.assertAlmostEqual(found["return_std"], math.sqrt(3) / 4)
    self.assertAlmostEqual(found["group_std"], 0.25)
    # Means 0.5 and 1: deviation 0.25 sqrt(2), over sqrt(2) groups.
    self.assertAlmostEqual(found["return_error"], 0.25)

  def test_interventions_and_second_tries(self):
    other = (attempt(text="<think>x</think> left"),)
    found = mechanism.describe(
      [
        episode(
          turn("a", text="<think>y</think> left", discarded=other),
          turn("b", text="<think>y</think> right", discarded=other),
          success=True,
        ),
        episode(turn("a", fired_at=3), turn("b"), success=True),
        episode(turn("a", fired_at=3)),
      ]
    )
    self.assertEqual(found["resample_changed"], 0.5)
    self.assertEqual(found["intervention_success"], 0.5)
    self.assertEqual(found["free_success"], 1.0)

  def test_nothing_is_nan(self):
    found = mechanism.describe([])
    self.assertTrue(all(math.isnan(value) for value in found.values()), found)


class DependenceTest(absltest.TestCase):
  def rollout(self, *groups):
    return [
      episode(turn("a", tokens=tokens), group=group, member=member)
      for group, members in enumerate(groups)
      for member, tokens in enumerate(members)
    ]

  def test_by_hand(self):
    # Pairs 12 23 | 12 24: within 1/3; 56 67 twice: 1; between 0.
    found = self.rollout([(1, 2, 3), (1, 2, 4)], [(5, 6, 7), (5, 6, 7)])
    self.assertAlmostEqual(mechanism.prompt_dependence(found), 2 / 3)

  def test_a_constant_policy_and_noise_depend_on_nothing(self):
    same = self.rollout(*[[(1, 2, 3)] * 4] * 3)
    self.assertEqual(mechanism.prompt_dependence(same), 0.0)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 50, (8, 8, 20))
    self.assertLess(
      abs(mechanism.prompt_dependence(self.rollout(*noise))), 0.01
    )

  def test_needs_two_groups_of_two(self):
    one = self.rollout([(1, 2), (1, 2)], [(1, 2)])
    self.assertTrue(math.isnan(mechanism.prompt_dependence(one)))


class RocTest(parameterized.TestCase):
  def test_is_the_share_of_pairs_in_order(self):
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 6, 40).astype(float)
    labels = rng.uniform(size=40) < 0.3
    pairs = itertools.product(scores[labels], scores[~labels])
    wanted = np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs])
    self.assertAlmostEqual(mechanism.roc_area(scores, labels), wanted)

  @parameterized.parameters(
    ([1, 2, 3, 4], [False, False, True, True], 1.0),
    ([4, 3, 2, 1], [False, False, True, True], 0.0),
    ([1, 1, 1], [True, False, True], 0.5),
    ([math.nan, 1, 2], [True, False, True], 1.0),
  )
  def test_by_hand(self, scores, labels, wanted):
    self.assertEqual(mechanism.roc_area(scores, labels), wanted)

  def test_nan_without_one_of_the_sides(self):
    self.assertTrue(math.isnan(mechanism.roc_area([1, 2], [True, True])))


class ThoughtTest(absltest.TestCase):
  def test_mean_over_positions(self):
    long = attempt(range(5), thinking=4, m=[0.0, 0.2, 0.8, 0.6, 9.0])
    short = attempt(range(2), thinking=2, m=[0.3, 0.5])
    lone = attempt(range(2), thinking=1, m=[7.0, 7.0])
    curve = mechanism.thought_curve([long, short, lone], bins=2)
    np.testing.assert_allclose(curve, [0.2, 0.6], atol=1e-6)
    self.assertTrue(np.isnan(mechanism.thought_curve([lone], bins=2)).all())


if __name__ == "__main__":
  absltest.main()
