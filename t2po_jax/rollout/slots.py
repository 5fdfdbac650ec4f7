"""The device side of sampling: the state of all slots, and its updates.

A slot is one row of the key/value cache with everything that belongs to one
response: its random key, the state of the thinking intervention, its record.
Four jitted functions update the slots, each donating them: `prefill` computes
the cache of a prompt, `fork` copies cache rows, `assign` begins a response,
`decode` runs up to one chunk of tokens and returns early once a slot has
finished. Exploration control (T2PO, arXiv 2605.02178, section on token-level
thinking intervention) is part of the decode step, row by row, without a host
round trip.

Prefill does not write the last prompt token to the cache; it is the first token
that the decode loop feeds. So to resample a turn the slot only steps back to
the end of its prompt.

Slots live on a mesh of the process's own devices. Its `tensor` axis splits
heads, feed-forward width and vocabulary; each shard of the rows owns separate
slots and only exchanges the number of running ones with the others. So cache
rows are only copied inside a shard.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from t2po_jax import types
from t2po_jax.control import automaton as automata
from t2po_jax.control import thinking, uncertainty
from t2po_jax.distributed import sharding
from t2po_jax.models import decoder
from t2po_jax.rollout import draw

# The recorded measurements of each token, in this order.
RECORD = (
  "logprob",
  "uncertainty",
  "entropy",
  "confidence",
  "forced",
  "window_mean",
)
FINISH = ("running", "stop", "eos", "length")
# Instead of 0 while the responses of another policy are decoded.
_HELD = len(FINISH)


_SILENT = uncertainty.Signal(function=lambda measures, state, **_: state)


@dataclasses.dataclass(frozen=True)
class Control:
  """Static settings of the exploration control inside the decode loop.

  Attributes:
    signal: one of `uncertainty.SIGNALS`; `none` neither measures nor
      intervenes, to determine the cost of control.
    settings: the signal's options; None: its defaults.
    top_j: tokens that the confidence averages over.
    tempered: whether to measure the tempered distribution instead of the
      model's.
    intervention: settings of the token-level thinking intervention.
  """

  signal: str = "calibrated"
  settings: Any = None
  top_j: int = uncertainty.TOP_J
  tempered: bool = False
  intervention: thinking.ThinkingConfig = thinking.ThinkingConfig()

  @property
  def source(self) -> uncertainty.Signal:
    """The signal; for `none` a placeholder that is never used."""
    if self.signal == "none":
      return _SILENT
    return uncertainty.SIGNALS[self.signal]


class Slots(flax.struct.PyTreeNode):
  """The state of all slots; a pytree on the device.

  Attributes:
    cache: keys and values of every layer.
    token: [B] int32, the token to feed next.
    length: [B] int32, tokens in the cache.
    count: [B] int32, response tokens so far.
    limit: [B] int32, the most response tokens.
    finish: [B] int32, index into `FINISH`; 0 while the slot is running.
    keys: [B, 2] uint32.
    signal: [B, W] float32, the state of the uncertainty signal.
    thinking: state of the thinking intervention.
    automaton: [B] int32, progress in recognising tags.
    tokens: [B, T] int32, the response.
    record: [B, T, len(RECORD)] float32.
  """

  cache: Any
  token: jax.Array
  length: jax.Array
  count: jax.Array
  limit: jax.Array
  finish: jax.Array
  keys: jax.Array
  signal: jax.Array
  thinking: thinking.ThinkingState
  automaton: jax.Array
  tokens: jax.Array
  record: jax.Array


@functools.partial(jax.jit, static_argnames=("control",))
def turn_scores(slots: Slots, control: Control) -> types.Array:
  """Phi of every slot's response so far, [B] float32."""
  signal = slots.record[..., RECORD.index("uncertainty")]
  forced = slots.record[..., RECORD.index("forced")] > 0
  written = jnp.arange(signal.shape[1]) < slots.count[:, None]
  return uncertainty.turn_score(
    signal, written & ~forced, mean=control.source.mean
  )


class Tables(flax.struct.PyTreeNode):
  """Constant arrays of the decode loop."""

  automaton: automata.Automaton
  closing: types.Array  # [Q] int32
  eos: types.Array  # [E] int32


def slot_axes(slots: Slots) -> Slots:
  """Logical axis names of every array."""
  named = jax.tree.map(lambda x: ("rows", *[None] * (x.ndim - 1)), slots)
  return named.replace(cache=decoder.cache_axes(slots.cache))


