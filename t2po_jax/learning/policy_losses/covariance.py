"""Losses that restrain the tokens behind a fall of entropy (arXiv 2505.22617).

Entropy falls with the covariance between log-probability and advantage, and a
few tokens carry most of it: Clip-Cov removes the gradient of some of them,
KL-Cov charges them a KL to the old policy. The covariance is over the given
tokens, so the parts of a batch do not add up exactly to the whole: each selects
its own tokens, as in the reference code.
"""

import dataclasses

import jax
import jax.numpy as jnp

from t2po_jax import keys, masked, types
from t2po_jax.learning.policy_losses import record


@dataclasses.dataclass(frozen=True)
class ClipCovariance(record.Clip):
  """Options of `clip_cov`."""

  clip_cov_ratio: float = keys.key(
    2e-4, "Fraction of the tokens that lose their gradient.", above=0, most=1
  )
  clip_cov_low: float = keys.key(
    1.0, "Covariance above which a token may lose its gradient."
  )
  clip_cov_high: float = keys.key(
    5.0, "Covariance above which a token keeps it again."
  )


@dataclasses.dataclass(frozen=True)
class KlCovariance:
  """Options of `kl_cov`."""

  kl_cov_ratio: float = keys.key(
    2e-4, "Fraction of the tokens that are charged.", above=0, most=1
  )
  kl_cov_coefficient: float = keys.key(
    1.0, "Of their |logp - logp_old|.", least=0
  )


def clip_cov(
  tokens: record.Tokens,
  *,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  clip_cov_ratio: float = 2e-4,
  clip_cov_low: float = 1.0,
  clip_cov_high: float = 5.0,
) -> record.PerToken:
  """Clipped surrogate without some tokens of high covariance (Clip-Cov).

  Of the unclipped tokens whose (A - mean A) (logp - mean logp) lies between the
  bounds, max(1, ratio x all tokens) drawn at random get loss 0. Unlike the
  reference, the draw is a function of the data, so that an update is
  reproducible.

  Args:
    tokens: [B, R] each, of some rows.
    clip_low: lower clip range, from 0 to 1.
    clip_high: upper clip range, at least 0.
    clip_cov_ratio: from 0 to 1.
    clip_cov_low: lower bound, exclusive.
    clip_cov_high: upper bound, exclusive.

  Returns:
    The loss per token; `clip_fraction` counts the tokens drawn.
  """
  ratio = tokens.ratio
  plain = -ratio * tokens.advantages
  limited = -jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
  limited *= tokens.advantages
  covariance = _covariance(tokens)
  free = tokens.mask & (limited <= plain)
  free &= (covariance > clip_cov_low) & (covariance < clip_cov_high)
  lots = jnp.where(free, _lots(tokens.old_logprobs), -jnp.inf)
  drawn = free & _largest(lots, _count(tokens.mask, clip_cov_ratio))
  loss = jnp.where(drawn, 0.0, jnp.maximum(plain, limited))
  return record.PerToken(loss, clipped=drawn)


def kl_cov(
  tokens: record.Tokens,
  *,
  kl_cov_ratio: float = 2e-4,
  kl_cov_coefficient: float = 1.0,
) -> record.PerToken:
  """Surrogate without a clip; tokens of highest covariance pay (KL-Cov).

  L = -rho A, plus coefficient x |logp - logp_old| for the max(1, ratio x all
  tokens) with the largest (A - mean A) (logp - mean logp).

  Args:
    tokens: [B, R] each, of some rows.
    kl_cov_ratio: from 0 to 1.
    kl_cov_coefficient: at least 0.

  Returns:
    As `clip_cov`; `clip_fraction` counts the tokens that pay.
  """
  log_ratio, mask = tokens.log_ratio, tokens.mask
  covariance = jnp.where(mask, _covariance(tokens), -jnp.inf)
  charged = mask & _largest(covariance, _count(mask, kl_cov_ratio))
  # Not jnp.abs: its gradient at 0 is not 0, and on-policy all values are 0.
  charge = kl_cov_coefficient * log_ratio * jnp.sign(log_ratio)
  loss = -tokens.ratio * tokens.advantages + jnp.where(charged, charge, 0.0)
  return record.PerToken(loss, clipped=charged)


LOSSES = {
  "clip_cov": record.PolicyLoss(clip_cov, ClipCovariance),
  "kl_cov": record.PolicyLoss(kl_cov, KlCovariance),
}


def _covariance(tokens: record.Tokens) -> types.Array:
  """(A - mean A) (logp - mean logp) of every sampled token, a constant."""
  logprobs = jax.lax.stop_gradient(tokens.logprobs)
  advantages = tokens.advantages
  return (advantages - masked.masked_mean(advantages, tokens.mask)) * (
    logprobs - masked.masked_mean(logprobs, tokens.mask)
  )


def _count(mask: types.Array, ratio: float) -> types.Array:
  """max(1, ratio x sampled tokens), rounded down."""
  # The small term compensates for products such as 5000 * 0.0002 < 1.
  return jnp.maximum(jnp.floor(jnp.sum(mask) * ratio + 1e-4), 1.0)


def _largest(scores: types.Array, count: types.Array) -> types.Array:
  """Marks the `count` largest scores; of equal ones, the first."""
  order = jnp.argsort(-scores, axis=None, stable=True)
  rank = (
    jnp.zeros(scores.size, jnp.int32)
    .at[order]
    .set(jnp.arange(scores.size, dtype=jnp.int32))
  )
  return (rank < count).reshape(scores.shape)


def _lots(old_logprobs: types.Array) -> types.Array:
  """[B, R] uniform numbers that depend only on the data."""
  total = jnp.sum(old_logprobs).astype(jnp.float32)
  seed = jax.lax.bitcast_convert_type(total, jnp.uint32)
  return jax.random.uniform(jax.random.key(seed), old_logprobs.shape)
