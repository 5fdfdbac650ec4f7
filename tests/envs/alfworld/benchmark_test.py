"""Episodes, prompts and arguments of ALFWorld, by the contract."""

import statistics
import sys

from absl.testing import absltest, parameterized

from t2po_jax import envs
from t2po_jax.envs import base, prompts
from t2po_jax.envs.alfworld import benchmark as benchmark_lib
from t2po_jax.envs.alfworld import engine, original, problem
from t2po_jax.envs.alfworld.wordings import compact


def _respond(command, thought="t"):
  return f"<think> {thought}</think><action> {command}</action>"


class EpisodeTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.benchmark = envs.make("alfworld", reward_success=3.0, max_turns=9)
    cls.task_id = cls.benchmark.splits["train"][0]

  def setUp(self):
    super().setUp()
    self.env = self.benchmark.env()
    self.first = self.env.reset(self.task_id)

  def test_first_observation(self):
    player = engine.Twin(self.benchmark.board(self.task_id))
    text = player.reset()
    self.assertEqual(
      text,
      f"{engine.BANNER}\n\n{self.first.text}\n\n"
      f"Your task is to: {self.first.task}.",
    )
    self.assertNotIn("help", self.first.admissible)
    self.assertEqual(
      sorted((*self.first.admissible, "help")), list(player.admissible)
    )

  def test_observations_are_the_engines(self):
    player = engine.Twin(self.benchmark.board(self.task_id))
    for command in self.benchmark.read(self.task_id).walkthrough:
      result = self.env.step(_respond(command))
      self.assertEqual(result.observation.text, player.step(command))
      self.assertEqual(result.action, command)
      self.assertTrue(result.format_valid and result.action_valid)
      self.assertEqual(result.observation.task, self.first.task)
      self.assertEqual(result.success, result.done)
      self.assertEqual(result.reward, 3.0 if result.done else 0.0)
    self.assertTrue(result.success)
    with self.assertRaisesRegex(RuntimeError, "call reset"):
      self.env.step(_respond("look"))

  def test_case_and_space_do_not_matter(self):
    command = self.first.admissible[0]
    result = self.env.step(_respond(f"  {command.upper()}\n"))
    self.assertEqual(result.action, command)
    self.assertTrue(result.action_valid)

  @parameterized.parameters("help", "go to nowhere 1", "dance", "look around")
  def test_impossible_action_costs_a_turn(self, command):
    result = self.env.step(_respond(command))
    self.assertEqual(result.observation.text, "Nothing happens.")
    self.assertEqual(result.observation.admissible, self.first.admissible)
    self.assertEqual(result.action, command)
    self.assertTrue(result.format_valid)
    self.assertFalse(result.action_valid)
    for turn in range(2, 10):
      result = self.env.step(_respond(command))
      self.assertEqual(result.done, turn == 9)
    self.assertEqual((result.reward, result.success), (0.0, False))

  def test_badly_formed_action_is_executed_but_invalid(self):
    command = next(c for c in self.first.admissible if c.startswith("go"))
    result = self.env.step(f"<action>{command}</action>")
    self.assertStartsWith(result.observation.text, "You arrive")
    self.assertEqual(result.action, command)
    self.assertFalse(result.format_valid or result.action_valid)

  @parameterized.parameters("", "go to desk 1", "<action>look", "<action/>")
  def test_no_action(self, response):
    result = self.env.step(response)
    self.assertEqual(result.observation.text, compact.NO_ACTION)
    self.assertEqual(result.action, "")
    self.assertFalse(result.format_valid or result.action_valid)
    self.assertEqual(result.observation.admissible, self.first.admissible)

  @parameterized.parameters("move {} to {}", "put {} in/on {}")
  def test_both_dialects(self, form):
    walkthrough = self.benchmark.read(self.task_id).walkthrough
    for command in walkthrough[:-1]:
      self.env.step(_respond(command))
    thing, receptacle = benchmark_lib.expert.put_down(walkthrough[-1])
    result = self.env.step(_respond(form.format(thing, receptacle)))
    self.assertTrue(result.success and result.action_valid)
    self.assertEqual(result.action, walkthrough[-1])

  def test_reset_starts_again(self):
    self.env.step(_respond(self.first.admissible[0]))
    self.assertEqual(self.env.reset(self.task_id), self.first)
    other = self.env.reset(self.benchmark.splits["train"][1])
    self.assertNotEqual(other.task, self.first.task)

  def test_environments_do_not_disturb_each_other(self):
    second = self.benchmark.env()
    second.reset(self.task_id)
    for command in self.benchmark.read(self.task_id).walkthrough:
      second.step(_respond(command))
    result = self.env.step(_respond("look"))
    self.assertEqual(result.observation.admissible, self.first.admissible)

  def test_unknown_task(self):
    with self.assertRaisesRegex(KeyError, "unknown task 'nope'"):
      self.env.reset("nope")

  def test_closed_environment_starts_again(self):
    self.env.close()
    with self.assertRaisesRegex(RuntimeError, "call reset"):
      self.env.step(_respond("look"))
    with self.assertRaisesRegex(RuntimeError, "call reset"):
      self.env.expert(0)
    self.assertEqual(self.env.reset(self.task_id), self.first)


