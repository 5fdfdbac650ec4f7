"""Losses on the response positions of a batch: pure functions of [B, R].

Every loss here is per token. What becomes of the tokens is decided once for
the whole batch by `token_weights`; `aggregate` then is a plain weighted sum,
so micro-batches, packings and shards add up to exactly the loss of the big
batch. Masks are 1 for tokens that the policy sampled: forced tokens and
padding take part in nothing, whatever their entries hold.

A turn is one sequence. Sources: clipped surrogate (arXiv 1707.06347), dual
clip (1912.09729), clip-higher (DAPO, 2503.14476), KL estimators (Schulman,
"Approximating KL divergence", 2020), GSPO (2507.18071), CISPO (2506.13585),
SAPO (2511.20347), truncated importance weights (Yao et al. 2025, "Your
efficient RL framework secretly brings you off-policy RL training").
"""

from collections.abc import Callable

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

# exp() of a log-ratio beyond this is of no use and soon infinite.
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
  """The weight of every token in the loss, from the WHOLE batch.

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
  # Every turn adds up to one; rounded, because 1/n added n times is not exact.
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
    [B, R] float32, the same number at all tokens of a turn.
  """
  begins = jnp.diff(turn, axis=1, prepend=turn[:, :1]) != 0
  segment = jnp.cumsum(begins, axis=1)

  def per_row(row, ids):
    total = jax.ops.segment_sum(row, ids, num_segments=row.shape[0])
    return total[ids]

  return jax.vmap(per_row)(values, segment)


def policy_loss(
  logprobs: types.Array,
  old_logprobs: types.Array,
  advantages: types.Array,
  mask: types.Array,
  *,
  turn: types.Array | None = None,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  dual_clip: float | None = 3.0,
) -> tuple[types.Array, Stats]:
  """Clipped surrogate with clip-higher and dual clip.

  L = max(-rho A, -clip(rho, 1 - clip_low, 1 + clip_high) A), and for A < 0 at
  most -dual_clip A; rho = exp(logp - logp_old).

  Args:
    logprobs: [B, R] float32, of the current policy; differentiated.
    old_logprobs: [B, R] float32, of the policy the ratio is against.
    advantages: [B, R] float32.
    mask: [B, R], 1 for sampled tokens.
    turn: not used; every policy loss takes it.
    clip_low: lower clip range, from 0 to 1.
    clip_high: upper clip range, at least 0.
    dual_clip: c > 1, or None for none.

  Returns:
    The loss per token and statistics per token, [B, R] each, 0 outside the
    mask: `clip_fraction`, `dual_clip_fraction`, `ratio`, `kl_old` (k3 of the
    old policy against the current one). Aggregate with `token_mean` weights.

  Raises:
    ValueError: for a dual clip of 1 or less.
  """
  del turn
  log_ratio = _log_ratio(logprobs, old_logprobs, mask)
  return _clipped(
    log_ratio,
    log_ratio,
    advantages,
    mask,
    clip_low=clip_low,
    clip_high=clip_high,
    dual_clip=dual_clip,
  )


def gspo_loss(
  logprobs: types.Array,
  old_logprobs: types.Array,
  advantages: types.Array,
  mask: types.Array,
  *,
  turn: types.Array,
  clip_low: float = 3e-4,
  clip_high: float = 4e-4,
) -> tuple[types.Array, Stats]:
  """Clipped surrogate of the ratio of whole turns (GSPO, token form).

  s = exp(mean over the turn of logp - logp_old) takes the place of rho; its
  gradient reaches a token through that token's own log-probability.

  Args:
    logprobs: as in `policy_loss`.
    old_logprobs: as in `policy_loss`.
    advantages: as in `policy_loss`.
    mask: as in `policy_loss`.
    turn: [B, R] int32; a turn's positions are neighbours in one row.
    clip_low: lower clip range, from 0 to 1.
    clip_high: upper clip range, at least 0.

  Returns:
    As `policy_loss`.
  """
  log_ratio = _log_ratio(logprobs, old_logprobs, mask)
  kept = (mask > 0).astype(jnp.float32)
  length = jnp.maximum(turn_sum(kept, turn), 1.0)
  mean = jax.lax.stop_gradient(turn_sum(log_ratio, turn) / length)
  # The value is the turn's mean, the gradient the token's own.
  sequence = mean + log_ratio - jax.lax.stop_gradient(log_ratio)
  return _clipped(
    sequence,
    log_ratio,
    advantages,
    mask,
    clip_low=clip_low,
    clip_high=clip_high,
    dual_clip=None,
  )


