"""Advantage estimators against loops over their formulas."""

import difflib
import itertools
import math

from absl.testing import absltest, parameterized
import numpy as np

from t2po_jax import types
from t2po_jax.learning import advantages

EPS = 1e-6
BASELINES = ("grpo", "gigpo", "rloo", "reinforce_pp_baseline", "empg")


def _mean(values):
  return sum(values) / len(values)


def _std(values):
  mean = _mean(values)
  return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def _random(seed, *, groups=3, size=4, aborted=True):
  """Episodes with everything any estimator may ask for."""
  rng = np.random.default_rng(seed)
  count = groups * size
  turns = rng.integers(1, 5, count)
  lengths = [rng.integers(1, 6, k) for k in turns]
  return advantages.Episodes(
    groups=np.repeat(np.arange(groups), size)[rng.permutation(count)],
    rewards=tuple(rng.normal(size=k).round(1) for k in turns),
    aborted=(rng.uniform(size=count) < 0.2) & aborted,
    anchors=tuple(tuple(rng.choice(list("abc"), size=k)) for k in turns),
    values=tuple(tuple(rng.normal(size=n) for n in ns) for ns in lengths),
    sampled=tuple(
      tuple(rng.uniform(size=n) < 0.7 for n in ns) for ns in lengths
    ),
    entropies=tuple(rng.uniform(size=k) for k in turns),
    baselines=rng.normal(size=count),
  )


def _reorder(data, order):
  """The same trajectories in another order."""

  def pick(field):
    return None if field is None else tuple(field[e] for e in order)

  return advantages.Episodes(
    groups=data.groups[order],
    rewards=pick(data.rewards),
    aborted=data.aborted[order],
    anchors=pick(data.anchors),
    values=pick(data.values),
    sampled=pick(data.sampled),
    entropies=pick(data.entropies),
    baselines=data.baselines[order],
  )


def _replace(data, **fields):
  names = advantages.Episodes.__dataclass_fields__
  return advantages.Episodes(
    **{name: getattr(data, name) for name in names} | fields
  )


