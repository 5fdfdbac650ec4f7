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

Slots live on a mesh of the process's own devices. Its `tensor` axis splits
heads, feed-forward width and vocabulary; each shard of the rows owns slots of
its own and tells the others only how many of them are running. So cache rows
are copied inside a shard only.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from t2po_jax import types
from t2po_jax.control import automaton as automata
from t2po_jax.control import thinking, uncertainty
from t2po_jax.distributed import sharding
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


_SILENT = uncertainty.Signal(function=lambda measures, state, **_: state)


@dataclasses.dataclass(frozen=True)
class Control:
  """Static settings of the exploration control inside the decode loop.

  Attributes:
    signal: one of `uncertainty.SIGNALS`; `none` measures nothing and never
      intervenes, to see what control costs.
    settings: the signal's options, None for its defaults.
    top_j: tokens that the confidence averages over.
    tempered: measure the tempered distribution instead of the model's own.
    intervention: settings of the token-level thinking intervention.
  """

  signal: str = "calibrated"
  settings: Any = None
  top_j: int = uncertainty.TOP_J
  tempered: bool = False
  intervention: thinking.ThinkingConfig = thinking.ThinkingConfig()

  @property
  def source(self) -> uncertainty.Signal:
    """The signal; for `none` one that is never asked."""
    if self.signal == "none":
      return _SILENT
    return uncertainty.SIGNALS[self.signal]


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
    signal: [B, W] float32, what the uncertainty signal carries.
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
  signal: types.Array
  thinking: thinking.ThinkingState
  automaton: types.Array
  tokens: types.Array
  record: types.Array


@functools.partial(jax.jit, static_argnames=("control",))
def _turn_scores(slots, control):
  """Phi of every slot's response so far, [B] float32."""
  signal = slots.record[..., RECORD.index("uncertainty")]
  forced = slots.record[..., RECORD.index("forced")] > 0
  written = jnp.arange(signal.shape[1]) < slots.count[:, None]
  return uncertainty.turn_score(
    signal, written & ~forced, mean=control.source.mean
  )


@flax.struct.dataclass
class _Tables:
  """Constant arrays of the decode loop."""

  automaton: automata.Automaton
  closing: types.Array  # [Q] int32
  eos: types.Array  # [E] int32


def _slot_axes(slots: Slots) -> Slots:
  """Logical axis names of every array."""
  named = jax.tree.map(lambda x: ("rows", *[None] * (x.ndim - 1)), slots)
  return named.replace(cache=decoder.cache_axes(slots.cache))


def _over_slots(*static: str):
  """Compiles a change of the slots that every shard makes to its own.

  Args:
    *static: names of the settings that a program is compiled for.

  Returns:
    A decorator of (shared arrays, slots, *arrays with rows first, **settings)
    -> slots, or a tuple that begins with them. The compiled function takes the
    mesh as one more setting and donates the slots.
  """

  def decorate(function):
    def change(shared, slots, *arrays, mesh, **settings):
      local = sharding.over_rows(functools.partial(function, **settings), mesh)
      result = local(shared, slots, *arrays)
      slots, *rest = result if isinstance(result, tuple) else (result,)
      # In another layout they would need another program next time.
      layout = sharding.params_sharding(mesh, slots, _slot_axes(slots))
      slots = jax.lax.with_sharding_constraint(slots, layout)
      return (slots, *rest) if rest else slots

    change.__name__, change.__doc__ = function.__name__, function.__doc__
    return jax.jit(
      change,
      static_argnames=("mesh", *static),
      donate_argnums=(1,),
    )

  return decorate


