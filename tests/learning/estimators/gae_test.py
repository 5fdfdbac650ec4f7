"""Generalised advantages against sums of errors."""

import itertools

from absl.testing import absltest, parameterized
import numpy as np

from t2po_jax.learning.estimators import episodes, gae
from tests.learning.estimators import cases


class GaeTest(parameterized.TestCase):
  def test_by_hand(self):
    data = episodes.Episodes(
      groups=np.array([0]),
      rewards=(np.array([1.0, 2.0]),),
      aborted=np.zeros(1, bool),
      values=((np.array([1.0, 2.0]), np.array([4.0])),),
    )
    found = gae.gae(
      data,
      token_discount=0.5,
      token_gae_lambda=0.5,
      discount=0.25,
      gae_lambda=1.0,
      whiten=False,
    )
    # Backwards: 2 - 4 = -2; 1 + 4/4 - 2 - 2/4 = -0.5; 2/2 - 1 - 0.5/4.
    np.testing.assert_allclose(found.tokens[0][1], [-2.0])
    np.testing.assert_allclose(found.tokens[0][0], [-0.125, -0.5])
    np.testing.assert_allclose(found.targets[0][0], [0.875, 1.5])
    np.testing.assert_allclose(found.targets[0][1], [2.0])
    np.testing.assert_allclose(found.turns[0], [-0.3125, -2.0])

  def test_full_trace_is_return_less_value(self):
    data = cases.random(12, aborted=False)
    found = gae.gae(
      data, token_gae_lambda=1.0, discount=0.9, gae_lambda=1.0, whiten=False
    )
    for e, rewards in enumerate(data.rewards):
      to_go = episodes.returns_to_go(rewards, discount=0.9)
      for k, values in enumerate(data.values[e]):
        np.testing.assert_allclose(
          found.tokens[e][k], to_go[k] - values, atol=1e-9
        )
        np.testing.assert_allclose(found.targets[e][k], to_go[k], atol=1e-9)

  def test_no_trace_is_the_one_step_error(self):
    data = cases.random(13, aborted=False)
    found = gae.gae(
      data,
      token_discount=0.8,
      token_gae_lambda=0.0,
      discount=0.6,
      gae_lambda=0.0,
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
    data = cases.random(14, groups=1, aborted=False)
    found = gae.gae(
      data,
      token_discount=0.9,
      token_gae_lambda=0.7,
      discount=0.9,
      gae_lambda=0.7,
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
    data = cases.random(15)
    raw = gae.gae(data, whiten=False)
    found = gae.gae(data)
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
          [
            (v - cases.mean(kept)) / (cases.std(kept) + cases.EPS)
            for v in tokens
          ],
          atol=1e-9,
        )
    np.testing.assert_array_equal(
      np.concatenate(found.targets[0]), np.concatenate(raw.targets[0])
    )

  def test_turn_level(self):
    data = cases.random(16, aborted=False)
    found = gae.gae_turn(data, discount=0.9, gae_lambda=0.6, whiten=False)
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
    data = cases.random(0)
    for estimator in (gae.gae, gae.gae_turn):
      with self.assertRaisesRegex(ValueError, "values: found None"):
        estimator(cases.replace(data, values=None))
    with self.assertRaisesRegex(ValueError, "values: found a turn of 0 tokens"):
      episodes.Episodes(
        np.zeros(1), (np.ones(1),), np.zeros(1), values=((np.zeros(0),),)
      )


if __name__ == "__main__":
  absltest.main()
