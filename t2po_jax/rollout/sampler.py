"""Device side of sampling: prefill and the chunked decode loop over slots.

A slot is one row of the key/value cache with everything that belongs to one
response: its random key, its place in the thinking intervention, its record.
Four jitted functions change the slots, each donating them: `_prefill` computes
the cache of a prompt, `_fork` copies cache rows, `_assign` begins a response,
`_decode` runs up to one chunk of tokens and returns early once a slot has
finished. Exploration control (T2PO, arXiv 2605.02178, section on token-level
thinking intervention) is part of the decode step, row by row, without a host
round trip.

The last prompt token never enters the cache by prefill; it is the first token
the decode loop feeds. So to sample a turn again the slot only steps back to
its prompt's end.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from t2po_jax import sharding, types
from t2po_jax.control import automaton as automata
from t2po_jax.control import thinking, uncertainty
from t2po_jax.models import decoder
from t2po_jax.rollout import draw

# What is recorded of each token, in this order.
RECORD = (
  "logprob",
  "uncertainty",
  "entropy",
  "confidence",
  "forced",
  "window_mean",
)
FINISH = ("running", "stop", "eos", "length")


@dataclasses.dataclass(frozen=True)
class Control:
  """Static settings of the exploration control inside the decode loop.

  Attributes:
    signal: `calibrated`, `entropy`, `confidence` or `released`; `none`
      measures nothing and never intervenes, to see what control costs.
    normalizer: `running` or `vocab`.
    alpha: weight of the entropy in M, in [0, 1].
    top_j: tokens that the confidence averages over.
    tempered: measure the tempered distribution instead of the model's own.
    intervention: settings of the token-level thinking intervention.
  """

  signal: str = "calibrated"
  normalizer: str = "running"
  alpha: float = 0.4
  top_j: int = 20
  tempered: bool = False
  intervention: thinking.ThinkingConfig = thinking.ThinkingConfig()


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """What the sampler needs to know of the tokenizer.

  Attributes:
    token_bytes: what each token id adds to the text.
    eos: token ids that end a response.
    closing: token ids that the thinking intervention forces.
    stops: strings at which a response ends.
  """

  token_bytes: Sequence[bytes]
  eos: tuple[int, ...]
  closing: tuple[int, ...]
  stops: tuple[str, ...]


@flax.struct.dataclass
class Slots:
  """State of all slots; a pytree that lives on the device.

  Attributes:
    cache: keys and values of every layer.
    token: [B] int32, the token to feed next.
    length: [B] int32, tokens in the cache.
    count: [B] int32, response tokens so far.
    limit: [B] int32, most response tokens.
    finish: [B] int32, index into `FINISH`; 0 while the slot is running.
    keys: [B, 2] uint32.
    extremes: running extremes of the uncertainty signal.
    thinking: state of the thinking intervention.
    automaton: [B] int32, progress in recognising tags.
    tokens: [B, T] int32, the response.
    record: [B, T, len(RECORD)] float32.
  """

  cache: Any
  token: types.Array
  length: types.Array
  count: types.Array
  limit: types.Array
  finish: types.Array
  keys: types.Array
  extremes: uncertainty.Extremes
  thinking: thinking.ThinkingState
  automaton: types.Array
  tokens: types.Array
  record: types.Array


@jax.jit
def _turn_scores(slots):
  """Phi of every slot's response so far, [B] float32."""
  signal = slots.record[..., RECORD.index("uncertainty")]
  forced = slots.record[..., RECORD.index("forced")] > 0
  written = jnp.arange(signal.shape[1]) < slots.count[:, None]
  return uncertainty.turn_score(signal, written & ~forced)


@flax.struct.dataclass
class _Tables:
  """Constant arrays of the decode loop."""

  automaton: automata.Automaton
  closing: types.Array  # [Q] int32
  eos: types.Array  # [E] int32


@functools.partial(jax.jit, static_argnames=("policy",))
def _decode_layout(params, *, policy):
  """Parameters in the decoding layout."""
  return policy.decode_params(params)