@_over_slots("policy", "live")
def _prefill(params, slots, tokens, start, rows, *, policy, live):
  """Computes keys and values of prompt parts.

  Args:
    params: parameters in the decoding layout.
    slots: the slots.
    tokens: [P, T] int32, right-padded; what padding writes is overwritten
      before it can be attended to.
    start: [P] int32, cache offset of each part.
    rows: [P] int32 slot numbers, from 0 in every shard; a number past the end
      is a padding row.
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


@_over_slots()
def _fork(_, slots, source, target):
  """Copies cache rows [P] -> [P]; a target past the end is dropped."""
  cache = jax.tree.map(
    lambda whole: whole.at[target].set(whole[source], mode="drop"), slots.cache
  )
  return slots.replace(cache=cache)


@_over_slots("control")
def _assign(_, slots, rows, numbers, keys, signal, *, control):
  """Begins a response in each of the rows.

  Args:
    slots: the slots.
    rows: [P] int32 slot numbers, from 0 in every shard; a number past the end
      is dropped.
    numbers: [P, 3] int32: tokens in the cache, token to feed, limit.
    keys: [P, 2] uint32.
    signal: [P, W] float32, what the uncertainty signal carries.
    control: exploration control.

  Returns:
    The slots, ready to decode.
  """
  count = rows.shape[0]

  def put(whole, new):
    return whole.at[rows].set(new, mode="drop")

  fresh = thinking.init(count, control.intervention)
  return slots.replace(
    length=put(slots.length, numbers[:, 0]),
    token=put(slots.token, numbers[:, 1]),
    limit=put(slots.limit, numbers[:, 2]),
    count=put(slots.count, 0),
    finish=put(slots.finish, 0),
    automaton=put(slots.automaton, 0),
    keys=put(slots.keys, keys),
    signal=put(slots.signal, signal),
    thinking=jax.tree.map(put, slots.thinking, fresh),
  )


def _watch(slots, logits, running, control):
  """Measures of the logits [B, V], the signal's new state, and M [B]."""
  if control.signal == "none":
    zero = jnp.zeros(logits.shape[0])
    log_z = jax.nn.logsumexp(logits, axis=-1)
    measures = uncertainty.Measures(log_z, zero, zero, zero)
    return measures, slots.signal, zero
  measures = uncertainty.measure(logits, control.top_j)
  source = control.source
  signal, state = source.advance(
    measures,
    slots.signal,
    running,
    vocab_size=logits.shape[-1],
    top_j=control.top_j,
    settings=control.settings or source.options(),
  )
  return measures, state, signal


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
  measures, signal_state, signal = _watch(slots, observed, running, control)
  log_z = measures.log_z
  if tempered is not observed:
    log_z = jax.nn.logsumexp(tempered, axis=-1)
  uniform = draw.uniforms(slots.keys, slots.count)
  token = draw.draw(tempered, uniform, sampling)
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
    signal=signal_state,
    thinking=thoughts,
    tokens=slots.tokens.at[rows, column].set(token, mode="drop"),
    record=slots.record.at[rows, column].set(record, mode="drop"),
  )


@_over_slots("policy", "control", "sampling", "live")
def _decode(shared, slots, *, policy, control, sampling, live):
  """Decodes a chunk; returns early once enough slots have finished.

  Args:
    shared: parameters in the decoding layout; constant arrays; [2] int32: most
      steps, and slots that make an early return; [] float32, threshold of the
      thinking intervention.
    slots: the slots.
    policy: the policy.
    control: exploration control.
    sampling: how tokens are drawn.
    live: cache length that may be attended to.

  Returns:
    The slots, and [1] int32, the number of steps done.
  """
  params, tables, knobs, epsilon = shared

  def running(slots):
    # Of all shards: their loops must take the same number of turns, because
    # what the partitioner exchanges inside may involve every device.
    return sharding.sum_over_rows(slots.finish == 0)

  before = running(slots)
  enough = jnp.minimum(knobs[1], before)

  def more(carry):
    done, slots = carry
    return (done < knobs[0]) & (before - running(slots) < enough)

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

  done, slots = jax.lax.while_loop(more, body, (jnp.zeros_like(before), slots))
  return slots, done[None]


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


@functools.partial(jax.jit, static_argnames=("policy",))
def _decode_layout(params, *, policy):
  """Parameters in the decoding layout, where they are."""
  return policy.decode_params(params)


def _fresh_slots(
  policy: decoder.Policy,
  control: Control,
  count: int,
  max_prompt: int,
  max_response: int,
) -> Slots:
  """Slots that have never been used, with the arguments of `Sampler`."""
  return Slots(
    cache=policy.init_cache(count, max_prompt + max_response, policy.dtype),
    token=jnp.zeros(count, jnp.int32),
    length=jnp.zeros(count, jnp.int32),
    count=jnp.zeros(count, jnp.int32),
    limit=jnp.zeros(count, jnp.int32),
    finish=jnp.ones(count, jnp.int32),
    keys=jnp.zeros((count, 2), jnp.uint32),
    signal=control.source.start(count),
    thinking=thinking.init(count, control.intervention),
    automaton=jnp.zeros(count, jnp.int32),
    tokens=jnp.zeros((count, max_response), jnp.int32),
    record=jnp.zeros((count, max_response, len(RECORD))),
  )


