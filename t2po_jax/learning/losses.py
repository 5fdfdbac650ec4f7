"""Weights, sums and penalties on the response positions of a batch.

Every loss here and in `policy_losses` is per token. `token_weights` fixes the
aggregation once for the whole batch; `aggregate` is then a plain weighted sum,
so that micro-batches, packings and shards add up exactly to the loss of the
whole batch. Masks are 1 for tokens that the policy sampled: forced tokens and
padding are excluded from everything, whatever their values.

A turn is one sequence. KL estimators: Schulman, "Approximating KL divergence",
2020.
"""

import jax
import jax.numpy as jnp

from t2po_jax import masked, types

AGGREGATIONS = (
  "token_mean",
  "seq_mean_token_mean",
  "seq_mean_token_sum",
  "seq_mean_token_sum_norm",
)
KL_KINDS = ("k1", "k2", "k3", "k1+", "k3+")

# Beyond this, exp() of a log-ratio is meaningless and soon infinite.
_LOG_RATIO_BOUND = 20.0
_K3_BOUND = 10.0

Stats = dict[str, types.Array]


def token_weights(
  mask: types.Array,
  turn: types.Array,
  *,
  mode: str,
  horizon: int | None = None,
) -> types.Array:
  """The weight of every token in the loss, computed from the WHOLE batch.

  token_mean: 1 / tokens of the batch; seq_mean_token_mean: 1 / (tokens of the
  turn x turns); seq_mean_token_sum: 1 / turns; seq_mean_token_sum_norm: 1 /
  (horizon x turns). Turns without a sampled token do not count.

  Args:
    mask: [B, R], 1 for sampled tokens.
    turn: [B, R] int32, turn (or sequence) of each position, -1 for padding. A
      turn's positions are neighbours in one row.
    mode: one of `AGGREGATIONS`.
    horizon: tokens, for `seq_mean_token_sum_norm`: a constant such as the
      longest response allowed.

  Returns:
    [B, R] float32, 0 outside the mask; slice it along with the rows when the
    batch is split.

  Raises:
    ValueError: for an unknown mode, or a horizon missing where it is needed.
  """
  if mode not in AGGREGATIONS:
    raise ValueError(f"mode: found {mode!r}, expected one of {AGGREGATIONS}")
  kept = (mask > 0).astype(jnp.float32)
  if mode == "token_mean":
    return kept / jnp.maximum(jnp.sum(kept), 1.0)
  length = jnp.maximum(turn_sum(kept, turn), 1.0)
  # Every turn sums to 1; rounded, because n times 1/n is not exact.
  turns = jnp.maximum(jnp.round(jnp.sum(kept / length)), 1.0)
  if mode == "seq_mean_token_mean":
    return kept / length / turns
  if mode == "seq_mean_token_sum":
    return kept / turns
  if horizon is None or horizon < 1:
    raise ValueError(
      f"horizon: found {horizon}, expected tokens >= 1 for {mode!r}"
    )
  return kept / (turns * horizon)


def aggregate(per_token: types.Array, weights: types.Array) -> types.Array:
  """Sum of weights * values; values of weight 0 may be NaN.

  Args:
    per_token: [B, R], of any part of the batch.
    weights: [B, R], the same part of `token_weights`.

  Returns:
    Scalar; over the parts of a batch these add up to the whole.
  """
  return masked.masked_sum(per_token, weights)


def turn_sum(values: types.Array, turn: types.Array) -> types.Array:
  """Sum over the turn each token belongs to.

  Args:
    values: [B, R] float32.
    turn: [B, R] int32; a turn's positions are neighbours in one row.

  Returns:
    [B, R] float32, equal for all tokens of a turn.
  """
  begins = jnp.diff(turn, axis=1, prepend=turn[:, :1]) != 0
  segment = jnp.cumsum(begins, axis=1)

  def per_row(row: types.Array, ids: types.Array) -> jax.Array:
    total = jax.ops.segment_sum(row, ids, num_segments=row.shape[0])
    return total[ids]

  return jax.vmap(per_row)(values, segment)


