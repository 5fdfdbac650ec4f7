"""The tool environment with a real server of the `mcp` package."""

import json
import pathlib
import sys
import tempfile

from absl.testing import absltest, parameterized

from t2po_jax import envs
from t2po_jax.envs import base

SERVER = '''
import os

from mcp.server.fastmcp import FastMCP

server = FastMCP("sums")
count = 0


@server.tool()
def add(a: int, b: int) -> str:
  """Adds two numbers."""
  return str(a + b)


@server.tool()
def next_number() -> str:
  """Counts."""
  global count
  count += 1
  return str(count)


@server.tool()
def start_over(task_id: str) -> str:
  """Forgets the count."""
  global count
  count = 10 if task_id == "two" else 0
  return "ready"


@server.tool()
def die() -> str:
  """Ends the server."""
  os._exit(1)


server.run()
'''
ROWS = (
  {"id": "one", "task": "What is 2 + 3?", "split": "train", "answer": "5"},
  {"id": "two", "task": "A colour?", "split": "valid", "answer": ["Red", "b"]},
  {"id": "three", "task": "?", "split": "test", "answer": 7},
)


def call(name, **arguments):
  action = json.dumps({"name": name, "arguments": arguments})
  return f"<think>so</think>\n<action>{action}</action>"


class ToolsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    (folder / "server.py").write_text(SERVER)
    self.tasks = folder / "tasks.jsonl"
    self.write(ROWS)
    self.command = f"{sys.executable} {folder / 'server.py'}"

  def write(self, rows):
    self.tasks.write_text("\n".join(map(json.dumps, rows)))

  def make(self, **values):
    settings = {"command": self.command, "tasks": str(self.tasks)} | values
    return envs.make("mcp", **settings)

  def test_an_episode(self):
    benchmark = self.make(reward_success=2.0)
    self.assertEqual(
      benchmark.splits,
      {"train": ("one",), "valid": ("two",), "test": ("three",)},
    )
    env = benchmark.env()
    self.addCleanup(env.close)
    first = env.reset("one")
    self.assertEqual(first.task, "What is 2 + 3?")
    sum_ = env.step(call("add", a=2, b=3))
    self.assertEqual(sum_.observation.text, "5")
    self.assertTrue(sum_.action_valid and not sum_.done)
    for response, text in (
      (call("add", a="two", b=3), "add"),  # Refused by the server.
      (call("subtract"), "There is no tool 'subtract'."),
      ("<think>a</think><action>{add</action>", "no call of a tool"),
      ("<think>a</think><action>[1]</action>", "no call of a tool"),
      (
        '<think>a</think><action>{"name": "add", "arguments": 3}</action>',
        "obj",
      ),
    ):
      result = env.step(response)
      self.assertIn(text, result.observation.text)
      self.assertFalse(result.action_valid or result.done)
    self.assertEqual(env.step(call("next_number")).observation.text, "1")
    last = env.step(call("finish", answer=" 5 "))
    self.assertTrue(last.done and last.success)
    self.assertEqual(last.reward, 2.0)
    # Another episode has another server, so its count begins again.
    env.reset("two")
    self.assertEqual(env.step(call("next_number")).observation.text, "1")
    wrong = env.step(call("finish", answer="green"))
    self.assertTrue(wrong.done)
    self.assertFalse(wrong.success or wrong.reward)

  def test_a_tool_resets(self):
    benchmark = self.make(reset_tool="start_over")
    env = benchmark.env()
    self.addCleanup(env.close)
    for task_id, number in (("one", "1"), ("two", "11"), ("one", "1")):
      env.reset(task_id)
      shown = env.step(call("next_number")).observation.text
      self.assertEqual(shown, number)
    hidden = env.step(call("start_over", task_id="two"))
    self.assertFalse(hidden.action_valid)

  def test_a_server_that_dies_aborts_the_episode(self):
    env = self.make(timeout=5.0).env()
    self.addCleanup(env.close)
    env.reset("one")
    with self.assertRaisesRegex(base.EnvError, "MCP tool 'die'"):
      env.step(call("die"))
    env.reset("one")
    self.assertEqual(env.step(call("add", a=1, b=1)).observation.text, "2")

  @parameterized.parameters(
    ({"command": ""}, "env.command: found none"),
    ({"tasks": "nothing.jsonl"}, "env.tasks: found 'nothing.jsonl'"),
    ({"command": "no-such-program"}, "env.command: MCP server 'no-such-prog"),
    ({"command": f"{sys.executable} -c 1"}, "env.command: .*does not start"),
  )
  def test_bad_arguments(self, values, message):
    with self.assertRaisesRegex(ValueError, message):
      self.make(timeout=10.0, **values)

  def test_bad_rows(self):
    self.write([{"id": "a", "task": "b", "split": "train"}])
    with self.assertRaisesRegex(ValueError, "row 1: KeyError.'answer'"):
      self.make()
    self.write([ROWS[0], ROWS[0]])
    with self.assertRaisesRegex(ValueError, "row 2: a second 'one'"):
      self.make()


if __name__ == "__main__":
  absltest.main()
