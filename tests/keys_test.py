"""Keys of a configuration: bounds, choices, unions."""

import dataclasses

from absl.testing import absltest, parameterized

from t2po_jax import keys


@dataclasses.dataclass(frozen=True)
class Steps:
  rate: float = keys.key(0.1, "Size of a step.", above=0, most=1)
  kind: str = keys.key("flat", "Its shape.", choices=("flat", "steep"))
  count: int = keys.key(1, "How many.", least=1)
  private: int = 3


class KeysTest(parameterized.TestCase):
  def test_a_section_lists_its_keys_in_order(self):
    found = keys.keys_of(Steps)
    self.assertEqual(list(found), ["rate", "kind", "count"])
    self.assertEqual(found["rate"].default, 0.1)
    self.assertEqual(found["kind"].choices, ("flat", "steep"))

  @parameterized.parameters(
    ({"rate": 0.0}, "step.rate: found 0.0, expected above 0 and at most 1"),
    ({"rate": 1.5}, "step.rate: found 1.5"),
    ({"rate": float("nan")}, "step.rate: found nan"),
    ({"rate": float("inf")}, "step.rate: found inf"),
    ({"kind": "step"}, "did you mean 'steep'"),
    ({"count": 0}, "step.count: found 0, expected at least 1"),
  )
  def test_a_wrong_value_is_named(self, values, message):
    with self.assertRaisesRegex(ValueError, message):
      keys.check(Steps, values, name="step")

  def test_right_values_pass(self):
    keys.check(Steps, {"rate": 1.0, "kind": "steep", "other": 0}, name="step")

  def test_choices_may_grow(self):
    known = ["a"]

    @dataclasses.dataclass(frozen=True)
    class Open:
      kind: str = keys.key("a", "Kind.", choices=lambda: known)

    with self.assertRaises(ValueError):
      keys.check(Open, {"kind": "b"}, name="open")
    known.append("b")
    keys.check(Open, {"kind": "b"}, name="open")

  def test_a_union_refuses_two_meanings_of_one_name(self):
    @dataclasses.dataclass(frozen=True)
    class Other:
      rate: float = keys.key(0.2, "Size of a step.", above=0, most=1)

    self.assertEqual(
      list(keys.union([Steps, Steps])), list(keys.keys_of(Steps))
    )
    with self.assertRaisesRegex(ValueError, "'rate' of Other"):
      keys.union([Steps, Other])


if __name__ == "__main__":
  absltest.main()
