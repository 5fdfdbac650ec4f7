"""Objectives of an update: weighted sums over the tokens of a batch.

An objective is a frozen record of options and a function of per-token arrays.
`PolicyObjective` is the loss of T2PO and its baselines (clipped surrogate, KL
to a reference, entropy bonus, importance weights against the sampler);
`LikelihoodObjective` is supervised fine-tuning. Both return the loss of any
part of a batch, given the weights that `losses.token_weights` computed for the
whole batch, so that parts simply add up. Metrics are per-token means over the
whole batch, which add up in the same way, and maxima.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from t2po_jax import types
from t2po_jax.learning import importance, losses, policy_losses
from t2po_jax.learning.policy_losses import record

OLD_LOGPROBS = ("sampler", "recompute")
WEIGHTS = ("off", *importance.IMPORTANCE)
REJECTIONS = ("off", *importance.REJECTIONS)


@dataclasses.dataclass(frozen=True)
class Parts:
  """The value of an objective on a part of a batch.

  Attributes:
    loss: scalar; the parts of a batch add up to the loss of the whole.
    means: scalars that add up to token means over the whole batch.
    maxima: scalars whose maximum is that of the whole batch.
  """

  loss: types.Array
  means: dict[str, types.Array]
  maxima: dict[str, types.Array]


class Objective(Protocol):
  """The interface of an objective.

  Attributes:
    aggregation: one of `losses.AGGREGATIONS`.
    horizon: tokens, for `seq_mean_token_sum_norm`.
    temperature: of sampling; divides the logits.
    entropy_coefficient: if 0, the entropy is measured but not differentiated.
    needs_reference: whether `ref_logprobs` must be filled.
    recomputes_old: whether the learner replaces `old_logprobs` by its own.
  """

  @property
  def aggregation(self) -> str: ...
  @property
  def horizon(self) -> int | None: ...
  @property
  def temperature(self) -> float: ...
  @property
  def entropy_coefficient(self) -> float: ...
  @property
  def needs_reference(self) -> bool: ...
  @property
  def recomputes_old(self) -> bool: ...

  def evaluate(
    self,
    logprobs: types.Array,
    entropy: types.Array,
    batch: types.Batch,
    weights: types.Array,
    metric_weights: types.Array,
  ) -> Parts:
    """The loss and metrics of some rows of a batch."""
    ...

  def evaluate_values(
    self, values: types.Array, batch: types.Batch, weights: types.Array
  ) -> tuple[types.Array, dict[str, types.Array]]:
    """The critic's loss and metrics; only called if there is a critic."""
    ...


