"""Losses that bound the ratio of the current policy to the old one.

Sources: clipped surrogate (arXiv 1707.06347), dual clip (1912.09729),
clip-higher (DAPO, 2503.14476), GSPO (2507.18071), CISPO (2506.13585), SAPO
(2511.20347), CE-GPPO (2509.20712), GMPO (2507.20673), GPG (2504.02546). A
token's log-ratio is clamped to +-20 before it is exponentiated; a turn's mean
log-ratio (`gspo`) is capped at 10.
"""

import dataclasses

import jax
import jax.numpy as jnp

from t2po_jax import keys, types
from t2po_jax.learning import losses
from t2po_jax.learning.policy_losses import record

# A turn's mean log-ratio is capped here (GSPO's reference code).
_TURN_LOG_RATIO_CAP = 10.0


@dataclasses.dataclass(frozen=True)
class Gate:
  """Options of `sapo`."""

  temperature_positive: float = keys.key(
    1.0, "Of the soft gate where A > 0.", above=0
  )
  temperature_negative: float = keys.key(
    1.05, "Of the soft gate elsewhere.", above=0
  )


@dataclasses.dataclass(frozen=True)
class GradientPreserving(record.DualClip):
  """Options of `ce_gppo`."""

  beta_low: float = keys.key(
    0.75,
    "Gradient kept by tokens with A < 0 and a ratio below the range.",
    least=0,
  )
  beta_high: float = keys.key(
    1.0,
    "Gradient kept by tokens with A > 0 and a ratio above the range.",
    least=0,
  )


