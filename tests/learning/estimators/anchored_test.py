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
    found = anchored.gigpo(data, discount=0.5, norm="mean_norm")
    np.testing.assert_allclose(found.turns, [[0.5, 0.5], [-0.5, -0.5]])
    # Without discounting the starts have 2 and 1.
    found = anchored.gigpo(data, discount=1.0, norm="mean_norm")
    np.testing.assert_allclose(found.turns, [[1.0, 0.5], [-1.0, -0.5]])
    found = anchored.gigpo(data, discount=1.0)
    half = 0.5 / (math.sqrt(0.5) + cases.EPS)
    np.testing.assert_allclose(found.turns[0], [2 * half, half])
    self.assertEqual(found.metrics["advantage/clusters"], 3.0)
    self.assertEqual(found.metrics["advantage/lone_turns"], 2.0)
    self.assertAlmostEqual(found.metrics["advantage/cluster_size"], 4 / 3)

  @parameterized.product(mode=groups.NORMS, weight=(0.0, 1.0, 2.5))
  def test_equals_loop(self, mode, weight):
    data = cases.random(6)
    found = anchored.gigpo(data, discount=0.9, norm=mode, step_weight=weight)
    episode = groups.grpo(data, norm=mode)
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

  @parameterized.parameters(("mean_norm", 10.0), ("mean_std_norm", 1.41421))
  def test_one_switch_for_both_parts(self, norm, expected):
    # What the reference code finds in its two modes.
    data = episodes.Episodes(
      groups=np.zeros(2, int),
      rewards=(np.array([10.0]), np.array([0.0])),
      aborted=np.zeros(2, bool),
      anchors=(("same",), ("same",)),
    )
    found = anchored.gigpo(data, norm=norm)
    np.testing.assert_allclose(
      np.concatenate(found.turns), [expected, -expected], rtol=1e-5
    )

  def test_penalties_charged_to_the_return(self):
    # Gross rewards (0, 2) and (0, 0), of which the first turn of the first
    # and the last turn of the second are charged 0.1.
    data = episodes.Episodes(
      groups=np.zeros(2, int),
      rewards=(np.array([-0.1, 2.0]), np.array([0.0, -0.1])),
      aborted=np.zeros(2, bool),
      anchors=(("a", "b"), ("a", "b")),
      penalties=(np.array([0.1, 0.0]), np.array([0.0, 0.1])),
    )
    found = anchored.gigpo(
      data, discount=0.5, norm="mean_norm", per="turn", penalty="return"
    )
    # Scores 1.9, 2 | 0, -0.1 around 0.95; to go 0.9, 2 | 0, -0.1.
    np.testing.assert_allclose(
      found.turns, [[0.95 + 0.45, 1.05 + 1.05], [-0.95 - 0.45, -1.05 - 1.05]]
    )
    with self.assertRaisesRegex(ValueError, "penalties: found None"):
      anchored.gigpo(cases.replace(data, penalties=None), penalty="return")

  def test_clusters_never_cross_groups(self):
    data = episodes.Episodes(
      groups=np.array([0, 0, 1, 1]),
      rewards=tuple(np.array([r]) for r in (0.0, 1.0, 10.0, 11.0)),
      aborted=np.zeros(4, bool),
      anchors=(("same",),) * 4,
    )
    found = anchored.gigpo(data, norm="mean_norm")
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
    exact = anchored.gigpo(data, norm="mean_norm")
    similar = anchored.gigpo(data, norm="mean_norm", similarity=0.9)
    np.testing.assert_allclose(exact.turns, [[-2.0], [2.0]])
    np.testing.assert_allclose(similar.turns, [[-4.0], [4.0]])

  def test_bad_options(self):
    data = cases.random(0)
    with self.assertRaisesRegex(ValueError, "norm: found 'mean'"):
      anchored.gigpo(data, norm="mean")
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

  def test_the_reference_lets_difflib_ignore_frequent_characters(self):
    rng = np.random.default_rng(0)
    # Thirty of each letter: all of them are frequent.
    text = "".join(rng.permutation(list("abcdefghij" * 30)))
    anchors = [text]
    for place in rng.permutation(100)[:49]:
      other = "b" if text[place] == "a" else "a"
      anchors.append(text[:place] + other + text[place + 1 :])
    ours = anchored.cluster_anchors(anchors, similarity=0.9)
    self.assertEqual(set(ours), {0})
    found = anchored.cluster_anchors(anchors, similarity=0.9, autojunk=True)
    leaders, expected = [], []
    for anchor in anchors:
      matching = [
        i
        for i, leader in enumerate(leaders)
        if difflib.SequenceMatcher(None, anchor, leader).ratio() >= 0.9
      ]
      if not matching:
        leaders.append(anchor)
      expected.append(matching[0] if matching else len(leaders) - 1)
    np.testing.assert_array_equal(found, expected)
    self.assertGreater(len(leaders), 10)