def _over_slots(
  *static: str,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
  """Compiles an operation that every shard applies to its own slots.

  Args:
    *static: names of the settings that a program is compiled for.

  Returns:
    A decorator of (shared arrays, slots, *arrays with rows first, **settings)
    -> slots, or a tuple that begins with them. The compiled function takes the
    mesh as one more setting and donates the slots.
  """

  def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
    def change(
      shared: Any,
      slots: Slots,
      *arrays: types.Array,
      mesh: jax.sharding.Mesh,
      **settings: Any,
    ) -> Any:
      local = sharding.over_rows(functools.partial(function, **settings), mesh)
      # The surrounding mesh determines the kernels and their partitioning.
      with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        result = local(shared, slots, *arrays)
      slots, *rest = result if isinstance(result, tuple) else (result,)
      # A different layout would trigger a recompilation next time.
      layout = sharding.params_sharding(mesh, slots, slot_axes(slots))
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
def prefill(
  params: types.Params,
  slots: Slots,
  tokens: types.Array,
  start: types.Array,
  rows: types.Array,
  *,
  policy: decoder.Policy,
  live: int,
) -> Slots:
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
def fork(
  _: None, slots: Slots, source: types.Array, target: types.Array
) -> Slots:
  """Copies cache rows [P] -> [P]; a target past the end is dropped."""
  cache = jax.tree.map(
    lambda whole: whole.at[target].set(whole[source], mode="drop"), slots.cache
  )
  return slots.replace(cache=cache)


@_over_slots("control")
def assign(
  _: None,
  slots: Slots,
  rows: types.Array,
  places: types.Array,
  keys: types.Array,
  signal: types.Array,
  *,
  control: Control,
) -> Slots:
  """Begins a response in each of the rows.

  Args:
    slots: the slots.
    rows: [P] int32 slot numbers, from 0 in every shard; a number past the end
      is dropped.
    places: [P, 3] int32: tokens in the cache, token to feed, limit.
    keys: [P, 2] uint32.
    signal: [P, W] float32, what the uncertainty signal carries.
    control: exploration control.

  Returns:
    The slots, ready to decode.
  """
  count = rows.shape[0]

  def put(whole: jax.Array, new: types.Array | float) -> jax.Array:
    return whole.at[rows].set(new, mode="drop")

  fresh = thinking.init(count, control.intervention)
  return slots.replace(
    length=put(slots.length, places[:, 0]),
    token=put(slots.token, places[:, 1]),
    limit=put(slots.limit, places[:, 2]),
    count=put(slots.count, 0),
    finish=put(slots.finish, 0),
    automaton=put(slots.automaton, 0),
    keys=put(slots.keys, keys),
    signal=put(slots.signal, signal),
    thinking=jax.tree.map(put, slots.thinking, fresh),
  )


@_over_slots()
def stop(_: None, slots: Slots, rows: types.Array) -> Slots:
  """Ends the responses of some rows [P]; a number past the end is dropped."""
  stopped = FINISH.index("stop")
  finish = slots.finish.at[rows].set(stopped, mode="drop")
  return slots.replace(finish=finish)


@_over_slots()
def hold(_: None, slots: Slots, held: types.Array) -> Slots:
  """Pauses the running slots where `held` [B] is set, resumes all others."""
  finish = jnp.where(slots.finish == _HELD, 0, slots.finish)
  return slots.replace(finish=jnp.where(held, _HELD, finish))


def _watch(
  slots: Slots, logits: types.Array, running: types.Array, control: Control
) -> tuple[uncertainty.Measures, types.Array, types.Array]:
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


def _choose(
  slots: Slots,
  logits: types.Array,
  epsilon: types.Array,
  running: types.Array,
  *,
  tables: Tables,
  control: Control,
  sampling: draw.Sampling,
) -> tuple[types.Array, types.Array, thinking.ThinkingState, list[types.Array]]:
  """Draws or forces a token of every row, and measures it.

  Args:
    slots: the slots.
    logits: [B, V] float32.
    epsilon: threshold of the thinking intervention.
    running: [B] bool, rows that decode.
    tables: constant arrays.
    control: exploration control.
    sampling: how tokens are drawn.

  Returns:
    Token [B], the state of the uncertainty signal, the state of the
    intervention before this token, and its measurements: the entries of
    `RECORD` but the last.
  """
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
  record = [
    jnp.where(forced, 0.0, logprob),
    signal,
    measures.entropy,
    measures.confidence,
    forced.astype(jnp.float32),
  ]
  return token, signal_state, thoughts, record


def _step(
  params: types.Params,
  tables: Tables,
  slots: Slots,
  epsilon: types.Array,
  *,
  policy: decoder.Policy,
  control: Control,
  sampling: draw.Sampling,
  live: int,
) -> Slots:
  """Decodes one token in every running slot; the others stay as they are."""
  running = slots.finish == 0
  hidden, cache = policy.extend(
    params, slots.cache, slots.token[:, None], slots.length, live=live
  )
  token, signal_state, thoughts, record = _choose(
    slots,
    policy.decode_logits(params, hidden[:, 0]),
    epsilon,
    running,
    tables=tables,
    control=control,
    sampling=sampling,
  )
  state, hits = automata.step(tables.automaton, slots.automaton, token)
  thoughts = thinking.observe(
    thoughts,
    automata.completed(hits, 0),
    automata.partial_match(tables.automaton, state, 0),
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
  record = jnp.stack([*record, thoughts.window_mean], axis=-1)
  rows = jnp.arange(token.shape[0])
  column = jnp.where(running, slots.count, slots.tokens.shape[1])

  def keep(new: types.Array, old: types.Array) -> jax.Array:
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
def decode(
  shared: Any,
  slots: Slots,
  *,
  policy: decoder.Policy,
  control: Control,
  sampling: draw.Sampling,
  live: int,
) -> tuple[Slots, types.Array]:
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

  def running(slots: Slots) -> types.Array:
    # Over all shards: their loops must have the same number of iterations,
    # because collectives inside may involve every device.
    return sharding.sum_over_rows(slots.finish == 0)

  before = running(slots)
  enough = jnp.minimum(knobs[1], before)

  def more(carry: Any) -> types.Array:
    done, slots = carry
    return (done < knobs[0]) & (before - running(slots) < enough)

  def body(carry: Any) -> tuple[types.Array, Slots]:
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


def fresh_slots(
  policy: decoder.Policy,
  control: Control,
  count: int,
  max_prompt: int,
  max_response: int,
) -> Slots:
  """Fresh slots; arguments as in `Sampler`."""
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
