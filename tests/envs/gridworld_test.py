"""The grid: rules, maps, slips, and an expert with habits."""

import random

from absl.testing import absltest, parameterized
import numpy as np

from t2po_jax import envs
from t2po_jax.envs import base, gridworld, prompts

SMALL = dict(train_tasks=40, valid_tasks=10, test_tasks=10)


def make(**values):
  return envs.make("gridworld", **(SMALL | values))


def say(direction, thought="x"):
  return f"<think> {thought}</think><action> go {direction}</action>"


def placed(benchmark, drawn):
  """An environment on a map of the test's own."""
  benchmark.maps["own"] = drawn
  env = benchmark.env()
  return env, env.reset("own")


# . # G
# S # .
# . . .
CORNER = gridworld.Map(
  3, frozenset({(0, 1), (1, 1)}), frozenset(), (1, 0), (0, 2)
)


def walk(benchmark, task, seed):
  """Responses and results of the expert's walk."""
  env = benchmark.env()
  env.reset(task)
  player = env.expert(seed)
  responses, results = [], []
  while not results or not results[-1].done:
    responses.append(player.respond())
    results.append(env.step(responses[-1]))
  return responses, results


class MapTest(parameterized.TestCase):
  def test_distances_by_hand(self):
    self.assertEqual(
      CORNER.distances(),
      {
        (0, 2): 0, (1, 2): 1, (2, 2): 2, (2, 1): 3, (2, 0): 4, (1, 0): 5,
        (0, 0): 6,
      },
    )  # fmt: skip

  def test_every_task_has_the_walk_that_was_asked_for(self):
    benchmark = make(shortest=5, longest=7, holes=0.1)
    names = [name for split in benchmark.splits.values() for name in split]
    self.assertLen(set(names), 60)
    self.assertLen(set(benchmark.maps.values()), 60)
    for name in names:
      steps = int(benchmark.category(name).split()[0])
      self.assertBetween(steps, 5, 7)
      # The expert, without habits, walks no step more.
      _, results = walk(benchmark, name, 0)
      self.assertLen(results, steps)
      self.assertTrue(results[-1].success)

  def test_the_same_on_every_machine(self):
    one, other = make(), make()
    self.assertEqual(one.maps, other.maps)
    self.assertNotEqual(one.maps, make(seed=1).maps)

  @parameterized.parameters(
    ({"shortest": 9, "longest": 8}, "env.longest"),
    (
      {"size": 3, "walls": 0.0, "shortest": 9, "longest": 9},
      "no map of size 3",
    ),
    ({"walls": 0.9}, "env.walls"),
    ({"wals": 0.1}, "did you mean 'walls'"),
  )
  def test_refuses(self, values, named):
    with self.assertRaisesRegex(ValueError, named):
      make(**values)


class StepTest(parameterized.TestCase):
  def test_a_walk_by_hand(self):
    env, first = placed(make(), CORNER)
    self.assertEqual(first.text, "goal east 2 north 1 . open north south .")
    # A wall answers with the same observation and costs nothing but a turn.
    bump = env.step(say("east"))
    self.assertEqual(bump.observation.text, first.text)
    self.assertEqual((bump.reward, bump.info["bumped"]), (0.0, 1.0))
    self.assertTrue(bump.action_valid and not bump.done)
    for direction in ("south", "east", "east", "north"):
      self.assertFalse(env.step(say(direction)).done)
    last = env.step(say("north"))
    self.assertEqual((last.reward, last.success, last.done), (1.0, True, True))
    self.assertEqual(last.observation.text, "goal here .")
    with self.assertRaisesRegex(RuntimeError, "call reset"):
      env.step(say("north"))

  @parameterized.parameters(
    ("<think> x</think><action> go up</action>", True),
    ("<think> x</think><action> north</action>", True),
    ("<think> x</think><action></action>", True),
    ("<think> north", False),
    (say("south") + say("south"), False),
  )
  def test_nonsense_moves_nobody(self, response, formed):
    env, _ = placed(make(), CORNER)
    result = env.step(response)
    self.assertEqual(env.place, (1, 0))
    self.assertEqual((result.action, result.action_valid), ("", False))
    self.assertEqual(result.format_valid, formed)

  def test_ends_after_the_last_turn(self):
    env, _ = placed(make(max_turns=2), CORNER)
    self.assertFalse(env.step(say("east")).done)
    last = env.step(say("east"))
    self.assertTrue(last.done and not last.success)

  def test_a_hole_ends_the_episode(self):
    holes = gridworld.Map(3, frozenset(), frozenset({(1, 1)}), (1, 0), (0, 2))
    env, first = placed(make(), holes)
    self.assertEndsWith(first.text, ". open north south . hole east .")
    result = env.step(say("east"))
    self.assertTrue(result.done and not result.success)
    self.assertEqual(result.reward, 0.0)

  def test_slips_go_sideways_as_often_as_asked_for(self):
    free = gridworld.Map(5, frozenset(), frozenset(), (2, 2), (0, 0))
    benchmark = make(slip=0.4)
    ends = []
    for number in range(600):
      env, _ = placed(benchmark, free)
      env.step(say("north", str(number)))
      ends.append(env.place)
    shares = [ends.count(place) / 600 for place in ((1, 2), (2, 1), (2, 3))]
    np.testing.assert_allclose(shares, [0.6, 0.2, 0.2], atol=0.06)
    # What was said decides: the same episode again ends in the same place.
    again, _ = placed(benchmark, free)
    again.step(say("north", "7"))
    self.assertEqual(again.place, ends[7])

  def test_unknown_task(self):
    with self.assertRaisesRegex(KeyError, "unknown task"):
      make().env().reset("nowhere")


class ExpertTest(absltest.TestCase):
  def test_repeats_its_turn_word_for_word(self):
    benchmark = make(expert_loop=0.6)
    repeated = total = 0
    for seed, task in enumerate(benchmark.splits["train"]):
      responses, results = walk(benchmark, task, seed)
      self.assertTrue(all(result.format_valid for result in results))
      total += len(responses) - 1
      pairs = zip(responses, responses[1:], strict=False)
      repeated += sum(a == b for a, b in pairs)
    self.assertBetween(repeated / total, 0.5, 0.75)

  def test_hesitation_repeats_the_thought(self):
    benchmark = make(expert_hesitation=1.0)
    rounds = [
      walk(benchmark, task, seed)[0][0].count("again")
      for seed, task in enumerate(benchmark.splits["train"])
    ]
    self.assertBetween(np.mean(rounds), 0.5, 1.5)
    self.assertLessEqual(max(rounds), gridworld.MAX_ROUNDS)

  def test_prompts_show_the_last_turns(self):
    benchmark = make()
    view = prompts.View("t", (("seen .", "go east"),), "now .", (), 2, 12)
    (message,) = benchmark.render(view)
    text = "G seen .<action> go east</action> now ."
    self.assertEqual(message["content"], text)
    self.assertTrue(all("<think>" in text for text in benchmark.corpus()))

  def test_is_a_benchmark_of_the_contract(self):
    benchmark = make()
    env = benchmark.env()
    task = random.Random(0).choice(benchmark.splits["valid"])
    self.assertIsInstance(env.reset(task), base.Observation)
    env.close()


if __name__ == "__main__":
  absltest.main()
