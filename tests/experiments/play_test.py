"""Playing in the terminal: completing what is typed, whole episodes."""

import contextlib
import io
import subprocess
import sys

from absl.testing import absltest, parameterized

from t2po_jax import envs
from t2po_jax.envs import prompts
from t2po_jax.experiments import play
from tests import places

ROOT = places.ROOT


class PlayTest(parameterized.TestCase):
  @parameterized.parameters(
    (("action",), "click[a]", "action", "click[a]"),
    (("search", "answer"), "answer red mug", "answer", "red mug"),
    (("search", "answer"), "red mug", "search", "red mug"),
  )
  def test_complete(self, kinds, text, kind, content):
    grammar = prompts.Grammar(actions=kinds)
    parsed = prompts.parse(play.complete(text, grammar), grammar)
    self.assertTrue(parsed.format_valid)
    self.assertEqual((parsed.kind, parsed.content), (kind, content))

  def test_whole_responses_stay(self):
    text = "<think>a</think><action>b</action>"
    self.assertEqual(play.complete(text, prompts.Grammar()), text)

  @parameterized.parameters("toy", "webshop", "searchqa")
  def test_expert_plays(self, name):
    benchmark = envs.make(name)
    task = benchmark.splits["train"][0]
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
      played = play.play(
        benchmark,
        task,
        memory=2,
        start=lambda env: play.ask_expert(env, 0),
      )
    self.assertTrue(played)
    env = benchmark.env()
    first = env.reset(task)
    view = prompts.View(
      first.task, (), first.text, first.admissible, 1, benchmark.max_turns
    )
    for message in benchmark.render(view):
      self.assertIn(message["content"], screen.getvalue())
    self.assertIn("solved", screen.getvalue())

  def test_empty_line_stops(self):
    answers = iter(["<action> search[ mug ]</action>", ""])
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
      played = play.play(
        envs.make("webshop"),
        "embedded-0",
        memory=2,
        start=lambda env: lambda: next(answers),
      )
    self.assertFalse(played)
    self.assertIn("badly formed", screen.getvalue())
    self.assertIn("--- turn 2", screen.getvalue())

  def test_command_line(self):
    def run(*arguments):
      return subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "play.py"), *arguments],
        capture_output=True,
        text=True,
        input="red\n\n",
        timeout=60,
      )

    typed = run("--env=toy")
    self.assertEqual(typed.returncode, 0, typed.stderr)
    self.assertIn("--- turn 2", typed.stdout)
    wrong = run("--env=toy", "--task=none")
    self.assertIn("error: --task: no task 'none'", wrong.stderr)


if __name__ == "__main__":
  absltest.main()
