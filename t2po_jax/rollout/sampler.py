"""The compiled programs of sampling, and the slots that they operate on.

`Sampler` translates the scheduler's requests (compute these prompts, begin
these responses, decode a chunk) into calls of the few compiled functions of
`slots`: sizes are rounded up to buckets, all shards get equally many rows, and
every program can be compiled in advance.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from t2po_jax import types
from t2po_jax.control import automaton as automata
from t2po_jax.distributed import sharding
from t2po_jax.models import decoder
from t2po_jax.rollout import draw, weights
from t2po_jax.rollout import slots as slot_state


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """What the sampler needs to know about the tokenizer.

  Attributes:
    token_bytes: the bytes that each token id adds to the text.
    eos: token ids that end a response.
    closing: token ids that the thinking intervention forces.
    stops: strings at which a response ends.
  """

  token_bytes: Sequence[bytes]
  eos: tuple[int, ...]
  closing: tuple[int, ...]
  stops: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled operation on the slots, with its arguments.

  Attributes:
    kind: `prefill`, `fork`, `assign` or `decode`.
    size: a description.
    function: jitted.
    arguments: arrays, or shapes with layouts.
    settings: its static arguments.
  """

  kind: str
  size: str
  function: Any
  arguments: tuple[Any, ...]
  settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Request:
  """One response to sample.

  Attributes:
    ticket: the caller's identifier, unique among requests in progress.
    prompt: [T] int32, at least one token.
    key: [2] uint32, the request's random key.
    limit: the most tokens the response may have.
    signal: [W] float32, the state of the uncertainty signal; None at the start
      of a trajectory.
    version: of the parameters that answer, see `weights.Weights`.
    priority: those with the smallest number are served first.
  """

  ticket: int
  prompt: np.ndarray
  key: np.ndarray
  limit: int
  signal: np.ndarray | None = None
  version: int = 0
  priority: int = 0


@dataclasses.dataclass(frozen=True)
class Completion:
  """One sampled response.

  Attributes:
    ticket: as in the request.
    attempt: tokens and their measurements; `text` is still empty.
    signal: [W] float32, the state of the signal after this response.
    deltas: [n] float32, windowed mean |dM| where the intervention was allowed
      to fire; used to calibrate its threshold.
  """

  ticket: int
  attempt: types.Attempt
  signal: np.ndarray | None
  deltas: np.ndarray


def _buckets(smallest: int, largest: int, factor: int = 2) -> tuple[int, ...]:
  """Increasing sizes from the smallest to the largest."""
  sizes = []
  while smallest < largest:
    sizes.append(smallest)
    smallest *= factor
  return (*sizes, largest)


def _bucket(size: int, buckets: Sequence[int]) -> int:
  """The smallest bucket that is large enough."""
  return next(bucket for bucket in buckets if bucket >= size)


