"""Adaptive entropy modulation against given numbers and a loop."""

import math
import types

from absl.testing import absltest, parameterized
import numpy as np

from t2po_jax.learning import estimators
from t2po_jax.learning.estimators import episodes, gae, modulation
from tests.learning.estimators import cases


class AemTest(parameterized.TestCase):
  @parameterized.parameters(
    ([0.2, 0.5, 1.0, 0.6], [1.502799, 1.032858, 0.552849, 0.911494]),
    # Less than 0.1 nats apart.
    ([0.20, 0.25, 0.29], [1.0, 1.0, 1.0]),
  )
  def test_given_numbers(self, entropies, expected):
    data = episodes.Episodes(
      groups=np.zeros(2, int),
      rewards=(np.zeros(2), np.zeros(len(entropies) - 2)),
      aborted=np.zeros(2, bool),
      entropies=(np.array(entropies[:2]), np.array(entropies[2:])),
    )
    found = np.concatenate(modulation.aem(data))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    self.assertAlmostEqual(np.mean(found), 1.0)

  def test_equals_loop(self):
    data = cases.random(30)
    found = modulation.aem(data, modulation_strength=1.7)
    for e, own in enumerate(data.entropies):
      group = [
        h
        for other, entropies in enumerate(data.entropies)
        if data.groups[other] == data.groups[e] and not data.aborted[other]
        for h in entropies
      ]
      low, high = min(group), max(group)
      mean = cases.mean(
        [math.exp(-1.7 * (h - low) / (high - low)) for h in group]
      )
      for k, h in enumerate(own):
        expected = math.exp(-1.7 * (h - low) / (high - low)) / mean
        if data.aborted[e]:
          expected = 1.0
        self.assertAlmostEqual(found[e][k], expected)

  @parameterized.parameters("gigpo", "grpo", "hgpo", "gae")
  def test_stacks_on_an_estimator(self, name):
    data = cases.random(31)
    plain = estimators.ESTIMATORS[name].function(data)
    settings = types.SimpleNamespace(modulation_strength=1.0)
    found = modulation.apply("aem", data, plain, settings)
    factors = modulation.aem(data)
    for e, turns in enumerate(plain.turns):
      np.testing.assert_allclose(found.turns[e], factors[e] * turns)
      if name == "gae":
        for k in range(len(turns)):
          np.testing.assert_allclose(
            found.tokens[e][k], factors[e][k] * plain.tokens[e][k]
          )
    self.assertLess(found.metrics["advantage/modulation_min"], 1.0)
    self.assertGreater(found.metrics["advantage/modulation_max"], 1.0)
    self.assertIs(modulation.apply("off", data, plain, settings), plain)
    self.assertIs(found.targets, plain.targets)

  def test_needs_entropies(self):
    data = cases.replace(cases.random(0), entropies=None)
    with self.assertRaisesRegex(ValueError, "entropies: found None"):
      modulation.apply("aem", data, gae.gae(data), modulation.AemOptions())


if __name__ == "__main__":
  absltest.main()
