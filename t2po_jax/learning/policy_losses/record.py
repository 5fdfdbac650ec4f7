"""What every policy loss is, and what several of them share.

A policy loss takes (logprobs, old_logprobs, advantages, mask) [B, R], the
keyword `turn` [B, R] and its options, and returns the loss per token with
statistics per token: `clip_fraction`, `dual_clip_fraction`, `ratio`, `kl_old`
(k3 of the old policy against the current one); all 0 outside the mask.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from t2po_jax import keys, types
from t2po_jax.learning import losses

Result = tuple[types.Array, losses.Stats]


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
  """A policy loss: its function and what goes with it.

  Attributes:
    function: see the module's docstring; the options are keyword arguments of
      the same names.
    options: a dataclass of `keys.key` fields, the keys of the configuration's
      section `loss` that it reads.
    aggregation: the only one of `losses.AGGREGATIONS` that the method is
      defined with; None leaves the choice to the configuration.
  """

  function: Callable[..., Result]
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
    return self.function(
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
  """Options of the losses that also bound the loss where A < 0."""

  dual_clip: float = keys.key(
    3.0,
    "Bound of the loss in units of -A where A < 0, above 1; 0 = off.",
    least=0,
  )


def finish(
  loss: types.Array,
  log_ratio: types.Array,
  mask: types.Array,
  *,
  clipped: types.Array,
  stopped: types.Array | None = None,
) -> Result:
  """Loss and statistics, both 0 outside the mask.

  Args:
    loss: [B, R], per token.
    log_ratio: [B, R], from `losses.log_ratio`.
    mask: [B, R], 1 for sampled tokens.
    clipped: [B, R] bool, tokens without gradient because their ratio is out
      of range.
    stopped: [B, R] bool, tokens that the dual clip stopped.
  """
  none = jnp.zeros(loss.shape, bool)
  log_ratio = jax.lax.stop_gradient(log_ratio)
  stats = {
    "clip_fraction": clipped.astype(jnp.float32),
    "dual_clip_fraction": (none if stopped is None else stopped).astype(
      jnp.float32
    ),
    "ratio": jnp.exp(log_ratio),
    "kl_old": jnp.expm1(log_ratio) - log_ratio,
  }
  kept = mask > 0
  return jnp.where(kept, loss, 0.0), {
    name: jnp.where(kept, value, 0.0) for name, value in stats.items()
  }
