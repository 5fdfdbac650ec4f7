"""The string bandit: rules, splits, expert, ordered failures."""

import itertools
import time

from absl.testing import absltest, parameterized

from t2po_jax import envs
from t2po_jax.envs import base, prompts, toy


def _play(benchmark, task_id, seed=0):
  """One episode of the expert: (responses, results)."""
  env = benchmark.env()
  env.reset(task_id)
  player = env.expert(seed)
  responses, results = [], []
  while not results or not results[-1].done:
    responses.append(player.respond())
    results.append(env.step(responses[-1]))
  return responses, results


class ToyTest(parameterized.TestCase):
  def test_splits_are_disjoint_and_balanced(self):
    splits = envs.make("toy").splits
    self.assertEqual(set(splits), {"train", "valid", "test"})
    everything = list(itertools.chain(*splits.values()))
    self.assertLen(set(everything), len(everything))
    self.assertLen(everything, 2 * 4**3)
    for tasks in splits.values():
      echo = sum(task.startswith("echo-") for task in tasks)
      self.assertEqual(2 * echo, len(tasks))

  @parameterized.parameters(
    ("echo", "red", "red"), ("swap", "red", "green"), ("swap", "pink", "blue")
  )
  def test_rule(self, category, shown, answer):
    self.assertEqual(toy.right_answer(category, shown), answer)

  def test_swapping_twice_echoes(self):
    for colour in toy.COLOURS:
      once = toy.right_answer("swap", colour)
      self.assertNotEqual(once, colour)
      self.assertEqual(toy.right_answer("swap", once), colour)

  def test_episode(self):
    env = envs.make("toy", reward_success=3.0).env()
    first = env.reset("swap-red-blue-blue")
    self.assertEqual((first.task, first.text), ("swap", "red"))
    right = env.step("<think> x</think><action> GREEN</action>")
    self.assertEqual((right.reward, right.action), (1.0, "green"))
    self.assertTrue(right.format_valid and right.action_valid)
    self.assertEqual(right.observation.text, "blue")
    wrong = env.step("<action>blue</action>")
    self.assertEqual(wrong.reward, 0.0)
    self.assertFalse(wrong.format_valid or wrong.action_valid)
    last = env.step("<think> x</think><action> pink</action>")
    self.assertEqual((last.reward, last.done, last.success), (1.0, True, False))
    with self.assertRaisesRegex(RuntimeError, "call reset"):
      env.step("")

  def test_no_action_uses_up_the_turn(self):
    env = envs.make("toy").env()
    env.reset("echo-red-red-red")
    result = env.step("what?")
    self.assertEqual((result.action, result.reward), ("", 0.0))
    self.assertEqual(env.turn, 1)

  def test_unknown_task(self):
    with self.assertRaisesRegex(KeyError, "unknown task 'nope'"):
      envs.make("toy").env().reset("nope")

  def test_expert_always_wins(self):
    benchmark = envs.make("toy")
    lengths = set()
    for index, task in enumerate(itertools.chain(*benchmark.splits.values())):
      responses, results = _play(benchmark, task, index)
      self.assertLen(results, benchmark.max_turns)
      self.assertTrue(results[-1].success)
      self.assertAlmostEqual(sum(r.reward for r in results), 1.0)
      self.assertTrue(all(r.action_valid for r in results))
      lengths.update(len(response.split()) for response in responses)
    self.assertGreater(len(lengths), 1)

  def test_expert_repeats_by_seed(self):
    benchmark = envs.make("toy", expert_slip=0.5)
    task = benchmark.splits["train"][0]
    self.assertEqual(_play(benchmark, task, 7), _play(benchmark, task, 7))

  def test_slipping_expert_loses(self):
    benchmark = envs.make("toy", expert_slip=1.0)
    _, results = _play(benchmark, benchmark.splits["train"][0])
    self.assertEqual(sum(result.reward for result in results), 0.0)
    self.assertTrue(all(result.action_valid for result in results))

  def test_ordered_error_hits_chosen_tasks(self):
    bad, good = envs.make("toy").splits["train"][:2]
    benchmark = envs.make("toy", error_turn=2, faulty_tasks=(bad,))
    self.assertTrue(_play(benchmark, good)[1][-1].success)
    env = benchmark.env()
    env.reset(bad)
    env.step("")
    with self.assertRaisesRegex(base.EnvError, "turn 2"):
      env.step("")

  def test_ordered_sleep(self):
    benchmark = envs.make("toy", sleep_turn=1, sleep_seconds=0.05)
    env = benchmark.env()
    env.reset(benchmark.splits["train"][0])
    durations = []
    for _ in range(2):
      start = time.perf_counter()
      env.step("")
      durations.append(time.perf_counter() - start)
    self.assertGreaterEqual(durations[0], 0.05)
    self.assertLess(durations[1], 0.05)

  @parameterized.parameters(
    (
      {"expert_thoughts": 0},
      "env.expert_thoughts: found 0, expected at least 1",
    ),
    ({"expert_slip": 1.5}, "env.expert_slip: found 1.5"),
    ({"error_turn": 4}, "env.error_turn: found 4"),
    ({"sleep_turn": -1}, "env.sleep_turn: found -1"),
  )
  def test_bad_arguments(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      envs.make("toy", **arguments)

  def test_corpus_has_every_word(self):
    benchmark = envs.make("toy")
    known = set(" ".join(benchmark.corpus()).split())
    for task in benchmark.splits["test"]:
      responses, _ = _play(benchmark, task)
      self.assertLessEqual(set(" ".join(responses).split()), known)

  def test_prompt(self):
    view = prompts.View("echo", (("red", "red"),), "blue", (), 2, 3)
    (message,) = envs.make("toy").render(view)
    self.assertEqual(message, {"role": "user", "content": "echo blue"})

  def test_unknown_environment_names_the_nearest(self):
    with self.assertRaisesRegex(ValueError, "did you mean 'toy'"):
      envs.make("toi")


if __name__ == "__main__":
  absltest.main()
