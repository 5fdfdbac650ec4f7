"""Whole updates of every kind of algorithm, on the toy bandit."""

import math
import pathlib
import tempfile

from absl.testing import absltest, parameterized
import jax
import numpy as np

from t2po_jax.configs import base as settings
from t2po_jax.configs import smoke
from t2po_jax.training import checkpoint, loop, metrics

CACHE = tempfile.TemporaryDirectory()


def setUpModule():
  # Compiling takes most of the time here, and nothing else depends on it.
  jax.config.update("jax_disable_most_optimizations", True)


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)
  CACHE.cleanup()


def play(names, changes, *, updates=2, workdir=None):
  """Trains the smoke configuration; returns workdir and metrics."""
  config = smoke.get_config(names).unlock()
  config.cache_dir = CACHE.name
  config.log.tensorboard = False
  config.cold_start.episodes = 64
  config.train.updates = updates
  config.train.eval_every = 0
  config.update_from_flattened_dict(changes)
  workdir = workdir or pathlib.Path(tempfile.mkdtemp())
  loop.train(settings.read(config), workdir)
  return workdir, metrics.read(workdir / "metrics.jsonl")


def comparable(lines):
  clocks = ("time", "elapsed", "seconds/", "speed/", "compiles")
  return [
    {k: str(v) for k, v in line.items() if not k.startswith(clocks)}
    for line in lines
  ]


class AlgorithmsTest(parameterized.TestCase):
  def test_ppo_with_an_adaptive_penalty_in_the_reward(self):
    _, lines = play(
      "ppo",
      {
        "reward.kl": "k3",
        "reward.kl_coefficient": 0.05,
        "reward.kl_target": 0.5,
        "reward.kl_horizon": 160.0,
      },
    )
    first, second = lines[1], lines[2]
    # The reference is the policy that begins; 16 episodes far below target.
    self.assertLess(first["reward/kl"], 1e-6)
    self.assertGreater(second["reward/kl"], 1e-6)
    self.assertEqual(first["reward/kl_coefficient"], 0.05)
    self.assertAlmostEqual(
      second["reward/kl_coefficient"], 0.05 * (1 - 0.2 * 16 / 160)
    )
    self.assertEqual(first["learn/value"], 0.0)
    self.assertNotEqual(second["learn/value"], 0.0)

  def test_turn_level_critic_goes_on_exactly_after_a_stop(self):
    changes = {"critic.kind": "separate"}
    whole, straight = play("ppo_turn", changes, updates=3)
    self.assertGreater(straight[1]["learn/value_loss"], 0.0)
    stopped, _ = play("ppo_turn", changes, updates=2)
    _, resumed = play("ppo_turn", changes, updates=3, workdir=stopped)
    # The last update of a shorter run was evaluated as well.
    for line in resumed:
      if line["step"] == 2:
        for key in [key for key in line if key.startswith("eval/")]:
          del line[key]
    self.assertEqual(comparable(resumed), comparable(straight))

  def test_remax_with_filtered_groups(self):
    _, lines = play(
      "remax",
      {
        "rollout.filter_groups": True,
        "rollout.filter_tries": 2,
        "loss.old_logprobs": "recompute",
        "loss.importance": "mask",
      },
      updates=1,
    )
    (line,) = lines[1:]
    self.assertIn("filter/tries", line)
    self.assertTrue(math.isfinite(line["train/greedy_return"]))
    self.assertAlmostEqual(line["learn/importance_weight"], 1.0, places=3)

  @parameterized.parameters(
    "gspo",
    "cispo",
    "sapo",
    "empg",
    "dr_grpo",
    "hgpo,aem",
    "kl_cov,icepop",
    "grpo,snr_filter",
  )
  def test_other_losses_take_a_step(self, name):
    _, lines = play(name, {}, updates=1)
    self.assertGreater(lines[1]["learn/update_norm"], 0.0)
    self.assertTrue(math.isfinite(lines[1]["learn/loss"]))


class RateTest(absltest.TestCase):
  def test_steps_that_move_too_far_become_smaller_also_after_a_stop(self):
    changes = {"train.mini_batches": 2, "optimizer.target_kl": 1e-6}
    _, lines = play("", changes, updates=3)
    first, second, third = lines[1:]
    self.assertGreater(first["learn/kl_old"], 1.6e-5)
    self.assertAlmostEqual(
      second["learn/learning_rate"] / first["learn/learning_rate"], 0.25
    )
    self.assertLess(third["learn/learning_rate"], second["learn/learning_rate"])
    again = pathlib.Path(tempfile.mkdtemp())
    play("", changes, updates=2, workdir=again)
    _, resumed = play("", changes, updates=3, workdir=again)
    for name in ("learn/learning_rate", "learn/loss"):
      self.assertEqual(resumed[3][name], third[name], msg=name)

  def test_a_step_after_one_that_moved_too_far_is_left_out(self):
    changes = {"train.mini_batches": 2, "optimizer.learning_rate": 1e-4}
    _, (_, free) = play("", changes, updates=1)
    _, (_, bound) = play("kl_stop", changes, updates=1)
    self.assertLess(free["learn/kl_old"], 0.005)  # Half of the second step's.
    self.assertEqual(bound["learn/halted"], 0.0)
    _, (_, bound) = play("", changes | {"optimizer.max_kl": 1e-5}, updates=1)
    self.assertEqual(bound["learn/halted"], 1.0)
    self.assertLess(
      abs(bound["learn/kl_old"] / free["learn/kl_old"] - 1), 0.001
    )
    self.assertLess(bound["learn/update_norm"], free["learn/update_norm"])
    self.assertNotIn("learn/halted", free)

  def test_a_single_step_is_measured_after_it(self):
    changes = {"optimizer.target_kl": 1e-6, "optimizer.learning_rate": 1e-3}
    _, lines = play("grpo", changes, updates=2)
    first, second = lines[1:]
    self.assertLess(first["learn/kl_old"], 1e-6)
    self.assertGreater(first["learn/kl_update"], 1.6e-5)
    self.assertAlmostEqual(
      second["learn/learning_rate"] / first["learn/learning_rate"], 0.25
    )
    # A second pass over the same tokens measures the same before its step.
    _, lines = play("grpo", changes | {"train.epochs": 2}, updates=1)
    measured = 2 * lines[1]["learn/kl_old"]  # A mean with the first pass's 0.
    self.assertLess(abs(measured / first["learn/kl_update"] - 1), 0.01)