class EveryEstimatorTest(parameterized.TestCase):
  @parameterized.parameters(*advantages.ESTIMATORS)
  def test_shapes_and_finite(self, name):
    data = _random(0)
    with np.errstate(all="raise"):
      found = advantages.ESTIMATORS[name](data)
    for rewards, turns in zip(data.rewards, found.turns, strict=True):
      self.assertEqual(turns.shape, rewards.shape)
      self.assertTrue(np.isfinite(turns).all())
    for field in (found.tokens, found.targets):
      for of_turns, values in zip(field or (), data.values, strict=False):
        self.assertEqual([len(t) for t in of_turns], [len(v) for v in values])
    self.assertTrue(all(math.isfinite(v) for v in found.metrics.values()))

  @parameterized.parameters(*advantages.ESTIMATORS)
  def test_order_of_trajectories_does_not_matter(self, name):
    data = _random(1)
    order = np.random.default_rng(0).permutation(len(data.groups))
    found = advantages.ESTIMATORS[name](data)
    again = advantages.ESTIMATORS[name](_reorder(data, order))
    for place, e in enumerate(order):
      np.testing.assert_allclose(again.turns[place], found.turns[e], atol=1e-9)

  @parameterized.parameters(*advantages.ESTIMATORS)
  def test_aborted_and_empty_ones_change_nothing(self, name):
    data = _random(2, aborted=False)
    clean = advantages.ESTIMATORS[name](data)
    # One with absurd numbers, one aborted before its first turn, one without.
    nan = np.array([np.nan, 1e9])
    more = advantages.Episodes(
      groups=np.append(data.groups, [0, 1, 2]),
      rewards=(*data.rewards, nan, np.zeros(0), np.zeros(0)),
      aborted=np.append(data.aborted, [True, True, False]),
      anchors=(*data.anchors, ("a", "a"), (), ()),
      values=(*data.values, (nan, nan), (), ()),
      sampled=(*data.sampled, (nan > 0, nan > 0), (), ()),
      entropies=(*data.entropies, nan, np.zeros(0), np.zeros(0)),
      baselines=np.append(data.baselines, [np.nan, 0.0, 0.0]),
    )
    found = advantages.ESTIMATORS[name](more)
    for e, turns in enumerate(clean.turns):
      np.testing.assert_allclose(found.turns[e], turns, atol=1e-12)
    np.testing.assert_array_equal(found.turns[-3], [0.0, 0.0])
    self.assertEmpty(found.turns[-1])
    self.assertEqual(found.metrics, clean.metrics)

  @parameterized.parameters(*BASELINES)
  def test_a_group_of_one_gets_nothing_and_is_counted(self, name):
    data = _random(3, aborted=False)
    alone = advantages.Episodes(
      groups=np.append(data.groups, [7, 8, 8]),
      rewards=(*data.rewards, np.array([5.0, 2.0]), np.ones(1), np.ones(1)),
      aborted=np.append(data.aborted, [False, False, True]),
      anchors=(*data.anchors, ("a", "a"), ("b",), ("b",)),
      sampled=(*data.sampled, (np.ones(2) > 0,) * 2, *((np.ones(1) > 0,),) * 2),
      entropies=(*data.entropies, np.ones(2), np.ones(1), np.ones(1)),
    )
    found = advantages.ESTIMATORS[name](alone)
    clean = advantages.ESTIMATORS[name](data)
    for turns in found.turns[-3:]:
      np.testing.assert_array_equal(turns, 0.0)
    for e, turns in enumerate(clean.turns):
      np.testing.assert_allclose(found.turns[e], turns, atol=1e-12)
    self.assertEqual(found.metrics["advantage/lone_groups"], 2.0)

  @parameterized.parameters("grpo", "rloo", "reinforce_pp_baseline", "empg")
  def test_a_constant_per_group_changes_nothing(self, name):
    data = _random(4)
    shifted = _replace(
      data,
      rewards=tuple(
        np.append(r[:-1], r[-1] + 3.0 * (g + 1))
        for r, g in zip(data.rewards, data.groups, strict=True)
      ),
    )
    found = advantages.ESTIMATORS[name](data)
    again = advantages.ESTIMATORS[name](shifted)
    for one, other in zip(found.turns, again.turns, strict=True):
      np.testing.assert_allclose(one, other, atol=1e-9)

  def test_no_episode_at_all(self):
    empty = advantages.Episodes(np.zeros(0, int), (), np.zeros(0, bool), (), ())
    empty = _replace(empty, entropies=(), baselines=np.zeros(0))
    for estimator in advantages.ESTIMATORS.values():
      self.assertEqual(estimator(empty).turns, ())


class ReturnsTest(parameterized.TestCase):
  def test_by_hand(self):
    found = advantages.returns_to_go(np.array([1.0, 0.0, 4.0]), discount=0.5)
    np.testing.assert_array_equal(found, [2.0, 2.0, 4.0])

  def test_equals_double_loop(self):
    rewards = np.random.default_rng(0).normal(size=9)
    expected = [
      sum(0.95 ** (j - k) * rewards[j] for j in range(k, 9)) for k in range(9)
    ]
    found = advantages.returns_to_go(rewards, discount=0.95)
    np.testing.assert_allclose(found, expected)

  def test_equal_groups(self):
    data = advantages.Episodes(
      groups=np.array([0, 0, 1, 1, 2, 3, 3]),
      rewards=tuple(
        np.array(r, float) for r in ([1], [0, 1], [1], [2], [1], [1], [9])
      ),
      aborted=np.array([0, 0, 0, 0, 0, 0, 1], bool),
    )
    self.assertEqual(advantages.equal_groups(data), {0, 2, 3})


