"""Prices of responses by hand."""

from absl.testing import absltest, parameterized

from t2po_jax.rollout import penalties


class PenaltiesTest(parameterized.TestCase):
  @parameterized.parameters(
    ("sum", False, False, 0.3),
    ("largest", False, False, 0.2),
    ("largest", True, False, 0.2),
    ("largest", False, True, 0.1),
    ("sum", True, True, 0.0),
  )
  def test_malformed_and_impossible(self, combine, form, action, expected):
    prices = penalties.Penalties(0.1, 0.2, combine)
    found = prices.of(
      format_valid=form, action_valid=action, tokens=9, longest=9
    )
    self.assertAlmostEqual(found, expected)

  @parameterized.parameters(
    (50, 0.0), (80, 0.0), (85, 0.25), (90, 0.5), (100, 1.0), (130, 1.0)
  )
  def test_soft_overlong_by_hand(self, tokens, expected):
    found = penalties.soft_overlong(tokens, longest=100, buffer=20)
    self.assertAlmostEqual(found, expected)
    prices = penalties.Penalties(0.5, overlong=2.0, buffer=20)
    cost = prices.of(
      format_valid=False, action_valid=True, tokens=tokens, longest=100
    )
    self.assertAlmostEqual(cost, 0.5 + 2.0 * expected)

  def test_without_a_buffer(self):
    found = [
      penalties.soft_overlong(n, longest=9, buffer=0) for n in (8, 9, 10)
    ]
    self.assertEqual(found, [0.0, 0.0, 1.0])

  def test_repeated_beside_the_others(self):
    prices = penalties.Penalties(0.1, 0.2, "largest", repeated=0.05)
    facts = dict(format_valid=False, action_valid=True, tokens=1, longest=9)
    self.assertAlmostEqual(prices.of(**facts, repeated=True), 0.15)
    self.assertAlmostEqual(prices.of(**facts), 0.1)

  def test_unknown_combination(self):
    with self.assertRaisesRegex(ValueError, "combine: found 'mean'"):
      penalties.Penalties(combine="mean")


if __name__ == "__main__":
  absltest.main()
