"""What a measured KL adapts: the penalty's coefficient, the learning rate."""

import math

from absl.testing import absltest, parameterized

from t2po_jax.learning import kl_control


class MeasureTest(parameterized.TestCase):
  def test_by_hand(self):
    # Turns with KLs [1] and [0, 0, 0], and one without a sampled token.
    sums, tokens = [1.0, 0.0, 0.0], [1.0, 3.0, 0.0]
    found = kl_control.measure(sums, tokens, mean="token", trajectories=2)
    self.assertEqual(found, (0.25, 2))
    found = kl_control.measure(sums, tokens, mean="turn", trajectories=2)
    self.assertEqual(found, (0.5, 2))

  def test_nothing_measured(self):
    for mean in kl_control.MEANS:
      kl, _ = kl_control.measure([], [], mean=mean, trajectories=0)
      self.assertEqual(kl, 0.0)

  def test_unknown_mean(self):
    with self.assertRaisesRegex(ValueError, "mean: found 'row'"):
      kl_control.measure([], [], mean="row", trajectories=0)


class KLControllerTest(parameterized.TestCase):
  def test_a_target_of_zero_fixes_it(self):
    controller = kl_control.KLController(0.3, target=0.0, horizon=10.0)
    controller.advance(5.0, 100)
    self.assertEqual(controller.coefficient, 0.3)

  @parameterized.parameters(
    (0.11, 1.0 + 0.1 * 32 / 320),  # Ten per cent too much.
    (0.05, 1.0 - 0.2 * 32 / 320),  # Half of it: clipped at -0.2.
    (9.0, 1.0 + 0.2 * 32 / 320),
    (0.1, 1.0),
  )
  def test_one_step_by_hand(self, kl, factor):
    controller = kl_control.KLController(0.5, target=0.1, horizon=320.0)
    controller.advance(kl, 32)
    self.assertAlmostEqual(controller.coefficient, 0.5 * factor)

  def test_goes_on_from_its_state_unless_configured_anew(self):
    one = kl_control.KLController(0.5, target=0.1, horizon=10.0)
    one.advance(1.0, 10)
    same = kl_control.KLController(0.5, target=0.1, horizon=10.0)
    same.load(one.state_dict())
    self.assertEqual(same.coefficient, one.coefficient)
    for changed in (
      kl_control.KLController(0.3, target=0.1, horizon=10.0),
      kl_control.KLController(0.3, target=0.0, horizon=10.0),
    ):
      changed.load(one.state_dict())
      self.assertEqual(changed.coefficient, 0.3)

  def test_steers_a_simple_policy_to_its_target(self):
    # A policy whose KL is inverse to the penalty.
    controller = kl_control.KLController(1.0, target=0.02, horizon=100.0)
    for _ in range(2000):
      controller.advance(0.1 / controller.coefficient, 16)
    self.assertAlmostEqual(controller.coefficient, 5.0, places=3)


class RateControllerTest(parameterized.TestCase):
  def test_a_target_of_zero_fixes_it(self):
    controller = kl_control.RateController(0.0)
    controller.advance(5.0)
    controller.load({"scale": 0.1})
    self.assertEqual(controller.scale, 1.0)

  @parameterized.parameters(
    (0.04, 0.5),  # Four times too much: half the step.
    (0.02, 0.5**0.5),
    (0.01, 1.0),
    (0.001, 1.0),  # Never above the configured rate.
    (9.0, 0.25),
    (math.nan, 0.25),
    (math.inf, 0.25),
    (0.0, 1.0),
  )
  def test_one_update_by_hand(self, kl, scale):
    controller = kl_control.RateController(0.01)
    controller.advance(kl)
    self.assertAlmostEqual(controller.scale, scale)

  def test_it_recovers_slowly(self):
    controller = kl_control.RateController(0.01)
    for kl, scale in ((1.0, 0.25), (0.001, 0.3125), (0.008, 0.34939)):
      controller.advance(kl)
      self.assertAlmostEqual(controller.scale, scale, places=5)

  def test_it_keeps_a_quadratic_kl_at_the_target(self):
    # KL = 50 (rate)^2: at the target with a rate of 0.01 / 50 squared.
    controller = kl_control.RateController(0.01)
    for _ in range(30):
      controller.advance(50.0 * controller.scale**2)
    self.assertAlmostEqual(50.0 * controller.scale**2, 0.01)

  def test_it_never_stops_learning(self):
    controller = kl_control.RateController(1e-6)
    for _ in range(50):
      controller.advance(1.0)
    self.assertEqual(controller.scale, 1e-3)

  def test_goes_on_where_it_stopped(self):
    one = kl_control.RateController(0.01)
    one.advance(0.05)
    other = kl_control.RateController(0.01)
    other.load(one.state_dict())
    self.assertEqual(other.scale, one.scale)

  def test_a_run_from_before_it_existed_starts_at_the_full_rate(self):
    controller = kl_control.RateController(0.01)
    controller.load({})
    self.assertEqual(controller.scale, 1.0)


if __name__ == "__main__":
  absltest.main()
