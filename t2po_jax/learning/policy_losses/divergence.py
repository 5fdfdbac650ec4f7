"""Divergence proximal policy optimisation (DPPO, arXiv 2602.04879).

Instead of clipping the ratio, a token is left out if the policy has already
moved too far in the direction of its advantage. The distance is that of the
binary distribution "this token or any other": a rare token may double its
probability, a common one may not.
"""

import dataclasses

import jax
import jax.numpy as jnp

from t2po_jax import keys, types
from t2po_jax.learning.policy_losses import record

# Importance weights are truncated here, as in the reference code.
_RATIO_CAP = 20.0
_EPSILON = 1e-8


@dataclasses.dataclass(frozen=True)
class Divergence:
  """Options of the losses of this module."""

  divergence_low: float = keys.key(
    0.2,
    "Distance from the old policy at which tokens with A <= 0 are left out; "
    "0.2 is usual for `dppo_tv`, 0.05 for `dppo_kl`.",
    least=0,
  )
  divergence_high: float = keys.key(
    0.2,
    "The same for tokens with A > 0.",
    least=0,
  )


def dppo_tv(
  tokens: record.Tokens,
  *,
  divergence_low: float = 0.2,
  divergence_high: float = 0.2,
) -> record.PerToken:
  """DPPO with the total variation |p - q| of the token's probability.

  L = -sg(min(rho, 20)) A logp, and 0 where A > 0 and p - q > divergence_high,
  or A <= 0 and q - p > divergence_low; p is the policy's probability of the
  token and q the old policy's, preferably as recorded by the sampler.

  Args:
    tokens: [B, R] each, of some rows.
    divergence_low: from 0 to 1.
    divergence_high: from 0 to 1.

  Returns:
    The loss per token; `clip_fraction` counts those left out.
  """
  p, q = _probabilities(tokens)
  out = jnp.where(
    tokens.advantages > 0, p - q > divergence_high, q - p > divergence_low
  )
  return _leave_out(tokens, out)


def dppo_kl(
  tokens: record.Tokens,
  *,
  divergence_low: float = 0.05,
  divergence_high: float = 0.05,
) -> record.PerToken:
  """DPPO with KL(q || p) of the two-outcome distribution.

  D = q log(q / p) + (1 - q) log((1 - q) / (1 - p)). As `dppo_tv`, but a token
  is left out where D exceeds its bound and p has moved from q in the direction
  of the advantage.

  Args:
    tokens: [B, R] each, of some rows.
    divergence_low: nats, at least 0.
    divergence_high: nats, at least 0.

  Returns:
    As `dppo_tv`.
  """
  p, q = _probabilities(tokens)
  others = jnp.log((1.0 - q + _EPSILON) / (1.0 - p + _EPSILON))
  divergence = -q * tokens.log_ratio + (1.0 - q) * others
  out = jnp.where(
    tokens.advantages > 0,
    (divergence > divergence_high) & (p > q),
    (divergence > divergence_low) & (p < q),
  )
  return _leave_out(tokens, out)


LOSSES = {
  "dppo_tv": record.PolicyLoss(dppo_tv, Divergence),
  "dppo_kl": record.PolicyLoss(dppo_kl, Divergence),
}


def _probabilities(tokens: record.Tokens) -> tuple[types.Array, types.Array]:
  """Probabilities of the tokens, without gradient; 1 outside the mask."""
  p = jnp.exp(jax.lax.stop_gradient(tokens.logprobs))
  return p, jnp.exp(tokens.old_logprobs)


def _leave_out(tokens: record.Tokens, out: types.Array) -> record.PerToken:
  """-sg(min(rho, 20)) A logp, 0 for tokens that are left out."""
  weight = jax.lax.stop_gradient(jnp.minimum(tokens.ratio, _RATIO_CAP))
  loss = -weight * tokens.advantages * tokens.logprobs
  return record.PerToken(jnp.where(out, 0.0, loss), clipped=out)
