"""The server as its clients see it: the real `openai` client over a socket."""

import contextlib
import functools
import json
import threading
import time

from absl.testing import absltest, parameterized
import httpx
import jax
import numpy as np
import openai
import uvicorn

from t2po_jax.control import thinking
from t2po_jax.models import config as model_config
from t2po_jax.models import decoder
from t2po_jax.rollout import draw, sampler, scheduler, slots
from t2po_jax.serving import app, engine, protocol

EOS, VOCAB = 257, 260
CLOSING = tuple(b"</t>")
MAX_PROMPT, MAX_RESPONSE, SLOTS = 64, 48, 8


class Letters:
  """One token per byte; chats as `role:content;`."""

  vocab_size = VOCAB
  eos_ids = (EOS,)
  pad_id = 256

  def encode(self, text):
    return list(text.encode())

  def decode(self, ids):
    data = bytes(i for i in ids if i < 256)
    return data.decode(errors="replace")

  def render_chat(self, messages, prefix=""):
    text = "".join(f"{m['role'][0]}:{m['content']};" for m in messages)
    return self.encode(f"{text}a:{prefix}")

  def token_bytes(self):
    return [bytes([i]) for i in range(256)] + [b""] * 4


@functools.cache
def tiny_policy():
  config = model_config.ModelConfig(
    family="qwen3",
    vocab_size=VOCAB,
    width=16,
    layers=1,
    heads=2,
    kv_heads=1,
    head_width=8,
    mlp_width=24,
    rope_theta=1e4,
    tied_embeddings=True,
    qk_norm=True,
  )
  policy = decoder.Policy(config)
  params = jax.tree.map(lambda x: 2 * x, policy.init(jax.random.key(1)))
  return policy, params


def control(window=2):
  return slots.Control(
    intervention=thinking.ThinkingConfig(
      window=window, min_tokens=3, max_tokens=8
    )
  )


def make_scheduler():
  """A scheduler with few programs, so that a test compiles little."""
  policy, params = tiny_policy()
  device = sampler.Sampler(
    policy,
    sampler.Vocabulary(Letters().token_bytes(), (EOS,), CLOSING, ("</a>",)),
    control(),
    slots=SLOTS,
    max_prompt=MAX_PROMPT,
    max_response=MAX_RESPONSE,
    chunk=4,
    prefill_tokens=MAX_PROMPT,
    prefill_rows=1,
    live_tokens=MAX_PROMPT + MAX_RESPONSE,
  )
  device.load(params)
  return device, scheduler.Scheduler(device)


class Live:
  """A server on a free port, in a thread."""

  def __init__(self, key=""):
    device, under = make_scheduler()
    self.engine = engine.Engine(device, under, control=control())
    model = protocol.Model(
      name="tiny",
      created=0,
      prefix="<t>",
      max_prompt=MAX_PROMPT,
      max_response=MAX_RESPONSE,
      sampling=draw.Sampling(),
      epsilon=0.0,
      controlled=False,
      state_size=len(control().source.initial),
    )
    served = app.Server(model, Letters(), self.engine, key=key).app()
    self.server = uvicorn.Server(
      uvicorn.Config(served, port=0, log_level="warning")
    )
    self.thread = threading.Thread(target=self.server.run, daemon=True)
    self.thread.start()
    while not self.server.started:
      time.sleep(0.01)
    port = self.server.servers[0].sockets[0].getsockname()[1]
    self.url = f"http://127.0.0.1:{port}"

  def client(self, key="none"):
    return openai.OpenAI(
      base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=600
    )

  def load(self):
    return httpx.get(f"{self.url}/health", timeout=60).json()

  def wait_until_idle(self):
    for _ in range(500):
      load = self.load()
      if not (load["slots_taken"] or load["waiting"] or load["running"]):
        return
      time.sleep(0.02)
    raise AssertionError(load)

  def close(self):
    self.server.should_exit = True
    self.thread.join()


@functools.cache
def live():
  """One server for all tests: compiling takes longest."""
  return Live()


def tearDownModule():
  live().close()


def chat(client, content="hi", **options):
  options = {"model": "tiny", "max_tokens": 12, "seed": 3} | options
  return client.chat.completions.create(
    messages=[{"role": "user", "content": content}], **options
  )


def direct(prompt, *, seed, index=0, limit=12, sampling=None):
  """The same response from a scheduler of its own."""
  device, under = make_scheduler()
  device.use(engine.without_intervention(control()))
  under.submit(
    sampler.Request(
      ticket=0,
      prompt=np.asarray(prompt, np.int32),
      key=engine.key_of((seed, index)),
      limit=limit,
    )
  )
  while under.busy:
    done = under.poll(sampling or draw.Sampling(), 0.0)
    for completion in done:
      return completion
  raise AssertionError("nothing came")


class AnswerTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.client = live().client()

  def test_chat_is_what_the_sampler_says(self):
    found = chat(self.client, temperature=0, logprobs=True)
    expected = direct(
      Letters().render_chat([{"role": "user", "content": "hi"}], "<t>"),
      seed=3,
      sampling=draw.Sampling(temperature=0.0),
    )
    tokens = expected.attempt.tokens
    choice = found.choices[0]
    self.assertEqual(
      choice.message.content, "<t>" + Letters().decode(tokens.tolist())
    )
    self.assertEqual(choice.finish_reason, "length")
    self.assertEqual(found.usage.completion_tokens, len(tokens))
    self.assertEqual(found.usage.prompt_tokens, len("u:hi;a:<t>"))
    entries = choice.logprobs.content
    self.assertLen(entries, len(tokens))
    np.testing.assert_allclose(
      [e.logprob for e in entries], expected.attempt.logprobs, rtol=1e-5
    )
    np.testing.assert_allclose(
      [e.uncertainty for e in entries],
      expected.attempt.uncertainty,
      atol=1e-5,
    )
    self.assertEqual(found.choices[0].exploration_control["fired_at"], -1)

  def test_the_last_message_of_the_assistant_is_continued(self):
    asked = dict(model="tiny", max_tokens=8, seed=5)
    begun = self.client.chat.completions.create(
      messages=[
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "<t>"},
      ],
      **asked,
    )
    plain = chat(self.client, **asked)
    self.assertEqual(
      "<t>" + begun.choices[0].message.content,
      plain.choices[0].message.content,
    )

  def test_seed_names_the_randomness_and_choices_differ(self):
    first = chat(self.client, n=3)
    again = chat(self.client, n=3)
    other = chat(self.client, n=3, seed=4)

    def said(found):
      return [c.message.content for c in found.choices]

    self.assertEqual(said(first), said(again))
    self.assertNotEqual(said(first), said(other))
    self.assertLen(set(said(first)), 3)
    self.assertEqual(first.usage.prompt_tokens, len("u:hi;a:<t>"))

  def test_a_stream_adds_up_to_the_answer(self):
    whole = chat(self.client, logprobs=True)
    text, reason, tokens, used = "", None, [], None
    for chunk in chat(
      self.client,
      stream=True,
      logprobs=True,
      stream_options={"include_usage": True},
    ):
      used = chunk.usage or used
      for choice in chunk.choices:
        text += choice.delta.content or ""
        reason = choice.finish_reason or reason
        tokens += choice.logprobs.content if choice.logprobs else []
    self.assertEqual(text, whole.choices[0].message.content)
    self.assertEqual(reason, whole.choices[0].finish_reason)
    self.assertEqual(used, whole.usage)
    self.assertEqual(
      [t.token for t in tokens],
      [t.token for t in whole.choices[0].logprobs.content],
    )

  @parameterized.parameters(False, True)
  def test_a_stop_string_is_cut_off_and_frees_the_slot(self, stream):
    asked = {"temperature": 0, "max_tokens": MAX_RESPONSE, "prompt": "abcde"}
    whole = self.client.completions.create(model="tiny", **asked)
    text = whole.choices[0].text
    stop = text[9:11]
    asked["stop"] = [stop, "never there"]
    found = self.client.completions.create(model="tiny", stream=stream, **asked)
    if stream:
      pieces = [c.choices[0].text for c in found if c.choices]
      said = "".join(pieces)
    else:
      said = found.choices[0].text
      self.assertEqual(found.choices[0].finish_reason, "stop")
      self.assertLess(
        found.usage.completion_tokens, whole.usage.completion_tokens
      )
    self.assertEqual(said, text[: text.find(stop)])
    live().wait_until_idle()

  def test_completions_take_texts_and_ids_and_many(self):
    found = self.client.completions.create(
      model="tiny", prompt=["ab", "cd"], n=2, max_tokens=4, seed=1, logprobs=1
    )
    self.assertEqual([c.index for c in found.choices], [0, 1, 2, 3])
    self.assertLen(found.choices[0].logprobs.tokens, 4)
    same = self.client.completions.create(
      model="tiny", prompt=[97, 98], max_tokens=4, seed=1
    )
    self.assertEqual(same.choices[0].text, found.choices[0].text)

  def test_exploration_control_is_an_option(self):
    on = {"exploration_control": {"enabled": True, "epsilon": 0.0}}
    asked = dict(max_tokens=40, logprobs=True)
    found = chat(self.client, extra_body=on, **asked)
    choice = found.choices[0]
    self.assertEqual(choice.exploration_control["fired_at"], 8)
    forced = [e.token for e in choice.logprobs.content if e.forced]
    self.assertEqual("".join(forced), "</t>")
    off = chat(self.client, **asked)
    self.assertFalse(any(e.forced for e in off.choices[0].logprobs.content))

  def test_state_carries_the_signal_from_turn_to_turn(self):
    first = chat(self.client, temperature=0).choices[0].exploration_control
    self.assertLen(first["state"], 4)
    body = {"exploration_control": {"state": first["state"]}}
    fresh = chat(self.client, "x", temperature=0, logprobs=True)
    carried = chat(
      self.client, "x", temperature=0, logprobs=True, extra_body=body
    )

    def signal(found):
      return [e.uncertainty for e in found.choices[0].logprobs.content]

    self.assertNotEqual(signal(fresh), signal(carried))
    self.assertEqual(
      fresh.choices[0].message.content, carried.choices[0].message.content
    )

  def test_models(self):
    self.assertEqual([m.id for m in self.client.models.list()], ["tiny"])
    self.assertEqual(self.client.models.retrieve("tiny").prefix, "<t>")
    with self.assertRaises(openai.NotFoundError):
      self.client.models.retrieve("other")


