"""GiGPO and its clusters against loops over their formulas."""

import difflib
import math

from absl.testing import absltest, parameterized
import numpy as np

from t2po_jax.learning.estimators import anchored, episodes, groups
from tests.learning.estimators import cases


class GigpoTest(parameterized.TestCase):
  def test_by_hand(self):
    data = episodes.Episodes(
      groups=np.zeros(2, int),
      rewards=(np.array([0.0, 2.0]), np.array([1.0, 0.0])),
      aborted=np.zeros(2, bool),
      anchors=(("start", "left"), ("start", "right")),
    )
    # Returns to go: (1, 2) and (1, 0) at a discount of 1/2; both starts have
    # 1, and the second turns are alone.
    found = anchored.gigpo(data, discount=0.5, norm_std=False)
    np.testing.assert_allclose(found.turns, [[0.5, 0.5], [-0.5, -0.5]])
    # Without discounting the starts have 2 and 1.
    found = anchored.gigpo(data, discount=1.0, norm_std=False)
    np.testing.assert_allclose(found.turns, [[1.0, 0.5], [-1.0, -0.5]])
    found = anchored.gigpo(
      data, discount=1.0, norm_std=False, step_norm="mean_std_norm"
    )
    step = 0.5 / (math.sqrt(0.5) + cases.EPS)
    np.testing.assert_allclose(found.turns[0], [0.5 + step, 0.5])
    self.assertEqual(found.metrics["advantage/clusters"], 3.0)
    self.assertEqual(found.metrics["advantage/lone_turns"], 2.0)
    self.assertAlmostEqual(found.metrics["advantage/cluster_size"], 4 / 3)

  @parameterized.product(mode=anchored.NORMS, weight=(0.0, 1.0, 2.5))
  def test_equals_loop(self, mode, weight):
    data = cases.random(6)
    found = anchored.gigpo(
      data, discount=0.9, step_norm=mode, step_weight=weight
    )
    episode = groups.grpo(data)
    kept = np.flatnonzero(~data.aborted)
    places = [(e, k) for e in kept for k in range(len(data.rewards[e]))]

    def to_go(e, k):
      rewards = data.rewards[e][k:]
      return sum(0.9**j * r for j, r in enumerate(rewards))

    for e, k in places:
      members = [e2 for e2 in kept if data.groups[e2] == data.groups[e]]
      cluster = [
        to_go(e2, k2)
        for e2, k2 in places
        if e2 in members and data.anchors[e2][k2] == data.anchors[e][k]
      ]
      step = 0.0
      if len(members) > 1 and len(cluster) > 1:
        step = to_go(e, k) - cases.mean(cluster)
        if mode == "mean_std_norm":
          step /= cases.std(cluster) + cases.EPS
      expected = episode.turns[e][k] + weight * step
      self.assertAlmostEqual(found.turns[e][k], expected, places=9)

  def test_clusters_never_cross_groups(self):
    data = episodes.Episodes(
      groups=np.array([0, 0, 1, 1]),
      rewards=tuple(np.array([r]) for r in (0.0, 1.0, 10.0, 11.0)),
      aborted=np.zeros(4, bool),
      anchors=(("same",),) * 4,
    )
    found = anchored.gigpo(data, norm_std=False)
    np.testing.assert_allclose(
      np.concatenate(found.turns), [-1.0, 1.0, -1.0, 1.0]
    )

  def test_similar_anchors_cluster(self):
    data = episodes.Episodes(
      groups=np.zeros(2, int),
      rewards=(np.array([0.0]), np.array([4.0])),
      aborted=np.zeros(2, bool),
      anchors=(("You are in room 1.",), ("You are in room 2.",)),
    )
    exact = anchored.gigpo(data, norm_std=False)
    similar = anchored.gigpo(data, norm_std=False, similarity=0.9)
    np.testing.assert_allclose(exact.turns, [[-2.0], [2.0]])
    np.testing.assert_allclose(similar.turns, [[-4.0], [4.0]])

  def test_bad_options(self):
    data = cases.random(0)
    with self.assertRaisesRegex(ValueError, "step_norm: found 'mean'"):
      anchored.gigpo(data, step_norm="mean")
    with self.assertRaisesRegex(ValueError, "similarity: found 1.5"):
      anchored.gigpo(data, similarity=1.5)
    with self.assertRaisesRegex(ValueError, "anchors: found None"):
      anchored.gigpo(cases.replace(data, anchors=None))


class ClusterTest(parameterized.TestCase):
  def test_greedy_by_hand(self):
    # "abcd" and "abcx" share 3 of 4 letters: a ratio of 0.75.
    anchors = ["abcd", "abxx", "abcx", "abxx", "zzzz", "abcd"]
    labels = anchored.cluster_anchors(anchors, similarity=0.75)
    # "abcx" resembles both leaders; the first one wins.
    self.assertEqual(labels.tolist(), [0, 1, 0, 1, 2, 0])
    labels = anchored.cluster_anchors(anchors, similarity=1.0)
    self.assertEqual(labels.tolist(), [0, 1, 2, 1, 3, 0])

  @parameterized.parameters(0.5, 0.7, 0.9)
  def test_equals_a_plain_greedy_loop(self, similarity):
    rng = np.random.default_rng(0)
    base = ["".join(rng.choice(list("abcdef"), size=12)) for _ in range(4)]
    anchors = []
    for _ in range(40):
      letters = list(base[rng.integers(4)])
      for _ in range(rng.integers(0, 5)):
        letters[rng.integers(12)] = rng.choice(list("abcdef"))
      anchors.append("".join(letters))
    leaders, expected = [], []
    for anchor in anchors:
      label = len(leaders)
      for place, leader in enumerate(leaders):
        matcher = difflib.SequenceMatcher(None, anchor, leader)
        if matcher.ratio() >= similarity:
          label = place
          break
      if label == len(leaders):
        leaders.append(anchor)
      expected.append(label)
    found = anchored.cluster_anchors(anchors, similarity=similarity)
    self.assertEqual(found.tolist(), expected)

  def test_long_texts_that_differ_in_a_word(self):
    # difflib's shortcut for texts of 200 letters and more finds these unlike.
    room = "You see a cabinet 1, a desk 2, a drawer 3 and a shelf 4. " * 5
    labels = anchored.cluster_anchors(
      ["A lamp is on. " + room, "Nothing. " + room], similarity=0.9
    )
    self.assertEqual(labels.tolist(), [0, 0])


if __name__ == "__main__":
  absltest.main()
