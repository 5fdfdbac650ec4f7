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
  tokens: record.Tokens,
  *,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  dual_clip: float = 3.0,
) -> record.PerToken:
  """Clipped surrogate with clip-higher and dual clip.

  L = max(-rho A, -clip(rho, 1 - clip_low, 1 + clip_high) A), and for A < 0 at
  most -dual_clip A; rho = exp(logp - logp_old).

  Args:
    tokens: [B, R] each, of some rows.
    clip_low: lower clip range, from 0 to 1.
    clip_high: upper clip range, at least 0.
    dual_clip: c > 1, or 0 for none.

  Returns:
    The loss per token, where the clip acts and where the dual clip does.

  Raises:
    ValueError: for a dual clip that is neither 0 nor above 1.
  """
  return _clip(tokens.ratio, tokens.advantages, clip_low, clip_high, dual_clip)


def gspo(
  tokens: record.Tokens,
  *,
  clip_low: float = 3e-4,
  clip_high: float = 4e-4,
) -> record.PerToken:
  """Clipped surrogate of the ratio of whole turns (GSPO, token form).

  s = exp(min(mean over the turn of logp - logp_old, 10)) takes the place of
  rho; the gradient of a token flows through its own log-probability, and is 0
  where the cap acts.

  Args:
    tokens: [B, R] each, of some rows.
    clip_low: lower clip range, from 0 to 1.
    clip_high: upper clip range, at least 0.

  Returns:
    As `ppo`.
  """
  own = tokens.logprobs - tokens.old_logprobs
  mean = losses.turn_sum(own, tokens.turn) / _turn_length(tokens)
  # The value is the turn's mean, the gradient that of the token.
  sequence = jax.lax.stop_gradient(mean) + own - jax.lax.stop_gradient(own)
  ratio = jnp.exp(jnp.minimum(sequence, _TURN_LOG_RATIO_CAP))
  return _clip(ratio, tokens.advantages, clip_low, clip_high, 0.0)


def cispo(
  tokens: record.Tokens,
  *,
  clip_low: float = 1.0,
  clip_high: float = 4.0,
) -> record.PerToken:
  """Policy gradient with clipped, constant importance weights (CISPO).

  L = -sg(clip(rho, 1 - clip_low, 1 + clip_high)) A logp: no token loses its
  gradient.

  Args:
    tokens: [B, R] each, of some rows.
    clip_low: 1 leaves small ratios alone.
    clip_high: upper clip range, at least 0.

  Returns:
    As `ppo`.
  """
  ratio = jax.lax.stop_gradient(tokens.ratio)
  bounded = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
  loss = -bounded * tokens.advantages * tokens.logprobs
  return record.PerToken(loss, clipped=bounded != ratio)


def sapo(
  tokens: record.Tokens,
  *,
  temperature_positive: float = 1.0,
  temperature_negative: float = 1.05,
) -> record.PerToken:
  """Soft gate in place of the clip (SAPO).

  L = -(4 / tau) sigmoid(tau (rho - 1)) A, tau by the sign of A. Its slope at
  rho = 1 is that of the plain surrogate. Turns have equal weight, whatever
  their length.

  Args:
    tokens: [B, R] each, of some rows.
    temperature_positive: tau where A > 0; above 0.
    temperature_negative: tau elsewhere; above 0.

  Returns:
    As `ppo`; nothing is ever clipped.
  """
  advantages = tokens.advantages
  tau = jnp.where(advantages > 0, temperature_positive, temperature_negative)
  gate = jax.nn.sigmoid(tau * (tokens.ratio - 1.0))
  return record.PerToken(-4.0 / tau * gate * advantages)


