"""Thresholds as quantiles of what was observed."""

import json

from absl.testing import absltest, parameterized
import numpy as np

from t2po_jax.control import thresholds


def _quantile(setting="auto(0.25)", **options):
  return thresholds.Quantile(setting, key="control.epsilon", **options)


class ParseTest(parameterized.TestCase):
  @parameterized.parameters(
    (0.3, (0.3, None)),
    (0, (0.0, None)),
    ("0.02", (0.02, None)),
    ("auto(0.1)", (0.0, 0.1)),
    (" auto( .5 ) ", (0.0, 0.5)),
    ({"auto": 0.9}, (0.0, 0.9)),
  )
  def test_good(self, value, expected):
    self.assertEqual(thresholds.parse(value, "eta"), expected)

  @parameterized.parameters(
    "auto",
    "auto()",
    "auto(1.5)",
    "auto(nan)",
    "automatic(0.1)",
    -0.1,
    float("nan"),
    True,
    None,
    ({"auto": 2},),
    ({"auto": 0.1, "q": 1},),
  )
  def test_bad(self, value):
    with self.assertRaisesRegex(ValueError, "^control.eta: found .*auto"):
      thresholds.parse(value, "control.eta")


class QuantileTest(parameterized.TestCase):
  def test_by_hand(self):
    threshold = _quantile(calibrate_after=2)
    self.assertEqual(threshold.value, 0.0)
    threshold.add([4.0, np.inf, 1.0, np.nan])
    self.assertFalse(threshold.advance())
    self.assertEqual(threshold.value, 0.0)
    threshold.add(np.array([[2.0], [3.0], [5.0]]))
    self.assertTrue(threshold.advance())
    self.assertEqual(threshold.value, 2.0)

  def test_fixed(self):
    threshold = _quantile(0.3, recalibrate_every=1)
    threshold.add([1.0, 2.0])
    self.assertFalse(threshold.advance())
    self.assertEqual(threshold.value, 0.3)
    self.assertEqual(threshold.state_dict()["samples"], [])

  def test_calibrates_on_schedule_with_the_samples_since(self):
    threshold = _quantile("auto(0.5)", calibrate_after=2, recalibrate_every=3)
    values = []
    for update in range(9):
      threshold.add([float(update)])
      threshold.advance()
      values.append(threshold.value)
    self.assertEqual(values, [0.0, 0.5, 0.5, 0.5, 3.0, 3.0, 3.0, 6.0, 6.0])

  def test_once_only(self):
    threshold = _quantile("auto(0.5)")
    for update in range(5):
      threshold.add([float(update + 1)])
      self.assertEqual(threshold.advance(), update == 0)
    self.assertEqual(threshold.value, 1.0)

  def test_waits_for_a_sample(self):
    threshold = _quantile()
    threshold.add([np.inf])
    self.assertFalse(threshold.advance())
    threshold.add([0.7])
    self.assertTrue(threshold.advance())
    self.assertAlmostEqual(threshold.value, 0.7, places=6)

  def test_memory_is_bounded_and_spread_over_the_stream(self):
    stream = np.arange(1000, dtype="f4")
    rng = np.random.default_rng(0)
    threshold = _quantile("auto(0.5)", capacity=64)
    for part in np.split(stream, np.sort(rng.integers(0, 1000, 20))):
      threshold.add(part)
      self.assertLessEqual(len(threshold.state_dict()["samples"]), 64)
    # Every 16th of the stream, however it was cut into parts.
    self.assertEqual(threshold.state_dict()["samples"], stream[::16].tolist())

  def test_resumes_exactly_through_json(self):
    rng = np.random.default_rng(1)
    parts = [rng.uniform(size=rng.integers(0, 40)) for _ in range(12)]
    options = dict(calibrate_after=3, recalibrate_every=4, capacity=16)
    whole, values = _quantile(**options), []
    for part in parts:
      whole.add(part)
      whole.advance()
      values.append(whole.value)
    for stop in range(12):
      threshold = _quantile(**options)
      for part in parts[:stop]:
        threshold.add(part)
        threshold.advance()
      again = _quantile(**options)
      again.load(json.loads(json.dumps(threshold.state_dict())))
      for update in range(stop, 12):
        again.add(parts[update])
        again.advance()
        self.assertEqual(again.value, values[update])

  def test_the_config_decides_over_the_checkpoint(self):
    old = _quantile("auto(0.5)")
    old.add([3.0])
    old.advance()
    for setting, expected in ((0.2, 0.2), ("auto(0.1)", 0.0)):
      again = _quantile(setting)
      again.load(old.state_dict())
      self.assertEqual(again.value, expected)
      self.assertEqual(again.updates, 1)

  @parameterized.parameters(
    (dict(calibrate_after=0), "calibrate_after = 0"),
    (dict(recalibrate_every=-1), "recalibrate_every = -1"),
    (dict(capacity=1), "capacity = 1"),
  )
  def test_bad_numbers(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      _quantile(**options)


if __name__ == "__main__":
  absltest.main()