class Sampler:
  """The slots of one policy and the programs that change them.

  Attributes:
    slots: number of slots B.
    shards: into how many parts, of equal size, they are split; only slots of
      one shard can copy from each other.
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
    mesh: jax.sharding.Mesh | None = None,
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
      mesh: devices of this process; by default the first.

    Raises:
      ValueError: if the slots cannot be split evenly.
    """
    self._mesh = mesh or sharding.create_mesh(devices=jax.local_devices()[:1])
    self.slots = slots
    self.shards = sharding.row_shards(self._mesh)
    if slots % self.shards:
      raise ValueError(
        f"slots: found {slots}, expected a multiple of {self.shards}, the "
        "groups of devices that share them"
      )
    self._own = slots // self.shards
    self.max_prompt = max_prompt
    self.max_response = max_response
    self.active = np.zeros(slots, bool)
    self._policy = policy
    self._control = control
    self._signal = np.asarray(control.source.initial, np.float32)
    self._chunk = chunk
    self._length = max_prompt + max_response
    self._prefill_tokens = _buckets(prefill_tokens, max_prompt)
    self._prefill_rows = _buckets(1, min(prefill_rows, self._own), 4)
    self._row_counts = _buckets(1, self._own, 4)
    self._live = _buckets(live_tokens, self._length)
    self._params = None
    self._lengths = np.zeros(slots, np.int64)
    self._counts = np.zeros(slots, np.int64)
    self._finish = np.ones(slots, np.int64)
    tables = _Tables(
      automaton=automata.build(
        vocabulary.token_bytes,
        ("</think>", *vocabulary.stops),
        vocab_size=policy.config.vocab_size,
      ),
      closing=np.asarray(vocabulary.closing, np.int32),
      eos=np.asarray(vocabulary.eos or (-1,), np.int32),
    )
    self._tables = sharding.put(tables, sharding.replicated(self._mesh))
    fresh = functools.partial(
      _fresh_slots, policy, control, slots, max_prompt, max_response
    )
    shapes = jax.eval_shape(fresh)
    layout = sharding.params_sharding(self._mesh, shapes, _slot_axes(shapes))
    self._state = jax.jit(fresh, out_shardings=layout)()

  def load(self, params: types.Params) -> None:
    """Takes new parameters, in the training layout and of any sharding."""
    # In the dtype of the computation there is less to move.
    params = _decode_layout(params, policy=self._policy)
    axes = decoder.logical_axes(params)
    layout = sharding.params_sharding(self._mesh, params, axes)
    self._params = sharding.put(params, layout)

  def prefill(self, parts: Sequence[tuple[int, np.ndarray, int]]) -> None:
    """Computes the cache of prompts.

    Args:
      parts: (slot, prompt tokens, how many of them the cache already holds).
    """
    # Equal sizes together, and only as many rows a call as are needed.
    parts = sorted(parts, key=lambda part: len(part[1]) - part[2])
    left = self._by_shard([part[0] for part in parts], parts)
    while any(left):
      most = max(map(len, left))
      height = max(n for n in self._prefill_rows if n <= most)
      some = [shard[:height] for shard in left]
      left = [shard[height:] for shard in left]
      width = _bucket(
        max(len(p) - n for shard in some for _, (_, p, n) in shard),
        self._prefill_tokens,
      )
      rows, tokens, start = self._padding(height, (width,), ())
      for at, (row, (_, prompt, held)) in self._lines(height, some):
        # A padded part must end inside the cache; then more is recomputed.
        start[at] = min(held, self._length - width)
        tokens[at, : len(prompt) - start[at]] = prompt[start[at] :]
        rows[at] = row
      self._prefill(tokens, start, rows)

  def _by_shard(
    self, slots: Sequence[int], values: Sequence[Any]
  ) -> list[list[tuple[int, Any]]]:
    """For every shard, (its own number of the slot, value) in order."""
    shards = [[] for _ in range(self.shards)]
    for slot, value in zip(slots, values, strict=True):
      shard, row = divmod(slot, self._own)
      shards[shard].append((row, value))
    return shards

  def _lines(self, height: int, shards: Sequence[Sequence[Any]]):
    """(index, value) in arrays that give every shard as many rows."""
    for shard, values in enumerate(shards):
      yield from enumerate(values, start=shard * height)

  def _padding(self, height: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    """int32 arrays with rows for every shard; the first names no slot."""
    count = self.shards * height
    nowhere = np.full(count, self._own, np.int32)
    return [nowhere, *(np.zeros((count, *s), np.int32) for s in shapes)]

  def _prefill(self, tokens, start, rows) -> None:
    self._state = _prefill(
      self._params,
      self._state,
      tokens,
      start,
      rows,
      policy=self._policy,
      live=self._length,
      mesh=self._mesh,
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
    jobs = []
    for height in self._prefill_rows:
      for width in self._prefill_tokens:
        rows, tokens, start = self._padding(height, (width,), ())
        jobs.append(functools.partial(self._prefill, tokens, start, rows))
    for height in self._row_counts:
      rows, source, numbers = self._padding(height, (), (3,))
      keys = np.zeros((len(rows), 2), np.uint32)
      signal = np.tile(self._signal, (len(rows), 1))
      jobs.append(functools.partial(self._fork, source, rows))
      jobs.append(functools.partial(self._assign, rows, numbers, keys, signal))
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
    """Copies cache rows from source to target slots, all at once.

    Raises:
      ValueError: if a pair lies in two shards.
    """
    if any(s // self._own != t // self._own for s, t in pairs):
      raise ValueError(f"slots: found {pairs}, expected pairs inside a shard")
    if pairs:
      shards = self._by_shard([t for _, t in pairs], [s for s, _ in pairs])
      height = _bucket(max(map(len, shards)), self._row_counts)
      target, source = self._padding(height, ())
      for at, (row, slot) in self._lines(height, shards):
        source[at], target[at] = slot % self._own, row
      self._fork(source, target)

  def _fork(self, source, target) -> None:
    self._state = _fork(None, self._state, source, target, mesh=self._mesh)

  def assign(self, rows: Sequence[int], requests: Sequence[Any]) -> None:
    """Begins (or, after a rewind, begins anew) a response in each slot."""
    for row, request in zip(rows, requests, strict=True):
      self._lengths[row] = len(request.prompt) - 1
      self._counts[row] = self._finish[row] = 0
      self.active[row] = True
    shards = self._by_shard(rows, requests)
    height = _bucket(max(map(len, shards)), self._row_counts)
    slots, numbers = self._padding(height, (3,))
    keys = np.zeros((len(slots), 2), np.uint32)
    signal = np.tile(self._signal, (len(slots), 1))
    for at, (row, request) in self._lines(height, shards):
      slots[at] = row
      numbers[at] = len(request.prompt) - 1, request.prompt[-1], request.limit
      keys[at] = request.key
      if request.signal is not None:
        signal[at] = request.signal
    self._assign(slots, numbers, keys, signal)

  def _assign(self, rows, numbers, keys, signal) -> None:
    self._state = _assign(
      None,
      self._state,
      rows,
      numbers,
      keys,
      signal,
      control=self._control,
      mesh=self._mesh,
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
    return int(steps[0]), used, finished

  def _decode(self, sampling, epsilon, live) -> types.Array:
    self._state, steps = _decode(
      (
        self._params,
        self._tables,
        np.asarray([self._chunk, max(self.slots // 8, 1)], np.int32),
        np.float32(epsilon),
      ),
      self._state,
      policy=self._policy,
      control=self._control,
      sampling=sampling,
      live=live,
      mesh=self._mesh,
    )
    return steps

  def fetch(self, rows: Sequence[int]) -> list[Mapping[str, np.ndarray]]:
    """What was recorded of finished slots.

    Args:
      rows: slot numbers.

    Returns:
      Per slot: `tokens` [n] int32, every name of `RECORD` [n] float32,
      `signal` [W], `finish`, `fired_at`, `thinking_tokens` and `phi`.
    """
    state = self._state
    tokens, record, signal, fired_at, thought, phi = jax.device_get(
      (
        state.tokens,
        state.record,
        state.signal,
        state.thinking.fired_at,
        state.thinking.thinking_tokens,
        _turn_scores(state, self._control),
      )
    )
    answers = []
    for row in rows:
      size = self._counts[row]
      answers.append(
        {
          "tokens": tokens[row, :size],
          "signal": signal[row],
          "finish": FINISH[self._finish[row]],
          "fired_at": int(fired_at[row]),
          "thinking_tokens": int(thought[row]),
          "phi": float(phi[row]),
          **dict(zip(RECORD, record[row, :size].T, strict=True)),
        }
      )
    return answers
