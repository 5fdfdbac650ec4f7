"""Tool calls: a benchmark with tags, played by calls."""

import dataclasses
import json
import pickle

from absl.testing import absltest, parameterized
import hypothesis
from hypothesis import strategies

from t2po_jax import envs
from t2po_jax.envs import checks, prompts, tool_calls

THOUGHT = "<think>so</think>\n"


def call(name="search", **arguments):
  text = json.dumps({"name": name, "arguments": arguments})
  return f"<tool_call>\n{text}\n</tool_call>"


def make(name="searchqa", **settings):
  return envs.make(name, grammar="tool_call", **settings)


class ReadTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.benchmark = make()

  def parse(self, response):
    tagged = self.benchmark.to_tags(response)
    return prompts.parse(tagged, self.benchmark.tagged.grammar)

  def test_calls_are_actions(self):
    parsed = self.parse(THOUGHT + call(query="red mug"))
    self.assertEqual((parsed.kind, parsed.content), ("search", "red mug"))
    self.assertTrue(parsed.format_valid)
    parsed = self.parse(THOUGHT + call("answer", answer='Él "x" \n y'))
    self.assertEqual((parsed.kind, parsed.content), ("answer", 'Él "x" \n y'))
    self.assertTrue(parsed.format_valid)
    compact = '<think>so</think><tool_call>{"name":"search","arguments":'
    parsed = self.parse(compact + '{"query":"a"}}</tool_call>')
    self.assertEqual((parsed.content, parsed.format_valid), ("a", True))

  @parameterized.named_parameters(
    ("no json", "<tool_call>search red mug</tool_call>"),
    ("single quotes", "<tool_call>{'name': 'search'}</tool_call>"),
    ("open brace", '<tool_call>{"name": "search"</tool_call>'),
    ("unknown tool", call("buy", query="x")),
    ("other argument", call(text="x")),
    ("further argument", call(query="x", count=3)),
    ("a number", call(query=3)),
    ("no arguments", '<tool_call>{"name": "search"}</tool_call>'),
    ("text for arguments", call().replace("{}", '"x"')),
    ("a list", "<tool_call>[]</tool_call>"),
    ("a list for a name", '<tool_call>{"name":[],"arguments":{}}</tool_call>'),
    ("deep", "<tool_call>" + "[" * 100_000 + "</tool_call>"),
    ("long number", "<tool_call>" + "1" * 10_000 + "</tool_call>"),
    ("unclosed", call(query="x").removesuffix("</tool_call>")),
    ("a tag", "<search>x</search>"),
    ("a tag in a call", call(query="a</search><answer>b</answer>")),
    ("a tag in a broken call", "<tool_call><search>x</search></tool_call>"),
    ("nothing", ""),
  )
  def test_everything_else_is_no_action(self, block):
    parsed = self.parse(THOUGHT + block)
    self.assertIsNone(parsed.kind)
    self.assertFalse(parsed.format_valid)
    env = self.benchmark.env()
    env.reset(self.benchmark.splits["train"][0])
    result = env.step(THOUGHT + block)
    self.assertEqual((result.action, result.action_valid), ("", False))

  def test_two_calls_are_no_well_formed_response(self):
    parsed = self.parse(THOUGHT + call(query="x") + call(query="y"))
    self.assertEqual((parsed.opened, parsed.format_valid), (2, False))
    parsed = self.parse(call(query="x"))  # No thought.
    self.assertEqual((parsed.content, parsed.format_valid), ("x", False))

  @hypothesis.given(
    parts=strategies.lists(
      strategies.sampled_from(
        [*'{}[]":, x1', "<tool_call>", "</tool_call>", "<search>"]
      )
    )
  )
  @hypothesis.settings(max_examples=200, deadline=None)
  def test_nothing_raises(self, parts):
    self.parse("".join(parts))

  @hypothesis.given(content=strategies.text())
  @hypothesis.settings(max_examples=100, deadline=None)
  def test_read_inverts_write(self, content):
    grammar = self.benchmark.grammar
    for kind in ("search", "answer"):
      written = grammar.write(content, kind)
      inside = written.removeprefix("<tool_call>").removesuffix("</tool_call>")
      self.assertEqual(grammar.read(inside), (kind, content))


class WriteTest(parameterized.TestCase):
  def test_the_forced_text_leads_into_a_call(self):
    several, one = make().grammar, make("toy").grammar
    self.assertEqual(several.closing, '</think>\n<tool_call>\n{"name": "')
    self.assertTrue(
      one.write("red").startswith(one.closing[len("</think>\n") :])
    )
    self.assertEqual(one.stops, ("</tool_call>",))

  def test_schemas_are_those_of_chat_templates(self):
    search, answer = make().grammar.schemas()
    self.assertEqual(search["function"]["name"], "search")
    self.assertEqual(
      search["function"]["parameters"],
      {
        "type": "object",
        "properties": {"query": {"type": "string"}},
        "required": ["query"],
      },
    )
    self.assertEqual(answer["function"]["name"], "answer")
    self.assertEmpty(prompts.Grammar().schemas())

  @parameterized.parameters("searchqa", "webshop", "alfworld")
  def test_instructions_speak_of_calls(self, name):
    benchmark = make(name, wording="full")
    env = benchmark.env()
    seen = env.reset(benchmark.splits["train"][0])
    wrong = env.step("nonsense")
    for text in (seen.text, wrong.observation.text):
      self.assertNotRegex(text, r"</(search|answer|action)>")
    view = prompts.View(
      seen.task,
      ((seen.text, wrong.action),),
      wrong.observation.text,
      wrong.observation.admissible,
      2,
      benchmark.max_turns,
    )
    (message,) = benchmark.render(view)
    self.assertIn('<tool_call>\n{"name": "', message["content"])
    self.assertNotRegex(message["content"], r"<(search|answer|action)>")

  @parameterized.parameters("toy", "searchqa", "gridworld")
  def test_experts_and_corpus_call(self, name):
    benchmark, tagged = make(name), envs.make(name)
    env, other = benchmark.env(), tagged.env()
    for task in benchmark.splits["train"][:3]:
      env.reset(task)
      other.reset(task)
      expert, twin = env.expert(1), other.expert(1)
      done = False
      while not done:
        response = expert.respond()
        self.assertRegex(response, r'(?s)</think>\n<tool_call>\n\{"name": "')
        result, expected = env.step(response), other.step(twin.respond())
        self.assertEqual(
          (result.action, result.reward, result.success, result.done),
          (
            expected.action,
            expected.reward,
            expected.success,
            expected.done,
          ),
        )
        self.assertTrue(result.format_valid)
        done = result.done
    self.assertNotRegex(
      "".join(benchmark.corpus()[:50]), r"</(search|answer|action)>"
    )

  def test_checks_find_nothing(self):
    benchmark = make("toy")
    episode = checks.explore(benchmark, benchmark.splits["train"][0], 0)
    self.assertNotEmpty(episode.results)
    copy = pickle.loads(pickle.dumps(benchmark))
    self.assertEqual(copy.grammar, benchmark.grammar)

  def test_unknown_grammar_is_one_line(self):
    with self.assertRaisesRegex(
      ValueError, "env.grammar: found 'xml', expected one of tags, tool_call"
    ):
      envs.make("toy", grammar="xml")
    self.assertIsInstance(make("toy"), tool_calls.ToolCalls)
    self.assertFalse(dataclasses.is_dataclass(make("toy")))


if __name__ == "__main__":
  absltest.main()