@functools.partial(
  jax.jit, static_argnames=("policy", "live"), donate_argnames=("slots",)
)
def _prefill(params, slots, tokens, start, rows, *, policy, live):
  """Computes keys and values of prompt parts.

  Args:
    params: parameters in the decoding layout.
    slots: the slots.
    tokens: [P, T] int32, right-padded; what padding writes is overwritten
      before it can be attended to.
    start: [P] int32, cache offset of each part.
    rows: [P] int32 slot numbers; a number past the end is a padding row.
    policy: the policy.
    live: cache length that may be attended to.

  Returns:
    The slots with the rows' cache extended.
  """
  size = slots.token.shape[0]
  part = jax.tree.map(
    lambda whole: whole[jnp.minimum(rows, size - 1)], slots.cache
  )
  _, part = policy.extend(params, part, tokens, start, live=live)
  cache = jax.tree.map(
    lambda whole, new: whole.at[rows].set(new, mode="drop"), slots.cache, part
  )
  return slots.replace(cache=cache)


@functools.partial(jax.jit, donate_argnames=("slots",))
def _fork(slots, source, target):
  """Copies cache rows [P] -> [P]; a target past the end is dropped."""
  cache = jax.tree.map(
    lambda whole: whole.at[target].set(whole[source], mode="drop"), slots.cache
  )
  return slots.replace(cache=cache)


@functools.partial(
  jax.jit, static_argnames=("control",), donate_argnames=("slots",)
)
def _assign(slots, rows, numbers, keys, extremes, *, control):
  """Begins a response in each of the rows.

  Args:
    slots: the slots.
    rows: [P] int32 slot numbers; a number past the end is dropped.
    numbers: [P, 3] int32: tokens in the cache, token to feed, limit.
    keys: [P, 2] uint32.
    extremes: [P, 4] float32.
    control: exploration control.

  Returns:
    The slots, ready to decode.
  """
  count = rows.shape[0]
  fresh = (
    uncertainty.Extremes(*extremes.T),
    thinking.init(count, control.intervention),
  )

  def put(whole, new):
    return whole.at[rows].set(new, mode="drop")

  old = (slots.extremes, slots.thinking)
  extremes, thoughts = jax.tree.map(put, old, fresh)
  return slots.replace(
    length=put(slots.length, numbers[:, 0]),
    token=put(slots.token, numbers[:, 1]),
    limit=put(slots.limit, numbers[:, 2]),
    count=put(slots.count, 0),
    finish=put(slots.finish, 0),
    automaton=put(slots.automaton, 0),
    keys=put(slots.keys, keys),
    extremes=extremes,
    thinking=thoughts,
  )


def _watch(slots, logits, running, control):
  """Measures of the logits [B, V], their extremes so far, and M [B]."""
  if control.signal == "none":
    zero = jnp.zeros(logits.shape[0])
    log_z = jax.nn.logsumexp(logits, axis=-1)
    measures = uncertainty.Measures(log_z, zero, zero, zero)
    return measures, slots.extremes, zero
  measures = uncertainty.measure(logits, control.top_j)
  extremes = uncertainty.update_extremes(
    slots.extremes, measures.entropy, measures.confidence, running
  )
  signal = uncertainty.signal(
    measures,
    extremes,
    kind=control.signal,
    normalizer=control.normalizer,
    vocab_size=logits.shape[-1],
    top_j=control.top_j,
    alpha=control.alpha,
  )
  return measures, extremes, signal


