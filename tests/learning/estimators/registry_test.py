"""Every estimator by name: shapes, order, what is left out."""

import dataclasses
import inspect
import math

from absl.testing import absltest, parameterized
import numpy as np

from t2po_jax import keys
from t2po_jax.learning import estimators
from t2po_jax.learning.estimators import episodes, groups
from tests.learning.estimators import cases


@dataclasses.dataclass(frozen=True)
class OwnOptions:
  own_scale: float = keys.key(1.0, "A key that nobody registered.")


OWN = episodes.Estimator(groups.rloo, episodes.NoOptions, grouped=True)
UNKNOWN_KEYS = episodes.Estimator(groups.rloo, OwnOptions)


class EveryEstimatorTest(parameterized.TestCase):
  @parameterized.parameters(*estimators.ESTIMATORS)
  def test_shapes_and_finite(self, name):
    data = cases.random(0)
    with np.errstate(all="raise"):
      found = estimators.ESTIMATORS[name].function(data)
    for rewards, turns in zip(data.rewards, found.turns, strict=True):
      self.assertEqual(turns.shape, rewards.shape)
      self.assertTrue(np.isfinite(turns).all())
    for field in (found.tokens, found.targets):
      for of_turns, values in zip(field or (), data.values, strict=False):
        self.assertEqual([len(t) for t in of_turns], [len(v) for v in values])
    self.assertTrue(all(math.isfinite(v) for v in found.metrics.values()))

  @parameterized.parameters(*estimators.ESTIMATORS)
  def test_order_of_trajectories_does_not_matter(self, name):
    data = cases.random(1)
    order = np.random.default_rng(0).permutation(len(data.groups))
    found = estimators.ESTIMATORS[name].function(data)
    again = estimators.ESTIMATORS[name].function(cases.reorder(data, order))
    for place, e in enumerate(order):
      np.testing.assert_allclose(again.turns[place], found.turns[e], atol=1e-9)

  @parameterized.parameters(*estimators.ESTIMATORS)
  def test_aborted_and_empty_ones_change_nothing(self, name):
    data = cases.random(2, aborted=False)
    clean = estimators.ESTIMATORS[name].function(data)
    # One with absurd numbers, one aborted before its first turn, one without.
    nan = np.array([np.nan, 1e9])
    more = episodes.Episodes(
      groups=np.append(data.groups, [0, 1, 2]),
      rewards=(*data.rewards, nan, np.zeros(0), np.zeros(0)),
      aborted=np.append(data.aborted, [True, True, False]),
      anchors=(*data.anchors, ("a", "a"), (), ()),
      values=(*data.values, (nan, nan), (), ()),
      sampled=(*data.sampled, (nan > 0, nan > 0), (), ()),
      entropies=(*data.entropies, nan, np.zeros(0), np.zeros(0)),
      baselines=np.append(data.baselines, [np.nan, 0.0, 0.0]),
      penalties=(*data.penalties, nan, np.zeros(0), np.zeros(0)),
    )
    found = estimators.ESTIMATORS[name].function(more)
    for e, turns in enumerate(clean.turns):
      np.testing.assert_allclose(found.turns[e], turns, atol=1e-12)
    np.testing.assert_array_equal(found.turns[-3], [0.0, 0.0])
    self.assertEmpty(found.turns[-1])
    self.assertEqual(found.metrics, clean.metrics)

  @parameterized.parameters(*cases.BASELINES)
  def test_a_group_of_one_gets_nothing_and_is_counted(self, name):
    data = cases.random(3, aborted=False)
    alone = episodes.Episodes(
      groups=np.append(data.groups, [7, 8, 8]),
      rewards=(*data.rewards, np.array([5.0, 2.0]), np.ones(1), np.ones(1)),
      aborted=np.append(data.aborted, [False, False, True]),
      anchors=(*data.anchors, ("a", "a"), ("b",), ("b",)),
      sampled=(*data.sampled, (np.ones(2) > 0,) * 2, *((np.ones(1) > 0,),) * 2),
      entropies=(*data.entropies, np.ones(2), np.ones(1), np.ones(1)),
    )
    found = estimators.ESTIMATORS[name].function(alone)
    clean = estimators.ESTIMATORS[name].function(data)
    for turns in found.turns[-3:]:
      np.testing.assert_array_equal(turns, 0.0)
    for e, turns in enumerate(clean.turns):
      np.testing.assert_allclose(found.turns[e], turns, atol=1e-12)
    self.assertEqual(found.metrics["advantage/lone_groups"], 2.0)

  @parameterized.parameters("grpo", "rloo", "reinforce_pp_baseline", "empg")
  def test_a_constant_per_group_changes_nothing(self, name):
    data = cases.random(4)
    shifted = cases.replace(
      data,
      rewards=tuple(
        np.append(r[:-1], r[-1] + 3.0 * (g + 1))
        for r, g in zip(data.rewards, data.groups, strict=True)
      ),
    )
    found = estimators.ESTIMATORS[name].function(data)
    again = estimators.ESTIMATORS[name].function(shifted)
    for one, other in zip(found.turns, again.turns, strict=True):
      np.testing.assert_allclose(one, other, atol=1e-9)

  def test_no_episode_at_all(self):
    empty = episodes.Episodes(np.zeros(0, int), (), np.zeros(0, bool), (), ())
    empty = cases.replace(empty, entropies=(), baselines=np.zeros(0))
    for estimator in estimators.ESTIMATORS.values():
      self.assertEqual(estimator.function(empty).turns, ())


class RegistryTest(absltest.TestCase):
  def test_unknown_names(self):
    with self.assertRaisesRegex(ValueError, "did you mean 'gigpo'"):
      estimators.find("gigp")
    with self.assertRaisesRegex(ValueError, "cannot be imported"):
      estimators.find("no_such_module:NAME")
    with self.assertRaisesRegex(ValueError, "is a tuple, expected an Estim"):
      estimators.find("tests.learning.estimators.cases:BASELINES")

  def test_a_record_elsewhere(self):
    here = "tests.learning.estimators.registry_test"
    found = estimators.find(f"{here}:OWN")
    self.assertIs(found.function, groups.rloo)
    with self.assertRaisesRegex(ValueError, "no keys, own_scale; call"):
      estimators.find(f"{here}:UNKNOWN_KEYS")

  def test_a_name_or_a_key_that_is_taken(self):
    @dataclasses.dataclass(frozen=True)
    class Other:
      discount: float = keys.key(0.5, "Something else.")

    record = episodes.Estimator(groups.rloo, Other)
    with self.assertRaisesRegex(ValueError, "'grpo': the name is taken"):
      estimators.register("grpo", record)
    with self.assertRaisesRegex(ValueError, "key 'discount' of Other differs"):
      estimators.register("other", record)
    self.assertNotIn("other", estimators.ESTIMATORS)
    with self.assertRaisesRegex(ValueError, r"found \['anchor'\]"):
      episodes.Estimator(groups.rloo, Other, frozenset({"anchor"}))

  def test_options_are_arguments_and_needs_are_missed(self):
    for name, record in estimators.ESTIMATORS.items():
      taken = inspect.signature(record.function).parameters
      self.assertEqual({*record.keys, "data"}, {*taken}, msg=name)
      data = cases.random(4)
      settings = record.options()
      record.estimate(data, settings)
      for field in record.needs:
        with self.assertRaisesRegex(ValueError, f"{field}: found None"):
          record.estimate(cases.replace(data, **{field: None}), settings)


if __name__ == "__main__":
  absltest.main()
