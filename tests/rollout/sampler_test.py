"""The decode loop against a plain replay with the full forward pass."""

import collections
import dataclasses
import functools

from absl.testing import absltest, parameterized
import jax
import numpy as np

from t2po_jax.configs import base as settings
from t2po_jax.configs import smoke
from t2po_jax.control import thinking
from t2po_jax.models import config as model_config
from t2po_jax.models import decoder
from t2po_jax.rollout import draw, sampler, scheduler
from t2po_jax.rollout import slots as slot_state
from t2po_jax.setup import build

VOCAB = 260
EOS = 257
CLOSING = tuple(b"</think>\n<a>")
MAX_PROMPT, MAX_RESPONSE = 40, 24


@functools.cache
def tiny_policy() -> tuple[decoder.Policy, dict]:
  config = model_config.ModelConfig(
    family="qwen3",
    vocab_size=VOCAB,
    width=16,
    layers=2,
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


def make(
  *,
  slots=4,
  control=None,
  stops=("</a>",),
  buckets=False,
  mesh=None,
  exact=False,
):
  """A scheduler on a byte vocabulary; few programs unless with buckets."""
  policy, params = tiny_policy()
  token_bytes = [bytes([i]) for i in range(256)] + [b"", b""]
  vocabulary = sampler.Vocabulary(
    token_bytes=token_bytes, eos=(EOS,), closing=CLOSING, stops=stops
  )
  device = sampler.Sampler(
    policy,
    vocabulary,
    control or slot_state.Control(),
    slots=slots,
    max_prompt=MAX_PROMPT,
    max_response=MAX_RESPONSE,
    chunk=5,
    prefill_tokens=8 if buckets else MAX_PROMPT,
    prefill_rows=4 if buckets else 1,
    live_tokens=16 if buckets else MAX_PROMPT + MAX_RESPONSE,
    mesh=mesh,
  )
  device.load(params)
  return scheduler.Scheduler(device, exact=exact)


def request(ticket, prompt, *, key=None, limit=MAX_RESPONSE):
  return sampler.Request(
    ticket=ticket,
    prompt=np.asarray(prompt, np.int32),
    key=np.asarray(key or (ticket, 7), np.uint32),
    limit=limit,
  )


def serve(under, requests, sampling=draw.Sampling(), epsilon=0.0):  # noqa: B008
  for one in requests:
    under.submit(one)
  done = {}
  while under.busy:
    for completion in under.poll(sampling, epsilon):
      under.release(completion.ticket)
      done[completion.ticket] = completion
  return done


def random_prompts(count, seed=0):
  generator = np.random.default_rng(seed)
  return [
    generator.integers(97, 123, generator.integers(1, MAX_PROMPT + 1))
    for _ in range(count)
  ]


def full_logits(prompt, response):
  """Logits before each response token, by the training-time forward."""
  policy, params = tiny_policy()
  tokens = np.concatenate([prompt, response])[None]
  hidden = policy.hidden(
    params,
    tokens,
    np.arange(tokens.shape[1])[None],
    np.ones_like(tokens),
  )
  return np.asarray(policy.logits(params, hidden)[0, len(prompt) - 1 : -1])


class RecordTest(parameterized.TestCase):
  @parameterized.parameters((1.0, True), (0.7, False))
  def test_records_what_the_full_forward_says(self, temperature, buckets):
    prompts = random_prompts(6)
    done = serve(
      make(buckets=buckets),
      [request(i, p) for i, p in enumerate(prompts)],
      draw.Sampling(temperature=temperature),
    )
    for ticket, prompt in enumerate(prompts):
      attempt = done[ticket].attempt
      logits = full_logits(prompt, attempt.tokens).astype(np.float64)
      low, high = [np.inf, np.inf], [-np.inf, -np.inf]
      for t, (row, token) in enumerate(
        zip(logits, attempt.tokens, strict=True)
      ):
        plain = row - np.log(np.sum(np.exp(row)))
        scaled = row / temperature
        scaled = scaled - np.log(np.sum(np.exp(scaled)))
        self.assertAlmostEqual(attempt.logprobs[t], scaled[token], delta=1e-4)
        entropy = -np.sum(np.exp(plain) * plain)
        confidence = -np.mean(np.sort(plain)[-20:])
        self.assertAlmostEqual(attempt.entropy[t], entropy, delta=1e-4)
        self.assertAlmostEqual(attempt.confidence[t], confidence, delta=1e-4)
        values = [entropy, confidence]
        low = [min(pair) for pair in zip(low, values, strict=True)]
        high = [max(pair) for pair in zip(high, values, strict=True)]
        h, c = (
          (v - lo) / (hi - lo) if hi > lo else 0.0
          for v, lo, hi in zip(values, low, high, strict=True)
        )
        if t:  # At the first token both ranges are empty.
          self.assertAlmostEqual(
            attempt.uncertainty[t], 0.4 * h + 0.6 * (1 - c), delta=2e-2
          )
      logs = np.log(np.maximum(attempt.uncertainty, 1e-6))
      self.assertAlmostEqual(attempt.phi, np.exp(logs.mean()), delta=1e-4)

  def test_greedy_takes_the_likeliest_token(self):
    prompt = random_prompts(1)[0]
    done = serve(make(), [request(0, prompt)], draw.Sampling(temperature=0.0))
    tokens = done[0].attempt.tokens
    expected = np.argmax(full_logits(prompt, tokens), axis=-1)
    np.testing.assert_array_equal(tokens, expected)

  def test_the_signals_state_is_carried_over_turns(self):
    prompt = random_prompts(1)[0]
    first = serve(make(), [request(0, prompt)])[0]
    again = sampler.Request(
      1, prompt, np.asarray([5, 5], np.uint32), 3, first.signal
    )
    second = serve(make(), [again])[1]
    for now, before in zip(second.signal, first.signal, strict=True):
      self.assertTrue(np.isfinite(now) and np.isfinite(before))
    self.assertTrue(
      np.all(second.signal[[0, 2]] <= first.signal[[0, 2]])
      and np.all(second.signal[[1, 3]] >= first.signal[[1, 3]])
    )
    # From the second turn on the range is not empty at the first token.
    self.assertGreater(second.attempt.uncertainty[0], 0)


class OrderTest(parameterized.TestCase):
  def test_with_one_size_neither_order_nor_company_changes_a_bit(self):
    prompts = random_prompts(9)
    prompts[4] = prompts[2]  # One is copied or computed, as it comes.
    requests = [request(i, p) for i, p in enumerate(prompts)]
    reference = serve(make(), requests)
    for order in (requests[::-1], requests[5:] + requests[:5]):
      self.assert_same_bits(serve(make(), order), reference)
    one_by_one, under = {}, make()
    for one in requests:
      one_by_one |= serve(under, [one])
    self.assert_same_bits(one_by_one, reference)

  def test_with_many_sizes_company_does_change_bits(self):
    # Else the test above could not tell whether there is one size.
    requests = [request(i, p) for i, p in enumerate(random_prompts(9))]
    found, reference = (
      serve(make(buckets=True), order) for order in (requests[::-1], requests)
    )
    with self.assertRaises(AssertionError):
      self.assert_same_bits(found, reference)

  @parameterized.parameters(True, False)
  def test_a_dialogue_has_the_same_bits_wherever_it_goes_on(self, exact):
    # The next turn where the last is still held, and where it is not.
    prompts = random_prompts(4, seed=1)
    prompts = [prompt[: MAX_PROMPT // 2] for prompt in prompts]
    first = [request(i, prompt) for i, prompt in enumerate(prompts)]
    under = make(exact=exact)
    said = serve(under, first)
    second = [
      request(
        10 + i,
        np.concatenate([prompt, said[i].attempt.tokens, [98]])[:MAX_PROMPT],
      )
      for i, prompt in enumerate(prompts)
    ]
    held = serve(under, second)
    computed = serve(make(exact=exact), second)
    if exact:
      self.assert_same_bits(held, computed)
      return
    # What decoding has put into the cache is rounded differently.
    with self.assertRaises(AssertionError):
      self.assert_same_bits(held, computed)

  def test_one_size_from_the_configuration_is_one_size(self):
    def sizes(**changes):
      config = smoke.get_config().unlock()
      config.rollout.update(max_prompt=160, max_response=64, **changes)
      config.train.row_tokens = 224
      read = settings.read(config)
      policy, _ = tiny_policy()
      vocabulary = sampler.Vocabulary([b"a"] * 9, (EOS,), CLOSING, ())
      device = build.device_sampler(
        read, policy, vocabulary, build.sampling_mesh(read), abstract=True
      )
      programs = device.programs([draw.Sampling()])
      count = collections.Counter(program.kind for program in programs)
      return count["prefill"], count["decode"]

    self.assertEqual(sizes(one_size=True), (1, 1))
    self.assertGreater(min(sizes()), 1)

  def test_two_versions_share_the_slots(self):
    prompts = random_prompts(8, seed=5)
    prompts[4:] = prompts[:4]  # Equal prompts, of which each computes its own.
    policy, params = tiny_policy()
    other = jax.tree.map(lambda x: 1.1 * x, params)

    def under(*versions):
      found = make()
      for version in versions:
        found._sampler.weights.load(
          {1: params, 2: other}[version], version=version, keep=versions
        )
      return found

    requests = [
      dataclasses.replace(request(i, prompt), version=1 + i // 4)
      for i, prompt in enumerate(prompts)
    ]
    wanted = {}
    for version in (1, 2):
      mine = [one for one in requests if one.version == version]
      wanted |= serve(under(version), mine)
    mixed, found = under(1, 2), {}
    for one in requests[::2] + requests[1::2]:
      mixed.submit(one)
    while mixed.busy:
      for version in (1, 2):
        for done in mixed.poll(draw.Sampling(), 0.0, version=version):
          mixed.release(done.ticket)
          found[done.ticket] = done
    self.assert_same_bits(found, wanted)
    self.assertNotEqual(
      wanted[0].attempt.logprobs.tolist(), wanted[4].attempt.logprobs.tolist()
    )

  def assert_same_bits(self, found, expected):
    self.assertEqual(found.keys(), expected.keys())
    for ticket, completion in found.items():
      for name in ("tokens", "logprobs", "uncertainty", "entropy", "phi"):
        np.testing.assert_array_equal(
          getattr(completion.attempt, name),
          getattr(expected[ticket].attempt, name),
        )

  def test_rollouts_do_not_depend_on_slots_or_order(self):
    prompts = random_prompts(20, seed=3)
    requests = [request(i, p) for i, p in enumerate(prompts)]
    reference = serve(make(slots=1), requests)
    for slots, order in ((7, 1), (7, -1), (64, 1)):
      found = serve(make(slots=slots), requests[::order])
      self.assertSameElements(found, reference)
      for ticket, completion in found.items():
        expected = reference[ticket].attempt
        np.testing.assert_array_equal(
          completion.attempt.tokens, expected.tokens
        )
        np.testing.assert_allclose(
          completion.attempt.logprobs, expected.logprobs, atol=1e-4
        )

  def test_different_keys_give_different_responses(self):
    prompt = random_prompts(1)[0]
    done = serve(make(), [request(i, prompt) for i in range(4)])
    texts = {tuple(done[i].attempt.tokens.tolist()) for i in range(4)}
    self.assertLen(texts, 4)


class ReuseTest(parameterized.TestCase):
  def test_a_group_shares_one_prefill(self):
    prompt = random_prompts(1)[0]
    under = make()
    shared = serve(under, [request(i, prompt) for i in range(8)])
    self.assertEqual(under.counters["prompt_tokens_computed"], len(prompt) - 1)
    alone = serve(make(slots=1), [request(3, prompt)])
    np.testing.assert_array_equal(
      shared[3].attempt.tokens, alone[3].attempt.tokens
    )

  def test_the_next_turn_reuses_what_its_prompt_begins_with(self):
    first = np.arange(97, 117)
    second = np.concatenate([first, np.arange(100, 110)])
    under = make()
    serve(under, [request(0, first)])
    found = serve(under, [request(1, second)])
    computed = under.counters["prompt_tokens_computed"]
    # Decoding has put the last token of the first prompt into the cache.
    self.assertEqual(computed, len(second) - 2)
    fresh = serve(make(), [request(1, second)])
    np.testing.assert_array_equal(
      found[1].attempt.tokens, fresh[1].attempt.tokens
    )

  def test_a_retry_rewinds_and_computes_no_prefill(self):
    prompt = random_prompts(1)[0]
    under = make()
    under.submit(request(0, prompt, key=(1, 1)))
    completions = []
    while not completions:
      completions = under.poll(draw.Sampling(), 0.0)
    computed = under.counters["prompt_tokens_computed"]
    under.retry(0, request(1, prompt, key=(2, 2)))
    completions = []
    while not completions:
      completions = under.poll(draw.Sampling(), 0.0)
    under.release(1)
    self.assertEqual(under.counters["rewinds"], 1)
    self.assertEqual(under.counters["prompt_tokens_computed"], computed)
    fresh = serve(make(), [request(0, prompt, key=(2, 2))])
    np.testing.assert_array_equal(
      completions[0].attempt.tokens, fresh[0].attempt.tokens
    )

  def test_a_dialogue_that_goes_on_computes_only_what_is_new(self):
    prompt, new = np.arange(97, 107), np.arange(110, 116)
    under = make()
    first = serve(under, [request(0, prompt, limit=12)])[0].attempt
    second = np.concatenate([prompt, first.tokens, new])
    found = serve(under, [request(1, second)])[1].attempt
    # The response's last token was drawn but not fed; the dialogue's last is
    # what decoding begins with.
    self.assertEqual(
      under.counters["prompt_tokens_computed"], len(prompt) - 1 + len(new)
    )
    fresh = serve(make(), [request(1, second)])[1].attempt
    np.testing.assert_array_equal(found.tokens, fresh.tokens)
    np.testing.assert_allclose(found.logprobs, fresh.logprobs, atol=1e-4)

  def test_new_parameters_forget_old_caches(self):
    prompt = random_prompts(1)[0]
    under = make()
    serve(under, [request(0, prompt)])
    under.forget()
    serve(under, [request(1, prompt)])
    self.assertEqual(under.counters["prompt_tokens_reused"], 0)

  def test_finished_slots_are_refilled_at_once(self):
    under = make(slots=4)
    limits = [20, 2, 2, 2, 2, 2, 2, 2]
    prompts = random_prompts(8, seed=5)
    serve(
      under,
      [
        request(i, p, limit=limit)
        for i, (p, limit) in enumerate(zip(prompts, limits, strict=True))
      ],
    )
    # In lock step, four at a time, it would be 20 + 2 steps.
    self.assertLessEqual(under.counters["decode_steps"], 20)
    self.assertEqual(under.counters["slot_steps_used"], sum(limits))


class StopTest(parameterized.TestCase):
  def test_stops_at_a_string_across_tokens_and_inside_one(self):
    prompt = random_prompts(1)[0]
    free = serve(make(stops=("\x00never",)), [request(0, prompt)])[0].attempt
    text = bytes(t for t in free.tokens.tolist() if t < 256)
    self.assertGreater(len(text), 12)
    stop = text[8:11]
    if any(byte > 127 for byte in stop):
      stop = bytes(byte for byte in stop if byte < 128)
    stop = stop.decode()
    at = text.index(stop.encode()) + len(stop)
    done = serve(make(stops=(stop,)), [request(0, prompt)])[0].attempt
    self.assertEqual(done.finish, "stop")
    self.assertLen(done.tokens, at)

  def test_stops_at_a_string_across_the_border_of_chunks(self):
    free, found = make(stops=("\x00never",)), []
    for prompt in random_prompts(20):
      plain = serve(free, [request(0, prompt)])[0].attempt
      letters = plain.tokens.tolist()
      # The fifth token ends a chunk: the string's two letters lie around it.
      found = [i for i in (5, 10, 15) if max(letters[i - 1 : i + 1]) < 128]
      if found:
        break
    at = found[0]
    stop = bytes(letters[at - 1 : at + 1])
    first = bytes(min(i, 255) for i in letters).index(stop) + len(stop)
    done = serve(make(stops=(stop.decode(),)), [request(0, prompt)])[0].attempt
    self.assertEqual((done.finish, len(done.tokens)), ("stop", first))
    self.assertEqual(first, at + 1)

  def test_limit_ends_a_response(self):
    done = serve(make(), [request(0, [97, 98], limit=4)])[0].attempt
    self.assertEqual((done.finish, len(done.tokens)), ("length", 4))


class InterventionTest(parameterized.TestCase):
  def test_the_budget_forces_the_closing_tokens(self):
    rule = thinking.ThinkingConfig(max_tokens=6, min_tokens=0)
    under = make(control=slot_state.Control(intervention=rule))
    done = serve(
      under, [request(i, p) for i, p in enumerate(random_prompts(4))]
    )
    for completion in done.values():
      attempt = completion.attempt
      self.assertEqual(attempt.fired_at, 6)
      forced = attempt.tokens[attempt.forced]
      np.testing.assert_array_equal(forced, CLOSING)
      np.testing.assert_array_equal(attempt.logprobs[attempt.forced], 0)
      self.assertTrue(np.all(attempt.logprobs[~attempt.forced] < 0))
      self.assertEqual(attempt.thinking_tokens, 6 + len(b"</think>"))

  def test_off_never_forces(self):
    rule = thinking.ThinkingConfig(enabled=False, max_tokens=6, min_tokens=0)
    under = make(control=slot_state.Control(intervention=rule))
    done = serve(under, [request(0, [97, 98, 99])], epsilon=9.0)[0]
    self.assertFalse(done.attempt.forced.any())
    self.assertNotEmpty(done.deltas)


class CostTest(parameterized.TestCase):
  def test_without_control_the_same_tokens_are_drawn(self):
    requests = [request(i, p) for i, p in enumerate(random_prompts(4))]
    rule = thinking.ThinkingConfig(enabled=False)
    on = serve(make(control=slot_state.Control(intervention=rule)), requests)
    off = serve(make(control=slot_state.Control(signal="none")), requests)
    for ticket, completion in off.items():
      attempt, expected = completion.attempt, on[ticket].attempt
      np.testing.assert_array_equal(attempt.tokens, expected.tokens)
      np.testing.assert_allclose(attempt.logprobs, expected.logprobs, atol=1e-5)
      self.assertFalse(attempt.uncertainty.any() or attempt.entropy.any())
      self.assertEqual(attempt.thinking_tokens, expected.thinking_tokens)


class ProgramTest(parameterized.TestCase):
  def test_nothing_is_compiled_after_the_warm_up(self):
    under = make(buckets=True)
    under._sampler.warm_up([draw.Sampling()])
    programs = lambda: sum(  # noqa: E731
      f._cache_size()
      for f in (
        slot_state.prefill,
        slot_state.fork,
        slot_state.assign,
        slot_state.decode,
        slot_state.turn_scores,
      )
    )
    before = programs()
    prompts = random_prompts(12, seed=9)
    serve(under, [request(i, prompts[i // 2]) for i in range(24)], epsilon=0.3)
    self.assertEqual(programs(), before)

  def test_the_cache_is_as_large_as_the_arithmetic_says(self):
    under = make()
    policy, _ = tiny_policy()
    found = sum(x.nbytes for x in jax.tree.leaves(under._sampler._state.cache))
    config = policy.config
    per_token = 2 * config.layers * config.kv_heads * config.head_width * 4
    self.assertEqual(found, 4 * (MAX_PROMPT + MAX_RESPONSE) * per_token)

  def test_refuses_what_does_not_fit(self):
    under = make()
    with self.assertRaisesRegex(ValueError, "rollout.max_prompt"):
      under.submit(request(0, np.full(MAX_PROMPT + 1, 97)))
    with self.assertRaisesRegex(ValueError, "rollout.max_response"):
      under.submit(request(0, [97], limit=MAX_RESPONSE + 1))
    under.submit(request(0, [97]))
    with self.assertRaisesRegex(RuntimeError, "under way"):
      under.forget()


if __name__ == "__main__":
  absltest.main()