VECTOR = episodes.Episodes(
  groups=np.zeros(3, int),
  # Discounted by 0.95: 9.025 9.5 10 | 0 0 0 0 | 4.5125 4.75 5.
  rewards=(np.array([0, 0, 10.0]), np.zeros(4), np.array([0, 0, 5.0])),
  aborted=np.zeros(3, bool),
  anchors=(tuple("abc"), tuple("abbd"), tuple("xbc")),
)


class HgpoTest(parameterized.TestCase):
  @parameterized.parameters(
    (
      dict(context_turns=0),
      [1, 1.50756, 1, -1, -0.90453, -0.90453, 0, 0, 0.30151, -1],
    ),
    (
      dict(context_turns=2),
      [1, 1.20302, 1, -1, -0.96181, -0.90453, 0, 0, 0.30151, -1],
    ),
    (
      dict(context_turns=2, context_base=True),
      [1.08543, 1.2119, 1.04271, -1.00929, -0.97282, -0.94565, -1.02787]
      + [0.11421, 0.23908, -0.8143],
    ),
    (
      dict(context_turns=2, norm="mean_norm"),
      [4.5125, 5.225, 2.5, -4.5125, -4.275, -3.5625, 0, 0, 1.1875, -2.5],
    ),
  )
  def test_the_references_numbers(self, options, expected):
    found = anchored.hgpo(VECTOR, **options)
    np.testing.assert_allclose(np.concatenate(found.turns), expected, atol=6e-6)

  @parameterized.product(norm=groups.NORMS, exponent=(0.0, 2.0))
  def test_equals_loop(self, norm, exponent):
    data = cases.random(7)
    found = anchored.hgpo(
      data,
      discount=0.9,
      context_turns=1,
      context_exponent=exponent,
      norm=norm,
    )
    for e, rewards in enumerate(data.rewards):
      members = np.flatnonzero(~data.aborted & (data.groups == data.groups[e]))
      for k in range(len(rewards)):
        terms = []
        for level in (1, 2):
          if data.aborted[e] or len(members) < 2 or k + 1 < level:
            continue
          context = data.anchors[e][k + 1 - level : k + 1]
          cluster = [
            sum(0.9**j * r for j, r in enumerate(data.rewards[e2][k2:]))
            for e2 in members
            for k2 in range(level - 1, len(data.rewards[e2]))
            if data.anchors[e2][k2 + 1 - level : k2 + 1] == context
          ]
          own = sum(0.9**j * r for j, r in enumerate(rewards[k:]))
          if len(cluster) > 1:
            value = own - cases.mean(cluster)
            if norm == "mean_std_norm":
              value /= np.std(cluster) + cases.EPS
            if value:
              terms.append(((level + 1) ** exponent, value))
        expected = 0.0
        if terms:
          weight = sum(w for w, _ in terms) + cases.EPS
          expected = sum(w * v for w, v in terms) / weight
        self.assertAlmostEqual(found.turns[e][k], expected, places=9)


if __name__ == "__main__":
  absltest.main()
