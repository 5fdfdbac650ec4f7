"""Episodes, returns and groups that teach."""

import itertools

from absl.testing import absltest, parameterized
import numpy as np

from t2po_jax import types
from t2po_jax.learning.estimators import episodes
from tests.learning.estimators import cases


class ReturnsTest(parameterized.TestCase):
  def test_by_hand(self):
    found = episodes.returns_to_go(np.array([1.0, 0.0, 4.0]), discount=0.5)
    np.testing.assert_array_equal(found, [2.0, 2.0, 4.0])

  def test_equals_double_loop(self):
    rewards = np.random.default_rng(0).normal(size=9)
    expected = [
      sum(0.95 ** (j - k) * rewards[j] for j in range(k, 9)) for k in range(9)
    ]
    found = episodes.returns_to_go(rewards, discount=0.95)
    np.testing.assert_allclose(found, expected)

  def test_most_varied_holds_the_share(self):
    # Variances 0, 4, 1, 0 and 3: 8 in all.
    returns = [[1, 1], [0, 4], [0, 2], [], [0, 12**0.5]]
    for share, expected in (
      (0.3, [1]),
      (0.5, [1]),
      (0.51, [1, 4]),
      (0.9, [1, 2, 4]),
      (1.0, [1, 2, 4]),
    ):
      self.assertEqual(episodes.most_varied(returns, share), expected, share)

  def test_most_varied_equals_the_smallest_subset(self):
    generator = np.random.default_rng(4)
    for _ in range(20):
      returns = generator.normal(size=(6, 5)) * generator.uniform(size=(6, 1))
      share = generator.uniform(0.05, 0.95)
      variances = returns.var(1)
      subsets = [
        subset
        for size in range(1, 7)
        for subset in itertools.combinations(range(6), size)
        if variances[list(subset)].sum() >= share * variances.sum()
      ]
      fewest = [s for s in subsets if len(s) == len(subsets[0])]
      best = max(fewest, key=lambda s: variances[list(s)].sum())
      self.assertEqual(episodes.most_varied(returns, share), list(best))

  def test_most_varied_without_any_signal_takes_all(self):
    self.assertEqual(episodes.most_varied([[1, 1], [0, 0], []], 0.9), [0, 1, 2])

  def test_equal_groups(self):
    data = episodes.Episodes(
      groups=np.array([0, 0, 1, 1, 2, 3, 3]),
      rewards=tuple(
        np.array(r, float) for r in ([1], [0, 1], [1], [2], [1], [1], [9])
      ),
      aborted=np.array([0, 0, 0, 0, 0, 0, 1], bool),
    )
    self.assertEqual(episodes.equal_groups(data), {0, 2, 3})


class EpisodesTest(parameterized.TestCase):
  def _turn(self, reward, penalty, anchor, entropy, forced):
    count = len(forced)
    zeros = np.zeros(count, "f4")
    attempt = types.Attempt(
      tokens=np.zeros(count, "i4"),
      logprobs=zeros,
      uncertainty=zeros,
      entropy=np.array(entropy, "f4"),
      confidence=zeros,
      forced=np.array(forced, bool),
      text="",
      finish="stop",
      fired_at=-1,
      thinking_tokens=count,
      phi=0.5,
    )
    return types.Turn(
      prompt=np.zeros(1, "i4"),
      response=attempt,
      anchor=anchor,
      action="",
      reward=reward,
      penalty=penalty,
      format_valid=True,
      action_valid=True,
      phi_change=0.1,
      prompt_shortened=False,
    )

  def test_from_trajectories(self):
    turns = (
      self._turn(0.0, 0.1, "a", [1.0, 9.0, 3.0], [0, 1, 0]),
      self._turn(1.0, 0.0, "b", [9.0], [1]),
    )
    first = types.Trajectory("t", "c", 3, 0, turns, True)
    second = types.Trajectory("t", "c", 3, 1, turns[:1], False, aborted=True)
    data = episodes.episodes([first, second])
    np.testing.assert_array_equal(data.groups, [3, 3])
    np.testing.assert_allclose(data.rewards[0], [-0.1, 1.0])
    self.assertEqual(data.anchors, (("a", "b"), ("a",)))
    np.testing.assert_array_equal(data.aborted, [False, True])
    np.testing.assert_array_equal(data.sampled[0][0], [True, False, True])
    np.testing.assert_allclose(data.entropies[0], [2.0, 0.0])
    self.assertAlmostEqual(data.returns[0], first.episode_return)

  def test_mixed_groups(self):
    def play(group, reward, aborted=False):
      turn = self._turn(reward, 0.0, "a", [1.0], [0])
      return types.Trajectory("t", "c", group, 0, (turn,), True, aborted)

    played = [play(0, 1.0), play(0, 0.0), play(1, 0.3), play(1, 0.1 + 0.2)]
    played += [play(2, 1.0), play(2, 0.0, aborted=True), play(3, 1.0, True)]
    # Of three groups with anything left one teaches.
    self.assertAlmostEqual(episodes.mixed_groups(played), 1 / 3)
    data = episodes.episodes(played)
    self.assertEqual(episodes.equal_groups(data), {1, 2, 3})
    self.assertTrue(np.isnan(episodes.mixed_groups([])))

  def test_mismatched_fields(self):
    data = cases.random(0)
    with self.assertRaisesRegex(ValueError, "groups: found 1 trajectories"):
      cases.replace(data, groups=np.zeros(1))
    with self.assertRaisesRegex(ValueError, "entropies: found 9 turns"):
      cases.replace(data, entropies=(np.zeros(9), *data.entropies[1:]))


if __name__ == "__main__":
  absltest.main()
