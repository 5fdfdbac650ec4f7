"""When a turn is sampled again."""

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from t2po_jax.control import resampling, uncertainty


class ResamplingTest(parameterized.TestCase):
  @parameterized.parameters(
    (0.50, 0.60, 0, True),  # A small gap, both tries left.
    (0.60, 0.50, 1, True),
    (0.50, 0.60, 2, False),  # No try left.
    (0.50, 0.50, 0, False),  # The same score again.
    (0.50, 0.90, 0, False),  # Far enough.
    (0.50, float("nan"), 0, False),  # The first turn.
  )
  def test_by_hand(self, phi, previous, tries, expected):
    change = resampling.phi_change(phi, previous)
    found = resampling.should_resample(
      change, eta=0.3, tries=tries, max_tries=2
    )
    self.assertEqual(found, expected)

  @parameterized.parameters(
    # Sign, small change, repeated, expected.
    ("phi", True, False, True),
    ("phi", False, True, False),
    ("action", True, False, False),
    ("action", False, True, True),
    ("both", True, False, False),
    ("both", False, True, False),
    ("both", True, True, True),
  )
  def test_signs(self, sign, small, repeated, expected):
    change = 0.1 if small else 0.5
    options = dict(eta=0.3, max_tries=2, sign=sign, repeated=repeated)
    for tries, wanted in ((1, expected), (2, False)):
      found = resampling.should_resample(change, tries=tries, **options)
      self.assertEqual(found, wanted)

  def test_sureness_by_hand(self):
    entropy = np.array([0.1, 0.5, 9.0, 0.6], np.float32)
    forced = np.array([False, False, True, False])
    found = resampling.confidence(entropy, forced)
    self.assertAlmostEqual(found, np.exp(-0.4), places=6)
    nothing = resampling.confidence(entropy, np.ones(4, bool))
    self.assertTrue(np.isnan(nothing))
    options = dict(eta=0.7, tries=0, max_tries=1, sign="unsure")
    self.assertTrue(resampling.should_resample(found, **options))
    self.assertFalse(resampling.should_resample(0.8, **options))
    self.assertFalse(resampling.should_resample(nothing, **options))

  def test_the_released_score_and_threshold(self):
    # Geometric means with a floor would be 0.0054 twice: never resampled.
    mask = jnp.ones((1, 3))
    before, after = (
      float(uncertainty.turn_score(jnp.array([m]), mask, mean="arithmetic")[0])
      for m in ([0.4, 0.4, -0.5], [0.4, 0.4, -0.3])
    )
    change = resampling.phi_change(after, before)
    self.assertAlmostEqual(change, 0.2 / 3, places=6)
    self.assertTrue(
      resampling.should_resample(change, eta=0.3, tries=0, max_tries=2)
    )

  def test_threshold_itself_is_far_enough(self):
    options = dict(tries=0, max_tries=2)
    self.assertFalse(resampling.should_resample(0.25, eta=0.25, **options))
    self.assertTrue(resampling.should_resample(0.2499, eta=0.25, **options))

  def test_off(self):
    self.assertFalse(
      resampling.should_resample(0.1, eta=0.3, tries=0, max_tries=0)
    )
    self.assertFalse(
      resampling.should_resample(0.1, eta=0.0, tries=0, max_tries=2)
    )

  def test_arrays_equal_a_loop(self):
    rng = np.random.default_rng(0)
    phi, previous = rng.uniform(size=(2, 50)).round(1).astype("f4")
    previous[::7] = np.nan
    tries = rng.integers(0, 4, 50)

    def decide(phi, previous, tries):
      return resampling.should_resample(
        resampling.phi_change(phi, previous), eta=0.35, tries=tries, max_tries=2
      )

    expected = [
      bool(0 < abs(a - b) < 0.35) and n < 2
      for a, b, n in zip(phi, previous, tries, strict=True)
    ]
    np.testing.assert_array_equal(decide(phi, previous, tries), expected)
    on_device = jax.jit(decide)(*map(jnp.asarray, (phi, previous, tries)))
    np.testing.assert_array_equal(on_device, expected)


if __name__ == "__main__":
  absltest.main()
