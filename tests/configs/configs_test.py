"""Every configuration and preset is complete, locked and sound."""

import importlib

from absl.testing import absltest, parameterized

from t2po_jax.configs import algorithms, base, searchqa
from t2po_jax.setup import build, validate

TASKS = (
  "smoke",
  "searchqa",
  "webshop",
  "alfworld",
  "gridworld",
  "sokoban",
  "textarena",
  "gymnasium",
)


def all_presets():
  for task in TASKS:
    yield task, ""
    for preset in importlib.import_module(f"configs.{task}").PRESETS:
      yield task, preset
  for preset in algorithms.PRESETS:
    yield "searchqa", f"tiny,rft,{preset}"
  yield "webshop", "smollm2,gigpo_dapo"


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters(*all_presets())
  def test_passes_the_checks(self, task, preset):
    config = importlib.import_module(f"configs.{task}").get_config(preset)
    validate.read(config)
    self.assertTrue(config.is_locked)
    self.assertEqual(config.env.name, "toy" if task == "smoke" else task)

  @parameterized.parameters(*all_presets())
  def test_adds_no_key_outside_the_environment(self, task, preset):
    config = importlib.import_module(f"configs.{task}").get_config(preset)
    known = base.flatten(base.get_config().to_dict()).keys()
    used = base.flatten(config.to_dict()).keys()
    self.assertEqual(
      {key for key in used if not key.startswith("env.")},
      {key for key in known if not key.startswith("env.")},
    )

  def test_presets_say_what_they_change(self):
    for names, key, value in (
      ("grpo", "control.thinking.enabled", False),
      ("grpo", "control.resampling.max_tries", 0),
      ("t2po_no_tds", "control.thinking.enabled", True),
      ("t2po_no_tds", "control.resampling.max_tries", 0),
      ("t2po_no_tti", "control.resampling.max_tries", 2),
      ("hard_budget", "control.thinking.epsilon", "0"),
      ("rft", "cold_start.kind", "expert+rft"),
      ("rft,t2po_no_rft", "cold_start.kind", "expert"),
      ("gigpo_dapo", "rollout.filter_groups", True),
      ("gigpo_dapo", "loss.clip_high", 0.28),
      ("gigpo", "loss.clip_high", 0.2),
      ("gigpo_dapo,gigpo", "rollout.filter_groups", False),
      ("grpo,t2po", "control.thinking.enabled", True),
      ("gspo,t2po", "loss.kind", "ppo"),
      ("hard_budget,t2po", "control.thinking.epsilon", "auto(0.2)"),
    ):
      config = searchqa.get_config(names)
      self.assertEqual(base.flatten(config.to_dict())[key], value, names)

  def test_t2po_with_a_careful_rate_is_the_default(self):
    for task in TASKS:
      module = importlib.import_module(f"configs.{task}")
      method = "t2po" if task == "smoke" else "t2po,kl_rate"
      for before in ("", "grpo,", "hard_budget,", "gspo,", "released,"):
        self.assertEqual(
          module.get_config(before + method).to_dict(),
          module.get_config().to_dict(),
        )

  def test_there_must_be_something_to_leave_out(self):
    with self.assertRaisesRegex(ValueError, "t2po_no_rft.*'expert'"):
      searchqa.get_config("t2po_no_rft")

  def test_later_presets_win(self):
    def low(c):
      c.seed = 1

    def high(c):
      c.seed = 2

    presets = {"low": low, "high": high}
    config = base.apply_presets(base.get_config(), "low,high", presets)
    self.assertEqual(config.seed, 2)

  @parameterized.parameters(
    ({"model": {"dtype": "float16"}}, "model.dtype"),
    ({"advantage": {"estimator": "gipo"}}, "advantage.estimator"),
    ({"cold_start": {"kind": "experts"}}, "cold_start.kind"),
    ({"train": {"row_tokens": 100}}, "train.row_tokens"),
    ({"rollout": {"group_size": 0}}, "rollout.group_size"),
    ({"loss": {"kl": "k3"}}, "loss.kl_coefficient"),
    ({"rollout": {"temperature": 0.0}}, "rollout.temperature"),
    (
      {"rollout": {"env_threads": 2, "env_workers": 1}},
      "rollout.env_threads: found 2, expected 0 with rollout.env_workers 1",
    ),
    ({"rollout": {"env_workers": -1}}, "rollout.env_workers"),
    ({"rollout": {"env_memory": 9.0}}, "rollout.env_memory.*does not use it"),
    ({"rollout": {"group_size": 1}}, "rollout.group_size.*at least 2: gigpo"),
    ({"rollout": {"filter_tries": 5}}, "rollout.filter_tries.*filter_groups"),
    (
      {"advantage": {"estimator": "gae"}}
      | {"rollout": {"group_size": 1, "variance_kept": 0.9}},
      "rollout.group_size.*rollout.variance_kept",
    ),
    ({"rollout": {"variance_kept": 0.0}}, "rollout.variance_kept.*above 0"),
    (
      {"rollout": {"horizon": "4:10", "oversample": 2}},
      "rollout.oversample.*0 with rollout.horizon",
    ),
    ({"rollout": {"horizon": "4-10"}}, "rollout.horizon: found '4-10'"),
    ({"loss": {"kl_coefficient": 0.1}}, "loss.kl_coefficient.*loss.kl 'off'"),
    ({"loss": {"kl": "k4"}}, "loss.kl.*one of"),
    ({"loss": {"importance_cap": 3.0}}, "importance_cap.*old_logprobs"),
    (
      {"loss": {"kind": "cispo", "dual_clip": 2.0}},
      "dual_clip.*'cispo'",
    ),
    ({"loss": {"kind": "sapo"}}, "aggregation.*'seq_mean_token_mean'.*sapo"),
    ({"loss": {"temperature_positive": 2.0}}, "temperature_positive.*'ppo'"),
    ({"reward": {"kl": "k3"}}, "reward.kl_coefficient"),
    ({"reward": {"kl": "k3+", "kl_coefficient": 0.1}}, "reward.kl.*without"),
    ({"reward": {"kl_target": 0.1}}, "reward.kl_target.*reward.kl 'off'"),
    ({"advantage": {"gae_lambda": 0.5}}, "advantage.gae_lambda.*'gigpo'"),
    (
      {"advantage": {"estimator": "grpo", "step_weight": 2.0}},
      "advantage.step_weight.*'grpo'",
    ),
    ({"critic": {"kind": "separate"}}, "critic.kind.*'gigpo'"),
    ({"guard": {"rollbacks": 9}}, "guard.rollbacks.*'warn'"),
    ({"guard": {"action": "halt"}}, "guard.action"),
    ({"guard": {"action": "off", "max_kl": 9.0}}, "guard.max_kl.*'off'"),
    ({"guard": {"min_entropy": -1.0}}, "guard.min_entropy.*at least 0"),
    ({"reward": {"kl_horizon": 0.5}}, "reward.kl_horizon.*at least 1"),
    ({"loss": {"dual_clip": 0.5}}, "loss.dual_clip.*above 1"),
    ({"advantage": {"similarity": 2.0}}, "advantage.similarity.*at most 1"),
    ({"advantage": {"discount": 1.5}}, "advantage.discount.*at most 1"),
    ({"loss": {"clip_low": -3.0}}, "loss.clip_low.*at least 0"),
    ({"loss": {"importance_cap": 0.5}}, "loss.importance_cap.*above 1"),
    ({"optimizer": {"schedule": "cosin"}}, "optimizer.schedule.*cosine"),
    ({"model": {"remat": "ful"}}, "model.remat.*full"),
    ({"cold_start": {"kind": "none+rft"}}, "cold_start.kind"),
    ({"cold_start": {"rft_rounds": 2}}, "cold_start.rft_rounds.*'none'"),
    (
      {
        "advantage": {"estimator": "gae"},
        "control": {"resampling": {"negative": 0.5}},
      },
      "control.resampling.negative.*'gae'",
    ),
    (
      {"control": {"resampling": {"negative": 0.5, "max_tries": 0}}},
      "control.resampling.negative.*max_tries 0",
    ),
    (
      {"advantage": {"estimator": "gae"}, "reward": {"drop_void": True}},
      "reward.drop_void.*'gae'",
    ),
    (
      {
        "advantage": {"estimator": "gae"},
        "critic": {"kind": "separate", "coefficient": 0.1},
      },
      "critic.coefficient.*'separate'",
    ),
  )
  def test_refuses_by_name(self, changes, key):
    config = base.get_config()
    config.update(changes)
    with self.assertRaisesRegex(ValueError, key):
      validate.read(config)


class PoolTest(absltest.TestCase):
  def test_threads_need_an_environment_that_bears_them(self):
    class Fragile:
      threadsafe = False

    for name, value in (("env_threads", 2), ("env_timeout", 1.0)):
      config = base.get_config()
      config.rollout[name] = value
      with self.assertRaisesRegex(ValueError, f"rollout.{name}.*env_workers"):
        build.environment_pool(base.read(config), Fragile())


if __name__ == "__main__":
  absltest.main()
