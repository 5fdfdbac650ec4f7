"""Which update allows how many turns."""

from absl.testing import absltest, parameterized

from t2po_jax.rollout import horizon


class HorizonTest(parameterized.TestCase):
  def test_stages_follow_each_other(self):
    found = [horizon.turns("4:2, 8:5", update) for update in range(1, 8)]
    self.assertEqual(found, [4, 4, 8, 8, 8, 0, 0])

  def test_empty_is_the_environments_limit(self):
    self.assertEqual(horizon.turns("", 1), 0)

  @parameterized.parameters(
    "4", "4:", "4:10,8:10", "4:10,8:5", "0:5", "-4:5", "4:0", "4:10,", "4.5:2"
  )
  def test_refuses(self, text):
    with self.assertRaisesRegex(ValueError, "rollout.horizon: found"):
      horizon.parse(text)


if __name__ == "__main__":
  absltest.main()
