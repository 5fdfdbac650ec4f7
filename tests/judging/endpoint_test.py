"""Endpoints that refuse, stumble, answer nonsense, or work."""

import json
import os
import threading
import time
from unittest import mock

from absl.testing import absltest, parameterized
import httpx

from t2po_jax.envs import base, prompts, toy
from t2po_jax.judging import dialogues, endpoint, scripted
from t2po_jax.rollout import collect


class Letters:
  eos_ids = (0,)

  def encode(self, text):
    return [ord(x) for x in text]

  def render_chat(self, messages, prefix=""):
    return self.encode("".join(m["content"] for m in messages) + prefix)


def answer(text, **changes):
  choice = {"message": {"content": text}, "finish_reason": "stop"}
  usage = {"prompt_tokens": 7, "completion_tokens": 3}
  return {"choices": [choice], "usage": usage} | changes


class Fake:
  """An endpoint; `replies` are given one after the other, the last again."""

  def __init__(self, replies, models=None):
    self.replies = list(replies)
    self.models = models or {"data": [{"id": "m"}]}
    self.asked = []
    self.lock = threading.Lock()

  def __call__(self, request):
    if request.method == "GET":
      if isinstance(self.models, int):
        return httpx.Response(self.models)
      return httpx.Response(200, json=self.models)
    with self.lock:
      self.asked.append(json.loads(request.content) | {"h": request.headers})
      reply = self.replies[0]
      if len(self.replies) > 1:
        self.replies.pop(0)
    if isinstance(reply, Exception):
      raise reply
    if isinstance(reply, httpx.Response):
      return reply
    return httpx.Response(200, json=reply)


def make(fake, **changes):
  settings = dict(url="http://x/v1", model="m", retries=3)
  return endpoint.Endpoint(
    endpoint.Settings(**(settings | changes)),
    prompts.Grammar(),
    transport=httpx.MockTransport(fake),
  )


def ask(player, state=None):
  place = dialogues.Place("valid", "t", 0, 0)
  respond = player.begin(None, place)
  message = [{"role": "user", "content": "what?"}]
  return respond(message, base.Observation("t", "o"), state)


class EndpointTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.pauses = []
    patch = mock.patch.object(time, "sleep", self.pauses.append)
    patch.start()
    self.addCleanup(patch.stop)

  def test_a_response_ends_at_the_action(self):
    fake = Fake([answer("<think>a</think><action>b</action> and more")])
    player = make(fake, temperature=0.5)
    reply = ask(player)
    self.assertEqual(reply.text, "<think>a</think><action>b</action>")
    self.assertEqual(reply.usage, (7, 3))
    self.assertEqual(player.counts["completion_tokens"], 3)
    asked = fake.asked[0]
    self.assertEqual(asked["temperature"], 0.5)
    self.assertNotIn("top_k", asked)
    self.assertNotIn("exploration_control", asked)

  def test_a_cut_response_is_said_to_be(self):
    cut = answer("<think>a")
    cut["choices"][0]["finish_reason"] = "length"
    self.assertEqual(ask(make(Fake([cut]))).finish, "length")

  def test_the_control_is_asked_for_where_there_is_one(self):
    told = answer("x")
    told["choices"][0]["exploration_control"] = {"state": [1, 2, None, 3]}
    card = {"id": "m", "exploration_control": True}
    fake = Fake([told], models={"data": [card]})
    player = make(fake, control=True, top_k=20)
    reply = ask(player, state=[0, 1, 2, 3])
    self.assertEqual(reply.state, [1, 2, None, 3])
    self.assertEqual(fake.asked[0]["top_k"], 20)
    self.assertEqual(
      fake.asked[0]["exploration_control"],
      {"enabled": True, "state": [0, 1, 2, 3]},
    )

  def test_stumbling_is_waited_out(self):
    fake = Fake(
      [
        httpx.Response(429, headers={"retry-after": "7"}),
        httpx.Response(503),
        httpx.ConnectError("down"),
        answer("fine"),
      ]
    )
    player = make(fake)
    self.assertEqual(ask(player).text, "fine")
    self.assertEqual(self.pauses[0], 7.0)
    self.assertBetween(self.pauses[1], 0.5, 1.0)
    self.assertBetween(self.pauses[2], 1.0, 2.0)
    self.assertEqual(player.counts["repeated"], 3)

  def test_giving_up_aborts_the_episode_alone(self):
    with self.assertRaisesRegex(base.EnvError, "500 broken"):
      ask(make(Fake([httpx.Response(500, json={"error": "broken"})])))

  @parameterized.parameters(
    (httpx.Response(401, json={"error": {"message": "bad key"}}), "bad key"),
    (httpx.Response(400, text="too long"), "too long"),
    (httpx.Response(200, text="<html>"), "expected JSON"),
    ({"choices": []}, "expected choices"),
  )
  def test_what_cannot_get_better_ends_it(self, reply, named):
    fake = Fake([reply])
    with self.assertRaisesRegex(ValueError, named):
      ask(make(fake))
    self.assertLen(fake.asked, 1)

  def test_unknown_model_is_named(self):
    with self.assertRaisesRegex(ValueError, "expected one of other"):
      make(Fake([answer("")], models={"data": [{"id": "other"}]}))
    make(Fake([answer("")], models=404))  # Not every endpoint has a list.

  def test_the_key_comes_from_the_environment_and_is_not_shown(self):
    fake = Fake([httpx.Response(401, text="no")])
    with mock.patch.dict(os.environ, {"MY_KEY": "sesame"}):
      player = make(fake, key_variable="MY_KEY")
    with self.assertRaises(ValueError) as caught:
      ask(player)
    self.assertEqual(fake.asked[0]["h"]["authorization"], "Bearer sesame")
    self.assertNotIn("sesame", str(caught.exception))

  def test_pace(self):
    pace = endpoint.Pace(600)
    for _ in range(4):
      pace.wait()
    self.assertAlmostEqual(self.pauses[-1], 0.3, delta=0.05)


class DialogueTest(parameterized.TestCase):
  def table(self, player, **changes):
    rules = dict(memory=1, max_prompt=500, max_response=50)
    return dialogues.Table(
      toy.ToyBenchmark(), Letters(), collect.Rules(**(rules | changes)), player
    )

  def places(self, count=6):
    tasks = toy.ToyBenchmark().splits["train"][:count]
    return [
      dialogues.Place("train", task, n, 0) for n, task in enumerate(tasks)
    ]

  @parameterized.parameters(1, 4)
  def test_the_expert_solves_and_chance_does_not(self, concurrency):
    table = self.table(scripted.Expert())
    found = list(table.play(self.places(), concurrency=concurrency))
    self.assertTrue(all(p.trajectory.success for p in found))
    self.assertCountEqual([p.place.number for p in found], range(6))
    chance = self.table(scripted.Random(toy.ToyBenchmark().grammar))
    solved = [p.trajectory.success for p in chance.play(self.places(20))]
    self.assertLess(sum(solved), 15)
    again = self.table(scripted.Random(toy.ToyBenchmark().grammar))
    self.assertEqual(
      solved, [p.trajectory.success for p in again.play(self.places(20))]
    )

  def test_endpoints_play_side_by_side_and_failures_abort(self):
    with mock.patch.object(time, "sleep"):
      player = make(Fake([httpx.Response(500)]), retries=1)
      (found,) = self.table(player).play(self.places(1))
    self.assertTrue(found.trajectory.aborted)

  @parameterized.parameters("window", "append")
  def test_contexts(self, context):
    seen = []

    class Player:
      def begin(self, env, place):
        def respond(messages, observation, state):
          seen.append([m["role"] for m in messages])
          return dialogues.Reply("<think></think><action>red</action>")

        return respond

    list(self.table(Player(), context=context).play(self.places(1)))
    roles = [message for message in seen[1]]
    self.assertEqual("assistant" in roles, context == "append")


if __name__ == "__main__":
  absltest.main()