class BenchmarkTest(parameterized.TestCase):
  def test_splits_and_categories(self):
    benchmark = envs.make("alfworld", train_tasks=13, test_tasks=6)
    self.assertEqual(
      {name: len(ids) for name, ids in benchmark.splits.items()},
      {"train": 13, "valid": 60, "test": 6},
    )
    self.assertEqual(
      [benchmark.category(i) for i in benchmark.splits["test"]],
      list(problem.TASK_TYPES),
    )
    self.assertEqual(
      benchmark.splits,
      envs.make("alfworld", train_tasks=13, test_tasks=6).splits,
    )

  def test_boards_are_bounded(self):
    benchmark = envs.make("alfworld", train_tasks=140)
    for task_id in benchmark.splits["train"]:
      benchmark.board(task_id)
    self.assertLessEqual(len(benchmark._boards), 128)
    task_id = benchmark.splits["train"][-1]
    self.assertIs(benchmark.board(task_id), benchmark.board(task_id))

  @parameterized.parameters(
    ({"wording": "verbose"}, "env.wording: found 'verbose'"),
    ({"engine": "turbo"}, "env.engine: .*one of cached, stock, twin"),
    ({"size": "huge"}, "env.size: .*one of full, small, tiny"),
    ({"expert_mode": "lazy"}, "env.expert_mode: .*explore, walkthrough"),
    ({"task_types": ("sleep",)}, "env.task_types: .*pick_and_place_simple"),
    ({"task_types": ()}, "env.task_types: none"),
    ({"max_turns": 0}, "env.max_turns: found 0"),
    ({"expert_hesitation": -1.0}, "env.expert_hesitation: found -1.0"),
    ({"expert_doubt": 1.5}, "env.expert_doubt: found 1.5"),
    ({"valid_tasks": -2}, "env.valid_tasks: found -2"),
    ({"data_dir": "/nowhere"}, "env.data_dir: /nowhere does not exist"),
  )
  def test_bad_arguments(self, arguments, message):
    with self.assertRaisesRegex(ValueError, f"^{message}") as caught:
      envs.make("alfworld", **arguments)
    self.assertNotIn("\n", str(caught.exception))

  def test_engine_that_is_not_installed(self):
    missing = absltest.mock.patch.dict(sys.modules, {"textworld": None})
    version = absltest.mock.patch.object(sys, "version_info", (3, 12, 1))
    with missing, version:
      with self.assertRaisesRegex(
        ValueError, r"pip install -e '\.\[alfworld\]'"
      ):
        envs.make("alfworld", engine="stock")

  def test_engine_on_a_python_it_does_not_run_on(self):
    version = absltest.mock.patch.object(sys, "version_info", (3, 13, 0))
    with version, self.assertRaisesRegex(ValueError, "up to 3.12, found 3.13"):
      envs.make("alfworld", engine="cached")

  def test_failing_engine_is_an_infrastructure_failure(self):
    benchmark = envs.make("alfworld")
    benchmark.engine = "cached"  # Past the check: the import fails later.

    class Broken(original.Original):
      def __init__(self, *, cached):
        self.admissible, self.won = ("look",), False

      def load(self, file):
        del file

      def reset(self):
        return "room\n\nYour task is to: x."

      def step(self, command):
        raise OSError("gone")

    env = benchmark.env()
    with absltest.mock.patch.object(original, "Original", Broken):
      env.reset(benchmark.splits["train"][0])
      with self.assertRaisesRegex(base.EnvError, "failed at 'look'.*gone"):
        env.step(_respond("look"))
      with self.assertRaisesRegex(RuntimeError, "call reset"):
        env.step(_respond("look"))
      Broken.reset = Broken.step.__get__(None, Broken)
      with self.assertRaisesRegex(base.EnvError, "cannot load train/"):
        env.reset(benchmark.splits["train"][0])


