"""Estimators without a critic against loops over their formulas."""

import itertools
import math

from absl.testing import absltest, parameterized
import numpy as np

from t2po_jax.learning.estimators import episodes, groups
from tests.learning.estimators import cases


class GrpoTest(parameterized.TestCase):
  def test_by_hand(self):
    data = episodes.Episodes(
      groups=np.array([4, 4]),
      rewards=(np.array([0.0, 3.0]), np.array([1.0])),
      aborted=np.zeros(2, bool),
    )
    deviation = math.sqrt(2) + cases.EPS
    found = groups.grpo(data).turns
    np.testing.assert_allclose(found[0], [1 / deviation] * 2)
    np.testing.assert_allclose(found[1], [-1 / deviation])
    found = groups.grpo(data, norm="mean_norm").turns
    np.testing.assert_array_equal(found[0], [1.0, 1.0])
    # Three rows: 3, 3 and 1.
    found = groups.grpo(data, per="turn").turns
    np.testing.assert_allclose(
      found[1], [(1 - 7 / 3) / (math.sqrt(4 / 3) + cases.EPS)]
    )

  @parameterized.product(per=groups.PER, norm=groups.NORMS)
  def test_equals_loop(self, per, norm):
    data = cases.random(5)
    found = groups.grpo(data, per=per, norm=norm)
    for e, rewards in enumerate(data.rewards):
      rows = []
      for other, others in enumerate(data.rewards):
        if data.groups[other] == data.groups[e] and not data.aborted[other]:
          rows += [sum(others)] * (len(others) if per == "turn" else 1)
      expected = 0.0
      if not data.aborted[e]:
        expected = sum(rewards) - cases.mean(rows)
        if norm == "mean_std_norm":
          expected /= cases.std(rows) + cases.EPS
      np.testing.assert_allclose(found.turns[e], expected, atol=1e-9)

  def test_equal_returns_give_zero(self):
    data = episodes.Episodes(
      np.zeros(3, int), (np.ones(2), np.full(1, 2.0), np.ones(2)), np.zeros(3)
    )
    found = groups.grpo(data)
    self.assertEqual([t.tolist() for t in found.turns], [[0, 0], [0], [0, 0]])
    self.assertEqual(found.metrics["advantage/equal_groups"], 1.0)

  def test_unknown_options(self):
    with self.assertRaisesRegex(ValueError, "norm: found 'mean'"):
      groups.grpo(cases.random(0), norm="mean")
    with self.assertRaisesRegex(ValueError, "per: found 'token'"):
      groups.grpo(cases.random(0), per="token")


