"""Importance weights and rejection against loops."""

import math

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from t2po_jax.learning import importance
from tests.learning import loss_cases as cases


class TokenWeightTest(parameterized.TestCase):
  def test_masked_importance_weight(self):
    rng = np.random.default_rng(4)
    trainer, sampler = rng.normal(
      size=(2, *cases.MASK.shape), scale=0.3
    ).astype(np.float32)
    found = importance.bounded(trainer, sampler, cases.MASK, cap=1.5)
    kept = 0
    for place in np.ndindex(cases.MASK.shape):
      weight = np.exp(float(trainer[place]) - float(sampler[place]))
      inside = cases.MASK[place] > 0 and 1 / 1.5 <= weight <= 1.5
      kept += inside
      self.assertAlmostEqual(
        float(found[place]), weight if inside else 0.0, places=5
      )
    self.assertBetween(kept, 1, int(np.sum(cases.MASK)) - 1)
    grad = jax.grad(lambda x: importance.bounded(x, sampler, cases.MASK).sum())(
      trainer
    )
    self.assertFalse(np.any(grad))

  def test_importance_weight(self):
    trainer, sampler, _ = cases.batch(spread=1.0)
    found = importance.truncated(trainer, sampler, cases.MASK, cap=1.5)

    def weight(place):
      return min(math.exp(float(trainer[place]) - float(sampler[place])), 1.5)

    np.testing.assert_allclose(found, cases.loop(weight), rtol=1e-5)
    slope = jax.grad(
      lambda x: importance.truncated(x, sampler, cases.MASK).sum()
    )(trainer)
    np.testing.assert_array_equal(slope, 0.0)

  def test_bounds_need_not_be_symmetric(self):
    ratio = jnp.array([[0.4, 0.5, 1.0, 5.0, 5.1]])
    ones = jnp.ones((1, 5))
    found = importance.bounded(
      jnp.log(ratio), 0 * ones, ones, low=0.499, cap=5.001
    )
    np.testing.assert_allclose(found, [[0.0, 0.5, 1.0, 5.0, 0.0]], rtol=1e-5)


class TurnWeightTest(parameterized.TestCase):
  def _scores(self, trainer, sampler):
    """Per turn the log-ratios of its sampled tokens."""
    found = {}
    for place in zip(*np.nonzero(cases.MASK), strict=True):
      gap = float(trainer[place]) - float(sampler[place])
      found.setdefault(cases.TURN[place], []).append(gap)
    return found

  def test_product_of_a_turn(self):
    trainer, sampler, _ = cases.batch(spread=0.5)
    found = importance.turn_truncated(
      trainer, sampler, cases.MASK, turn=cases.TURN, cap=1.4
    )
    scores = self._scores(trainer, sampler)
    expected = cases.loop(
      lambda p: min(math.exp(sum(scores[cases.TURN[p]])), 1.4)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    self.assertGreater(len(set(np.round(expected[expected > 0], 5))), 2)

  @parameterized.parameters(
    ("geometric", 0.8, 1.2, lambda g: math.exp(sum(g) / len(g))),
    ("product", 0.5, 2.0, lambda g: math.exp(sum(g))),
  )
  def test_rejection_equals_loop(self, kind, low, high, score):
    kept = 0
    for seed in range(4):
      trainer, sampler, _ = cases.batch(seed, spread=0.4)
      scores = self._scores(trainer, sampler)
      found = importance.accepted(
        trainer,
        sampler,
        cases.MASK,
        turn=cases.TURN,
        kind=kind,
        low=low,
        high=high,
      )
      expected = cases.loop(
        lambda p, s=scores: low <= score(s[cases.TURN[p]]) <= high
      )
      np.testing.assert_array_equal(found, expected)
      kept += expected.sum()
    self.assertBetween(kept, 1, 39)

  def test_one_absurd_token_rejects_its_turn(self):
    trainer, sampler, _ = cases.batch(spread=0.1)
    trainer[1, 2] = sampler[1, 2] - 12.0
    found = importance.accepted(
      trainer,
      sampler,
      cases.MASK,
      turn=cases.TURN,
      kind="token",
      low=1e-4,
      high=100.0,
    )
    expected = cases.loop(lambda p: cases.TURN[p] != 2)
    np.testing.assert_array_equal(found, expected)

  def test_unknown_kind(self):
    with self.assertRaisesRegex(ValueError, "rejection: found 'mean'"):
      importance.accepted(
        cases.MASK,
        cases.MASK,
        cases.MASK,
        turn=cases.TURN,
        kind="mean",
        low=0.5,
        high=2.0,
      )


if __name__ == "__main__":
  absltest.main()
