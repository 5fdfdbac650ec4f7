"""Presets of methods do what their names say; the paper's, key by key."""

import importlib

from absl.testing import absltest, parameterized
import numpy as np

from t2po_jax.configs import algorithms, base, searchqa, smoke
from t2po_jax.learning import losses
from t2po_jax.setup import build, validate
from tests.learning import loss_cases
from tests.learning.estimators import cases

# What arXiv 2605.02178 and the scripts and code released with it have.
PAPER = {
  "model.source": "Qwen/Qwen3-4B",
  "optimizer.learning_rate": 1e-6,
  "optimizer.schedule": "constant",
  "optimizer.b1": 0.9,
  "optimizer.b2": 0.999,
  "optimizer.weight_decay": 0.01,
  "optimizer.clip_norm": 1.0,
  "control.signal": "calibrated",
  "control.alpha": 0.4,
  "control.thinking.enabled": True,
  "control.thinking.max_tokens": 450,
  "control.thinking.closing": "",
  "control.resampling.eta": "0.3",
  "control.resampling.max_tries": 2,
  "reward.format_penalty": 0.1,
  "reward.invalid_penalty": 0.1,
  "reward.penalties": "largest",
  "advantage.estimator": "gigpo",
  "advantage.discount": 0.95,
  "advantage.step_weight": 1.0,
  "advantage.per": "turn",
  "advantage.penalty": "return",
  "loss.kind": "ppo",
  "loss.clip_low": 0.2,
  "loss.clip_high": 0.2,
  "loss.aggregation": "token_mean",
  "loss.old_logprobs": "recompute",
  "loss.importance": "off",
  "eval.temperature": 0.6,
  "eval.top_p": 0.95,
  "eval.top_k": 20,
  "cold_start.kind": "rft",
}
OF_TASK = {
  "webshop": {
    "env.max_turns": 15,
    "rollout.tasks": 16,
    "rollout.group_size": 8,
    "rollout.memory": 2,
    "rollout.max_prompt": 4096,
    "rollout.max_response": 500,
    "advantage.norm": "mean_norm",
    "advantage.similarity": 1.0,
    "advantage.autojunk": False,
    "loss.kl": "off",
    "loss.entropy_coefficient": 0.001,
    "optimizer.warmup": 0,
  },
  "alfworld": {
    "env.max_turns": 50,
    "rollout.tasks": 16,
    "rollout.group_size": 8,
    "rollout.memory": 2,
    "rollout.max_prompt": 2048,
    "rollout.max_response": 500,
    "advantage.norm": "mean_std_norm",
    "advantage.similarity": 1.0,
    "advantage.autojunk": False,
    "loss.kl": "k3",
    "loss.kl_coefficient": 0.01,
    "loss.entropy_coefficient": 0.001,
    "optimizer.warmup": 0,
  },
  "searchqa": {
    "env.max_turns": 4,
    "rollout.tasks": 256,
    "rollout.group_size": 5,
    "rollout.memory": 4,
    "rollout.max_prompt": 4096,
    "rollout.max_response": 500,
    "advantage.norm": "mean_std_norm",
    "advantage.similarity": 0.9,
    "advantage.autojunk": True,
    "loss.kl": "off",
    "loss.entropy_coefficient": 0.0,
    "optimizer.warmup": 80,  # A tenth of 200 updates of 4 steps.
  },
}
# Where the code differs from the text, on every task and on one.
CODE = {
  "control.signal": "released",
  "control.thinking.closing": "</think>",
  "control.resampling.eta": "0.3",
}
CODE_OF_TASK = {"webshop": {"rollout.max_response": 300}}


class PaperTest(parameterized.TestCase):
  @parameterized.product(task=tuple(OF_TASK), code=(False, True))
  def test_equals_the_table(self, task, code):
    module = importlib.import_module(f"t2po_jax.configs.{task}")
    config = module.get_config("paper-code" if code else "paper")
    validate.read(config)
    expected = PAPER | OF_TASK[task]
    if code:
      expected = expected | CODE | CODE_OF_TASK.get(task, {})
      del expected["control.alpha"]  # The released signal has none.
    values = base.flatten(config.to_dict())
    self.assertEqual({key: values[key] for key in expected}, expected)


