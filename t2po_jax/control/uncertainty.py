"""How unsure the policy is at each token, and over a turn (arXiv 2605.02178).

The self-calibrated uncertainty M_t blends the entropy H_t of the next-token
distribution with its top-j confidence C_t, both normalised to [0, 1]. It is
high where the policy hesitates and low where it has converged.

All quantities are of the distribution whose logits are given: by default the
caller gives the untempered model distribution, before top-k/top-p filtering.
Logits of -inf (padded or forbidden vocabulary entries) have probability zero
and count nowhere.

Deliberate choices. The extremes of the normalisation are causal: the running
minimum and maximum over the trajectory so far, the current token included. A
range of zero width gives the normalised value 0. C_t has no finite maximum, so
the `vocab` normalizer takes the value it has when the runners-up together are
as improbable as V^-2 each, and clips there. `released` is the formula of the
paper's released code instead of its text; it is not confined to [0, 1].
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from t2po_jax import masked, types

SIGNALS = ("calibrated", "entropy", "confidence", "released")
NORMALIZERS = ("running", "vocab")
ALPHA = 0.4  # Weight of the entropy in M_t, from the paper.
TOP_J = 20
SCORE_FLOOR = 1e-6

# On a CPU lax.top_k costs more than both stages of the blockwise search from
# about this vocabulary on.
_BLOCKWISE_FROM = 16_384
_BLOCKS = 512
# Below any x - max whose e^(x - max) is not 0 in float32.
_LOWEST = -1e30


class Measures(NamedTuple):
  """What the logits of one position say; all float32, in nats.

  Attributes:
    log_z: [...] log-sum-exp of the logits: log p(v) = logit(v) - log_z.
    entropy: [...] H_t, from 0 to log V.
    confidence: [...] C_t, mean of -log p over the j most likely tokens; larger
      means a sharper distribution.
    top_logprob: [...] log-probability of the most likely token.
  """

  log_z: types.Array
  entropy: types.Array
  confidence: types.Array
  top_logprob: types.Array


@flax.struct.dataclass
class Extremes:
  """Running extremes of a trajectory, carried from turn to turn.

  Attributes:
    entropy_min: [B] float32, inf before the first token.
    entropy_max: [B] float32, -inf before the first token.
    confidence_min: [B] float32, inf before the first token.
    confidence_max: [B] float32, -inf before the first token.
  """

  entropy_min: types.Array
  entropy_max: types.Array
  confidence_min: types.Array
  confidence_max: types.Array


def token_entropy(logits: types.Array) -> types.Array:
  """H = -sum_v p(v) log p(v).

  Args:
    logits: [..., V]; -inf has probability 0.

  Returns:
    [...] float32 nats, from 0 to log V.
  """
  top, total, weighted = moments(logits.astype(jnp.float32))
  del top
  return jnp.log(total) - weighted / total


def top_confidence(logits: types.Array, top_j: int) -> types.Array:
  """C = -(1/j) sum over the j most likely tokens of log p.

  Args:
    logits: [..., V]; tokens of probability 0 are left out of the mean.
    top_j: j, from 1 to V.

  Returns:
    [...] float32 nats; larger means a sharper distribution.

  Raises:
    ValueError: if j is out of range.
  """
  return measure(logits, top_j).confidence


def measure(logits: types.Array, top_j: int) -> Measures:
  """Log-sum-exp, entropy, top-j confidence and top log-probability at once.

  Args:
    logits: [..., V]; -inf has probability 0. A row of -inf only gives zeros
      and `log_z` -inf.
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
  # The offset goes first: adding log_total to a large one would cost digits.
  surprise = (top[..., None] - largest) + log_total[..., None]
  surprise = jnp.where(possible, surprise, 0.0)
  return Measures(
    log_z=jnp.where(jnp.any(possible, -1), top + log_total, -jnp.inf),
    entropy=log_total - weighted / total,
    confidence=masked.masked_mean(surprise, possible, axis=-1),
    top_logprob=-log_total,
  )


def largest_values(values: types.Array, count: int) -> types.Array:
  """The largest entries of the last axis, those of `jax.lax.top_k`.

  Takes the blockwise search on a CPU where it is the faster one.

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
  """Exact search in two stages: the blocks that matter, then inside them.

  The `count` blocks with the largest maxima hold the `count` largest values.

  Args:
    values: [..., V]; a V that `blocks` does not divide is padded (a copy).
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


def initial_extremes(batch: int) -> Extremes:
  """Extremes of `batch` trajectories that have no token yet."""

  def full(value):  # A buffer of its own per field, so that all can be donated.
    return jnp.full((batch,), value, jnp.float32)

  return Extremes(full(jnp.inf), full(-jnp.inf), full(jnp.inf), full(-jnp.inf))


def restart_extremes(extremes: Extremes, rows: types.Array) -> Extremes:
  """Forgets the extremes of rows ([B] bool) that begin a new trajectory."""
  fresh = initial_extremes(rows.shape[0])
  return jax.tree.map(
    lambda new, old: jnp.where(rows, new, old), fresh, extremes
  )