class BaselineTest(parameterized.TestCase):
  def test_maxrl(self):
    data = episodes.Episodes(
      groups=np.array([0, 0, 0, 0, 1, 1, 2, 2]),
      rewards=tuple(np.array([r]) for r in (1.0, 0, 0, 0, 0, 0, 3.0, 1.0)),
      aborted=np.zeros(8, bool),
    )
    found = np.concatenate(groups.maxrl(data).turns)
    # One of four succeeds: (1 - 1/4) / (1/4) = 3; a mean of 0 gives 0.
    expected = [3, -1, -1, -1, 0, 0, 0.5, -0.5]
    np.testing.assert_allclose(found, expected, rtol=1e-5)

  def test_maxrl_equals_loop(self):
    data = cases.random(20)
    found = groups.maxrl(data)
    positive = 0
    for e, rewards in enumerate(data.rewards):
      group = [
        sum(r)
        for r, g, gone in zip(
          data.rewards, data.groups, data.aborted, strict=True
        )
        if g == data.groups[e] and not gone
      ]
      expected = 0.0
      if not data.aborted[e] and len(group) > 1 and cases.mean(group) > 0:
        expected = sum(rewards) - cases.mean(group)
        expected /= cases.mean(group) + cases.EPS
        positive += 1
      np.testing.assert_allclose(found.turns[e], expected, atol=1e-9)
    self.assertBetween(positive, 1, 11)

  def test_opo(self):
    data = episodes.Episodes(
      groups=np.zeros(2, int),
      rewards=(np.array([0.0, 1.0]), np.array([0.0])),
      aborted=np.zeros(2, bool),
      sampled=(
        (np.ones(2, bool), np.array([True, False])),
        (np.ones(1, bool),),
      ),
    )
    # Three tokens returned 1, one token 0: the baseline is 3/4.
    found = groups.opo(data).turns
    np.testing.assert_allclose(found[0], [0.25, 0.25])
    np.testing.assert_allclose(found[1], [-0.75])
    # Without token counts turns count: 2/3.
    found = groups.opo(cases.replace(data, sampled=None)).turns
    np.testing.assert_allclose(found[1], [-2 / 3])

  def test_opo_equals_loop(self):
    data = cases.random(21, aborted=False)
    found = groups.opo(data)
    for e, rewards in enumerate(data.rewards):
      top = bottom = 0.0
      for other in np.flatnonzero(data.groups == data.groups[e]):
        tokens = sum(sum(map(int, turn)) for turn in data.sampled[other])
        top += tokens * sum(data.rewards[other])
        bottom += tokens
      np.testing.assert_allclose(
        found.turns[e], sum(rewards) - top / bottom, atol=1e-9
      )

  def test_rloo(self):
    data = cases.random(7)
    found = groups.rloo(data)
    for e, rewards in enumerate(data.rewards):
      others = [
        sum(data.rewards[o])
        for o in range(len(data.rewards))
        if o != e and data.groups[o] == data.groups[e] and not data.aborted[o]
      ]
      expected = 0.0
      if others and not data.aborted[e]:
        expected = sum(rewards) - cases.mean(others)
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
    data = cases.random(8)
    kept = np.flatnonzero(~data.aborted)
    to_go = [
      [
        sum(0.9 ** (j - k) * r[j] for j in range(k, len(r)))
        for k in range(len(r))
      ]
      for r in data.rewards
    ]
    flat = self._flat(to_go, data, kept)
    found = groups.reinforce_pp(data, discount=0.9)
    for e in kept:
      expected = [
        (v - cases.mean(flat)) / (cases.std(flat) + cases.EPS) for v in to_go[e]
      ]
      np.testing.assert_allclose(found.turns[e], expected, atol=1e-9)
    white = self._flat(found.turns, data, kept)
    self.assertAlmostEqual(cases.mean(white), 0.0)
    self.assertAlmostEqual(cases.std(white), 1.0, places=4)

  def test_reinforce_pp_baseline(self):
    data = cases.random(9, aborted=False)
    kept = range(len(data.groups))
    centred = []
    for e, rewards in enumerate(data.rewards):
      group = [
        sum(data.rewards[o]) for o in kept if data.groups[o] == data.groups[e]
      ]
      centred.append([sum(rewards) - cases.mean(group)] * len(rewards))
    flat = self._flat(centred, data, kept)
    found = groups.reinforce_pp_baseline(data)
    for e in kept:
      expected = [
        (v - cases.mean(flat)) / (cases.std(flat) + cases.EPS)
        for v in centred[e]
      ]
      np.testing.assert_allclose(found.turns[e], expected, atol=1e-9)

  def test_remax(self):
    data = episodes.Episodes(
      groups=np.array([0]),
      rewards=(np.array([1.0, 4.0]),),
      aborted=np.zeros(1, bool),
      baselines=np.array([2.0]),
    )
    found = groups.remax(data, discount=0.5)
    np.testing.assert_array_equal(found.turns[0], [1.0, 2.0])
    with self.assertRaisesRegex(ValueError, "baselines: found None"):
      groups.remax(cases.replace(data, baselines=None))

  def test_empg(self):
    data = cases.random(10, aborted=False)
    found = groups.empg(
      data, entropy_scale=1.5, clarity_scale=0.7, clarity_weight=0.2
    )
    base = groups.grpo(data)
    entropies = list(itertools.chain(*data.entropies))
    low, high = min(entropies), max(entropies)

    def level(e, k):
      return (data.entropies[e][k] - low) / (high - low)

    places = [(e, k) for e, r in enumerate(data.rewards) for k in range(len(r))]
    scale = cases.mean([math.exp(-1.5 * level(*place)) for place in places])
    raw = {}
    for e, k in places:
      raw[e, k] = base.turns[e][k] * math.exp(-1.5 * level(e, k)) / scale
      if k + 1 < len(data.rewards[e]):
        raw[e, k] += 0.2 * math.exp(-0.7 * level(e, k + 1))
    centre = cases.mean(list(raw.values()))
    for (e, k), value in raw.items():
      self.assertAlmostEqual(found.turns[e][k], value - centre, places=9)

  def test_empg_without_differences_in_entropy_is_grpo(self):
    data = cases.random(11, aborted=False)
    data = cases.replace(
      data, entropies=tuple(0 * r + 0.3 for r in data.rewards)
    )
    found = groups.empg(data, clarity_weight=0.0)
    base = groups.grpo(data)
    centre = cases.mean(list(itertools.chain(*base.turns)))
    for one, other in zip(found.turns, base.turns, strict=True):
      np.testing.assert_allclose(one, other - centre, atol=1e-9)


if __name__ == "__main__":
  absltest.main()