@dataclasses.dataclass(frozen=True)
class PolicyObjective:
  """Policy gradient: L = sum_t w_t (L_pg - c_H H + c_KL KL).

  Attributes:
    kind: one of `policy_losses.POLICY_LOSSES`.
    settings: a record of that loss's options; None for its defaults.
    aggregation: one of `losses.AGGREGATIONS`.
    horizon: tokens, >= 1, for `seq_mean_token_sum_norm`.
    kl: `off`, or one of `losses.KL_KINDS` as a loss term.
    kl_coefficient: c_KL, at least 0.
    entropy_coefficient: c_H, at least 0: a bonus.
    old_logprobs: `sampler` uses the recorded ones; `recompute` runs the policy
      once more before the first step.
    importance: the importance weight between recomputed and recorded log-probs:
      `off`, or one of `importance.IMPORTANCE`.
    importance_cap: the largest weight, above 1; only with `recompute`.
    importance_low: the smallest weight, for `mask`; 0 = 1 / cap.
    rejection: the criterion for leaving out turns: `off`, or one of
      `importance.REJECTIONS`; only with `recompute`.
    rejection_low: the smallest ratio; 0 = the usual value.
    rejection_high: the largest ratio; 0 = the usual value.
    temperature: of sampling, above 0.
    value_coefficient: weight of the critic's loss, above 0.
    value_clip: clip range around the critic's old values, above 0; None: none.
  """

  kind: str = "ppo"
  settings: Any = None
  aggregation: str = "token_mean"
  horizon: int | None = None
  kl: str = "off"
  kl_coefficient: float = 0.0
  entropy_coefficient: float = 0.0
  old_logprobs: str = "sampler"
  importance: str = "truncate"
  importance_cap: float = 2.0
  importance_low: float = 0.0
  rejection: str = "off"
  rejection_low: float = 0.0
  rejection_high: float = 0.0
  temperature: float = 1.0
  value_coefficient: float = 0.5
  value_clip: float | None = 0.5

  def __post_init__(self) -> None:
    _check_choice("kind", self.kind, tuple(policy_losses.POLICY_LOSSES))
    _check_choice("kl", self.kl, ("off", *losses.KL_KINDS))
    _check_choice("old_logprobs", self.old_logprobs, OLD_LOGPROBS)
    _check_choice("aggregation", self.aggregation, losses.AGGREGATIONS)
    _check_choice("importance", self.importance, WEIGHTS)
    _check_choice("rejection", self.rejection, REJECTIONS)
    for name in ("kl_coefficient", "entropy_coefficient"):
      if getattr(self, name) < 0:
        raise ValueError(f"{name}: found {getattr(self, name)}, expected >= 0")
    if self.temperature <= 0:
      raise ValueError(
        f"temperature: found {self.temperature}, expected above 0: log-probs "
        "of greedy samples cannot be learned from"
      )

  @property
  def needs_reference(self) -> bool:
    """Whether the loss needs a reference policy."""
    return self.kl != "off"

  @property
  def recomputes_old(self) -> bool:
    """Whether the old log-probs are recomputed by the learner."""
    return self.old_logprobs == "recompute"

  @property
  def policy_loss(self) -> record.PolicyLoss:
    """The record of the policy loss."""
    return policy_losses.POLICY_LOSSES[self.kind]

  def evaluate(
    self,
    logprobs: types.Array,
    entropy: types.Array,
    batch: types.Batch,
    weights: types.Array,
    metric_weights: types.Array,
  ) -> Parts:
    """The loss and metrics of some rows of a batch.

    Args:
      logprobs: [B, R] float32, of the targets; differentiated.
      entropy: [B, R] float32 nats; differentiated if there is a bonus.
      batch: the rows.
      weights: [B, R], the rows' part of `losses.token_weights`.
      metric_weights: [B, R], the same with `token_mean`, for metrics.

    Returns:
      The parts; see `Parts`.
    """
    mask = batch.mask
    source = self.policy_loss
    per_token, stats = source.evaluate(
      logprobs, batch, self.settings or source.options()
    )
    means = {
      name: losses.aggregate(value, metric_weights)
      for name, value in stats.items()
      if name != "ratio"
    }
    trust = self._trust(batch)
    if trust is not None:
      per_token = per_token * trust
      means["importance_weight"] = losses.aggregate(trust, metric_weights)
    loss = losses.aggregate(per_token, weights)
    means |= {
      "pg_loss": loss,
      "entropy": losses.aggregate(entropy, metric_weights),
    }
    if self.needs_reference:
      kl = losses.kl_penalty(logprobs, batch.ref_logprobs, mask, kind=self.kl)
      loss += self.kl_coefficient * losses.aggregate(kl, weights)
      means["kl"] = losses.aggregate(kl, metric_weights)
    if self.entropy_coefficient:
      bonus = losses.aggregate(entropy, weights)
      loss -= self.entropy_coefficient * bonus
    mismatch = self._mismatch(logprobs, batch)
    total = jnp.sum(metric_weights)
    means["mismatch_mean"] = mismatch["mean_abs"] * total
    means["mismatch_kl"] = mismatch["kl"] * total
    return Parts(
      loss=loss,
      means={"loss": loss, **means},
      maxima={
        "ratio_max": jnp.max(jnp.where(mask > 0, stats["ratio"], 0.0)),
        "mismatch_max": mismatch["max_abs"],
      },
    )

  def evaluate_values(
    self, values: types.Array, batch: types.Batch, weights: types.Array
  ) -> tuple[types.Array, dict[str, types.Array]]:
    """The critic's loss on some rows of a batch.

    Args:
      values: [B, R] float32, differentiated.
      batch: those rows, with `old_values` and `value_targets`.
      weights: [B, R], the rows' part of weights that are equal for all targets
        of the batch and 0 elsewhere.

    Returns:
      The weighted loss, and means over the targets for logging.
    """
    per_token, stats = losses.value_loss(
      values,
      batch.old_values,
      batch.value_targets,
      weights,
      clip=self.value_clip,
    )
    loss = losses.aggregate(per_token, weights)
    means = {
      name: losses.aggregate(value, weights) for name, value in stats.items()
    }
    means |= {"value_loss": loss, "value": losses.aggregate(values, weights)}
    return self.value_coefficient * loss, means

  def _trust(self, batch: types.Batch) -> types.Array | None:
    """[B, R] constants that multiply the loss; None means 1 everywhere."""
    if not self.recomputes_old:
      return None
    pair = (batch.old_logprobs, batch.sampler_logprobs, batch.mask)
    trust = None
    if self.importance != "off":
      trust = importance.IMPORTANCE[self.importance](
        *pair,
        turn=batch.turn,
        low=self.importance_low,
        cap=self.importance_cap,
      )
    if self.rejection != "off":
      low, high = importance.REJECTIONS[self.rejection]
      kept = importance.accepted(
        *pair,
        turn=batch.turn,
        kind=self.rejection,
        low=self.rejection_low or low,
        high=self.rejection_high or high,
      )
      trust = kept if trust is None else trust * kept
    return trust

  def _mismatch(
    self, logprobs: types.Array, batch: types.Batch
  ) -> losses.Stats:
    """Statistics of sampler against trainer, for the policy that sampled."""
    trainer = batch.old_logprobs if self.recomputes_old else logprobs
    return losses.mismatch(
      jax.lax.stop_gradient(trainer), batch.sampler_logprobs, batch.mask
    )