def _step(params, tables, slots, epsilon, *, policy, control, sampling, live):
  """Decodes one token in every running slot; the others stay as they are."""
  running = slots.finish == 0
  hidden, cache = policy.extend(
    params, slots.cache, slots.token[:, None], slots.length, live=live
  )
  logits = policy.decode_logits(params, hidden[:, 0])
  tempered = logits
  if sampling.temperature not in (0.0, 1.0):
    tempered = logits / sampling.temperature
  observed = tempered if control.tempered else logits
  measures, extremes, signal = _watch(slots, observed, running, control)
  log_z = measures.log_z
  if tempered is not observed:
    log_z = jax.nn.logsumexp(tempered, axis=-1)
  uniform = draw.uniforms(slots.keys, slots.count)
  token = draw.draw(tempered, log_z, uniform, sampling)
  thoughts, forced = slots.thinking, jnp.zeros_like(running)
  if control.signal != "none":
    thoughts, queued, forced = thinking.intervene(
      thoughts,
      signal,
      epsilon,
      tables.closing,
      control.intervention,
      active=running,
    )
    token = jnp.where(forced, queued, token)
  logprob = jnp.take_along_axis(tempered, token[:, None], axis=-1)[:, 0] - log_z
  state, hits = automata.step(tables.automaton, slots.automaton, token)
  thoughts = thinking.observe(
    thoughts,
    automata.completed(hits, 0),
    automata.begun(tables.automaton, state, 0),
    active=running,
  )

  count = slots.count + 1
  finish = jnp.select(
    [
      (hits >> 1) > 0,
      jnp.any(token[:, None] == tables.eos[None], axis=-1),
      count >= slots.limit,
    ],
    [FINISH.index("stop"), FINISH.index("eos"), FINISH.index("length")],
    0,
  )
  record = jnp.stack(
    [
      jnp.where(forced, 0.0, logprob),
      signal,
      measures.entropy,
      measures.confidence,
      forced.astype(jnp.float32),
      thoughts.window_mean,
    ],
    axis=-1,
  )
  rows = jnp.arange(token.shape[0])
  column = jnp.where(running, slots.count, slots.tokens.shape[1])

  def keep(new, old):
    return jnp.where(running, new, old)

  return slots.replace(
    cache=cache,
    token=keep(token, slots.token),
    length=keep(slots.length + 1, slots.length),
    count=keep(count, slots.count),
    finish=keep(finish, slots.finish),
    automaton=keep(state, slots.automaton),
    extremes=extremes,
    thinking=thoughts,
    tokens=slots.tokens.at[rows, column].set(token, mode="drop"),
    record=slots.record.at[rows, column].set(record, mode="drop"),
  )


@functools.partial(
  jax.jit,
  static_argnames=("policy", "control", "sampling", "live"),
  donate_argnames=("slots",),
)
def _decode(
  params, tables, slots, knobs, epsilon, *, policy, control, sampling, live
):
  """Decodes a chunk; returns early once enough slots have finished.

  Args:
    params: parameters in the decoding layout.
    tables: constant arrays.
    slots: the slots.
    knobs: [2] int32: most steps; slots that make an early return.
    epsilon: [] float32, threshold of the thinking intervention.
    policy: the policy.
    control: exploration control.
    sampling: how tokens are drawn.
    live: cache length that may be attended to.

  Returns:
    The slots, and [] int32, the number of steps done.
  """
  before = jnp.sum(slots.finish == 0)
  enough = jnp.minimum(knobs[1], before)

  def more(carry):
    done, slots = carry
    running = jnp.sum(slots.finish == 0)
    return (done < knobs[0]) & (before - running < enough)

  def body(carry):
    done, slots = carry
    slots = _step(
      params,
      tables,
      slots,
      epsilon,
      policy=policy,
      control=control,
      sampling=sampling,
      live=live,
    )
    return done + 1, slots

  done, slots = jax.lax.while_loop(more, body, (jnp.int32(0), slots))
  return slots, done


def _buckets(smallest: int, largest: int, factor: int = 2) -> tuple[int, ...]:
  """Growing sizes from the smallest up to the largest, which is the last."""
  sizes = []
  while smallest < largest:
    sizes.append(smallest)
    smallest *= factor
  return (*sizes, largest)


def _bucket(size: int, buckets: Sequence[int]) -> int:
  """The smallest bucket that holds the size."""
  return next(bucket for bucket in buckets if bucket >= size)