class GuardTest(parameterized.TestCase):
  def test_rolls_back_with_smaller_steps_and_then_gives_up(self):
    workdir = pathlib.Path(tempfile.mkdtemp())
    changes = {
      "guard.action": "rollback",
      "guard.patience": 1,
      "guard.max_entropy": 1e-6,
      "guard.rollbacks": 2,
    }
    with self.assertRaisesRegex(
      loop.CollapseError, "update 3: learn/entropy.*best checkpoint: 0"
    ):
      play("", changes, updates=9, workdir=workdir)
    lines = metrics.read(workdir / "metrics.jsonl")[1:]
    rates = [line["learn/learning_rate"] for line in lines]
    np.testing.assert_allclose(rates, rates[0] * np.array([1, 0.5, 0.25]))
    self.assertEqual([line["guard/rollbacks"] for line in lines], [1, 2, 2])
    kept = checkpoint.Checkpoints(workdir / "checkpoints")
    # What was rolled back to is saved again, with its smaller steps.
    self.assertEqual(kept.latest(), 2)
    kept.close()

  def test_a_lost_score_brings_the_best_policy_back(self):
    workdir = pathlib.Path(tempfile.mkdtemp())
    changes = {
      "guard.action": "rollback",
      "guard.rate_factor": 1e-6,
      "train.eval_every": 1,
      "train.mini_batches": 2,
      "optimizer.learning_rate": 3.0,
    }
    _, lines = play("", changes, updates=3, workdir=workdir)
    # The first update ruins the policy; what goes on is the cold start's.
    self.assertEqual(lines[0]["eval/success"], 1.0)
    self.assertLess(lines[1]["guard/lost_success"], 0.3)
    self.assertEqual(lines[1]["eval/success"], 1.0)
    self.assertEqual(lines[1]["learn/steps"], 2.0)
    self.assertEqual(lines[1]["guard/rollbacks"], 1.0)
    # Then more carefully: smaller steps, fewer, and a price for leaving it.
    ratio = lines[2]["learn/learning_rate"] / lines[1]["learn/learning_rate"]
    self.assertAlmostEqual(ratio, 1e-6, places=9)
    self.assertEqual(lines[2]["learn/steps"], 1.0)
    self.assertEqual(lines[2]["guard/kl_coefficient"], 0.05)
    self.assertEqual(lines[3]["guard/rollbacks"], 1.0)
    kept = checkpoint.Checkpoints(workdir / "checkpoints")
    self.assertIsNotNone(kept.best())
    kept.close()
    # A run that stops in between goes on as if it had not.
    again = pathlib.Path(tempfile.mkdtemp())
    play("", changes, updates=2, workdir=again)
    _, resumed = play("", changes, updates=3, workdir=again)
    for name in ("learn/loss", "guard/kl", "eval/success", "eval/tokens"):
      self.assertEqual(resumed[3][name], lines[3][name], msg=name)

  def test_stop_keeps_the_last_good_checkpoint(self):
    workdir = pathlib.Path(tempfile.mkdtemp())
    play("", {}, updates=1, workdir=workdir)
    changes = {
      "guard.action": "stop",
      "guard.patience": 2,
      "guard.min_format": 2.0,
    }
    with self.assertRaisesRegex(loop.CollapseError, "update 3.*checkpoint: 1"):
      play("", changes, updates=9, workdir=workdir)

  def test_a_warning_changes_nothing(self):
    _, plain = play("", {}, updates=2)
    changes = {"guard.patience": 1, "guard.min_format": 2.0}
    changes |= {"log.gradient_noise": 2}
    _, warned = play("", changes, updates=2)
    self.assertNotIn("learn/grad_agreement", warned[1])
    self.assertBetween(warned[2]["learn/grad_agreement"], 0.0, 1.0 + 1e-6)
    self.assertEqual(warned[1]["guard/alarms"], 1.0)
    self.assertEqual(plain[2]["learn/loss"], warned[2]["learn/loss"])


if __name__ == "__main__":
  absltest.main()
