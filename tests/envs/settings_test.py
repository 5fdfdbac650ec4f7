"""Settings: every one is a config key; what is wrong is said in one line."""

import dataclasses
import importlib
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized

from t2po_jax import envs, keys
from t2po_jax.configs import environment
from t2po_jax.envs import base, toy
from tests import places

TASKS = {
  "smoke": "toy",
  "searchqa": "searchqa",
  "webshop": "webshop",
  "alfworld": "alfworld",
}


class SettingsTest(parameterized.TestCase):
  @parameterized.parameters(*TASKS.items())
  def test_every_argument_is_a_key_of_the_config(self, task, name):
    module = importlib.import_module(f"t2po_jax.configs.{task}")
    config = module.get_config().env.to_dict()
    self.assertEqual(config.pop("name"), name)
    section = envs.settings(name)
    fields = {field.name: field for field in dataclasses.fields(section)}
    self.assertEqual(set(config), set(fields))
    self.assertEqual(set(keys.keys_of(section)), set(fields))
    section(**config)  # The task's own values are within bounds.

  @parameterized.parameters(*envs.BUILT_IN)
  def test_every_key_says_what_it_means(self, name):
    for key in keys.keys_of(envs.settings(name)).values():
      self.assertGreater(len(key.meaning), 5, key.name)
      key.check(key.default)

  @parameterized.parameters(
    ({"sleep_turn": "1"}, "env.sleep_turn: found '1', expected an integer"),
    ({"sleep_turn": True}, "env.sleep_turn: found True"),
    ({"sleep_turn": 1.0}, "env.sleep_turn: found 1.0"),
    ({"faulty_tasks": "a"}, "env.faulty_tasks: found 'a', expected a list"),
    ({"leak": float("nan")}, "env.leak: found nan"),
  )
  def test_wrong_types_are_refused(self, values, message):
    with self.assertRaisesRegex(ValueError, message):
      toy.Settings(**values)

  def test_fitting_types_are_taken(self):
    made = toy.Settings(leak=2, faulty_tasks=["a"])
    self.assertIsInstance(made.leak, float)
    self.assertEqual(made.faulty_tasks, ("a",))
    made = envs.settings("alfworld")(data_dir=pathlib.Path("/x"))
    self.assertEqual(made.data_dir, "/x")

  def test_an_unknown_key_names_the_nearest_and_the_list(self):
    for make in (envs.make, environment.section):
      with self.assertRaisesRegex(
        ValueError, "env.expert_slips: .*mean 'expert_slip'.*known: error_turn"
      ):
        make("toy", expert_slips=0.5)

  @parameterized.parameters(
    ("--config.env.retreiver=http", "'env.retreiver'; did you mean 'retriever"),
    ("--config.env.retriever=htp", "env.retriever: found 'htp'.*bm25, dense"),
    ("--config.env.tfds=nqopen", "env.tfds: .*give env.data_dir"),
    ("--config.env.people=7", "env.people: 7"),
  )
  def test_the_command_line_sets_and_refuses_them(self, argument, message):
    with tempfile.TemporaryDirectory() as folder:
      done = subprocess.run(
        [
          *(sys.executable, places.ROOT / "experiments/main.py"),
          f"--config={places.ROOT / 'configs/searchqa.py'}",
          argument,
          f"--workdir={folder}/run",
        ],
        capture_output=True,
        text=True,
        timeout=300,
      )
    self.assertEqual(done.returncode, 1)
    self.assertRegex(done.stderr, message)
    self.assertNotIn("Traceback", done.stderr)


class FindTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.enter_context(mock.patch("sys.path", [folder, *sys.path]))
    self.addCleanup(sys.modules.pop, "own_games", None)
    (pathlib.Path(folder) / "own_games.py").write_text(
      "from t2po_jax.envs import toy\n"
      "class Mine(toy.ToyBenchmark):\n"
      "  pass\n"
      "class Bare:\n"
      "  pass\n"
    )

  def test_by_module_and_class(self):
    made = envs.make("own_games:Mine", reward_success=2.0)
    self.assertEqual(type(made).__name__, "Mine")
    self.assertEqual(made.settings.reward_success, 2.0)
    section = environment.section("own_games:Mine", expert_slip=0.5)
    self.assertEqual(section.name, "own_games:Mine")
    self.assertEqual(section.expert_slip, 0.5)

  def test_by_entry_point(self):
    point = mock.Mock(value="own_games:Mine")
    point.name = "mine"
    with mock.patch.object(
      envs.metadata, "entry_points", return_value=[point]
    ) as asked:
      self.assertEqual(type(envs.make("mine")).__name__, "Mine")
      with self.assertRaisesRegex(ValueError, "did you mean 'mine'"):
        envs.find("min")
    asked.assert_called_with(group="t2po_jax.environments")

  def test_what_is_missing_is_said(self):
    for name, message in {
      "own_gams:Mine": "'own_gams:Mine' cannot be imported: No module named",
      "own_games:Yours": "module own_games has no 'Yours'",
      "own_games:Bare": "no dataclass `Settings`",
    }.items():
      with self.assertRaisesRegex(ValueError, f"env.name: .*{message}"):
        envs.find(name)

  def test_built_in_names_cannot_be_taken(self):
    point = mock.Mock(value="own_games:Mine")
    point.name = "toy"
    with mock.patch.object(envs.metadata, "entry_points", return_value=[point]):
      self.assertIs(envs.find("toy"), toy.ToyBenchmark)

  def test_benchmarks_are_made_of_settings_alone(self):
    made = toy.ToyBenchmark(toy.Settings(expert_slip=1.0))
    self.assertIsInstance(made.settings, base.Settings)
    self.assertEqual(made.settings.expert_slip, 1.0)


if __name__ == "__main__":
  absltest.main()
