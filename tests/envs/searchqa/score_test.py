"""Exact match by hand."""

from absl.testing import absltest, parameterized

from t2po_jax.envs.searchqa import score


class ScoreTest(parameterized.TestCase):
  @parameterized.parameters(
    ("The Wild  Duck!", "wild duck"),
    ("  an apple, a day ", "apple day"),
    ("Anna and Theo", "anna and theo"),
    ("A.D. 1,000", "ad 1000"),
    ("the", ""),
    ("J. R. R. Tolkien", "j r r tolkien"),
    ("Čapek\n(Karel)", "čapek karel"),
  )
  def test_normalize(self, text, expected):
    self.assertEqual(score.normalize(text), expected)
    self.assertEqual(score.normalize(expected), expected)

  @parameterized.parameters(
    ("Henrik Ibsen.", ("Ibsen", "henrik ibsen"), True),
    ("Ibsen, Henrik", ("Ibsen", "henrik ibsen"), False),
    ("yes it is", ("yes",), False),
    ("", ("yes",), False),
    # Nothing is left of either side: an empty answer is never right.
    ("the", ("a", "!"), False),
    ("yes", (), False),
  )
  def test_exact_match(self, answer, targets, expected):
    self.assertEqual(score.exact_match(answer, targets), expected)

  @parameterized.parameters(
    ("Henrik Ibsen", ("henrik ibsen",), 1.0),
    # One of two words right, one of three found: P 1/2, R 1/3.
    ("Henrik Lund", ("Henrik Johan Ibsen",), 2 * (1 / 2 * 1 / 3) / (5 / 6)),
    # Counted as often as it stands in both: 2 of 3 and 2 of 2.
    ("new new york", ("new new",), 2 * (2 / 3 * 1) / (5 / 3)),
    # The nearest target counts.
    ("the Paris region", ("Lyon", "Paris"), 2 * (1 / 2 * 1) / (3 / 2)),
    ("Oslo", ("Bergen",), 0.0),
    ("the", ("a", "!"), 0.0),
    ("yes", (), 0.0),
  )
  def test_f1(self, answer, targets, expected):
    self.assertAlmostEqual(score.f1(answer, targets), expected)


if __name__ == "__main__":
  absltest.main()