class IntroTest(parameterized.TestCase):
  def test_splits_room_and_task(self):
    text = f"{engine.BANNER}\n\nA room.\n\nYour task is to: put a b in c."
    self.assertEqual(
      benchmark_lib.split_intro(text), ("A room.", "put a b in c")
    )


class WordingTest(parameterized.TestCase):
  def _views(self, wording, size, turns):
    """(view, response) of a few expert episodes."""
    benchmark = envs.make(
      "alfworld", wording=wording, size=size, max_turns=turns
    )
    for index, task_id in enumerate(benchmark.splits["train"][:24]):
      env = benchmark.env()
      observation, memory = env.reset(task_id), []
      player = env.expert(index)
      for turn in range(1, turns + 1):
        view = prompts.View(
          observation.task,
          tuple(memory[-2:]),
          observation.text,
          observation.admissible,
          turn,
          turns,
        )
        response = player.respond()
        yield benchmark, view, response
        result = env.step(response)
        memory.append((observation.text, result.action))
        observation = result.observation
        if result.done:
          break

  @parameterized.parameters(("compact", "small", 16), ("full", "full", 50))
  def test_prompt_shows_task_and_every_action(self, wording, size, turns):
    for benchmark, view, response in self._views(wording, size, turns):
      (message,) = benchmark.render(view)
      self.assertEqual(message["role"], "user")
      text = message["content"]
      self.assertIn(view.task, text)
      for command in view.admissible:
        self.assertIn(command, text)
      for _, action in view.memory:
        self.assertIn(action, text)
      parsed = prompts.parse(response, benchmark.grammar)
      self.assertTrue(parsed.format_valid)
      self.assertIn(parsed.content, view.admissible)
      if wording == "full":
        self.assertIn(view.observation, text)
        self.assertIn(f"turn {view.turn} of {turns}", text)

  def test_compact_is_short(self):
    lengths, responses = [], []
    for benchmark, view, response in self._views("compact", "small", 16):
      text = benchmark.render(view)[0]["content"]
      lengths.append(len(text.replace("<", " <").replace(">", "> ").split()))
      responses.append(len(response.replace("<", " <").split()))
    self.assertLess(max(lengths), 150)
    self.assertBetween(statistics.mean(responses), 10, 25)
    self.assertLessEqual(max(responses), 46)

  def test_compact_words_follow_a_space(self):
    for benchmark, view, response in self._views("compact", "small", 16):
      text = benchmark.render(view)[0]["content"] + response
      self.assertNotRegex(text, r">[^ <]| <")
      self.assertNotIn("  ", text)

  @parameterized.parameters(
    (
      "You arrive at desk 1. On the desk 1, you see a mug 1, and a pen 2.",
      "desk 1 mug 1 pen 2 .",
    ),
    ("You arrive at drawer 1. The drawer 1 is closed.", "drawer 1 closed ."),
    (
      "You open the drawer 1. The drawer 1 is open. In it, you see nothing.",
      "drawer 1 open in nothing .",
    ),
    ("You pick up the mug 1 from the desk 1.", "pick up mug 1 desk 1 ."),
    ("You are in the middle of a room. Looking quickly", "start ."),
    ("Nothing happens.", "nothing happens ."),
  )
  def test_compact_observations(self, text, words):
    self.assertEqual(compact.observe(text), words)

  @parameterized.parameters(
    (("find", "mug", "go to desk 1"), "find mug go desk 1 ."),
    (("find", "mug", "take mug 1 from desk 1"), "find mug take 1 desk 1 ."),
    (
      ("heat", "mug 1", "heat mug 1 with microwave 1"),
      "heat mug 1 microwave 1 .",
    ),
    (("put", "mug 1", "move mug 1 to desk 1"), "put mug 1 move desk 1 ."),
  )
  def test_compact_thoughts(self, arguments, thought):
    self.assertEqual(compact.plan(*arguments), thought)

  def test_corpus_holds_prompts_and_responses(self):
    benchmark = envs.make("alfworld", train_tasks=12)
    corpus = benchmark.corpus()
    self.assertEqual(corpus, benchmark.corpus())
    self.assertTrue(all("</action>" in text for text in corpus))
    words = set(" ".join(corpus).split())
    self.assertContainsSubset({"task", "look", ";", "go", "1"}, words)


if __name__ == "__main__":
  absltest.main()