def cispo_loss(
  logprobs: types.Array,
  old_logprobs: types.Array,
  advantages: types.Array,
  mask: types.Array,
  *,
  turn: types.Array | None = None,
  clip_low: float = 1.0,
  clip_high: float = 4.0,
) -> tuple[types.Array, Stats]:
  """Policy gradient with clipped, constant importance weights (CISPO).

  L = -sg(clip(rho, 1 - clip_low, 1 + clip_high)) A logp: no token loses its
  gradient.

  Args:
    logprobs: as in `policy_loss`.
    old_logprobs: as in `policy_loss`.
    advantages: as in `policy_loss`.
    mask: as in `policy_loss`.
    turn: not used; every policy loss takes it.
    clip_low: 1 leaves small ratios alone.
    clip_high: upper clip range, at least 0.

  Returns:
    As `policy_loss`.
  """
  del turn
  log_ratio = _log_ratio(logprobs, old_logprobs, mask)
  ratio = jax.lax.stop_gradient(jnp.exp(log_ratio))
  bounded = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
  loss = -bounded * advantages * jnp.where(mask > 0, logprobs, 0.0)
  return _masked_loss(loss, log_ratio, mask, clipped=bounded != ratio)


def sapo_loss(
  logprobs: types.Array,
  old_logprobs: types.Array,
  advantages: types.Array,
  mask: types.Array,
  *,
  turn: types.Array | None = None,
  temperature_positive: float = 1.0,
  temperature_negative: float = 1.05,
) -> tuple[types.Array, Stats]:
  """Soft gate in place of the clip (SAPO).

  L = -(4 / tau) sigmoid(tau (rho - 1)) A, tau by the sign of A. Its slope at
  rho = 1 is that of the plain surrogate.

  Args:
    logprobs: as in `policy_loss`.
    old_logprobs: as in `policy_loss`.
    advantages: as in `policy_loss`.
    mask: as in `policy_loss`.
    turn: not used; every policy loss takes it.
    temperature_positive: tau where A > 0; above 0.
    temperature_negative: tau elsewhere; above 0.

  Returns:
    As `policy_loss`; nothing is ever clipped.
  """
  del turn
  log_ratio = _log_ratio(logprobs, old_logprobs, mask)
  ratio = jnp.exp(log_ratio)
  tau = jnp.where(advantages > 0, temperature_positive, temperature_negative)
  loss = -4.0 / tau * jax.nn.sigmoid(tau * (ratio - 1.0)) * advantages
  return _masked_loss(
    loss, log_ratio, mask, clipped=jnp.zeros(ratio.shape, bool)
  )


POLICY_LOSSES: dict[str, Callable[..., tuple[types.Array, Stats]]] = {
  "ppo": policy_loss,
  "gspo": gspo_loss,
  "cispo": cispo_loss,
  "sapo": sapo_loss,
}