class MethodTest(parameterized.TestCase):
  @parameterized.parameters(
    ("hgpo", "advantage.estimator", "hgpo"),
    ("hgpo", "advantage.penalty", "return"),
    ("grpo,aem", "advantage.estimator", "grpo"),
    ("gigpo,aem", "advantage.modulation", "aem"),
    ("aem", "control.thinking.enabled", True),
    ("aem,grpo", "advantage.modulation", "off"),
    ("repeat_negatives", "control.resampling.negative", 1.0),
    ("repeat_negatives,gigpo", "control.resampling.negative", 0.0),
    ("repeat_negatives,t2po", "control.resampling.sign", "phi"),
    ("brief", "control.resampling.max_tries", 0),
    ("brief,kl_rate", "control.thinking.epsilon", "auto(0.5)"),
    ("brief,t2po", "control.thinking.epsilon", "auto(0.2)"),
    ("gigpo,kl_rate", "optimizer.target_kl", 0.001),
    ("kl_rate,gigpo", "optimizer.target_kl", 0.0),
    ("kl_rate,kl_stop", "optimizer.target_kl", 0.001),
    ("gigpo,kl_stop", "optimizer.max_kl", 0.01),
    ("kl_stop,gigpo", "optimizer.max_kl", 0.0),
    ("gigpo,snr_filter", "rollout.variance_kept", 0.9),
    ("snr_filter,gigpo", "rollout.variance_kept", 1.0),
    ("maxrl", "reward.invalid_penalty", 0.0),
    ("dr_grpo", "advantage.norm", "mean_norm"),
    ("dr_grpo,grpo", "advantage.norm", "mean_std_norm"),
    ("sapo", "loss.aggregation", "seq_mean_token_mean"),
    ("gspo", "loss.aggregation", "seq_mean_token_mean"),
    ("sapo,grpo", "loss.aggregation", "token_mean"),
    ("dppo_kl", "loss.divergence_low", 0.05),
    ("dapo", "reward.overlong_buffer", 3),
    ("dapo,grpo", "reward.overlong_penalty", 0.0),
    ("icepop", "loss.importance_low", 0.5),
    ("released", "control.resampling.eta", "0.3"),
    ("released", "control.thinking.closing", "</think>"),
  )
  def test_what_a_preset_sets(self, names, key, value):
    config = smoke.get_config(names)
    validate.read(config)
    self.assertEqual(base.flatten(config.to_dict())[key], value)

  @parameterized.parameters(
    # A measured default of the models from scratch; a named method is its own.
    ("", 0.001),
    ("gigpo", 0.0),
    ("gigpo,kl_rate", 0.001),
    ("deep", 0.001),
    ("smollm2", 0.0),
    ("smollm2,kl_rate", 0.001),
    ("qwen3-4b", 0.0),
    ("paper", 0.0),
  )
  def test_which_learning_rates_follow_the_kl(self, names, expected):
    found = searchqa.get_config(names).optimizer.target_kl
    self.assertEqual(found, expected)

  def test_gigpo_is_scaled_as_the_published_scripts_have_it(self):
    for task, settings in OF_TASK.items():
      module = importlib.import_module(f"t2po_jax.configs.{task}")
      for names in ("", "gigpo", "dr_grpo,gigpo", "t2po"):
        found = module.get_config(names).advantage.norm
        self.assertEqual(found, settings["advantage.norm"], (task, names))

  @parameterized.parameters(
    *(n for n in algorithms.PRESETS if n not in ("t2po_no_rft", "rft"))
  )
  def test_every_preset_estimates_and_minimises(self, name):
    config = validate.read(smoke.get_config(name))
    data = cases.random(0)
    estimate = build.estimate(config, data)
    for turns in estimate.turns:
      self.assertTrue(np.isfinite(turns).all())
    logprobs, old, advantages = loss_cases.batch()
    objective = build.objective(config)
    batch = loss_cases.full_batch(old, advantages)
    weights = losses.token_weights(
      loss_cases.MASK, loss_cases.TURN, mode=objective.aggregation, horizon=9
    )
    parts = objective.evaluate(logprobs, 0 * weights, batch, weights, weights)
    self.assertTrue(np.isfinite(parts.loss))
    self.assertNotEqual(float(parts.loss), 0.0)


if __name__ == "__main__":
  absltest.main()