class GrpoTest(parameterized.TestCase):
  def test_by_hand(self):
    data = advantages.Episodes(
      groups=np.array([4, 4]),
      rewards=(np.array([0.0, 3.0]), np.array([1.0])),
      aborted=np.zeros(2, bool),
    )
    deviation = math.sqrt(2) + EPS
    found = advantages.grpo(data).turns
    np.testing.assert_allclose(found[0], [1 / deviation] * 2)
    np.testing.assert_allclose(found[1], [-1 / deviation])
    found = advantages.grpo(data, norm_std=False).turns
    np.testing.assert_array_equal(found[0], [1.0, 1.0])
    # Three rows: 3, 3 and 1.
    found = advantages.grpo(data, per="turn").turns
    np.testing.assert_allclose(
      found[1], [(1 - 7 / 3) / (math.sqrt(4 / 3) + EPS)]
    )

  @parameterized.product(per=advantages.PER, norm_std=(True, False))
  def test_equals_loop(self, per, norm_std):
    data = _random(5)
    found = advantages.grpo(data, per=per, norm_std=norm_std)
    for e, rewards in enumerate(data.rewards):
      rows = []
      for other, others in enumerate(data.rewards):
        if data.groups[other] == data.groups[e] and not data.aborted[other]:
          rows += [sum(others)] * (len(others) if per == "turn" else 1)
      expected = 0.0
      if not data.aborted[e]:
        expected = sum(rewards) - _mean(rows)
        expected /= _std(rows) + EPS if norm_std else 1.0
      np.testing.assert_allclose(found.turns[e], expected, atol=1e-9)

  def test_equal_returns_give_zero(self):
    data = advantages.Episodes(
      np.zeros(3, int), (np.ones(2), np.full(1, 2.0), np.ones(2)), np.zeros(3)
    )
    found = advantages.grpo(data)
    self.assertEqual([t.tolist() for t in found.turns], [[0, 0], [0], [0, 0]])
    self.assertEqual(found.metrics["advantage/equal_groups"], 1.0)

  def test_unknown_per(self):
    with self.assertRaisesRegex(ValueError, "per: found 'token'"):
      advantages.grpo(_random(0), per="token")


class GigpoTest(parameterized.TestCase):
  def test_by_hand(self):
    data = advantages.Episodes(
      groups=np.zeros(2, int),
      rewards=(np.array([0.0, 2.0]), np.array([1.0, 0.0])),
      aborted=np.zeros(2, bool),
      anchors=(("start", "left"), ("start", "right")),
    )
    # Returns to go: (1, 2) and (1, 0) at a discount of 1/2; both starts have
    # 1, and the second turns are alone.
    found = advantages.gigpo(data, discount=0.5, norm_std=False)
    np.testing.assert_allclose(found.turns, [[0.5, 0.5], [-0.5, -0.5]])
    # Without discounting the starts have 2 and 1.
    found = advantages.gigpo(data, discount=1.0, norm_std=False)
    np.testing.assert_allclose(found.turns, [[1.0, 0.5], [-1.0, -0.5]])
    found = advantages.gigpo(
      data, discount=1.0, norm_std=False, step_mode="mean_std_norm"
    )
    step = 0.5 / (math.sqrt(0.5) + EPS)
    np.testing.assert_allclose(found.turns[0], [0.5 + step, 0.5])
    self.assertEqual(found.metrics["advantage/clusters"], 3.0)
    self.assertEqual(found.metrics["advantage/lone_turns"], 2.0)
    self.assertAlmostEqual(found.metrics["advantage/cluster_size"], 4 / 3)

  @parameterized.product(mode=advantages.STEP_MODES, weight=(0.0, 1.0, 2.5))
  def test_equals_loop(self, mode, weight):
    data = _random(6)
    found = advantages.gigpo(
      data, discount=0.9, step_mode=mode, step_weight=weight
    )
    episode = advantages.grpo(data)
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
        step = to_go(e, k) - _mean(cluster)
        if mode == "mean_std_norm":
          step /= _std(cluster) + EPS
      expected = episode.turns[e][k] + weight * step
      self.assertAlmostEqual(found.turns[e][k], expected, places=9)

  def test_clusters_never_cross_groups(self):
    data = advantages.Episodes(
      groups=np.array([0, 0, 1, 1]),
      rewards=tuple(np.array([r]) for r in (0.0, 1.0, 10.0, 11.0)),
      aborted=np.zeros(4, bool),
      anchors=(("same",),) * 4,
    )
    found = advantages.gigpo(data, norm_std=False)
    np.testing.assert_allclose(
      np.concatenate(found.turns), [-1.0, 1.0, -1.0, 1.0]
    )

  def test_similar_anchors_cluster(self):
    data = advantages.Episodes(
      groups=np.zeros(2, int),
      rewards=(np.array([0.0]), np.array([4.0])),
      aborted=np.zeros(2, bool),
      anchors=(("You are in room 1.",), ("You are in room 2.",)),
    )
    exact = advantages.gigpo(data, norm_std=False)
    similar = advantages.gigpo(data, norm_std=False, similarity=0.9)
    np.testing.assert_allclose(exact.turns, [[-2.0], [2.0]])
    np.testing.assert_allclose(similar.turns, [[-4.0], [4.0]])

  def test_bad_options(self):
    data = _random(0)
    with self.assertRaisesRegex(ValueError, "step_mode: found 'mean'"):
      advantages.gigpo(data, step_mode="mean")
    with self.assertRaisesRegex(ValueError, "similarity: found 1.5"):
      advantages.gigpo(data, similarity=1.5)
    with self.assertRaisesRegex(ValueError, "anchors: found None"):
      advantages.gigpo(_replace(data, anchors=None))


