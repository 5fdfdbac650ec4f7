"""Response grammar and prompt shrinking, against plain re-statements."""

import random

from absl.testing import absltest, parameterized

from t2po_jax.envs import prompts

_ACTION = prompts.Grammar()
_SEARCH = prompts.Grammar(actions=("search", "answer"), closing="</think>")


def _is_strict(text: str, actions) -> bool:
  """The grammar as a walk over tags: think, /think, one kind, /kind."""
  tags = [f"<{mark}{tag}>" for tag in ("think", *actions) for mark in ("", "/")]
  found, between, rest = [], [""], text
  while rest:
    tag = next((tag for tag in tags if rest.startswith(tag)), None)
    if tag is None:
      between[-1] += rest[0]
      rest = rest[1:]
    else:
      found.append(tag)
      between.append("")
      rest = rest[len(tag) :]
  wanted = [
    ["<think>", "</think>", f"<{kind}>", f"</{kind}>"] for kind in actions
  ]
  gaps = (between[0], between[2], between[4]) if len(between) == 5 else ("x",)
  return found in wanted and not any(gap.strip() for gap in gaps)


class ParseTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("plain", "<think>a b</think><action>go</action>", "a b", "go", True),
    (
      "newlines",
      "\n<think>a</think>\n <action> go\n</action> ",
      "a",
      "go",
      True,
    ),
    ("empty thought", "<think></think><action>x</action>", "", "x", True),
    (
      "several lines",
      "<think>a\nb</think><action>x</action>",
      "a\nb",
      "x",
      True,
    ),
    ("no thought", "<action>go</action>", None, "go", False),
    ("trailing", "<think>a</think><action>go</action> ok", "a", "go", False),
    ("leading", "so <think>a</think><action>go</action>", "a", "go", False),
    ("between", "<think>a</think> so <action>go</action>", "a", "go", False),
    ("no action", "<think>a</think>", "a", None, False),
    ("open thought", "<think>a <action>go</action>", None, "go", False),
    ("open action", "<think>a</think><action>go", "a", None, False),
    (
      "two actions",
      "<think>a</think><action>x</action><action>y</action>",
      "a",
      "x",
      False,
    ),
    (
      "two thoughts",
      "<think>a</think><think>b</think><action>x</action>",
      "a",
      "x",
      False,
    ),
    (
      "inside",
      "<think>a <action>x</action></think>",
      "a <action>x</action>",
      "x",
      False,
    ),
    ("empty", "", None, None, False),
  )
  def test_hand_cases(self, text, thought, content, valid):
    parsed = prompts.parse(text, _ACTION)
    self.assertEqual(parsed.thought, thought)
    self.assertEqual(parsed.kind, None if content is None else "action")
    self.assertEqual(parsed.content, content or "")
    self.assertEqual(parsed.format_valid, valid)

  def test_kinds(self):
    parsed = prompts.parse("<think>t</think><answer>x</answer>", _SEARCH)
    self.assertEqual((parsed.kind, parsed.content), ("answer", "x"))
    self.assertTrue(parsed.format_valid)
    self.assertEqual(parsed.opened, 1)

  @parameterized.parameters(
    ("<search>a</search><answer>b</answer>", "search", 2),
    ("<answer>b</answer><answer>c</answer>", "answer", 2),
    ("<search>a<answer>b</answer>", "answer", 2),
    ("<search>a</answer>", None, 1),
    ("nothing", None, 0),
  )
  def test_opened_counts_every_kind(self, action, kind, opened):
    parsed = prompts.parse(f"<think>t</think>{action}", _SEARCH)
    self.assertEqual((parsed.kind, parsed.opened), (kind, opened))
    self.assertFalse(parsed.format_valid)

  def test_unknown_tag_is_no_action(self):
    parsed = prompts.parse("<think>t</think><search>a</search>", _ACTION)
    self.assertIsNone(parsed.kind)

  def test_strictness_equals_a_walk_over_tags(self):
    generator = random.Random(0)
    pieces = [
      *("<think>", "</think>", "<search>", "</search>", "<answer>"),
      *("</answer>", "a", " ", "\n"),
    ]
    valid = 0
    for _ in range(2000):
      # A valid response with a few pieces replaced or put in.
      parts = ["", "<think>", "a", "</think>", "", "<search>", "b", "</search>"]
      for _ in range(generator.randint(0, 2)):
        start = generator.randrange(len(parts))
        end = start + generator.randint(0, 1)
        parts[start:end] = generator.choices(pieces, k=1)
      text = "".join(parts)
      expected = _is_strict(text, _SEARCH.actions)
      valid += expected
      self.assertEqual(
        prompts.parse(text, _SEARCH).format_valid, expected, text
      )
    self.assertGreater(valid, 10)

  def test_stops(self):
    self.assertEqual(_SEARCH.stops, ("</search>", "</answer>"))


class FitTest(parameterized.TestCase):
  def _view(self, memory=3, observation="o" * 100):
    return prompts.View(
      task="task",
      memory=tuple((f"seen {i}", f"did {i}") for i in range(memory)),
      observation=observation,
      admissible=("go", "stay"),
      turn=4,
      max_turns=9,
    )

  def _length(self, view):
    pairs = [text for pair in view.memory for text in pair]
    texts = (view.task, *pairs, view.observation, *view.admissible)
    return len("\n".join(texts))

  @parameterized.parameters(range(0, 14))
  def test_shorten_keeps_the_ends(self, keep):
    text = "abcdefghij"
    short = prompts.shorten(text, keep)
    self.assertLen(short, min(keep, len(text)))
    if len(prompts.ELLIPSIS) < keep < len(text):
      head, tail = short.split(prompts.ELLIPSIS)
      self.assertTrue(text.startswith(head) and text.endswith(tail))
      self.assertBetween(len(head) - len(tail), 0, 1)

  def test_untouched_if_it_fits(self):
    view = self._view()
    self.assertEqual(prompts.fit(view, lambda _: True), (view, False))

  @parameterized.parameters(range(12, 170, 7))
  def test_least_is_lost(self, limit):
    view = self._view()

    def fits(candidate):
      return self._length(candidate) <= limit

    least = self._length(self._view(memory=0, observation=""))
    if limit < least:
      with self.assertRaisesRegex(ValueError, "prompt too long.*4 characters"):
        prompts.fit(view, fits)
      return
    shrunk, changed = prompts.fit(view, fits)
    self.assertTrue(fits(shrunk))
    self.assertEqual(changed, shrunk != view)
    self.assertEqual(shrunk.task, view.task)
    self.assertEqual(shrunk.admissible, view.admissible)
    kept = len(shrunk.memory)
    self.assertEqual(shrunk.memory, view.memory[len(view.memory) - kept :])
    if shrunk.observation != view.observation:
      self.assertEmpty(shrunk.memory)
      self.assertEqual(self._length(shrunk), limit)
    elif kept < len(view.memory):
      more = self._view()
      self.assertFalse(
        fits(prompts.dataclasses.replace(more, memory=more.memory[2 - kept :]))
      )

  def test_nothing_to_shorten(self):
    with self.assertRaisesRegex(ValueError, "prompt too long"):
      prompts.fit(self._view(memory=0, observation=""), lambda _: False)


if __name__ == "__main__":
  absltest.main()