class CrowdTest(absltest.TestCase):
  def test_64_at_once_get_what_each_alone_would(self):
    client = live().client()
    answers = {}

    def ask(i):
      sampling = {"temperature": 0} if i % 8 == 0 else {}
      found = chat(client, f"number {i}", seed=i, **sampling)
      answers[i] = found.choices[0].message.content

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(64)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    self.assertLen(answers, 64)
    for i in (0, 1, 8, 63):
      alone = chat(
        client,
        f"number {i}",
        seed=i,
        **({"temperature": 0} if i % 8 == 0 else {}),
      )
      self.assertEqual(answers[i], alone.choices[0].message.content)
    live().wait_until_idle()

  def test_those_who_leave_free_their_slots(self):
    client = live().client()
    whole = chat(client, max_tokens=MAX_RESPONSE).choices[0].message.content
    for _ in range(3 * SLOTS):
      stream = chat(client, stream=True, max_tokens=MAX_RESPONSE)
      next(iter(stream))
      stream.close()
    impatient = live().client().with_options(timeout=0.02)
    for _ in range(SLOTS):
      with contextlib.suppress(openai.APITimeoutError):
        chat(impatient, n=4, max_tokens=MAX_RESPONSE)
    live().wait_until_idle()
    again = chat(client, max_tokens=MAX_RESPONSE)
    self.assertEqual(again.choices[0].message.content, whole)


class RefusalTest(parameterized.TestCase):
  def post(self, body, path="chat/completions", **headers):
    return httpx.post(
      f"{live().url}/v1/{path}",
      content=body if isinstance(body, bytes) else json.dumps(body),
      headers=headers,
      timeout=60,
    )

  @parameterized.parameters(
    (b"{", 400, "not valid JSON"),
    (b"[1]", 400, "not an object"),
    (b"[" * 100_000, 400, "not valid JSON"),
    (b"\xff\xfe", 400, "not valid JSON"),
    ({}, 400, "model"),
    ({"model": "gpt"}, 404, "does not exist"),
    ({"model": "tiny"}, 400, "messages"),
    ({"model": "tiny", "messages": []}, 400, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "role"),
    ({"messages": [{"role": "user"}]}, 400, "content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
     "content"),
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 1000}, 400, "max_tokens"),
    ({"max_tokens": 1.5}, 400, "max_tokens"),
    ({"n": 1000}, 400, "n:"),
    ({"n": True}, 400, "n:"),
    ({"stop": [""]}, 400, "stop"),
    ({"stop": 3}, 400, "stop"),
    ({"seed": "x"}, 400, "seed"),
    ({"stream": "yes"}, 400, "stream"),
    ({"tools": [{"type": "function"}]}, 400, "tools"),
    ({"top_logprobs": 5}, 400, "top_logprobs"),
    ({"temprature": 1}, 400, "did you mean 'temperature'"),
    ({"exploration_control": {"on": 1}}, 400, "exploration_control"),
    ({"exploration_control": {"state": [1]}}, 400, "state"),
    ({"messages": [{"role": "user", "content": "x" * 100}]}, 400,
     "takes 64 at most"),
  )  # fmt: skip
  def test_what_is_wrong_is_said(self, body, status, named):
    if isinstance(body, dict) and body and "model" not in body:
      good = {"model": "tiny", "max_tokens": 2}
      good["messages"] = [{"role": "user", "content": "hi"}]
      body = good | body
    found = self.post(body)
    self.assertEqual(found.status_code, status, found.text)
    self.assertIn(named, found.json()["error"]["message"])
    live().wait_until_idle()

  @parameterized.parameters(
    ("", 400), ([], 400), ([[]], 400), ([5000], 400), (None, 400), ([1.5], 400)
  )
  def test_bad_prompts(self, prompt, status):
    body = {"model": "tiny", "prompt": prompt}
    self.assertEqual(self.post(body, "completions").status_code, status)

  def test_unknown_paths_and_methods(self):
    self.assertEqual(self.post({}, "nowhere").status_code, 404)
    self.assertEqual(httpx.get(f"{live().url}/v1/nothing").status_code, 404)

  def test_too_large_a_body(self):
    found = self.post(b" " * (app.MOST_BYTES + 1))
    self.assertEqual(found.status_code, 413)


class KeyTest(absltest.TestCase):
  def test_a_key_is_asked_for(self):
    own = Live(key="secret")
    self.addCleanup(own.close)
    with self.assertRaises(openai.AuthenticationError):
      own.client("wrong").models.list()
    self.assertLen(list(own.client("secret").models.list()), 1)


if __name__ == "__main__":
  absltest.main()
