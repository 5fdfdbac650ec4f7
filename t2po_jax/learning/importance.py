"""Importance weights between sampler and trainer: one constant per token.

When the log-probs of the old policy are recomputed, they differ slightly from
those recorded by the sampler, because of different kernels and precision. The
ratio w = exp(logp_trainer - logp_sampler) corrects for this: it multiplies the
loss of its token. Weights outside sensible bounds are truncated, or their token
is left out; a whole turn can be rejected. Tokens left out still count in the
denominator of averages.

Sources: truncated weights (Yao et al. 2025, "Your efficient RL framework
secretly brings you off-policy RL training"), masked weights (IcePop, Ling team
2025, arXiv 2510.18855), weights and rejection of sequences (verl's rollout
correction).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from t2po_jax import types
from t2po_jax.learning import losses

# A turn's summed log-ratio is clamped to this.
_SUM_BOUND = 20.0


def truncated(
  trainer_logprobs: types.Array,
  sampler_logprobs: types.Array,
  mask: types.Array,
  *,
  turn: types.Array | None = None,
  low: float = 0.0,
  cap: float = 2.0,
) -> types.Array:
  """w = min(exp(logp_trainer - logp_sampler), cap).

  Args:
    trainer_logprobs: [B, R] float32, of the old policy, from the trainer.
    sampler_logprobs: [B, R] float32, as recorded while sampling.
    mask: [B, R], 1 for sampled tokens.
    turn: unused; part of the common signature.
    low: unused; part of the common signature.
    cap: C, above 0.

  Returns:
    [B, R] float32, from 0 to C; 0 outside the mask.
  """
  del turn, low
  ratio = jnp.exp(losses.log_ratio(trainer_logprobs, sampler_logprobs, mask))
  return _constant(jnp.minimum(ratio, cap), mask)


def bounded(
  trainer_logprobs: types.Array,
  sampler_logprobs: types.Array,
  mask: types.Array,
  *,
  turn: types.Array | None = None,
  low: float = 0.0,
  cap: float = 2.0,
) -> types.Array:
  """w = exp(logp_trainer - logp_sampler) in [low, cap], elsewhere 0 (IcePop).

  Tokens on which trainer and sampler disagree too much are left out.

  Args:
    trainer_logprobs: as in `truncated`.
    sampler_logprobs: as in `truncated`.
    mask: as in `truncated`.
    turn: unused; part of the common signature.
    low: at least 0; 0 means 1 / cap.
    cap: C, above 1.

  Returns:
    [B, R] float32, 0 or from `low` to C; 0 outside the mask.
  """
  del turn
  ratio = jnp.exp(losses.log_ratio(trainer_logprobs, sampler_logprobs, mask))
  inside = (ratio >= (low or 1.0 / cap)) & (ratio <= cap)
  return _constant(jnp.where(inside, ratio, 0.0), mask)


def turn_truncated(
  trainer_logprobs: types.Array,
  sampler_logprobs: types.Array,
  mask: types.Array,
  *,
  turn: types.Array,
  low: float = 0.0,
  cap: float = 2.0,
) -> types.Array:
  """w = min(product of a turn's ratios, cap), equal for all its tokens.

  Args:
    trainer_logprobs: as in `truncated`.
    sampler_logprobs: as in `truncated`.
    mask: as in `truncated`.
    turn: [B, R] int32; a turn's positions are neighbours in one row.
    low: unused; part of the common signature.
    cap: C, above 0; 2 to 10 are usual.

  Returns:
    [B, R] float32, from 0 to C; 0 outside the mask.
  """
  del low
  total = losses.turn_sum(
    losses.log_ratio(trainer_logprobs, sampler_logprobs, mask), turn
  )
  ratio = jnp.exp(jnp.clip(total, -_SUM_BOUND, _SUM_BOUND))
  return _constant(jnp.minimum(ratio, cap), mask)


IMPORTANCE: dict[str, Callable[..., types.Array]] = {
  "truncate": truncated,
  "mask": bounded,
  "turn_truncate": turn_truncated,
}

# Rejection criteria, with their usual bounds.
REJECTIONS: dict[str, tuple[float, float]] = {
  "geometric": (0.99, 1.01),
  "product": (0.5, 2.0),
  "token": (1e-4, 100.0),
}


def accepted(
  trainer_logprobs: types.Array,
  sampler_logprobs: types.Array,
  mask: types.Array,
  *,
  turn: types.Array,
  kind: str,
  low: float,
  high: float,
) -> types.Array:
  """Selects the turns on which trainer and sampler agree well enough.

  geometric: the geometric mean of a turn's ratios lies in [low, high];
  product: their product does; token: all of them do.

  Args:
    trainer_logprobs: as in `truncated`.
    sampler_logprobs: as in `truncated`.
    mask: as in `truncated`.
    turn: [B, R] int32; a turn's positions are neighbours in one row.
    kind: one of `REJECTIONS`.
    low: above 0.
    high: at least `low`.

  Returns:
    [B, R] float32, 1 at the sampled tokens of accepted turns, 0 elsewhere.

  Raises:
    ValueError: for an unknown kind.
  """
  if kind not in REJECTIONS:
    raise ValueError(
      f"rejection: found {kind!r}, expected one of {tuple(REJECTIONS)}"
    )
  kept = (mask > 0).astype(jnp.float32)
  log_ratio = losses.log_ratio(trainer_logprobs, sampler_logprobs, mask)
  lowest, highest = jnp.log(low), jnp.log(high)
  if kind == "token":
    outside = (log_ratio < lowest) | (log_ratio > highest)
    good = losses.turn_sum(kept * outside, turn) == 0
  else:
    score = losses.turn_sum(log_ratio, turn)
    if kind == "geometric":
      score = score / jnp.maximum(losses.turn_sum(kept, turn), 1.0)
    good = (score >= lowest) & (score <= highest)
  return _constant(good.astype(jnp.float32), mask)


def _constant(weight: types.Array, mask: types.Array) -> types.Array:
  """The weight without gradient, 0 outside the mask."""
  return jax.lax.stop_gradient(jnp.where(mask > 0, weight, 0.0))
