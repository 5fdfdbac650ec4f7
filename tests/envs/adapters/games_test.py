"""Adapters of game libraries, with the real packages."""

import pathlib
import random
import sys
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized
import numpy as np

from t2po_jax import envs
from t2po_jax.configs import gymnasium as gymnasium_config
from t2po_jax.configs import textarena as textarena_config
from t2po_jax.envs import checks

FROZEN = "t2po_jax.envs.adapters.frozen_lake"
FEW = dict(train_tasks=6, valid_tasks=2, test_tasks=2)

# A text game as somebody would write it for Gymnasium.
ECHO = """
import gymnasium
from gymnasium import spaces


class Echo(gymnasium.Env):
  observation_space = spaces.Text(20)
  action_space = spaces.Text(20)

  def reset(self, *, seed=None, options=None):
    super().reset(seed=seed)
    self.word = str(self.np_random.choice(["red", "green", "blue"]))
    return f"say {self.word}", {}

  def step(self, action):
    right = action == self.word
    return "over", float(right), True, False, {}


gymnasium.register("Echo-v0", entry_point=Echo)


def answer(env, draw):
  return env.unwrapped.word


def shout(env, observation):
  return observation.upper(), ("red", "green", "blue")
"""


def sound(test, benchmark, *, tasks):
  """Finds no fault in episodes of some tasks; gives them."""
  played = [checks.explore(benchmark, task, 0) for task in tasks]
  for finding in (
    checks.check_determinism(benchmark, played),
    checks.check_answers(benchmark, played),
    checks.check_admissible(benchmark, played[:1]),
    checks.check_refusals(benchmark, played),
  ):
    test.assertIn(finding.verdict, ("ok", "note"), finding)
  return played


class TextArenaTest(parameterized.TestCase):
  @parameterized.parameters(
    *("2048-v0", "Mastermind-v0", "TowerOfHanoi-v0", "Minesweeper-v0"),
    *("Blackjack-v0", "Bandit-v0", "LightsOut-v0", "GuessTheNumber-v0"),
    "FrozenLake-v0",
  )
  def test_games_play_offline_and_repeat(self, game):
    benchmark = envs.make("textarena", game=game, **FEW)
    for played in sound(self, benchmark, tasks=benchmark.splits["train"][:2]):
      self.assertGreater(len(played.observations[0].task), 50)
      self.assertNotIn("[GAME]", played.observations[0].text)

  def test_the_same_in_any_order_of_play(self):
    benchmark = envs.make("textarena", game="2048-v0", **FEW)
    one, two = benchmark.env(), benchmark.env()
    alone = one.reset("seed-0")
    moves = ["<think>a</think><action>up</action>"] * 4 + [
      "<think>a</think><action>left</action>"
    ] * 4
    lonely = [one.step(move) for move in moves]
    random.seed(7)
    np.random.seed(7)
    expected = random.Random(7).random()
    self.assertEqual(one.reset("seed-0"), alone)
    two.reset("seed-1")
    mixed = []
    for move in moves:
      two.step(move)
      mixed.append(one.step(move))
    self.assertEqual(mixed, lonely)
    self.assertNotEqual(two.reset("seed-1"), alone)
    self.assertEqual(random.random(), expected)  # Chance outside is untouched.

  def test_frozen_lake_in_few_words(self):
    config = textarena_config.get_config().env.to_dict()
    name = config.pop("name")
    benchmark = envs.make(name, **config | FEW | {"expert_hesitation": 0.0})
    openings = set()
    for task_id in (t for ids in benchmark.splits.values() for t in ids):
      env = benchmark.env()
      openings.add(env.reset(task_id).text)
      player, result = env.expert(0), None
      while result is None or not result.done:
        result = env.step(player.respond())
      self.assertTrue(result.success, task_id)
      self.assertEqual(result.reward, 1.0)
    self.assertLen(openings, 10)
    self.assertRegex(
      openings.pop(), r"^holes \d \d , \d \d , \d \d goal \d \d me \d \d$"
    )

  def test_moves_against_the_rules(self):
    benchmark = envs.make("textarena", **FEW)
    env = benchmark.env()
    env.reset("seed-3")
    into_the_wall = env.step("<think>a</think><action>up</action>")
    self.assertTrue(into_the_wall.format_valid)
    self.assertFalse(into_the_wall.action_valid or into_the_wall.done)
    fine = env.step("<think>a</think><action>[right]</action>")
    self.assertTrue(fine.action_valid)
    env.reset("seed-3")
    env.step("")
    over = env.step("")
    self.assertTrue(over.done)
    self.assertFalse(over.success or over.action_valid)

  @parameterized.parameters(
    ({"game": "FrozenLak-v0"}, "env.game: .*did you mean 'FrozenLake-v0'"),
    ({"game": "TicTacToe-v0"}, "cannot be set up for one player"),
    ({"describe": "nothing"}, "env.describe: found 'nothing'.*module:function"),
    ({"expert": "json:nothing"}, "env.expert: found 'json:nothing'"),
    (
      {"game": "TowerOfHanoi-v0", "distinct": True},
      "env.train_tasks: 10 different .* found 1 openings",
    ),
  )
  def test_bad_arguments(self, values, message):
    with self.assertRaisesRegex(ValueError, message):
      envs.make("textarena", **FEW | values)

  def test_the_package_is_named_when_it_is_missing(self):
    for name in ("textarena", "gymnasium"):
      with mock.patch.dict(sys.modules, {name: None}):
        with self.assertRaisesRegex(ValueError, f"install the extra '{name}'"):
          envs.make(name)


class GymnasiumTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.enter_context(mock.patch("sys.path", [folder, *sys.path]))
    (pathlib.Path(folder) / "echo_game.py").write_text(ECHO)

  def test_a_text_game(self):
    benchmark = envs.make(
      "gymnasium",
      id="echo_game:Echo-v0",
      task="Say it.",
      expert="echo_game:answer",
      **FEW,
    )
    sound(self, benchmark, tasks=benchmark.splits["train"])
    env = benchmark.env()
    shown = set()
    for task_id in benchmark.splits["train"]:
      observation = env.reset(task_id)
      shown.add(observation.text)
      self.assertEqual(observation.task, "Say it.")
      result = env.step(env.expert(0).respond())
      self.assertTrue(result.success and result.done)
      self.assertEqual(result.reward, 1.0)
    self.assertGreater(len(shown), 1)
    self.assertFalse(env.reset("seed-0") and env.step("").success)

  def test_described(self):
    benchmark = envs.make(
      "gymnasium",
      id="echo_game:Echo-v0",
      describe="echo_game:shout",
      reward_scale=3.0,
      **FEW,
    )
    env = benchmark.env()
    first = env.reset("seed-1")
    self.assertEqual(first.admissible, ("red", "green", "blue"))
    word = first.text.removeprefix("SAY ").lower()
    result = env.step(f"<think>a</think><action>{word}</action>")
    self.assertEqual(result.reward, 3.0)
    with self.assertRaises(NotImplementedError):
      env.expert(0)

  def test_taxi(self):
    config = gymnasium_config.get_config().env.to_dict()
    name = config.pop("name")
    benchmark = envs.make(name, **config | FEW | {"expert_hesitation": 0.0})
    sound(self, benchmark, tasks=benchmark.splits["train"][:2])
    for task_id in benchmark.splits["train"]:
      env = benchmark.env()
      self.assertRegex(
        env.reset(task_id).text, r"^taxi \d \d passenger \d \d goal \d \d$"
      )
      player, result, total = env.expert(0), None, 0.0
      while result is None or not result.done:
        result = env.step(player.respond())
        total += result.reward
      self.assertTrue(result.success)
      self.assertGreater(total, 0.0)
    env = benchmark.env()
    env.reset("seed-0")
    lost = env.step("<think>a</think><action>fly</action>")
    self.assertFalse(lost.action_valid)
    self.assertEqual(lost.reward, 0.0)

  def test_ice_in_words(self):
    benchmark = envs.make(
      "gymnasium",
      describe=f"{FROZEN}:describe",
      expert=f"{FROZEN}:expert",
      actions=("left", "down", "right", "up"),
      options='{"is_slippery": false}',
      **FEW,
    )
    env = benchmark.env()
    first = env.reset("seed-0")
    self.assertEqual(first.text, "holes 1 1 , 1 3 , 2 3 , 3 0 goal 3 3 me 0 0")
    player, result = env.expert(0), None
    while result is None or not result.done:
      result = env.step(player.respond())
    self.assertTrue(result.success)

  @parameterized.parameters(
    ({"id": "Nothing-v0"}, "env.id: 'Nothing-v0'"),
    ({"options": "{"}, "env.options: found '{'"),
    ({"options": '{"is_slipery": true}'}, "env.id: 'FrozenLake-v1'"),
    ({"actions": ("up",)}, "env.actions: found 1 names, expected 4"),
    ({"id": "CartPole-v1"}, "env.describe: CartPole-v1 shows Box"),
    ({"id": "Pendulum-v1"}, "env.id: Pendulum-v1 has actions of Box"),
  )
  def test_bad_arguments(self, values, message):
    with self.assertRaisesRegex(ValueError, message):
      envs.make("gymnasium", **FEW | values)


if __name__ == "__main__":
  absltest.main()
