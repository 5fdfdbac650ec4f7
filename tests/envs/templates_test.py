"""Templates of prompts, the form of the published trainings, the parser."""

import pathlib
import tempfile

from absl.testing import absltest, parameterized

from t2po_jax import envs
from t2po_jax.envs import prompts, templates

THOUGHT = "<think>so</think>"
PLAIN = "<think>é</think><action>x</action>"
SHOUTED = "<Think>a</think><ACTION>Go</Action>"
CHINESE = "<think>你好</think><action>x</action>"


def view_of(benchmark, actions, memory=2):
  """The view after some actions of the first training task."""
  env = benchmark.env()
  observation, past = env.reset(benchmark.splits["train"][0]), []
  for kind, action in actions:
    result = env.step(f"{THOUGHT}<{kind}>{action}</{kind}>")
    past.append((observation.text, result.action))
    observation = result.observation
  return prompts.View(
    task=observation.task,
    memory=tuple(past[-memory:]),
    observation=observation.text,
    admissible=observation.admissible,
    turn=len(past) + 1,
    max_turns=benchmark.max_turns,
  )


def prompt(benchmark, view):
  (message,) = benchmark.render(view)
  return message["content"]


class ReferenceTest(absltest.TestCase):
  def test_alfworld(self):
    benchmark = envs.make("alfworld", wording="reference", train_tasks=6)
    first = view_of(benchmark, [])
    text = prompt(benchmark, first)
    self.assertIn(
      f"-= Welcome to TextWorld, ALFRED! =-\n\n{first.observation}\n\nYour "
      f"task is to: {first.task}.",
      text,
    )
    listed = "\n ".join(f"'{command}'" for command in first.admissible)
    self.assertIn(f"[{listed}].", text)
    go = first.admissible[0]
    later = view_of(benchmark, [("action", go), ("action", "inventory")])
    text = prompt(benchmark, later)
    self.assertIn(f"Your task is to: {later.task}\n", text)
    self.assertIn("taken 2 step(s)", text)
    self.assertIn("last 2 observations", text)
    self.assertIn("[Observation 1: '-= Welcome", text)
    self.assertIn(f"', Action 1: '{go}']\n[Observation 2: '", text)
    self.assertIn("Action 2: 'inventory']\nThis is step 3", text)

  def test_webshop(self):
    benchmark = envs.make("webshop", wording="reference", products=40)
    first = view_of(benchmark, [])
    self.assertEqual(first.observation, "'WebShop' [SEP] 'Search'")
    text = prompt(benchmark, first)
    self.assertIn("[\n'search[<your query>]',\n].", text)
    later = view_of(benchmark, [("action", "search[mug]")])
    text = prompt(benchmark, later)
    self.assertIn("'Back to Search' [SEP] 'Page 1 (Total results: ", text)
    self.assertIn(
      "[Observation 1: ''WebShop' [SEP] 'Search'', Action 1: 'search[mug]']",
      text,
    )
    self.assertIn("\n'click[back to search]',\n", text)

  def test_searchqa(self):
    benchmark = envs.make("searchqa", wording="reference", train_tasks=5)
    first = view_of(benchmark, [])
    self.assertNotIn("Step 1:", prompt(benchmark, first))
    later = view_of(benchmark, [("search", "one"), ("search", "two")], memory=4)
    text = prompt(benchmark, later)
    shown = later.memory[1][0]
    self.assertIn(f"Step 1:<search>one</search> {shown}\n\nStep 2:", text)
    self.assertIn(f"Step 2:<search>two</search> {later.observation}\n", text)

  def test_the_experts_still_play(self):
    for name in ("alfworld", "webshop", "searchqa"):
      benchmark = envs.make(name, wording="reference", expert_hesitation=0.0)
      env = benchmark.env()
      env.reset(benchmark.splits["train"][0])
      result, player = None, env.expert(0)
      while result is None or not result.done:
        result = env.step(player.respond())
        self.assertTrue(result.format_valid)
      self.assertTrue(result.success, name)


class FileTest(parameterized.TestCase):
  def write(self, text):
    folder = self.enter_context(tempfile.TemporaryDirectory())
    path = pathlib.Path(folder) / "prompt.txt"
    path.write_text(text)
    return str(path)

  def test_two_templates(self):
    path = self.write(
      "Now {current_observation} of {max_turns}\n=====\n"
      "{{Step}} {current_step}: {task_description} {memory_context}\n"
    )
    benchmark = envs.make("searchqa", prompt_file=path, train_tasks=5)
    first = view_of(benchmark, [])
    self.assertEqual(prompt(benchmark, first), f"Now {first.task} of 4")
    later = view_of(benchmark, [("search", "one")])
    self.assertStartsWith(
      prompt(benchmark, later), f"{{Step}} 2: {later.task} Step 1:"
    )

  def test_one_template_for_all_turns(self):
    path = self.write("{step_count} {available_actions}")
    benchmark = envs.make("webshop", prompt_file=path, products=40)
    self.assertEqual(
      prompt(benchmark, view_of(benchmark, [])), "0 'search[<your query>]',"
    )

  def test_text_from_outside_is_no_template(self):
    form = templates.Form(lambda view: "", lambda view: "")
    template = templates.Template("{current_observation}", "", form)
    view = prompts.View("t", (), "{task_description} {0}", (), 1, 4)
    (message,) = template.render(view)
    self.assertEqual(message["content"], "{task_description} {0}")

  @parameterized.parameters(
    (
      "{task_descripton}",
      "unknown field 'task_descripton'; did you mean 'task_",
    ),
    ("{task_description.__class__}", "unknown field 'task_description.__cl"),
    ("{", "a brace itself is written twice"),
    ("hello", "holds no field"),
    ("{max_turns}\n=====\na\n=====\nb", "found 3 templates"),
  )
  def test_bad_files_are_refused_at_the_start(self, text, message):
    path = self.write(text)
    with self.assertRaisesRegex(ValueError, f"env.prompt_file: .*{message}"):
      envs.make("searchqa", prompt_file=path)

  def test_a_missing_file(self):
    with self.assertRaisesRegex(ValueError, "env.prompt_file: /no: No such"):
      envs.make("alfworld", prompt_file="/no")


class ParserTest(parameterized.TestCase):
  @parameterized.parameters(
    (SHOUTED, {}, False, None, ""),
    (SHOUTED, {"any_case": True}, True, "action", "Go"),
    (f"{PLAIN}<ACTION>", {"any_case": True}, False, "action", "x"),
    (f"{PLAIN}<ACTION>", {}, False, "action", "x"),
    (CHINESE, {}, True, "action", "x"),
    (CHINESE, {"refuse_chinese": True}, False, "action", "x"),
    (PLAIN, {"refuse_chinese": True}, True, "action", "x"),
  )
  def test_variants(self, text, options, strict, kind, content):
    parsed = prompts.parse(text, prompts.Grammar(**options))
    self.assertEqual(parsed.format_valid, strict)
    self.assertEqual((parsed.kind, parsed.content), (kind, content))

  def test_from_the_settings(self):
    for name in ("alfworld", "webshop", "searchqa"):
      grammar = envs.make(name, tags="any case", refuse_chinese=True).grammar
      self.assertTrue(grammar.any_case and grammar.refuse_chinese)
      plain = envs.make(name).grammar
      self.assertFalse(plain.any_case or plain.refuse_chinese)


if __name__ == "__main__":
  absltest.main()