def kl_penalty(
  logprobs: types.Array,
  ref_logprobs: types.Array,
  mask: types.Array,
  *,
  kind: str,
) -> types.Array:
  """Estimates KL(policy || reference) at each sampled token.

  With d = logp - logp_ref: k1 = d; k2 = d^2 / 2; k3 = exp(-d) + d - 1 of a d
  clamped to +-20, then clamped to +-10 itself. A `+` keeps the value and takes
  the gradient of k2, which is the unbiased one. k1, k2 and the gradient of `+`
  are not clamped.

  Args:
    logprobs: [B, R] float32, of the current policy.
    ref_logprobs: [B, R] float32, of the reference policy.
    mask: [B, R], 1 for sampled tokens.
    kind: one of `KL_KINDS`.

  Returns:
    [B, R] float32 nats, 0 outside the mask.

  Raises:
    ValueError: for an unknown kind.
  """
  if kind not in KL_KINDS:
    raise ValueError(f"kl: found {kind!r}, expected one of {KL_KINDS}")
  difference = _difference(logprobs, ref_logprobs, mask)
  k2 = 0.5 * jnp.square(difference)
  if kind == "k2":
    return k2
  if kind.startswith("k1"):
    value = difference
  else:
    bounded = log_ratio(logprobs, ref_logprobs, mask)
    value = jnp.expm1(-bounded) + bounded
    value = jnp.clip(value, -_K3_BOUND, _K3_BOUND)
  if kind.endswith("+"):
    return jax.lax.stop_gradient(value) + k2 - jax.lax.stop_gradient(k2)
  return value


def mismatch(
  trainer_logprobs: types.Array,
  sampler_logprobs: types.Array,
  mask: types.Array,
) -> Stats:
  """The disagreement of trainer and sampler on the same tokens.

  Args:
    trainer_logprobs: [B, R] float32.
    sampler_logprobs: [B, R] float32.
    mask: [B, R], 1 for sampled tokens.

  Returns:
    Scalars over the given tokens: `mean_abs` and `max_abs` of the difference,
    and `kl`, the k3 estimate of KL(sampler || trainer); nats.
  """
  kept = mask > 0
  gap = jnp.where(kept, trainer_logprobs, 0.0) - jnp.where(
    kept, sampler_logprobs, 0.0
  )
  difference = log_ratio(trainer_logprobs, sampler_logprobs, mask)
  return {
    "mean_abs": masked.masked_mean(jnp.abs(gap), kept),
    "max_abs": jnp.max(jnp.abs(gap), initial=0.0),
    "kl": masked.masked_mean(jnp.expm1(difference) - difference, kept),
  }


def value_loss(
  values: types.Array,
  old_values: types.Array,
  targets: types.Array,
  mask: types.Array,
  *,
  clip: float | None = 0.5,
) -> tuple[types.Array, Stats]:
  """The critic's squared error, clipped around its old prediction.

  L = max((V - y)^2, (clip(V, V_old - clip, V_old + clip) - y)^2) / 2.

  Args:
    values: [B, R] float32, differentiated.
    old_values: [B, R] float32, predictions while sampling.
    targets: [B, R] float32, y.
    mask: [B, R], 1 where a target exists.
    clip: range, above 0; None for no clipping.

  Returns:
    The loss per token and `value_clip_fraction` per token; 0 outside the mask.
  """
  kept = mask > 0
  values = jnp.where(kept, values, 0.0)
  old_values = jnp.where(kept, old_values, 0.0)
  targets = jnp.where(kept, targets, 0.0)
  plain = jnp.square(values - targets)
  if clip is None:
    return 0.5 * plain, {"value_clip_fraction": jnp.zeros_like(plain)}
  bounded = jnp.clip(values, old_values - clip, old_values + clip)
  limited = jnp.square(bounded - targets)
  clipped = (limited > plain).astype(jnp.float32)
  return 0.5 * jnp.maximum(plain, limited), {"value_clip_fraction": clipped}


def log_ratio(
  logprobs: types.Array, other: types.Array, mask: types.Array
) -> types.Array:
  """Difference clamped to +-20 nats, to be exponentiated.

  Args:
    logprobs: [B, R] float32.
    other: [B, R] float32.
    mask: [B, R]; entries of both outside of it may be anything.

  Returns:
    [B, R] float32, 0 outside the mask.
  """
  difference = _difference(logprobs, other, mask)
  return jnp.clip(difference, -_LOG_RATIO_BOUND, _LOG_RATIO_BOUND)


def _difference(
  logprobs: types.Array, other: types.Array, mask: types.Array
) -> types.Array:
  """logprobs - other, 0 outside the mask."""
  kept = mask > 0
  return jnp.where(kept, logprobs, 0.0) - jnp.where(kept, other, 0.0)
