"""Reading chats to learn from, and the command that does."""

import json
import pathlib
import tempfile

from absl.testing import absltest, parameterized
import numpy as np

from t2po_jax.learning import chats


class Letters:
  """A tokenizer of Unicode code points; 0 ends a response."""

  eos_ids = (0,)

  def encode(self, text):
    return [ord(letter) for letter in text]

  def render_chat(self, messages, prefix=""):
    text = "".join(f"{m['role'][0]}:{m['content']}|" for m in messages)
    return self.encode(text + "a:" + prefix)


def message(role, content):
  return {"role": role, "content": content}


class ReadPairsTest(parameterized.TestCase):
  def read(self, *lines, max_length=99):
    path = pathlib.Path(tempfile.mkdtemp()) / "chats.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return chats.read_pairs(path, Letters(), max_length=max_length)

  def test_every_message_of_the_assistant_in_its_context(self):
    chat = [
      message("system", "S"),
      message("user", "hi"),
      message("assistant", "yo"),
      message("user", "more"),
      message("assistant", "no"),
    ]
    pairs = self.read(json.dumps({"messages": chat}), "", "")
    texts = [
      tuple("".join(map(chr, ids)) for ids in pair if ids.dtype == np.int32)
      for pair in pairs
    ]
    self.assertEqual(
      texts,
      [("s:S|u:hi|a:", "yo\0"), ("s:S|u:hi|a:yo|u:more|a:", "no\0")],
    )

  @parameterized.parameters(
    ("{", "line 1: expected a JSON object"),
    ("[1]", "line 1: expected a JSON object"),
    ('{"messages": []}', "line 1: .*not a list with an entry"),
    ('{"messages": [{"role": "user"}]}', 'line 1: a message is.*"content"'),
    ('{"messages": ["hi"]}', "line 1: a message is 'hi'"),
    (
      '{"messages": [{"role": "bot", "content": "x"}]}',
      "line 1: role is 'bot'.*assistant",
    ),
    (
      '{"messages": [{"role": "assistant", "content": "x"}]}',
      "line 1: begins with",
    ),
    ('{"messages": [{"role": "user", "content": "x"}]}', "no message of the"),
    ("", "no message of the assistant"),
  )
  def test_bad_lines_are_named(self, line, expected):
    with self.assertRaisesRegex(ValueError, expected):
      self.read(line)

  def test_too_long_is_refused_with_its_numbers(self):
    chat = [message("user", "hi"), message("assistant", "yo")]
    with self.assertRaisesRegex(ValueError, r"line 2: message 2 has 7 \+ 3"):
      self.read("", json.dumps({"messages": chat}), max_length=9)


if __name__ == "__main__":
  absltest.main()
