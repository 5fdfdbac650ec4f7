"""Token-level thinking intervention (TTI, arXiv 2605.02178).

Watches the uncertainty M_t of every row while it thinks, from the first
generated token until `</think>`. Once M_t has passed its peak and settled, or
thinking has used up its budget, a fixed queue of tokens (such as
`</think>\\n<action>`) is forced, one token per step; then sampling resumes.
This happens at most once per response. All rows advance together, inside jit.

In the decode loop, for each token:

  state, forced, is_forced = intervene(state, M_t, epsilon, queue, config)
  token = where(is_forced, forced, sampled)
  ... the automaton reads the token ...
  state = observe(state, closed, partial)

Choices where the paper is silent. Delta_t exists from the second token on, so
the window of N + 1 deltas is full from t = N + 1 (t counts from 0). "Past its
peak" means that the latest maximum of M in this response lies before the
window's first token, t - N; a plateau at the maximum is still the peak. While
the text ends in an unfinished `</think>` of two or more bytes, firing is
postponed: if the model completes the tag, the intervention never happens;
otherwise the rule applies again. A lone `<` does not postpone it. `released` is
the rule of the paper's released code: a counter of consecutive small deltas,
with neither a minimum prefix nor a peak.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from t2po_jax import types

RULES = ("calibrated", "released")


@dataclasses.dataclass(frozen=True)
class ThinkingConfig:
  """The rule of the intervention; hashable, static under jit.

  Attributes:
    enabled: whether to intervene; the statistics are collected either way.
    rule: `calibrated` (window mean below epsilon) or `released` (counter).
    window: N; the mean is over N + 1 deltas.
    min_tokens: L_min, tokens before the window rule may fire.
    max_tokens: L_max, thinking tokens after which the intervention always
      fires.
    require_past_peak: whether M's peak must lie before the window.
    tolerance: `released` only, the largest |dM| that counts as settled.
    patience: `released` only, consecutive settled steps before it fires.
  """

  enabled: bool = True
  rule: str = "calibrated"
  window: int = 8
  min_tokens: int = 16
  max_tokens: int = 450
  require_past_peak: bool = True
  tolerance: float = 1e-4
  patience: int = 20

  def __post_init__(self) -> None:
    if self.rule not in RULES:
      raise ValueError(f"rule: found {self.rule!r}, expected one of {RULES}")
    for name, least in (("window", 0), ("min_tokens", 0), ("patience", 1)):
      value = getattr(self, name)
      if value < least:
        raise ValueError(f"{name}: found {value}, expected at least {least}")
    if self.max_tokens < self.min_tokens:
      raise ValueError(
        f"max_tokens: found {self.max_tokens}, expected at least min_tokens = "
        f"{self.min_tokens}"
      )
    if self.tolerance < 0:
      raise ValueError(f"tolerance: found {self.tolerance}, expected >= 0")


class ThinkingState(flax.struct.PyTreeNode):
  """The progress of every row through its response.

  Attributes:
    thinking: [B] bool, whether the thinking segment is open.
    held: [B] bool, whether the text ends in an unfinished closing tag.
    step: [B] int32, t, tokens generated so far.
    thinking_tokens: [B] int32, tokens up to the one that closed the segment,
      forced ones included.
    fired_at: [B] int32, the t at which forcing began; -1 if it has not.
    queued: [B] int32, how many tokens of the queue have been forced.
    previous: [B] float32, M_{t-1}.
    deltas: [B, N + 1] float32, the latest deltas, oldest first.
    peak: [B] float32, largest M so far.
    peak_at: [B] int32, the latest t at which M had that value.
    still: [B] int32, consecutive deltas within the tolerance.
    window_mean: [B] float32, mean of the window at the current step, the
      statistic compared with epsilon; inf where the rule does not apply (window
      not full, before L_min, not thinking, or already fired).
  """

  thinking: types.Array
  held: types.Array
  step: types.Array
  thinking_tokens: types.Array
  fired_at: types.Array
  queued: types.Array
  previous: types.Array
  deltas: types.Array
  peak: types.Array
  peak_at: types.Array
  still: types.Array
  window_mean: types.Array


def init(batch: int, config: ThinkingConfig) -> ThinkingState:
  """The state of `batch` rows at the start of a response."""
  return _fresh(batch, config.window + 1)


def intervene(
  state: ThinkingState,
  uncertainty: types.Array,
  epsilon: types.Array,
  queue: types.Array,
  config: ThinkingConfig,
  *,
  active: types.Array | None = None,
) -> tuple[ThinkingState, types.Array, types.Array]:
  """Decides, before token t is chosen, whether it is forced.

  Fires when mean(Delta_{t-N} ... Delta_t) < epsilon or t >= L_max; see the
  module docstring for the conditions.

  Args:
    state: of all rows.
    uncertainty: [B] float32, M_t of the distribution of token t.
    epsilon: scalar float32, traced so that calibration does not trigger a
      recompilation; with 0 only the budget L_max acts. `released` ignores it.
    queue: [Q] int32 token ids to force, Q >= 1.
    config: static.
    active: [B] bool, rows that are generating; the others are left as they are
      and nothing is forced. None means all rows.

  Returns:
    The new state; the token to force, [B] int32; whether it is forced, [B]
    bool. The token is meaningless where it is not forced.

  Raises:
    ValueError: if the queue is empty.
  """
  if queue.ndim != 1 or queue.shape[0] == 0:
    raise ValueError(
      f"queue: found shape {queue.shape}, expected [Q] token ids with Q >= 1"
    )
  live = state.thinking & (state.fired_at < 0)
  if active is not None:
    live &= active
  state, due = _watch(state, uncertainty, epsilon, config, live)
  fire = due & live & ~state.held if config.enabled else jnp.zeros_like(live)
  fired_at = jnp.where(fire, state.step, state.fired_at)
  is_forced = (fired_at >= 0) & (state.queued < queue.shape[0])
  if active is not None:
    is_forced &= active
  forced = queue[jnp.minimum(state.queued, queue.shape[0] - 1)]
  state = state.replace(
    fired_at=fired_at, queued=state.queued + is_forced.astype(jnp.int32)
  )
  return state, forced.astype(jnp.int32), is_forced


def observe(
  state: ThinkingState,
  closed: types.Array,
  partial: types.Array | None = None,
  *,
  active: types.Array | None = None,
) -> ThinkingState:
  """Updates the state with the token that was sampled or forced.

  Once forcing has begun the whole queue is forced, although the segment closes
  in the middle of it.

  Args:
    state: after `intervene`.
    closed: [B] bool, whether this token completed `</think>`.
    partial: [B] int32, bytes of an unfinished `</think>` that the text ends
      with (`automaton.partial_match`). None means 0: firing is never postponed.
    active: [B] bool, rows that are generating; None means all rows.

  Returns:
    The new state, at t + 1.
  """
  one = jnp.ones_like(state.step)
  if active is not None:
    one = active.astype(jnp.int32)
    closed = closed & active
  held = state.held if partial is None else partial >= 2
  if active is not None:
    held = jnp.where(active, held, state.held)
  return state.replace(
    step=state.step + one,
    thinking_tokens=state.thinking_tokens + jnp.where(state.thinking, one, 0),
    thinking=state.thinking & ~closed,
    held=held,
  )


def _watch(
  state: ThinkingState,
  uncertainty: types.Array,
  epsilon: types.Array,
  config: ThinkingConfig,
  live: types.Array,
) -> tuple[ThinkingState, types.Array]:
  """Updates the statistics of active rows with M_t; returns where to fire."""
  delta = jnp.abs(uncertainty - state.previous)
  first = state.step == 0
  deltas = jnp.concatenate([state.deltas[:, 1:], delta[:, None]], axis=1)
  mean = jnp.mean(deltas, axis=1)
  full = state.step >= config.window + 1
  applies = live & full & (state.step >= config.min_tokens)
  window_mean = jnp.where(applies, mean, jnp.inf)
  higher = uncertainty >= state.peak
  still = (delta <= config.tolerance) & ~first
  watched = state.replace(
    previous=uncertainty,
    deltas=deltas,
    peak=jnp.where(higher, uncertainty, state.peak),
    peak_at=jnp.where(higher, state.step, state.peak_at),
    still=jnp.where(still, state.still + 1, 0),
  )
  watched = jax.tree.map(
    lambda new, old: jnp.where(
      live.reshape(live.shape + (1,) * (old.ndim - 1)), new, old
    ),
    watched,
    state,
  ).replace(window_mean=window_mean)
  if config.rule == "released":
    due = watched.still >= config.patience
  else:
    due = window_mean < epsilon
    if config.require_past_peak:
      due &= watched.peak_at < state.step - config.window
  return watched, due | (state.step >= config.max_tokens)


def _fresh(batch: int, width: int) -> ThinkingState:
  """The state at the first token, with a window of `width` deltas."""

  # Every field has a buffer of its own, so that the state can be donated.
  def full(value: float, dtype: Any) -> jax.Array:
    return jnp.full((batch,), value, dtype)

  return ThinkingState(
    thinking=full(True, bool),
    held=full(False, bool),
    step=full(0, jnp.int32),
    thinking_tokens=full(0, jnp.int32),
    fired_at=full(-1, jnp.int32),
    queued=full(0, jnp.int32),
    previous=full(0.0, jnp.float32),
    deltas=jnp.zeros((batch, width), jnp.float32),
    peak=full(-jnp.inf, jnp.float32),
    peak_at=full(0, jnp.int32),
    still=full(0, jnp.int32),
    window_mean=full(jnp.inf, jnp.float32),
  )