class ClusterTest(parameterized.TestCase):
  def test_greedy_by_hand(self):
    # "abcd" and "abcx" share 3 of 4 letters: a ratio of 0.75.
    anchors = ["abcd", "abxx", "abcx", "abxx", "zzzz", "abcd"]
    labels = advantages.cluster_anchors(anchors, similarity=0.75)
    # "abcx" resembles both leaders; the first one wins.
    self.assertEqual(labels.tolist(), [0, 1, 0, 1, 2, 0])
    labels = advantages.cluster_anchors(anchors, similarity=1.0)
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
    found = advantages.cluster_anchors(anchors, similarity=similarity)
    self.assertEqual(found.tolist(), expected)

  def test_long_texts_that_differ_in_a_word(self):
    # difflib's shortcut for texts of 200 letters and more finds these unlike.
    room = "You see a cabinet 1, a desk 2, a drawer 3 and a shelf 4. " * 5
    labels = advantages.cluster_anchors(
      ["A lamp is on. " + room, "Nothing. " + room], similarity=0.9
    )
    self.assertEqual(labels.tolist(), [0, 0])


class BaselineTest(parameterized.TestCase):
  def test_rloo(self):
    data = _random(7)
    found = advantages.rloo(data)
    for e, rewards in enumerate(data.rewards):
      others = [
        sum(data.rewards[o])
        for o in range(len(data.rewards))
        if o != e and data.groups[o] == data.groups[e] and not data.aborted[o]
      ]
      expected = 0.0
      if others and not data.aborted[e]:
        expected = sum(rewards) - _mean(others)
      np.testing.assert_allclose(found.turns[e], expected, atol=1e-9)

  def _flat(self, turns, data, kept):
    """Every turn as often as it has sampled tokens."""
    return [
      turns[e][k]
      for e in kept
      for k in range(len(turns[e]))
      for _ in range(int(sum(data.sampled[e][k])))
    ]

  def test_reinforce_pp(self):
    data = _random(8)
    kept = np.flatnonzero(~data.aborted)
    to_go = [
      [
        sum(0.9 ** (j - k) * r[j] for j in range(k, len(r)))
        for k in range(len(r))
      ]
      for r in data.rewards
    ]
    flat = self._flat(to_go, data, kept)
    found = advantages.reinforce_pp(data, discount=0.9)
    for e in kept:
      expected = [(v - _mean(flat)) / (_std(flat) + EPS) for v in to_go[e]]
      np.testing.assert_allclose(found.turns[e], expected, atol=1e-9)
    white = self._flat(found.turns, data, kept)
    self.assertAlmostEqual(_mean(white), 0.0)
    self.assertAlmostEqual(_std(white), 1.0, places=4)

  def test_reinforce_pp_baseline(self):
    data = _random(9, aborted=False)
    kept = range(len(data.groups))
    centred = []
    for e, rewards in enumerate(data.rewards):
      group = [
        sum(data.rewards[o]) for o in kept if data.groups[o] == data.groups[e]
      ]
      centred.append([sum(rewards) - _mean(group)] * len(rewards))
    flat = self._flat(centred, data, kept)
    found = advantages.reinforce_pp_baseline(data)
    for e in kept:
      expected = [(v - _mean(flat)) / (_std(flat) + EPS) for v in centred[e]]
      np.testing.assert_allclose(found.turns[e], expected, atol=1e-9)

  def test_remax(self):
    data = advantages.Episodes(
      groups=np.array([0]),
      rewards=(np.array([1.0, 4.0]),),
      aborted=np.zeros(1, bool),
      baselines=np.array([2.0]),
    )
    found = advantages.remax(data, discount=0.5)
    np.testing.assert_array_equal(found.turns[0], [1.0, 2.0])
    with self.assertRaisesRegex(ValueError, "baselines: found None"):
      advantages.remax(_replace(data, baselines=None))

  def test_empg(self):
    data = _random(10, aborted=False)
    found = advantages.empg(
      data, scale=1.5, clarity_scale=0.7, clarity_weight=0.2
    )
    base = advantages.grpo(data)
    entropies = list(itertools.chain(*data.entropies))
    low, high = min(entropies), max(entropies)

    def level(e, k):
      return (data.entropies[e][k] - low) / (high - low)

    places = [(e, k) for e, r in enumerate(data.rewards) for k in range(len(r))]
    scale = _mean([math.exp(-1.5 * level(*place)) for place in places])
    raw = {}
    for e, k in places:
      raw[e, k] = base.turns[e][k] * math.exp(-1.5 * level(e, k)) / scale
      if k + 1 < len(data.rewards[e]):
        raw[e, k] += 0.2 * math.exp(-0.7 * level(e, k + 1))
    centre = _mean(list(raw.values()))
    for (e, k), value in raw.items():
      self.assertAlmostEqual(found.turns[e][k], value - centre, places=9)

  def test_empg_without_differences_in_entropy_is_grpo(self):
    data = _random(11, aborted=False)
    data = _replace(data, entropies=tuple(0 * r + 0.3 for r in data.rewards))
    found = advantages.empg(data, clarity_weight=0.0)
    base = advantages.grpo(data)
    centre = _mean(list(itertools.chain(*base.turns)))
    for one, other in zip(found.turns, base.turns, strict=True):
      np.testing.assert_allclose(one, other - centre, atol=1e-9)