def ppo(
  logprobs: types.Array,
  old_logprobs: types.Array,
  advantages: types.Array,
  mask: types.Array,
  *,
  turn: types.Array | None = None,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  dual_clip: float = 3.0,
) -> record.Result:
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
    dual_clip: c > 1, or 0 for none.

  Returns:
    The loss and statistics per token; aggregate with weights of
    `losses.token_weights`.

  Raises:
    ValueError: for a dual clip that is neither 0 nor above 1.
  """
  del turn
  log_ratio = losses.log_ratio(logprobs, old_logprobs, mask)
  return _clipped(
    log_ratio,
    log_ratio,
    advantages,
    mask,
    clip_low=clip_low,
    clip_high=clip_high,
    dual_clip=dual_clip,
  )


def gspo(
  logprobs: types.Array,
  old_logprobs: types.Array,
  advantages: types.Array,
  mask: types.Array,
  *,
  turn: types.Array,
  clip_low: float = 3e-4,
  clip_high: float = 4e-4,
) -> record.Result:
  """Clipped surrogate of the ratio of whole turns (GSPO, token form).

  s = exp(min(mean over the turn of logp - logp_old, 10)) takes the place of
  rho; its gradient reaches a token through that token's own log-probability,
  and is 0 where the cap acts.

  Args:
    logprobs: as in `ppo`.
    old_logprobs: as in `ppo`.
    advantages: as in `ppo`.
    mask: as in `ppo`.
    turn: [B, R] int32; a turn's positions are neighbours in one row.
    clip_low: lower clip range, from 0 to 1.
    clip_high: upper clip range, at least 0.

  Returns:
    As `ppo`.
  """
  kept = mask > 0
  own = jnp.where(kept, logprobs, 0.0) - jnp.where(kept, old_logprobs, 0.0)
  length = jnp.maximum(losses.turn_sum(kept.astype(jnp.float32), turn), 1.0)
  mean = jax.lax.stop_gradient(losses.turn_sum(own, turn) / length)
  # The value is the turn's mean, the gradient the token's own.
  sequence = mean + own - jax.lax.stop_gradient(own)
  return _clipped(
    jnp.minimum(sequence, _TURN_LOG_RATIO_CAP),
    losses.log_ratio(logprobs, old_logprobs, mask),
    advantages,
    mask,
    clip_low=clip_low,
    clip_high=clip_high,
    dual_clip=0.0,
  )


def cispo(
  logprobs: types.Array,
  old_logprobs: types.Array,
  advantages: types.Array,
  mask: types.Array,
  *,
  turn: types.Array | None = None,
  clip_low: float = 1.0,
  clip_high: float = 4.0,
) -> record.Result:
  """Policy gradient with clipped, constant importance weights (CISPO).

  L = -sg(clip(rho, 1 - clip_low, 1 + clip_high)) A logp: no token loses its
  gradient.

  Args:
    logprobs: as in `ppo`.
    old_logprobs: as in `ppo`.
    advantages: as in `ppo`.
    mask: as in `ppo`.
    turn: not used; every policy loss takes it.
    clip_low: 1 leaves small ratios alone.
    clip_high: upper clip range, at least 0.

  Returns:
    As `ppo`.
  """
  del turn
  log_ratio = losses.log_ratio(logprobs, old_logprobs, mask)
  ratio = jax.lax.stop_gradient(jnp.exp(log_ratio))
  bounded = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
  loss = -bounded * advantages * jnp.where(mask > 0, logprobs, 0.0)
  return record.finish(loss, log_ratio, mask, clipped=bounded != ratio)


def sapo(
  logprobs: types.Array,
  old_logprobs: types.Array,
  advantages: types.Array,
  mask: types.Array,
  *,
  turn: types.Array | None = None,
  temperature_positive: float = 1.0,
  temperature_negative: float = 1.05,
) -> record.Result:
  """Soft gate in place of the clip (SAPO).

  L = -(4 / tau) sigmoid(tau (rho - 1)) A, tau by the sign of A. Its slope at
  rho = 1 is that of the plain surrogate. Turns weigh the same, whatever their
  length.

  Args:
    logprobs: as in `ppo`.
    old_logprobs: as in `ppo`.
    advantages: as in `ppo`.
    mask: as in `ppo`.
    turn: not used; every policy loss takes it.
    temperature_positive: tau where A > 0; above 0.
    temperature_negative: tau elsewhere; above 0.

  Returns:
    As `ppo`; nothing is ever clipped.
  """
  del turn
  log_ratio = losses.log_ratio(logprobs, old_logprobs, mask)
  ratio = jnp.exp(log_ratio)
  tau = jnp.where(advantages > 0, temperature_positive, temperature_negative)
  loss = -4.0 / tau * jax.nn.sigmoid(tau * (ratio - 1.0)) * advantages
  return record.finish(
    loss, log_ratio, mask, clipped=jnp.zeros(ratio.shape, bool)
  )


def ce_gppo(
  logprobs: types.Array,
  old_logprobs: types.Array,
  advantages: types.Array,
  mask: types.Array,
  *,
  turn: types.Array | None = None,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  dual_clip: float = 3.0,
  beta_low: float = 0.75,
  beta_high: float = 1.0,
) -> record.Result:
  """Clipped surrogate whose clipped tokens keep a bounded gradient (CE-GPPO).

  With s = rho / sg(rho), of value 1 and the gradient of logp: for A < 0 and
  rho < 1 - clip_low, L = -beta_low (1 - clip_low) s A; for A > 0 and rho > 1 +
  clip_high, L = -beta_high (1 + clip_high) s A; elsewhere -rho A. Then the
  dual clip as in `ppo`.

  Args:
    logprobs: as in `ppo`.
    old_logprobs: as in `ppo`.
    advantages: as in `ppo`.
    mask: as in `ppo`.
    turn: not used; every policy loss takes it.
    clip_low: lower clip range, from 0 to 1.
    clip_high: upper clip range, at least 0.
    dual_clip: c > 1, or 0 for none.
    beta_low: at least 0; 0 is a plain clip.
    beta_high: at least 0; 0 is a plain clip.

  Returns:
    As `ppo`; `clip_fraction` counts tokens out of range.
  """
  del turn
  log_ratio = losses.log_ratio(logprobs, old_logprobs, mask)
  ratio = jnp.exp(log_ratio)
  same = jnp.exp(log_ratio - jax.lax.stop_gradient(log_ratio))
  low, high = 1.0 - clip_low, 1.0 + clip_high
  below = (advantages < 0) & (ratio < low)
  above = (advantages > 0) & (ratio > high)
  factor = jnp.where(
    below,
    beta_low * low * same,
    jnp.where(above, beta_high * high * same, ratio),
  )
  loss, stopped = _dual_clip(-factor * advantages, advantages, dual_clip)
  return record.finish(
    loss, log_ratio, mask, clipped=below | above, stopped=stopped
  )


def gmpo(
  logprobs: types.Array,
  old_logprobs: types.Array,
  advantages: types.Array,
  mask: types.Array,
  *,
  turn: types.Array,
  clip_low: float = 0.4,
  clip_high: float = 0.4,
) -> record.Result:
  """Geometric mean of a turn's clipped ratios (GMPO).

  With x = logp - logp_old and the turn's mean advantage A, every token has L =
  -A exp(mean over the turn of x'), where x' is the smaller of x and clip(x,
  -clip_low, clip_high) for A > 0 and the larger for A < 0: single tokens
  are clipped, in the logarithm, before they are averaged.

  Args:
    logprobs: as in `ppo`.
    old_logprobs: as in `ppo`.
    advantages: as in `ppo`.
    mask: as in `ppo`.
    turn: [B, R] int32; a turn's positions are neighbours in one row.
    clip_low: nats, at least 0.
    clip_high: nats, at least 0.

  Returns:
    As `ppo`; `clip_fraction` counts tokens out of range.
  """
  kept = (mask > 0).astype(jnp.float32)
  log_ratio = losses.log_ratio(logprobs, old_logprobs, mask)
  clipped = jnp.clip(log_ratio, -clip_low, clip_high)
  sign = jnp.sign(jnp.where(mask > 0, advantages, 0.0))
  worse = sign * jnp.minimum(sign * log_ratio, sign * clipped)
  length = jnp.maximum(losses.turn_sum(kept, turn), 1.0)
  ratio = jnp.exp(losses.turn_sum(worse, turn) / length)
  advantage = losses.turn_sum(jnp.where(mask > 0, advantages, 0.0), turn)
  return record.finish(
    -ratio * advantage / length, log_ratio, mask, clipped=log_ratio != clipped
  )


def gpg(
  logprobs: types.Array,
  old_logprobs: types.Array,
  advantages: types.Array,
  mask: types.Array,
  *,
  turn: types.Array | None = None,
) -> record.Result:
  """The plain policy gradient, L = -A logp (GPG): no ratio, no clip.

  Args:
    logprobs: as in `ppo`.
    old_logprobs: as in `ppo`; only for the statistics.
    advantages: as in `ppo`.
    mask: as in `ppo`.
    turn: not used; every policy loss takes it.

  Returns:
    As `ppo`; nothing is ever clipped.
  """
  del turn
  log_ratio = losses.log_ratio(logprobs, old_logprobs, mask)
  loss = -advantages * jnp.where(mask > 0, logprobs, 0.0)
  return record.finish(
    loss, log_ratio, mask, clipped=jnp.zeros(loss.shape, bool)
  )


LOSSES = {
  "ppo": record.PolicyLoss(ppo, record.DualClip),
  "gspo": record.PolicyLoss(gspo, record.Clip, "seq_mean_token_mean"),
  "cispo": record.PolicyLoss(cispo, record.Clip),
  "sapo": record.PolicyLoss(sapo, Gate, "seq_mean_token_mean"),
  "ce_gppo": record.PolicyLoss(ce_gppo, GradientPreserving),
  "gmpo": record.PolicyLoss(gmpo, record.Clip, "seq_mean_token_mean"),
  "gpg": record.PolicyLoss(gpg, record.NoOptions),
}


def _clipped(
  log_ratio: types.Array,
  token_log_ratio: types.Array,
  advantages: types.Array,
  mask: types.Array,
  *,
  clip_low: float,
  clip_high: float,
  dual_clip: float,
) -> record.Result:
  """The clipped surrogate of a ratio, which may be that of a whole turn."""
  ratio = jnp.exp(log_ratio)
  plain = -ratio * advantages
  limited = -jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages
  loss, stopped = _dual_clip(jnp.maximum(plain, limited), advantages, dual_clip)
  return record.finish(
    loss, token_log_ratio, mask, clipped=limited > plain, stopped=stopped
  )


def _dual_clip(
  loss: types.Array, advantages: types.Array, dual_clip: float
) -> tuple[types.Array, types.Array]:
  """The loss, for A < 0 at most -dual_clip A, and where that stopped it."""
  if not dual_clip:
    return loss, jnp.zeros(loss.shape, bool)
  if dual_clip <= 1.0:
    raise ValueError(f"dual_clip: found {dual_clip}, expected above 1 or 0")
  bound = -dual_clip * advantages
  stopped = (advantages < 0) & (loss > bound)
  return jnp.where(stopped, bound, loss), stopped
