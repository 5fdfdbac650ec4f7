"""The policy's uncertainty at each token and over a turn (arXiv 2605.02178).

The self-calibrated uncertainty M_t blends the entropy H_t of the next-token
distribution with its top-j confidence C_t, both normalised to [0, 1]. It is
high where the policy hesitates and low where it has converged.

All quantities describe the distribution of the given logits; by default that is
the untempered model distribution, before top-k/top-p filtering. Logits of -inf
(padded or forbidden vocabulary entries) have probability zero and do not
contribute.

Deliberate choices. The extremes of the normalisation are causal: the running
minimum and maximum over the trajectory so far, the current token included. A
range of zero width gives the normalised value 0. C_t has no finite maximum, so
the `vocab` normalizer uses its value when each of the runners-up has
probability V^-2, and clips there. `released` is the formula of the paper's
released code, which differs from its text; its values are not confined to [0,
1].
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t2po_jax import keys, masked, types

NORMALIZERS = ("running", "vocab")
MEANS = ("geometric", "arithmetic")
ALPHA = 0.4  # Weight of the entropy in M_t, from the paper.
TOP_J = 20
SCORE_FLOOR = 1e-6

# On a CPU lax.top_k costs more than both stages of the blockwise search from
# about this vocabulary on.
_BLOCKWISE_FROM = 16_384
_BLOCKS = 512
# Less than any x - max for which e^(x - max) is not 0 in float32.
_LOWEST = -1e30


class Measures(NamedTuple):
  """Statistics of the logits at one position; all float32, in nats.

  Attributes:
    log_z: [...] log-sum-exp of the logits: log p(v) = logit(v) - log_z.
    entropy: [...] H_t, from 0 to log V.
    confidence: [...] C_t, mean of -log p over the j most likely tokens; larger
      means a more peaked distribution.
    top_logprob: [...] log-probability of the most likely token.
  """

  log_z: types.Array
  entropy: types.Array
  confidence: types.Array
  top_logprob: types.Array


def measure(logits: types.Array, top_j: int) -> Measures:
  """Log-sum-exp, entropy, top-j confidence and top log-probability at once.

  Args:
    logits: [..., V]; -inf has probability 0. A row of nothing but -inf gives
      zeros and a `log_z` of -inf.
    top_j: j, from 1 to V.

  Returns:
    The measures, each [...] float32.

  Raises:
    ValueError: if j is out of range.
  """
  vocab_size = logits.shape[-1]
  if not 1 <= top_j <= vocab_size:
    raise ValueError(f"top_j: found {top_j}, expected 1 to V = {vocab_size}")
  logits = logits.astype(jnp.float32)
  top, total, weighted = moments(logits)
  log_total = jnp.log(total)
  largest = largest_values(logits, top_j)
  possible = jnp.isfinite(largest)
  # Subtract the offset first: adding log_total to a large one loses precision.
  surprise = (top[..., None] - largest) + log_total[..., None]
  surprise = jnp.where(possible, surprise, 0.0)
  return Measures(
    log_z=jnp.where(jnp.any(possible, -1), top + log_total, -jnp.inf),
    entropy=log_total - weighted / total,
    confidence=masked.masked_mean(surprise, possible, axis=-1),
    top_logprob=-log_total,
  )


def largest_values(values: types.Array, count: int) -> types.Array:
  """The largest entries along the last axis, equal to those of `jax.lax.top_k`.

  Uses the blockwise search on CPUs where that is faster.

  Args:
    values: [..., V].
    count: how many, from 1 to V.

  Returns:
    [..., count] in descending order.
  """
  blocks = _block_count(values.shape[-1], count)
  if blocks == 0:
    return jax.lax.top_k(values, count)[0]
  return jax.lax.platform_dependent(
    values,
    cpu=lambda x: blockwise_largest(x, count, blocks=blocks),
    default=lambda x: jax.lax.top_k(x, count)[0],
  )


def blockwise_largest(
  values: types.Array, count: int, *, blocks: int
) -> types.Array:
  """Exact search in two stages: first the relevant blocks, then inside them.

  The `count` blocks with the largest maxima hold the `count` largest values.

  Args:
    values: [..., V]; a V not divisible by `blocks` is padded, which copies.
    count: how many, from 1 to V.
    blocks: number of blocks.

  Returns:
    As `largest_values`.
  """
  vocab_size = values.shape[-1]
  size = -(-vocab_size // blocks)
  blocks = -(-vocab_size // size)
  if blocks <= count:
    return jax.lax.top_k(values, count)[0]
  batch = values.shape[:-1]
  padding = [(0, 0)] * len(batch) + [(0, blocks * size - vocab_size)]
  split = jnp.pad(values, padding, constant_values=-jnp.inf)
  split = split.reshape(*batch, blocks, size)
  _, chosen = jax.lax.top_k(jnp.max(split, axis=-1), count)
  candidates = jnp.take_along_axis(split, chosen[..., None], axis=-2)
  candidates = candidates.reshape(*batch, count * size)
  return jax.lax.top_k(candidates, count)[0]


def calibrated(
  measures: Measures,
  state: types.Array,
  *,
  vocab_size: int,
  top_j: int,
  normalizer: str = "running",
  alpha: float = ALPHA,
) -> tuple[types.Array, types.Array]:
  """M = alpha H~ + (1 - alpha) (1 - C~), from 0 to 1.

  Args:
    measures: of the current token, each [B].
    state: [B, 4] float32, the running extremes over the preceding tokens.
    vocab_size: number of tokens that may have nonzero probability.
    top_j: the j of the confidence; only the `vocab` normalizer needs it.
    normalizer: one of `NORMALIZERS`.
    alpha: weight of the entropy, from 0 to 1.

  Returns:
    M [B], normalised with the current token's values included, and the extremes
    after this token.

  Raises:
    ValueError: for an unknown normalizer.
  """
  spread, sharpness, state = _normalised(
    measures, state, normalizer, vocab_size, top_j
  )
  return alpha * spread + (1.0 - alpha) * (1.0 - sharpness), state


def entropy(
  measures: Measures,
  state: types.Array,
  *,
  vocab_size: int,
  top_j: int,
  normalizer: str = "running",
) -> tuple[types.Array, types.Array]:
  """M = H~; arguments as `calibrated`."""
  spread, _, state = _normalised(measures, state, normalizer, vocab_size, top_j)
  return spread, state


def confidence(
  measures: Measures,
  state: types.Array,
  *,
  vocab_size: int,
  top_j: int,
  normalizer: str = "running",
) -> tuple[types.Array, types.Array]:
  """M = 1 - C~; arguments as `calibrated`."""
  _, sharpness, state = _normalised(
    measures, state, normalizer, vocab_size, top_j
  )
  return 1.0 - sharpness, state


def released(
  measures: Measures, state: types.Array, *, vocab_size: int, top_j: int
) -> tuple[types.Array, types.Array]:
  """M = 0.6 log max p + 0.4 (1 - H / log V), of the paper's released code.

  Neither normalised nor confined to [0, 1]; it grows with certainty and has no
  state. Arguments as in `calibrated`.
  """
  del top_j
  sharp = 1.0 - _normalise(measures.entropy, 0.0, float(np.log(vocab_size)))
  return 0.6 * measures.top_logprob + 0.4 * sharp, state


@dataclasses.dataclass(frozen=True)
class NoOptions:
  """A signal without options."""


@dataclasses.dataclass(frozen=True)
class NormalizedOptions:
  """Options of the signals normalised to [0, 1]."""

  normalizer: str = keys.key(
    "running",
    "What entropy and confidence are normalised by: extremes of the "
    "trajectory so far, or what the vocabulary allows.",
    choices=NORMALIZERS,
  )


@dataclasses.dataclass(frozen=True)
class CalibratedOptions(NormalizedOptions):
  """Options of `calibrated`."""

  alpha: float = keys.key(
    ALPHA, "Weight of the entropy in the signal.", least=0, most=1
  )


@dataclasses.dataclass(frozen=True)
class Signal:
  """An uncertainty signal: its function and everything that goes with it.

  Attributes:
    function: maps `Measures` [B] and a state [B, W] to M [B] and the new state;
      `vocab_size`, `top_j` and the options are keyword arguments of the same
      names.
    options: a dataclass of `keys.key` fields, the keys of the configuration's
      section `control` that it reads.
    initial: the W values of the state at the start of a trajectory; the state
      is carried from token to token and from turn to turn.
    rule: the one of `thinking.RULES` that detects convergence of the signal.
    mean: the one of `MEANS` that turns it into a turn's score.
  """

  function: Callable[..., tuple[types.Array, types.Array]]
  options: type = NoOptions
  initial: tuple[float, ...] = ()
  rule: str = "calibrated"
  mean: str = "geometric"

  def start(self, batch: int) -> jax.Array:
    """The state of `batch` trajectories before their first token, [B, W]."""
    initial = jnp.asarray(self.initial, jnp.float32)
    return jnp.tile(initial[None], (batch, 1))

  def advance(
    self,
    measures: Measures,
    state: types.Array,
    active: types.Array,
    *,
    vocab_size: int,
    top_j: int,
    settings: Any,
  ) -> tuple[types.Array, types.Array]:
    """Updates the state with one token.

    Args:
      measures: of the token, each [B].
      state: [B, W].
      active: [B] bool; other rows keep their state, and their M is meaningless.
      vocab_size: number of tokens that may have nonzero probability.
      top_j: the j of the confidence.
      settings: anything with the options as attributes.

    Returns:
      M [B] and the new state.
    """
    options = {
      name: getattr(settings, name) for name in keys.keys_of(self.options)
    }
    value, new = self.function(
      measures, state, vocab_size=vocab_size, top_j=top_j, **options
    )
    return value, jnp.where(active[:, None], new, state)


# Before the first token the range is empty: its minimum exceeds its maximum.
_EXTREMES = (float("inf"), -float("inf"), float("inf"), -float("inf"))

SIGNALS: dict[str, Signal] = {
  "calibrated": Signal(calibrated, CalibratedOptions, _EXTREMES),
  "entropy": Signal(entropy, NormalizedOptions, _EXTREMES),
  "confidence": Signal(confidence, NormalizedOptions, _EXTREMES),
  "released": Signal(released, rule="released", mean="arithmetic"),
}


def register(name: str, signal: Signal) -> None:
  """Registers a signal; its options become configuration keys.

  Args:
    name: for `control.signal`.
    signal: its record.

  Raises:
    ValueError: see `keys.add`.
  """
  keys.add(SIGNALS, name, signal, kind="signal")


def option_keys() -> dict[str, keys.Key]:
  """The options of all signals: keys of the section `control`."""
  return keys.union(known.options for known in SIGNALS.values())


def turn_score(
  uncertainty: types.Array, mask: types.Array, *, mean: str = "geometric"
) -> types.Array:
  """Phi, the mean of M_t over a response's sampled tokens.

  geometric: exp(mean(log(max(M_t, 1e-6)))), from 1e-6 to max M_t; arithmetic:
  mean(M_t), for signals that may be negative.

  Args:
    uncertainty: [..., T] float32, M_t.
    mask: [..., T], 1 for sampled tokens, 0 for forced ones and padding.
    mean: one of `MEANS`.

  Returns:
    [...] float32; 0 where no token was sampled.

  Raises:
    ValueError: for an unknown mean.
  """
  if mean not in MEANS:
    raise ValueError(f"mean: found {mean!r}, expected one of {MEANS}")
  mask = jnp.asarray(mask, jnp.float32)
  if mean == "arithmetic":
    return masked.masked_mean(uncertainty, mask, axis=-1)
  logs = jnp.log(jnp.maximum(uncertainty, SCORE_FLOOR))
  score = jnp.exp(masked.masked_mean(logs, mask, axis=-1))
  return jnp.where(jnp.any(mask > 0, axis=-1), score, 0.0)


def weigh(logits: types.Array) -> tuple[types.Array, types.Array]:
  """Unnormalised probabilities, e^(x - max).

  All callers share this function, so that the compiler computes them once.

  Args:
    logits: [..., V] float32; -inf has weight 0.

  Returns:
    The largest logit [...], 0 for a row of -inf only, and [..., V] weights
    from 0 to 1.
  """
  # The shift cancels out of every result, so it needs no gradient.
  top = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
  top = jnp.where(jnp.isfinite(top), top, 0.0)
  return top, jnp.exp(logits - top[..., None])


def moments(
  logits: types.Array,
) -> tuple[types.Array, types.Array, types.Array]:
  """The sums behind entropy and log-sum-exp, with few arrays of this size.

  Args:
    logits: [..., V] float32; -inf does not contribute.

  Returns:
    Maximum m, total = sum of e^(x - m), and sum of e^(x - m) (x - m); [...]
    each. The log-sum-exp is m + log total.
  """
  top, weights = weigh(logits)
  shifted = jnp.maximum(logits - top[..., None], _LOWEST)
  total = jnp.sum(weights, axis=-1)
  total = jnp.where(total > 0, total, 1.0)
  # The `where` does not change the result, as 0 * _LOWEST is 0. But XLA's
  # kernel for a plain sum of products on CPUs first writes the factors to
  # memory.
  terms = jnp.where(weights > 0, weights * shifted, 0.0)
  return top, total, jnp.sum(terms, axis=-1)


def _normalised(
  measures: Measures,
  state: types.Array,
  normalizer: str,
  vocab_size: int,
  top_j: int,
) -> tuple[types.Array, types.Array, types.Array]:
  """H~ and C~ with the current token's own values included, new extremes."""
  if normalizer not in NORMALIZERS:
    raise ValueError(
      f"normalizer: found {normalizer!r}, expected one of {NORMALIZERS}"
    )
  h, c = measures.entropy, measures.confidence
  extremes = (
    jnp.minimum(state[:, 0], h),
    jnp.maximum(state[:, 1], h),
    jnp.minimum(state[:, 2], c),
    jnp.maximum(state[:, 3], c),
  )
  if normalizer == "running":
    spread = _normalise(h, extremes[0], extremes[1])
    sharpness = _normalise(c, extremes[2], extremes[3])
  else:
    log_vocab = float(np.log(vocab_size))
    spread = _normalise(h, 0.0, log_vocab)
    highest = 2.0 * log_vocab * (top_j - 1) / top_j
    sharpness = _normalise(c, 0.0, highest)
  return spread, sharpness, jnp.stack(extremes, axis=-1)


def _normalise(
  value: types.Array, low: types.Array | float, high: types.Array | float
) -> types.Array:
  """(value - low) / (high - low), clipped to [0, 1]; 0 if high <= low."""
  valid = jnp.asarray(high > low)
  low = jnp.where(valid, low, 0.0)
  width = jnp.where(valid, high - low, 1.0)
  return jnp.where(valid, jnp.clip((value - low) / width, 0.0, 1.0), 0.0)


def _block_count(vocab_size: int, count: int) -> int:
  """Blocks that divide V evenly, near the best number; 0 if none do."""
  if vocab_size < _BLOCKWISE_FROM:
    return 0
  divisors = [
    blocks
    for blocks in range(max(64, 2 * count), 1025)
    if vocab_size % blocks == 0
  ]
  return min(divisors, key=lambda b: abs(np.log(b / _BLOCKS)), default=0)
