"""The OpenEnv adapter against a small server of its protocol."""

import json
import threading
import time

from absl.testing import absltest, parameterized
from websockets.sync import server

from t2po_jax import envs
from t2po_jax.envs import base, checks

FEW = dict(train_tasks=4, valid_tasks=2, test_tasks=2, max_turns=4)
COLOURS = ("red", "green", "blue")


def serve(session):
  """One session: say the word twice, it pays half each time."""
  word, turns = "", 0
  for message in session:
    asked = json.loads(message)
    if asked["type"] == "reset":
      word, turns = COLOURS[asked["data"]["seed"] % 3], 0
      body = {"observation": {"prompt": f"say {word}"}, "done": False}
      answer = {"type": "observation", "data": body | {"reward": None}}
    elif asked["data"].get("message") == "crash":
      answer = {"type": "error", "data": {"message": "out of order"}}
    elif "message" not in asked["data"]:
      told = {"message": "Invalid message", "code": "VALIDATION_ERROR"}
      answer = {"type": "error", "data": told}
    elif asked["data"].get("message") == "hang":
      continue
    else:
      turns += 1
      right = asked["data"].get("message") == word
      body = {
        "observation": {"prompt": "again" if right else f"no, {word}"},
        "reward": 0.5 * right,
        "done": turns == 2,
      }
      answer = {"type": "observation", "data": body}
    session.send(json.dumps(answer))


class OneSession:
  """A server with one session, which it frees a while after it was left."""

  def __init__(self):
    self.refused = 0
    self._taken = threading.Semaphore()

  def __call__(self, session):
    if not self._taken.acquire(blocking=False):
      self.refused += 1
      told = {"message": "1/1 sessions", "code": "CAPACITY_REACHED"}
      session.send(json.dumps({"type": "error", "data": told}))
      return
    try:
      serve(session)
    finally:
      time.sleep(0.3)
      self._taken.release()


class FullTest(absltest.TestCase):
  def test_a_server_with_one_session_is_waited_for(self):
    handler = OneSession()
    running = server.serve(handler, "127.0.0.1", 0)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    self.addCleanup(thread.join)
    self.addCleanup(running.shutdown)
    url = f"ws://127.0.0.1:{running.socket.getsockname()[1]}/ws"
    made = envs.make("openenv", url=url, timeout=5.0, **FEW)
    first = made.env()
    self.assertIn("red", first.reset("seed-0").text)
    # What was tried when it was made is over, but not yet for the server.
    self.assertGreater(handler.refused, 0)
    second = made.env()
    done = threading.Timer(0.2, first.close)
    done.start()
    self.assertIn("green", second.reset("seed-1").text)
    second.close()
    done.join()


class OpenEnvTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    running = server.serve(serve, "127.0.0.1", 0)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    self.addCleanup(thread.join)
    self.addCleanup(running.shutdown)
    self.url = f"ws://127.0.0.1:{running.socket.getsockname()[1]}/ws"

  def make(self, **values):
    return envs.make("openenv", url=self.url, **FEW | values)

  def test_an_episode(self):
    env = self.make(text_field="prompt", task="Say it.", reward_scale=2.0).env()
    first = env.reset("seed-1")
    self.assertEqual((first.task, first.text), ("Say it.", "say green"))
    right = env.step("<think>a</think><action>green</action>")
    self.assertEqual((right.reward, right.done), (1.0, False))
    last = env.step("<think>a</think><action>green</action>")
    self.assertTrue(last.done and last.success)
    env.reset("seed-2")
    env.step("<think>a</think><action>blue</action>")
    self.assertFalse(env.step("").success)
    env.close()

  def test_it_is_judged_sound(self):
    benchmark = self.make()
    played = [
      checks.explore(benchmark, task, 0) for task in benchmark.splits["train"]
    ]
    self.assertEqual(played[0].observations[0].text, '{"prompt": "say red"}')
    for finding in (
      checks.check_determinism(benchmark, played),
      checks.check_answers(benchmark, played),
      checks.check_refusals(benchmark, played),
      checks.check_threads(benchmark, played),
    ):
      self.assertEqual(finding.verdict, "ok", finding)

  def test_whole_actions_as_json(self):
    env = self.make(action_field="").env()
    env.reset("seed-0")
    wrong = env.step("<think>a</think><action>[1</action>")
    self.assertFalse(wrong.action_valid)
    self.assertTrue(wrong.format_valid)
    other = env.step('<think>a</think><action>{"word": "red"}</action>')
    self.assertFalse(other.action_valid)  # As the server says.
    right = env.step('<think>a</think><action>{"message": "red"}</action>')
    self.assertEqual(right.reward, 0.5)

  @parameterized.parameters(
    ("crash", "step: the server says 'out of order'"),
    ("hang", "step: "),
  )
  def test_trouble_aborts_the_episode(self, word, message):
    env = self.make(timeout=0.5).env()
    env.reset("seed-0")
    with self.assertRaisesRegex(base.EnvError, message):
      env.step(f"<think>a</think><action>{word}</action>")
    with self.assertRaisesRegex(RuntimeError, "call reset"):
      env.step("")
    self.assertIn("red", env.reset("seed-0").text)  # In a new session.

  @parameterized.parameters(
    ({"url": "http://x"}, "env.url: found 'http://x'"),
    (
      {"url": "ws://127.0.0.1:9/ws", "timeout": 1.0},
      "ws://127.0.0.1:9/ws: res",
    ),
  )
  def test_bad_arguments(self, values, message):
    with self.assertRaisesRegex(ValueError, message):
      envs.make("openenv", **FEW | values)


if __name__ == "__main__":
  absltest.main()
