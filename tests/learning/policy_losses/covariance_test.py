"""Clip-Cov and KL-Cov against loops over their formulas."""

import functools
import math

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from t2po_jax.learning.policy_losses import covariance, record
from tests.learning import loss_cases as cases


def _covariances(logprobs, advantages):
  kept = cases.MASK > 0
  a, x = advantages[kept].astype(float), logprobs[kept].astype(float)
  return {
    place: (advantages[place] - a.mean()) * (logprobs[place] - x.mean())
    for place in zip(*np.nonzero(kept), strict=True)
  }


class ClipCovTest(parameterized.TestCase):
  @parameterized.parameters(1e-4, 0.2, 1.0)
  def test_equals_loop_but_for_the_draw(self, ratio):
    logprobs, old, advantages = cases.batch(3, spread=0.3)
    options = dict(clip_cov_ratio=ratio, clip_cov_low=-0.5, clip_cov_high=0.6)
    loss, stats = record.evaluate(
      covariance.clip_cov, logprobs, old, advantages, cases.MASK, **options
    )
    drawn = np.asarray(stats["clip_fraction"]) > 0
    free = set()
    for place, value in _covariances(logprobs, advantages).items():
      rho = math.exp(float(logprobs[place]) - float(old[place]))
      a = float(advantages[place])
      limited = min(max(rho, 0.8), 1.2)
      if -min(limited * a, rho * a) == -rho * a and -0.5 < value < 0.6:
        free.add(place)
      expected = 0.0 if drawn[place] else -min(rho * a, limited * a)
      self.assertAlmostEqual(float(loss[place]), expected, places=5)
    self.assertBetween(len(free), 2, 9)
    self.assertLessEqual(set(zip(*np.nonzero(drawn), strict=True)), free)
    count = max(1, int(ratio * cases.MASK.sum()))
    self.assertEqual(drawn.sum(), min(count, len(free)))

  def test_the_draw_depends_on_the_data_alone(self):
    found = set()
    for seed in range(8):
      logprobs, old, advantages = cases.batch(seed)
      run = functools.partial(
        record.evaluate,
        covariance.clip_cov,
        logprobs,
        old,
        advantages,
        cases.MASK,
        clip_cov_low=-9.0,
        clip_cov_high=9.0,
      )
      first = np.asarray(run()[1]["clip_fraction"])
      np.testing.assert_array_equal(first, run()[1]["clip_fraction"])
      found.add(int(np.argmax(first)))
    self.assertGreater(len(found), 2)

  def test_nothing_between_the_bounds(self):
    logprobs, old, advantages = cases.batch()
    _, stats = record.evaluate(
      covariance.clip_cov,
      logprobs,
      old,
      advantages,
      cases.MASK,
      clip_cov_low=90.0,
    )
    np.testing.assert_array_equal(stats["clip_fraction"], 0.0)


class KlCovTest(parameterized.TestCase):
  @parameterized.parameters((1e-4, 1), (0.25, 2), (1.0, 10))
  def test_equals_loop(self, ratio, count):
    logprobs, old, advantages = cases.batch(5, spread=0.4)
    values = _covariances(logprobs, advantages)
    charged = sorted(values, key=values.get)[-count:]

    def one(place):
      gap = float(logprobs[place]) - float(old[place])
      loss = -math.exp(gap) * float(advantages[place])
      return loss + 0.7 * abs(gap) * (place in charged)

    def total(x):
      loss, stats = record.evaluate(
        covariance.kl_cov,
        x,
        old,
        advantages,
        cases.MASK,
        kl_cov_ratio=ratio,
        kl_cov_coefficient=0.7,
      )
      return loss.sum(), (loss, stats)

    slope, (loss, stats) = jax.grad(total, has_aux=True)(jnp.array(logprobs))
    np.testing.assert_allclose(loss, cases.loop(one), rtol=2e-5, atol=1e-6)
    self.assertEqual(stats["clip_fraction"].sum(), count)

    def one_slope(place):
      gap = float(logprobs[place]) - float(old[place])
      plain = -math.exp(gap) * float(advantages[place])
      return plain + 0.7 * np.sign(gap) * (place in charged)

    np.testing.assert_allclose(
      slope, cases.loop(one_slope), rtol=2e-5, atol=1e-6
    )


if __name__ == "__main__":
  absltest.main()