class GaeTest(parameterized.TestCase):
  def test_by_hand(self):
    data = advantages.Episodes(
      groups=np.array([0]),
      rewards=(np.array([1.0, 2.0]),),
      aborted=np.zeros(1, bool),
      values=((np.array([1.0, 2.0]), np.array([4.0])),),
    )
    found = advantages.gae(
      data,
      discount=0.5,
      trace=0.5,
      turn_discount=0.25,
      turn_trace=1.0,
      whiten=False,
    )
    # Backwards: 2 - 4 = -2; 1 + 4/4 - 2 - 2/4 = -0.5; 2/2 - 1 - 0.5/4.
    np.testing.assert_allclose(found.tokens[0][1], [-2.0])
    np.testing.assert_allclose(found.tokens[0][0], [-0.125, -0.5])
    np.testing.assert_allclose(found.targets[0][0], [0.875, 1.5])
    np.testing.assert_allclose(found.targets[0][1], [2.0])
    np.testing.assert_allclose(found.turns[0], [-0.3125, -2.0])

  def test_full_trace_is_return_less_value(self):
    data = _random(12, aborted=False)
    found = advantages.gae(
      data, trace=1.0, turn_discount=0.9, turn_trace=1.0, whiten=False
    )
    for e, rewards in enumerate(data.rewards):
      to_go = advantages.returns_to_go(rewards, discount=0.9)
      for k, values in enumerate(data.values[e]):
        np.testing.assert_allclose(
          found.tokens[e][k], to_go[k] - values, atol=1e-9
        )
        np.testing.assert_allclose(found.targets[e][k], to_go[k], atol=1e-9)

  def test_no_trace_is_the_one_step_error(self):
    data = _random(13, aborted=False)
    found = advantages.gae(
      data,
      discount=0.8,
      trace=0.0,
      turn_discount=0.6,
      turn_trace=0.0,
      whiten=False,
    )
    for e, turns in enumerate(data.values):
      for k, values in enumerate(turns):
        for t, value in enumerate(values):
          if t + 1 < len(values):
            expected = 0.8 * values[t + 1] - value
          else:
            following = turns[k + 1][0] if k + 1 < len(turns) else 0.0
            expected = data.rewards[e][k] + 0.6 * following - value
          self.assertAlmostEqual(found.tokens[e][k][t], expected)

  def test_equals_sum_of_errors(self):
    data = _random(14, groups=1, aborted=False)
    found = advantages.gae(
      data,
      discount=0.9,
      trace=0.7,
      turn_discount=0.9,
      turn_trace=0.7,
      whiten=False,
    )
    for e, turns in enumerate(data.values):
      values = [*itertools.chain(*turns), 0.0]
      rewards = []
      for k, turn in enumerate(turns):
        rewards += [0.0] * (len(turn) - 1) + [data.rewards[e][k]]
      errors = [
        r + 0.9 * values[t + 1] - values[t] for t, r in enumerate(rewards)
      ]
      expected = [
        sum((0.9 * 0.7) ** (j - t) * errors[j] for j in range(t, len(errors)))
        for t in range(len(errors))
      ]
      np.testing.assert_allclose(
        list(itertools.chain(*found.tokens[e])), expected, atol=1e-9
      )

  def test_whitened_over_sampled_tokens(self):
    data = _random(15)
    raw = advantages.gae(data, whiten=False)
    found = advantages.gae(data)
    kept = [
      raw.tokens[e][k][t]
      for e in np.flatnonzero(~data.aborted)
      for k, mask in enumerate(data.sampled[e])
      for t in np.flatnonzero(mask)
    ]
    for e in np.flatnonzero(~data.aborted):
      for k, tokens in enumerate(raw.tokens[e]):
        np.testing.assert_allclose(
          found.tokens[e][k],
          [(v - _mean(kept)) / (_std(kept) + EPS) for v in tokens],
          atol=1e-9,
        )
    np.testing.assert_array_equal(
      np.concatenate(found.targets[0]), np.concatenate(raw.targets[0])
    )

  def test_turn_level(self):
    data = _random(16, aborted=False)
    found = advantages.gae_turn(data, discount=0.9, trace=0.6, whiten=False)
    for e, rewards in enumerate(data.rewards):
      first = [*(turn[0] for turn in data.values[e]), 0.0]
      errors = [
        r + 0.9 * first[k + 1] - first[k] for k, r in enumerate(rewards)
      ]
      for k in range(len(rewards)):
        expected = sum(
          (0.9 * 0.6) ** (j - k) * errors[j] for j in range(k, len(errors))
        )
        self.assertAlmostEqual(found.turns[e][k], expected)
        target = found.targets[e][k]
        self.assertAlmostEqual(target[0], expected + first[k])
        self.assertTrue(np.isnan(target[1:]).all())

  def test_needs_values(self):
    data = _random(0)
    for estimator in (advantages.gae, advantages.gae_turn):
      with self.assertRaisesRegex(ValueError, "values: found None"):
        estimator(_replace(data, values=None))
    with self.assertRaisesRegex(ValueError, "values: found a turn of 0 tokens"):
      advantages.Episodes(
        np.zeros(1), (np.ones(1),), np.zeros(1), values=((np.zeros(0),),)
      )


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
    data = advantages.episodes([first, second])
    np.testing.assert_array_equal(data.groups, [3, 3])
    np.testing.assert_allclose(data.rewards[0], [-0.1, 1.0])
    self.assertEqual(data.anchors, (("a", "b"), ("a",)))
    np.testing.assert_array_equal(data.aborted, [False, True])
    np.testing.assert_array_equal(data.sampled[0][0], [True, False, True])
    np.testing.assert_allclose(data.entropies[0], [2.0, 0.0])
    self.assertAlmostEqual(data.returns[0], first.episode_return)

  def test_mismatched_fields(self):
    data = _random(0)
    with self.assertRaisesRegex(ValueError, "groups: found 1 trajectories"):
      _replace(data, groups=np.zeros(1))
    with self.assertRaisesRegex(ValueError, "entropies: found 9 turns"):
      _replace(data, entropies=(np.zeros(9), *data.entropies[1:]))


if __name__ == "__main__":
  absltest.main()