@dataclasses.dataclass(frozen=True)
class LikelihoodObjective:
  """Supervised fine-tuning: the mean of -log p over the response tokens.

  Attributes:
    aggregation: one of `losses.AGGREGATIONS`.
    horizon: tokens, >= 1, for `seq_mean_token_sum_norm`.
  """

  aggregation: str = "token_mean"
  horizon: int | None = None
  temperature = 1.0
  entropy_coefficient = 0.0
  needs_reference = False
  recomputes_old = False

  def __post_init__(self) -> None:
    _check_choice("aggregation", self.aggregation, losses.AGGREGATIONS)

  def evaluate(
    self,
    logprobs: types.Array,
    entropy: types.Array,
    batch: types.Batch,
    weights: types.Array,
    metric_weights: types.Array,
  ) -> Parts:
    """As `PolicyObjective.evaluate`; advantages are ignored."""
    del batch
    loss = losses.aggregate(-logprobs, weights)
    means = {"loss": loss, "entropy": losses.aggregate(entropy, metric_weights)}
    return Parts(loss=loss, means=means, maxima={})

  def evaluate_values(
    self, values: types.Array, batch: types.Batch, weights: types.Array
  ) -> tuple[types.Array, dict[str, types.Array]]:
    """Not supported: demonstrations have no returns.

    Raises:
      NotImplementedError: always.
    """
    raise NotImplementedError("supervised fine-tuning does not train a critic")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
  """Raises an error unless a value is one of the choices."""
  if value not in choices:
    raise ValueError(f"{name}: found {value!r}, expected one of {choices}")