class Sampler:
  """The slots of one policy and the programs that change them.

  Attributes:
    slots: number of slots B.
    max_prompt: most tokens of a prompt.
    max_response: most tokens of a response.
    active: [B] bool on the host, the slots that are decoding.
  """

  def __init__(
    self,
    policy: decoder.Policy,
    vocabulary: Vocabulary,
    control: Control,
    *,
    slots: int,
    max_prompt: int,
    max_response: int,
    chunk: int,
    prefill_tokens: int = 32,
    prefill_rows: int = 16,
    live_tokens: int = 128,
  ):
    """Allocates the slots.

    Args:
      policy: the policy; its dtype is the cache's as well.
      vocabulary: what the tokenizer says.
      control: exploration control.
      slots: number of slots B.
      max_prompt: most tokens of a prompt.
      max_response: most tokens of a response.
      chunk: most tokens decoded per call.
      prefill_tokens: smallest bucket of prompt tokens.
      prefill_rows: most prompts per prefill call.
      live_tokens: smallest bucket of cache length to attend over.
    """
    self.slots = slots
    self.max_prompt = max_prompt
    self.max_response = max_response
    self.active = np.zeros(slots, bool)
    self._policy = policy
    self._control = control
    self._chunk = chunk
    self._length = max_prompt + max_response
    self._prefill_tokens = _buckets(prefill_tokens, max_prompt)
    self._prefill_rows = _buckets(1, min(prefill_rows, slots), 4)
    self._row_counts = _buckets(1, slots, 4)
    self._live = _buckets(live_tokens, self._length)
    self._params = None
    self._lengths = np.zeros(slots, np.int64)
    self._counts = np.zeros(slots, np.int64)
    self._finish = np.ones(slots, np.int64)
    size = policy.config.vocab_size
    self._tables = jax.device_put(
      _Tables(
        automaton=automata.build(
          vocabulary.token_bytes,
          ("</think>", *vocabulary.stops),
          vocab_size=size,
        ),
        closing=np.asarray(vocabulary.closing, np.int32),
        eos=np.asarray(vocabulary.eos or (-1,), np.int32),
      )
    )
    self._state = Slots(
      cache=policy.init_cache(slots, self._length, policy.dtype),
      token=jnp.zeros(slots, jnp.int32),
      length=jnp.zeros(slots, jnp.int32),
      count=jnp.zeros(slots, jnp.int32),
      limit=jnp.zeros(slots, jnp.int32),
      finish=jnp.ones(slots, jnp.int32),
      keys=jnp.zeros((slots, 2), jnp.uint32),
      extremes=uncertainty.initial_extremes(slots),
      thinking=thinking.init(slots, control.intervention),
      automaton=jnp.zeros(slots, jnp.int32),
      tokens=jnp.zeros((slots, max_response), jnp.int32),
      record=jnp.zeros((slots, max_response, len(RECORD))),
    )

  def load(self, params: types.Params) -> None:
    """Takes new parameters, in the training layout and of any sharding."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    local = sharding.put(params, device)
    self._params = _decode_layout(local, policy=self._policy)

  def prefill(self, parts: Sequence[tuple[int, np.ndarray, int]]) -> None:
    """Computes the cache of prompts.

    Args:
      parts: (slot, prompt tokens, how many of them the cache already holds).
    """
    # Equal sizes together, and only as many rows a call as are needed.
    left = sorted(parts, key=lambda part: len(part[1]) - part[2])
    while left:
      height = max(n for n in self._prefill_rows if n <= len(left))
      some, left = left[:height], left[height:]
      width = _bucket(max(len(p) - n for _, p, n in some), self._prefill_tokens)
      tokens = np.zeros((height, width), np.int32)
      start = np.zeros(height, np.int32)
      for i, (_, prompt, held) in enumerate(some):
        # A padded part must end inside the cache; then more is recomputed.
        start[i] = min(held, self._length - width)
        tokens[i, : len(prompt) - start[i]] = prompt[start[i] :]
      rows = np.asarray([slot for slot, _, _ in some], np.int32)
      self._prefill(tokens, start, rows)

  def _prefill(self, tokens, start, rows) -> None:
    self._state = _prefill(
      self._params,
      self._state,
      tokens,
      start,
      rows,
      policy=self._policy,
      live=self._length,
    )

  def warm_up(
    self,
    samplings: Sequence[draw.Sampling],
    progress: Callable[[int, int], None] = lambda done, total: None,
  ) -> int:
    """Compiles every program that sampling may need; changes no slot.

    Args:
      samplings: the ways in which tokens will be drawn.
      progress: called with the programs compiled so far and their number.

    Returns:
      The number of programs.
    """
    outside = {n: np.full(n, self.slots, np.int32) for n in self._row_counts}
    jobs = [
      functools.partial(
        self._prefill,
        np.zeros((height, width), np.int32),
        np.zeros(height, np.int32),
        np.full(height, self.slots, np.int32),
      )
      for height in self._prefill_rows
      for width in self._prefill_tokens
    ]
    jobs += [
      functools.partial(self._fork, np.zeros_like(rows), rows)
      for rows in outside.values()
    ]
    jobs += [
      functools.partial(
        self._assign,
        rows,
        np.zeros((n, 3), np.int32),
        np.zeros((n, 2), np.uint32),
        np.zeros((n, 4), np.float32),
      )
      for n, rows in outside.items()
    ]
    jobs += [
      functools.partial(self._decode, sampling, 0.0, live)
      for sampling in dict.fromkeys(samplings)
      for live in self._live
    ]
    jobs.append(functools.partial(self.fetch, []))
    for done, job in enumerate(jobs):
      progress(done, len(jobs))
      job()
    progress(len(jobs), len(jobs))
    return len(jobs)

  def fork(self, pairs: Sequence[tuple[int, int]]) -> None:
    """Copies cache rows from source to target slots, all at once."""
    if pairs:
      height = _bucket(len(pairs), self._row_counts)
      padded = [*pairs, *[(0, self.slots)] * (height - len(pairs))]
      source, target = np.asarray(padded, np.int32).T
      self._fork(source, target)

  def _fork(self, source, target) -> None:
    self._state = _fork(self._state, source, target)

  def assign(self, rows: Sequence[int], requests: Sequence[Any]) -> None:
    """Begins (or, after a rewind, begins anew) a response in each slot."""
    height = _bucket(len(rows), self._row_counts)
    slots = np.full(height, self.slots, np.int32)
    numbers = np.zeros((height, 3), np.int32)
    keys = np.zeros((height, 2), np.uint32)
    extremes = np.zeros((height, 4), np.float32)
    for i, (row, request) in enumerate(zip(rows, requests, strict=True)):
      held = len(request.prompt) - 1
      slots[i] = row
      numbers[i] = held, request.prompt[-1], request.limit
      keys[i], extremes[i] = request.key, request.extremes
      self._lengths[row], self._counts[row], self._finish[row] = held, 0, 0
      self.active[row] = True
    self._assign(slots, numbers, keys, extremes)

  def _assign(self, rows, numbers, keys, extremes) -> None:
    self._state = _assign(
      self._state, rows, numbers, keys, extremes, control=self._control
    )

  def decode(
    self, sampling: draw.Sampling, epsilon: float
  ) -> tuple[int, int, list[int]]:
    """Decodes one chunk.

    Returns:
      Steps done, slot-steps that produced a token, slots that finished.
    """
    longest = int(self._lengths[self.active].max()) + self._chunk
    live = _bucket(min(longest, self._length), self._live)
    steps = self._decode(sampling, epsilon, live)
    steps, finish, counts = jax.device_get(
      (steps, self._state.finish, self._state.count)
    )
    self._finish = finish.astype(np.int64)
    used = int((counts - self._counts)[self.active].sum())
    self._lengths += counts - self._counts
    self._counts = counts.astype(np.int64)
    finished = np.flatnonzero(self.active & (self._finish > 0)).tolist()
    self.active[finished] = False
    return int(steps), used, finished

  def _decode(self, sampling, epsilon, live) -> types.Array:
    self._state, steps = _decode(
      self._params,
      self._tables,
      self._state,
      np.asarray([self._chunk, max(self.slots // 8, 1)], np.int32),
      np.float32(epsilon),
      policy=self._policy,
      control=self._control,
      sampling=sampling,
      live=live,
    )
    return steps

  def fetch(self, rows: Sequence[int]) -> list[Mapping[str, np.ndarray]]:
    """What was recorded of finished slots.

    Args:
      rows: slot numbers.

    Returns:
      Per slot: `tokens` [n] int32, every name of `RECORD` [n] float32,
      `extremes` [4], `finish`, `fired_at`, `thinking_tokens` and `phi`.
    """
    state = self._state
    tokens, record, extremes, fired_at, thought, phi = jax.device_get(
      (
        state.tokens,
        state.record,
        state.extremes,
        state.thinking.fired_at,
        state.thinking.thinking_tokens,
        _turn_scores(state),
      )
    )
    answers = []
    for row in rows:
      size = self._counts[row]
      answers.append(
        {
          "tokens": tokens[row, :size],
          "extremes": np.asarray([e[row] for e in jax.tree.leaves(extremes)]),
          "finish": FINISH[self._finish[row]],
          "fired_at": int(fired_at[row]),
          "thinking_tokens": int(thought[row]),
          "phi": float(phi[row]),
          **dict(zip(RECORD, record[row, :size].T, strict=True)),
        }
      )
    return answers