def update_extremes(
  extremes: Extremes,
  entropy: types.Array,
  confidence: types.Array,
  active: types.Array,
) -> Extremes:
  """Takes the current token into the running extremes.

  Args:
    extremes: of the tokens so far.
    entropy: [B] float32 nats, of the current token.
    confidence: [B] float32 nats, of the current token.
    active: [B] bool; other rows stay as they are.

  Returns:
    The new extremes. Update before calling `signal`: M_t is normalised with
    the current token's own values included.
  """

  def keep(new, old):
    return jnp.where(active, new, old)

  return Extremes(
    entropy_min=keep(
      jnp.minimum(extremes.entropy_min, entropy), extremes.entropy_min
    ),
    entropy_max=keep(
      jnp.maximum(extremes.entropy_max, entropy), extremes.entropy_max
    ),
    confidence_min=keep(
      jnp.minimum(extremes.confidence_min, confidence),
      extremes.confidence_min,
    ),
    confidence_max=keep(
      jnp.maximum(extremes.confidence_max, confidence),
      extremes.confidence_max,
    ),
  )


def signal(
  measures: Measures,
  extremes: Extremes,
  *,
  kind: str,
  normalizer: str,
  vocab_size: int,
  top_j: int = TOP_J,
  alpha: float = ALPHA,
) -> types.Array:
  """The uncertainty M_t of every row.

  calibrated: alpha H~ + (1 - alpha) (1 - C~); entropy: H~; confidence: 1 - C~;
  released: 0.6 log max p + 0.4 (1 - H / log V), which is neither normalised
  nor in [0, 1] and grows with certainty.

  Args:
    measures: of the current token, each [B].
    extremes: after `update_extremes` with the same token.
    kind: one of `SIGNALS`.
    normalizer: one of `NORMALIZERS`; `released` ignores it.
    vocab_size: number of tokens that the distribution may put weight on.
    top_j: the j of the confidence; only the `vocab` normalizer needs it.
    alpha: weight of the entropy, from 0 to 1.

  Returns:
    [B] float32, in [0, 1] except for `released`.

  Raises:
    ValueError: for an unknown kind or normalizer.
  """
  if kind not in SIGNALS:
    raise ValueError(f"signal: found {kind!r}, expected one of {SIGNALS}")
  if normalizer not in NORMALIZERS:
    raise ValueError(
      f"normalizer: found {normalizer!r}, expected one of {NORMALIZERS}"
    )
  log_vocab = float(np.log(vocab_size))
  if kind == "released":
    sharp = 1.0 - _normalise(measures.entropy, 0.0, log_vocab)
    return 0.6 * measures.top_logprob + 0.4 * sharp
  if normalizer == "running":
    spread = _normalise(
      measures.entropy, extremes.entropy_min, extremes.entropy_max
    )
    sharpness = _normalise(
      measures.confidence, extremes.confidence_min, extremes.confidence_max
    )
  else:
    highest = 2.0 * log_vocab * (top_j - 1) / top_j
    spread = _normalise(measures.entropy, 0.0, log_vocab)
    sharpness = _normalise(measures.confidence, 0.0, highest)
  if kind == "entropy":
    return spread
  if kind == "confidence":
    return 1.0 - sharpness
  return alpha * spread + (1.0 - alpha) * (1.0 - sharpness)


def turn_score(uncertainty: types.Array, mask: types.Array) -> types.Array:
  """Phi, the geometric mean of M_t over a response's sampled tokens.

  Phi = exp(mean(log(max(M_t, 1e-6)))).

  Args:
    uncertainty: [..., T] float32, M_t.
    mask: [..., T], 1 for sampled tokens, 0 for forced ones and padding.

  Returns:
    [...] float32, from 1e-6 to max M_t; 0 where no token was sampled.
  """
  mask = jnp.asarray(mask, jnp.float32)
  logs = jnp.log(jnp.maximum(uncertainty, SCORE_FLOOR))
  score = jnp.exp(masked.masked_mean(logs, mask, axis=-1))
  return jnp.where(jnp.any(mask > 0, axis=-1), score, 0.0)


def weigh(logits: types.Array) -> tuple[types.Array, types.Array]:
  """Unnormed probabilities, e^(x - max).

  Whoever needs them asks here: the compiler computes equal things once.

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
  """What entropy and log-sum-exp are made of, in few arrays of this size.

  Args:
    logits: [..., V] float32; -inf counts nowhere.

  Returns:
    Maximum m, total = sum of e^(x - m), and sum of e^(x - m) (x - m); [...]
    each. The log-sum-exp is m + log total.
  """
  top, weights = weigh(logits)
  shifted = jnp.maximum(logits - top[..., None], _LOWEST)
  total = jnp.sum(weights, axis=-1)
  total = jnp.where(total > 0, total, 1.0)
  # The choice changes nothing, 0 * _LOWEST is 0. But of a sum of products XLA
  # makes a kernel for CPUs that wants its factors in memory first.
  terms = jnp.where(weights > 0, weights * shifted, 0.0)
  return top, total, jnp.sum(terms, axis=-1)


def _normalise(value, low, high) -> types.Array:
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