def kl_penalty(
  logprobs: types.Array,
  ref_logprobs: types.Array,
  mask: types.Array,
  *,
  kind: str,
) -> types.Array:
  """Estimates KL(policy || reference) at each sampled token.

  With d = logp - logp_ref clamped to +-20: k1 = d; k2 = d^2 / 2; k3 =
  exp(-d) + d - 1, clamped to +-10. A `+` keeps the value and takes the
  gradient of k2, which is the unbiased one.

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
  difference = _log_ratio(logprobs, ref_logprobs, mask)
  k2 = 0.5 * jnp.square(difference)
  if kind == "k2":
    return k2
  if kind.startswith("k1"):
    value = difference
  else:
    value = jnp.expm1(-difference) + difference
    value = jnp.clip(value, -_K3_BOUND, _K3_BOUND)
  if kind.endswith("+"):
    return jax.lax.stop_gradient(value) + k2 - jax.lax.stop_gradient(k2)
  return value


def truncated_importance_weight(
  trainer_logprobs: types.Array,
  sampler_logprobs: types.Array,
  mask: types.Array,
  *,
  cap: float = 2.0,
) -> types.Array:
  """w = min(exp(logp_trainer - logp_sampler), cap), a constant.

  Corrects for the difference between the two implementations of the old
  policy when its log-probs were recomputed; multiplies the loss per token.

  Args:
    trainer_logprobs: [B, R] float32, of the old policy as the trainer sees it.
    sampler_logprobs: [B, R] float32, as recorded while sampling.
    mask: [B, R], 1 for sampled tokens.
    cap: C, above 0.

  Returns:
    [B, R] float32, from 0 to C; 0 outside the mask.
  """
  log_ratio = _log_ratio(trainer_logprobs, sampler_logprobs, mask)
  weight = jnp.minimum(jnp.exp(log_ratio), cap)
  return jax.lax.stop_gradient(jnp.where(mask > 0, weight, 0.0))


def masked_importance_weight(
  trainer_logprobs: types.Array,
  sampler_logprobs: types.Array,
  mask: types.Array,
  *,
  cap: float = 2.0,
) -> types.Array:
  """w = exp(logp_trainer - logp_sampler) in [1 / cap, cap], elsewhere 0.

  Tokens on which trainer and sampler disagree too much take no part at all
  (IcePop, Ling team 2025, "Every step evolves", arXiv 2510.18855).

  Args:
    trainer_logprobs: as in `truncated_importance_weight`.
    sampler_logprobs: as in `truncated_importance_weight`.
    mask: as in `truncated_importance_weight`.
    cap: C, above 1.

  Returns:
    [B, R] float32, 0 or from 1 / C to C; a constant; 0 outside the mask.
  """
  weight = jnp.exp(_log_ratio(trainer_logprobs, sampler_logprobs, mask))
  kept = (mask > 0) & (weight >= 1.0 / cap) & (weight <= cap)
  return jax.lax.stop_gradient(jnp.where(kept, weight, 0.0))


IMPORTANCE: dict[str, Callable[..., types.Array]] = {
  "truncate": truncated_importance_weight,
  "mask": masked_importance_weight,
}


def mismatch(
  trainer_logprobs: types.Array,
  sampler_logprobs: types.Array,
  mask: types.Array,
) -> Stats:
  """How far trainer and sampler disagree on the same tokens.

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
  log_ratio = _log_ratio(trainer_logprobs, sampler_logprobs, mask)
  return {
    "mean_abs": masked.masked_mean(jnp.abs(gap), kept),
    "max_abs": jnp.max(jnp.abs(gap), initial=0.0),
    "kl": masked.masked_mean(jnp.expm1(log_ratio) - log_ratio, kept),
  }


def value_loss(
  values: types.Array,
  old_values: types.Array,
  targets: types.Array,
  mask: types.Array,
  *,
  clip: float | None = 0.5,
) -> tuple[types.Array, Stats]:
  """Squared error of the critic, clipped around its old prediction.

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
    stats = {"value_clip_fraction": jnp.zeros_like(plain)}
    return 0.5 * plain, stats
  bounded = jnp.clip(values, old_values - clip, old_values + clip)
  limited = jnp.square(bounded - targets)
  stats = {"value_clip_fraction": (limited > plain).astype(jnp.float32)}
  return 0.5 * jnp.maximum(plain, limited), stats


def _log_ratio(logprobs, other, mask) -> types.Array:
  """Clamped difference, 0 outside the mask, where entries may be anything."""
  kept = mask > 0
  difference = jnp.where(kept, logprobs, 0.0) - jnp.where(kept, other, 0.0)
  return jnp.clip(difference, -_LOG_RATIO_BOUND, _LOG_RATIO_BOUND)


def _clipped(
  log_ratio,
  token_log_ratio,
  advantages,
  mask,
  *,
  clip_low: float,
  clip_high: float,
  dual_clip: float | None,
) -> tuple[types.Array, Stats]:
  """The clipped surrogate of a ratio, which may be that of a whole turn."""
  if dual_clip is not None and dual_clip <= 1.0:
    raise ValueError(f"dual_clip: found {dual_clip}, expected above 1 or None")
  ratio = jnp.exp(log_ratio)
  plain = -ratio * advantages
  limited = -jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages
  loss = jnp.maximum(plain, limited)
  stopped = jnp.zeros(loss.shape, bool)
  if dual_clip is not None:
    bound = -dual_clip * advantages
    stopped = (advantages < 0) & (loss > bound)
    loss = jnp.where(stopped, bound, loss)
  return _masked_loss(
    loss, token_log_ratio, mask, clipped=limited > plain, stopped=stopped
  )


def _masked_loss(
  loss, log_ratio, mask, *, clipped, stopped=None
) -> tuple[types.Array, Stats]:
  """Loss and statistics, both 0 outside the mask."""
  if stopped is None:
    stopped = jnp.zeros(loss.shape, bool)
  log_ratio = jax.lax.stop_gradient(log_ratio)
  stats = {
    "clip_fraction": clipped.astype(jnp.float32),
    "dual_clip_fraction": stopped.astype(jnp.float32),
    "ratio": jnp.exp(log_ratio),
    "kl_old": jnp.expm1(log_ratio) - log_ratio,
  }
  kept = mask > 0
  return jnp.where(kept, loss, 0.0), {
    name: jnp.where(kept, value, 0.0) for name, value in stats.items()
  }
