"""Every configuration and preset is complete, locked and sound."""

import importlib

from absl.testing import absltest, parameterized

from configs import base
from t2po_jax import build, train

TASKS = ("smoke", "searchqa", "webshop", "alfworld")


def all_presets():
  for task in TASKS:
    yield task, ""
    for preset in importlib.import_module(f"configs.{task}").PRESETS:
      yield task, preset


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters(*all_presets())
  def test_passes_the_checks(self, task, preset):
    config = importlib.import_module(f"configs.{task}").get_config(preset)
    build.check(config)
    self.assertTrue(config.is_locked)
    self.assertEqual(config.env.name, "toy" if task == "smoke" else task)

  @parameterized.parameters(*all_presets())
  def test_adds_no_key_outside_the_environment(self, task, preset):
    config = importlib.import_module(f"configs.{task}").get_config(preset)
    known = train.flatten(base.get_config().to_dict()).keys()
    used = train.flatten(config.to_dict()).keys()
    self.assertEqual(
      {key for key in used if not key.startswith("env.")},
      {key for key in known if not key.startswith("env.")},
    )

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
  )
  def test_refuses_by_name(self, changes, key):
    config = base.get_config()
    config.update(changes)
    with self.assertRaisesRegex(ValueError, key):
      build.check(config)


if __name__ == "__main__":
  absltest.main()