class Sampler:
  """The slots of one policy and the programs that change them.

  Attributes:
    slots: number of slots B.
    shards: the number of equal parts they are split into; only slots of the
      same shard can copy from each other.
    max_prompt: most tokens of a prompt.
    max_response: most tokens of a response.
    active: [B] bool on the host, the slots that are decoding.
    weights: the parameters that are loaded.
  """

  def __init__(
    self,
    policy: decoder.Policy,
    vocabulary: Vocabulary,
    control: slot_state.Control,
    *,
    slots: int,
    max_prompt: int,
    max_response: int,
    chunk: int,
    prefill_tokens: int = 32,
    prefill_rows: int = 16,
    live_tokens: int = 128,
    mesh: jax.sharding.Mesh | None = None,
    abstract: bool = False,
  ) -> None:
    """Allocates the slots.

    Args:
      policy: the policy; its dtype is also that of the cache.
      vocabulary: of the tokenizer.
      control: exploration control.
      slots: number of slots B.
      max_prompt: most tokens of a prompt.
      max_response: most tokens of a response.
      chunk: most tokens decoded per call.
      prefill_tokens: smallest bucket of prompt tokens.
      prefill_rows: most prompts per prefill call.
      live_tokens: smallest bucket of cache length to attend over.
      mesh: devices of this process; by default the first.
      abstract: whether to only describe the arrays instead of allocating them:
        nothing can be run then, but `programs` can be compiled, even for
        devices that are not present.

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
    self.weights = weights.Weights(policy, self._mesh)
    self._versions = np.zeros(slots, np.int64)
    self._lengths = np.zeros(slots, np.int64)
    self._counts = np.zeros(slots, np.int64)
    self._finish = np.ones(slots, np.int64)
    self._tickets = np.zeros(slots, np.int64)
    tables = slot_state.Tables(
      automaton=automata.build(
        vocabulary.token_bytes,
        ("</think>", *vocabulary.stops),
        vocab_size=policy.config.vocab_size,
      ),
      closing=np.asarray(vocabulary.closing, np.int32),
      eos=np.asarray(vocabulary.eos or (-1,), np.int32),
    )
    self._allocate(tables, abstract)

  def _allocate(self, tables: slot_state.Tables, abstract: bool) -> None:
    """Fresh slots, and the tables, on the devices."""
    fresh = functools.partial(
      slot_state.fresh_slots,
      self._policy,
      self._control,
      self.slots,
      self.max_prompt,
      self.max_response,
    )
    # The backend determines the layout of the cache.
    with jax.set_mesh(self._mesh):
      shapes = jax.eval_shape(fresh)
    layout = sharding.params_sharding(
      self._mesh, shapes, slot_state.slot_axes(shapes)
    )
    whole = sharding.replicated(self._mesh)
    if abstract:
      everywhere = jax.tree.map(lambda _: whole, tables)
      self._tables = sharding.describe(tables, everywhere)
      self._state = sharding.describe(shapes, layout)
      self.weights.take(self.abstract_params())
      return
    self._tables = sharding.put(tables, whole)
    with jax.set_mesh(self._mesh):
      self._state = jax.jit(fresh, out_shardings=layout)()

  def abstract_state(self) -> slot_state.Slots:
    """Shapes, dtypes and shardings of the slots."""
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      self._state,
    )

  def abstract_params(self) -> types.Params:
    """The decoding parameters likewise."""
    return self.weights.abstract()

  def load(self, params: types.Params) -> None:
    """Takes new parameters, in the training layout and of any sharding."""
    self.weights.load(params)

  def prefill(
    self,
    parts: Sequence[tuple[int, np.ndarray, int]],
    *,
    version: int | None = None,
  ) -> None:
    """Computes the cache of prompts.

    Args:
      parts: (slot, prompt tokens, number of them already in the cache).
      version: of the parameters; None for the only ones.
    """
    # Equal sizes together, with only as many rows per call as needed.
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
      self._prefill(tokens, start, rows, version)

  def _by_shard(
    self, slots: Sequence[int], values: Sequence[Any]
  ) -> list[list[tuple[int, Any]]]:
    """Per shard, (index of the slot in the shard, value) in order."""
    shards = [[] for _ in range(self.shards)]
    for slot, value in zip(slots, values, strict=True):
      shard, row = divmod(slot, self._own)
      shards[shard].append((row, value))
    return shards

  def _lines(
    self, height: int, shards: Sequence[Sequence[Any]]
  ) -> Iterator[tuple[int, Any]]:
    """Yields (index, value) for arrays with equally many rows per shard."""
    for shard, values in enumerate(shards):
      yield from enumerate(values, start=shard * height)

  def _padding(self, height: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    """int32 arrays with rows for every shard; the first refers to no slot."""
    count = self.shards * height
    nowhere = np.full(count, self._own, np.int32)
    return [nowhere, *(np.zeros((count, *s), np.int32) for s in shapes)]

  def _prefill(
    self,
    tokens: np.ndarray,
    start: np.ndarray,
    rows: np.ndarray,
    version: int | None,
  ) -> None:
    self._state = slot_state.prefill(
      self.weights.of(version),
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
    kinds: Collection[str] = (),
    mixed: bool = False,
  ) -> int:
    """Compiles every program that sampling may need; changes no slot.

    Args:
      samplings: the sampling settings that will be used.
      progress: called with the programs compiled so far and their number.
      kinds: of programs; empty for all.
      mixed: whether versions of the parameters will share the slots.

    Returns:
      The number of programs.
    """

    def chosen() -> Iterator[Program]:
      jobs = self.programs(samplings)
      return (job for job in jobs if not kinds or job.kind in kinds)

    total = sum(1 for _ in chosen()) + 1
    for done, job in enumerate(chosen()):
      progress(done, total)
      result = job.function(*job.arguments, **job.settings)
      self._state = result[0] if isinstance(result, tuple) else result
    if mixed:
      self._hold(np.zeros(self.slots, bool))
    self.fetch([])
    progress(total, total)
    return total

  def programs(self, samplings: Sequence[draw.Sampling]) -> Iterator[Program]:
    """Every program that changes the slots, those of a kind in growing sizes.

    Args:
      samplings: the ways in which tokens will be drawn.

    Yields:
      The programs, with padding as arguments, so that they change no slot. Each
      is built with the slots as they are at that moment.
    """
    mesh, policy, control = self._mesh, self._policy, self._control
    for height in self._prefill_rows:
      for width in self._prefill_tokens:
        rows, tokens, start = self._padding(height, (width,), ())
        yield Program(
          "prefill",
          f"{height} x {width}",
          slot_state.prefill,
          (self.weights.of(), self._state, tokens, start, rows),
          dict(policy=policy, live=self._length, mesh=mesh),
        )
    for height in self._row_counts:
      rows, source, places = self._padding(height, (), (3,))
      keys = np.zeros((len(rows), 2), np.uint32)
      signal = np.tile(self._signal, (len(rows), 1))
      yield Program(
        "fork",
        str(height),
        slot_state.fork,
        (None, self._state, source, rows),
        dict(mesh=mesh),
      )
      yield Program(
        "assign",
        str(height),
        slot_state.assign,
        (None, self._state, rows, places, keys, signal),
        dict(control=control, mesh=mesh),
      )
    for sampling in dict.fromkeys(samplings):
      for live in self._live:
        knobs = np.zeros(2, np.int32), np.float32(0)
        yield Program(
          "decode",
          f"{self.slots} x {live}",
          slot_state.decode,
          ((self.weights.of(), self._tables, *knobs), self._state),
          dict(
            policy=policy,
            control=control,
            sampling=sampling,
            live=live,
            mesh=mesh,
          ),
        )

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
      self._state = slot_state.fork(
        None, self._state, source, target, mesh=self._mesh
      )

  def assign(self, rows: Sequence[int], requests: Sequence[Request]) -> None:
    """Begins (or, after a rewind, restarts) a response in each slot."""
    for row, request in zip(rows, requests, strict=True):
      self._lengths[row] = len(request.prompt) - 1
      self._counts[row] = self._finish[row] = 0
      self._tickets[row] = request.ticket
      self._versions[row] = request.version
      self.active[row] = True
    shards = self._by_shard(rows, requests)
    height = _bucket(max(map(len, shards)), self._row_counts)
    slots, places = self._padding(height, (3,))
    keys = np.zeros((len(slots), 2), np.uint32)
    signal = np.tile(self._signal, (len(slots), 1))
    for at, (row, request) in self._lines(height, shards):
      slots[at] = row
      places[at] = len(request.prompt) - 1, request.prompt[-1], request.limit
      keys[at] = request.key
      if request.signal is not None:
        signal[at] = request.signal
    self._state = slot_state.assign(
      None,
      self._state,
      slots,
      places,
      keys,
      signal,
      control=self._control,
      mesh=self._mesh,
    )

  def stop(self, row: int) -> None:
    """Ends the response of a slot without fetching it."""
    self.active[row] = False
    self._finish[row] = slot_state.FINISH.index("stop")
    shard, own = divmod(row, self._own)
    (rows,) = self._padding(1)
    rows[shard] = own
    self._state = slot_state.stop(None, self._state, rows, mesh=self._mesh)

  def use(self, control: slot_state.Control) -> None:
    """Changes the settings of the exploration control, between responses.

    Raises:
      ValueError: if the slots cannot hold its state.
    """
    for found, made in (
      (control.signal, self._control.signal),
      (control.intervention.window, self._control.intervention.window),
    ):
      if found != made:
        raise ValueError(
          f"control: found {found!r}, expected {made!r}, which the slots were "
          "made for"
        )
    self._control = control

  def running(self, version: int | None = None) -> np.ndarray:
    """[B] bool, the slots that decode with a version; None for all."""
    if version is None:
      return self.active.copy()
    return self.active & (self._versions == version)

  def decode(
    self,
    sampling: draw.Sampling,
    epsilon: float,
    *,
    version: int | None = None,
  ) -> tuple[int, int, list[int]]:
    """Decodes one chunk.

    Args:
      sampling: how tokens are drawn.
      epsilon: threshold of the thinking intervention.
      version: of the parameters; the responses of others rest meanwhile. None
        for the only ones.

    Returns:
      Steps done, slot-steps that produced a token, slots that finished.
    """
    running = self.running(version)
    resting = self.active & ~running
    if resting.any():
      self._hold(resting)
    longest = int(self._lengths[running].max()) + self._chunk
    live = _bucket(min(longest, self._length), self._live)
    steps = self._decode(sampling, epsilon, live, version)
    steps, finish, counts = jax.device_get(
      (steps, self._state.finish, self._state.count)
    )
    if resting.any():
      self._hold(np.zeros_like(resting))
      finish = np.where(resting, 0, finish)
    self._finish = finish.astype(np.int64)
    used = int((counts - self._counts)[running].sum())
    self._lengths += counts - self._counts
    self._counts = counts.astype(np.int64)
    finished = np.flatnonzero(running & (self._finish > 0)).tolist()
    self.active[finished] = False
    return int(steps[0]), used, finished

  def _hold(self, resting: np.ndarray) -> None:
    self._state = slot_state.hold(None, self._state, resting, mesh=self._mesh)

  def _decode(
    self,
    sampling: draw.Sampling,
    epsilon: float,
    live: int,
    version: int | None,
  ) -> types.Array:
    self._state, steps = slot_state.decode(
      (
        self.weights.of(version),
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

  def fetch(self, rows: Sequence[int]) -> list[Completion]:
    """Fetches the responses of finished slots.

    Args:
      rows: slot numbers.
    """
    state = self._state
    tokens, record, signal, fired_at, thought, phi = jax.device_get(
      (
        state.tokens,
        state.record,
        state.signal,
        state.thinking.fired_at,
        state.thinking.thinking_tokens,
        slot_state.turn_scores(state, self._control),
      )
    )
    completions = []
    for row in rows:
      size = self._counts[row]
      of_row = dict(zip(slot_state.RECORD, record[row, :size].T, strict=True))
      means = of_row["window_mean"]
      attempt = types.Attempt(
        tokens=tokens[row, :size],
        logprobs=of_row["logprob"],
        uncertainty=of_row["uncertainty"],
        entropy=of_row["entropy"],
        confidence=of_row["confidence"],
        forced=of_row["forced"] > 0,
        text="",
        finish=slot_state.FINISH[self._finish[row]],
        fired_at=int(fired_at[row]),
        thinking_tokens=int(thought[row]),
        phi=float(phi[row]),
      )
      completions.append(
        Completion(
          int(self._tickets[row]),
          attempt,
          signal[row],
          means[np.isfinite(means)],
        )
      )
    return completions