def ce_gppo(
  tokens: record.Tokens,
  *,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  dual_clip: float = 3.0,
  beta_low: float = 0.75,
  beta_high: float = 1.0,
) -> record.PerToken:
  """Clipped surrogate whose clipped tokens keep a bounded gradient (CE-GPPO).

  With s = rho / sg(rho), of value 1 and the gradient of logp: for A < 0 and
  rho < 1 - clip_low, L = -beta_low (1 - clip_low) s A; for A > 0 and rho > 1 +
  clip_high, L = -beta_high (1 + clip_high) s A; elsewhere -rho A. Then the
  dual clip as in `ppo`.

  Args:
    tokens: [B, R] each, of some rows.
    clip_low: lower clip range, from 0 to 1.
    clip_high: upper clip range, at least 0.
    dual_clip: c > 1, or 0 for none.
    beta_low: at least 0; 0 is a plain clip.
    beta_high: at least 0; 0 is a plain clip.

  Returns:
    As `ppo`; `clip_fraction` counts tokens out of range.
  """
  advantages, ratio = tokens.advantages, tokens.ratio
  same = jnp.exp(tokens.log_ratio - jax.lax.stop_gradient(tokens.log_ratio))
  low, high = 1.0 - clip_low, 1.0 + clip_high
  below = (advantages < 0) & (ratio < low)
  above = (advantages > 0) & (ratio > high)
  factor = jnp.where(
    below,
    beta_low * low * same,
    jnp.where(above, beta_high * high * same, ratio),
  )
  loss, stopped = _dual_clip(-factor * advantages, advantages, dual_clip)
  return record.PerToken(loss, clipped=below | above, stopped=stopped)


def gmpo(
  tokens: record.Tokens,
  *,
  clip_low: float = 0.4,
  clip_high: float = 0.4,
) -> record.PerToken:
  """Geometric mean of a turn's clipped ratios (GMPO).

  With x = logp - logp_old and the turn's mean advantage A, every token has L =
  -A exp(mean over the turn of x'), where x' is the smaller of x and clip(x,
  -clip_low, clip_high) for A > 0 and the larger for A < 0: single tokens
  are clipped, in the logarithm, before they are averaged.

  Args:
    tokens: [B, R] each, of some rows.
    clip_low: nats, at least 0.
    clip_high: nats, at least 0.

  Returns:
    As `ppo`; `clip_fraction` counts tokens out of range.
  """
  log_ratio, turn = tokens.log_ratio, tokens.turn
  clipped = jnp.clip(log_ratio, -clip_low, clip_high)
  sign = jnp.sign(tokens.advantages)
  worse = sign * jnp.minimum(sign * log_ratio, sign * clipped)
  length = _turn_length(tokens)
  ratio = jnp.exp(losses.turn_sum(worse, turn) / length)
  advantage = losses.turn_sum(tokens.advantages, turn)
  return record.PerToken(
    -ratio * advantage / length, clipped=log_ratio != clipped
  )


def gpg(tokens: record.Tokens) -> record.PerToken:
  """The plain policy gradient, L = -A logp (GPG): no ratio, no clip.

  Args:
    tokens: [B, R] each, of some rows.

  Returns:
    As `ppo`; nothing is ever clipped.
  """
  return record.PerToken(-tokens.advantages * tokens.logprobs)


LOSSES = {
  "ppo": record.PolicyLoss(ppo, record.DualClip),
  "gspo": record.PolicyLoss(gspo, record.Clip, "seq_mean_token_mean"),
  "cispo": record.PolicyLoss(cispo, record.Clip),
  "sapo": record.PolicyLoss(sapo, Gate, "seq_mean_token_mean"),
  "ce_gppo": record.PolicyLoss(ce_gppo, GradientPreserving),
  "gmpo": record.PolicyLoss(gmpo, record.Clip, "seq_mean_token_mean"),
  "gpg": record.PolicyLoss(gpg, record.NoOptions),
}


def _clip(
  ratio: types.Array,
  advantages: types.Array,
  clip_low: float,
  clip_high: float,
  dual_clip: float,
) -> record.PerToken:
  """The clipped surrogate of a ratio, which may be that of a whole turn."""
  plain = -ratio * advantages
  limited = -jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages
  loss, stopped = _dual_clip(jnp.maximum(plain, limited), advantages, dual_clip)
  return record.PerToken(loss, clipped=limited > plain, stopped=stopped)


def _turn_length(tokens: record.Tokens) -> types.Array:
  """[B, R], how many tokens of a token's turn were sampled, at least 1."""
  count = losses.turn_sum(tokens.mask.astype(jnp.float32), tokens.turn)
  return jnp.maximum(count, 1.0)


def _dual_clip(
  loss: types.Array, advantages: types.Array, dual_clip: float
) -> tuple[types.Array, types.Array]:
  """The loss, bounded by -dual_clip A for A < 0, and where the bound acts."""
  if not dual_clip:
    return loss, jnp.zeros(loss.shape, bool)
  if dual_clip <= 1.0:
    raise ValueError(f"dual_clip: found {dual_clip}, expected above 1 or 0")
  bound = -dual_clip * advantages
  stopped = (advantages < 0) & (loss > bound)
  return jnp.where(stopped, bound, loss), stopped
