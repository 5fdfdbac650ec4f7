"""The definition of a policy loss, and the parts that losses share.

A policy loss is a formula: it computes the loss of every token from the
`Tokens` of some rows and its options. The steps before and after it are common
to all losses and implemented here, in `evaluate`: the log-ratio, the mask and
the statistics per token, `clip_fraction`, `dual_clip_fraction`, `ratio` and
`kl_old` (k3 of the old policy against the current one).
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from t2po_jax import keys, types
from t2po_jax.learning import losses

Result = tuple[types.Array, losses.Stats]


@dataclasses.dataclass(frozen=True)
class Tokens:
  """The input of a formula, [B, R] each and 0 outside the mask.

  Attributes:
    logprobs: of the current policy, nats; differentiated.
    old_logprobs: of the policy the ratio is against, nats.
    log_ratio: their difference, clamped to +-20.
    advantages: of the tokens.
    mask: bool, true for sampled tokens.
    turn: int32, the turn of each position, not masked; a turn's positions are
      neighbours in one row.
  """

  logprobs: types.Array
  old_logprobs: types.Array
  log_ratio: types.Array
  advantages: types.Array
  mask: types.Array
  turn: types.Array

  @property
  def ratio(self) -> types.Array:
    """rho, the ratio of the current policy to the old one; 1 outside."""
    return jnp.exp(self.log_ratio)


class PerToken(NamedTuple):
  """The output of a formula, [B, R] each; arbitrary outside the mask.

  Attributes:
    loss: per token, before any aggregation.
    clipped: bool, tokens that `clip_fraction` counts: those without gradient
      because their ratio is out of range. None: none.
    stopped: bool, tokens where the dual clip acts. None: none.
  """

  loss: types.Array
  clipped: types.Array | None = None
  stopped: types.Array | None = None


def evaluate(
  formula: Callable[..., PerToken],
  logprobs: types.Array,
  old_logprobs: types.Array,
  advantages: types.Array,
  mask: types.Array,
  *,
  turn: types.Array | None = None,
  **options: Any,
) -> Result:
  """Evaluates a policy loss on some rows.

  Args:
    formula: takes `Tokens` and the options.
    logprobs: [B, R] float32, of the current policy; differentiated.
    old_logprobs: [B, R] float32, of the policy the ratio is against.
    advantages: [B, R] float32.
    mask: [B, R], 1 for sampled tokens; elsewhere entries may be anything.
    turn: [B, R] int32; None: every row is one turn.
    **options: of the formula.

  Returns:
    The loss and statistics per token, 0 outside the mask; aggregate with
    weights of `losses.token_weights`.
  """
  kept = mask > 0
  tokens = Tokens(
    logprobs=jnp.where(kept, logprobs, 0.0),
    old_logprobs=jnp.where(kept, old_logprobs, 0.0),
    log_ratio=losses.log_ratio(logprobs, old_logprobs, mask),
    advantages=jnp.where(kept, advantages, 0.0),
    mask=kept,
    turn=jnp.zeros(mask.shape, jnp.int32) if turn is None else turn,
  )
  terms = formula(tokens, **options)
  log_ratio = jax.lax.stop_gradient(tokens.log_ratio)
  none = jnp.zeros(mask.shape, bool)
  clipped = none if terms.clipped is None else terms.clipped
  stopped = none if terms.stopped is None else terms.stopped
  stats = {
    "clip_fraction": clipped.astype(jnp.float32),
    "dual_clip_fraction": stopped.astype(jnp.float32),
    "ratio": jnp.exp(log_ratio),
    "kl_old": jnp.expm1(log_ratio) - log_ratio,
  }
  return jnp.where(kept, terms.loss, 0.0), {
    name: jnp.where(kept, value, 0.0) for name, value in stats.items()
  }


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
  """A policy loss: its formula and everything that goes with it.

  Attributes:
    formula: computes `PerToken` from `Tokens`; the options are keyword
      arguments of the same names.
    options: a dataclass of `keys.key` fields, the keys of the configuration's
      section `loss` that it reads.
    aggregation: the only one of `losses.AGGREGATIONS` that the method is
      defined with; None leaves the choice to the configuration.
  """

  formula: Callable[..., PerToken]
  options: type
  aggregation: str | None = None

  @property
  def keys(self) -> tuple[str, ...]:
    """Names of its options."""
    return tuple(keys.keys_of(self.options))

  def evaluate(
    self,
    logprobs: types.Array,
    batch: types.Batch,
    settings: Any,
  ) -> Result:
    """The loss per token of some rows.

    Args:
      logprobs: [B, R] float32, differentiated.
      batch: those rows.
      settings: anything with the options as attributes.
    """
    return evaluate(
      self.formula,
      logprobs,
      batch.old_logprobs,
      batch.advantages,
      batch.mask,
      turn=batch.turn,
      **{name: getattr(settings, name) for name in self.keys},
    )


@dataclasses.dataclass(frozen=True)
class NoOptions:
  """A loss without options."""


@dataclasses.dataclass(frozen=True)
class Clip:
  """Options of the losses that clip a ratio."""

  clip_low: float = keys.key(
    0.2, "How far the ratio may fall below 1.", least=0, most=1
  )
  clip_high: float = keys.key(
    0.2,
    "How far the ratio may rise above 1; more than `clip_low` is clip-higher "
    "(DAPO).",
    least=0,
  )


@dataclasses.dataclass(frozen=True)
class DualClip(Clip):
  """Options of the losses with a dual clip, a bound where A < 0."""

  dual_clip: float = keys.key(
    3.0,
    "Bound of the loss in units of -A where A < 0, above 1; 0 = off.",
    least=0,
  )
