"""The policy update: from episodes to optimizer steps.

The rows of an update are packed once. The network outputs that the estimator
needs (the critic's values, log-probs of the reference policy for a KL penalty
in the reward) are computed on these rows and split into turns; the advantages
are arranged on the same rows, and the learner steps on them.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from t2po_jax import types
from t2po_jax.configs import base as settings
from t2po_jax.distributed import sharding
from t2po_jax.learning import (
  batching,
  collapse_guard,
  kl_control,
  losses,
)
from t2po_jax.learning import learner as learners
from t2po_jax.learning.estimators import episodes
from t2po_jax.setup import build
from t2po_jax.training import experience, metrics


class Improver:
  """The update of one run.

  Attributes:
    kl: controls the coefficient of the KL penalty in the reward.
    rate: reduces the learning rate when updates move the policy too far.
    caution: how cautiously steps are taken, after rollbacks.
    good: parameters of the policy that a cautious run stays close to; None
      before a rollback.
    estimate: the advantages of the last update; None if it made no step.
  """

  def __init__(
    self,
    config: settings.Config,
    learner: learners.Learner,
    reference: types.Params | None,
  ) -> None:
    """Binds the parts.

    Args:
      config: the run's configuration.
      learner: compiled updates.
      reference: parameters of the reference policy, from `place_params`; None
        if it is not needed.
    """
    self._config = config
    self._learner = learner
    self._reference = reference
    self.kl = build.kl_controller(config)
    self.rate = build.rate_controller(config)
    self.caution = collapse_guard.Caution()
    self.good: types.Params | None = None
    self.estimate: episodes.Advantages | None = None

  def improve(
    self,
    state: types.TrainState,
    gathered: experience.Experience,
    *,
    update: int,
  ) -> tuple[types.TrainState, dict[str, float]]:
    """One update.

    Args:
      state: donated.
      gathered: the episodes.
      update: number of the update; seeds the mini-batches.

    Returns:
      The new state and scalars to log.
    """
    config, self.estimate = self._config, None
    packed = self._pack(gathered.trajectories, update)
    if not packed.batches:
      return state, {"pack/segments": 0.0}
    turns = [turn for t in gathered.trajectories for turn in t.turns]
    data = episodes.episodes(gathered.trajectories)
    data = dataclasses.replace(data, baselines=gathered.baselines)
    batches, scalars = packed.batches, {}
    if config.reward.kl != "off":
      batches, data, scalars = self._charge_kl(batches, turns, data)
    if self.caution.kl and self.good is not None:
      data, distance = self._charge_distance(batches, turns, data)
      scalars |= distance
    values = None
    if "values" in build.estimator(config).needs:
      values = self._values(state, batches, turns)
      data = dataclasses.replace(data, values=_by_trajectory(values, data))
    every = config.log.gradient_noise
    estimate = build.estimate(config, data)
    self.estimate = estimate
    negative = -config.control.resampling.negative
    batches = [
      _fill(batch, turns, estimate, values, negative) for batch in batches
    ]
    state, learned = self._learner.update(
      state,
      batches,
      epochs=self.caution.steps(config.train.epochs),
      # A KL penalty in the reward has already filled in the log-probs.
      ref_params=None if config.reward.kl != "off" else self._reference,
      lr_scale=self.caution.lr_scale * self.rate.scale,
      agreement=bool(every) and update % every == 0,
    )
    learned = metrics.to_floats(learned)
    if config.optimizer.target_kl:
      moved = self._kl_of_update(state, batches, learned)
      scalars["learn/kl_update"] = moved
      self.rate.advance(moved)
    scalars |= {f"learn/{name}": value for name, value in learned.items()}
    scalars |= {f"pack/{name}": value for name, value in packed.stats.items()}
    return state, scalars | estimate.metrics

  def _pack(
    self, trajectories: Sequence[types.Trajectory], update: int
  ) -> batching.Packed:
    config = self._config
    segments = batching.trajectory_segments(
      trajectories,
      max_length=config.train.row_tokens,
      drop_void=config.reward.drop_void,
      drop_overlong=config.reward.drop_overlong,
      discarded=-config.control.resampling.negative,
    )
    return batching.pack_close(
      segments,
      longest=config.train.row_tokens,
      rows=config.train.micro_rows,
      minibatches=self.caution.steps(config.train.mini_batches),
      by_row=self._learner.skips_rows,
      seed=(config.seed, update),
    )

  def _charge_kl(
    self,
    batches: Sequence[types.Batch],
    turns: Sequence[types.Turn],
    data: episodes.Episodes,
  ) -> tuple[list[types.Batch], episodes.Episodes, dict[str, float]]:
    """Subtracts beta KL(policy || reference) from the reward of every turn."""
    batches, sums = self._kl_sums(
      batches, turns, self._reference, kind=self._config.reward.kl
    )
    beta = self.kl.coefficient
    data = _charged(data, sums, beta)
    mean, count = kl_control.measure(
      sums,
      _sampled_tokens(batches, len(turns)),
      mean=self._config.reward.kl_mean,
      trajectories=len(data.rewards),
    )
    self.kl.advance(mean, count)
    scalars = {"reward/kl": mean, "reward/kl_coefficient": beta}
    return batches, data, scalars

  def _charge_distance(
    self,
    batches: Sequence[types.Batch],
    turns: Sequence[types.Turn],
    data: episodes.Episodes,
  ) -> tuple[episodes.Episodes, dict[str, float]]:
    """Charges a cautious run for its KL to the good policy."""
    _, sums = self._kl_sums(batches, turns, self.good, kind="k1")
    mean = sum(sums) / max(sum(_sampled_tokens(batches, len(turns))), 1.0)
    scalars = {"guard/kl": mean, "guard/kl_coefficient": self.caution.kl}
    return _charged(data, sums, self.caution.kl), scalars

  def _kl_of_update(
    self,
    state: types.TrainState,
    batches: Sequence[types.Batch],
    learned: Mapping[str, float],
  ) -> float:
    """How far an update moved the policy: nats per token (k3).

    Several steps have measured it, each before it was taken. For a single one,
    before which it is 0, the tokens are scored once more.
    """
    if learned["steps"] > 1:
      return learned["kl_old"]
    logprobs = self._logprobs(state.params, batches)
    total = sum(float(np.sum(kl)) for kl in _kls(batches, logprobs, kind="k3"))
    return total / max(sum(float(np.sum(batch.mask)) for batch in batches), 1.0)

  def _kl_sums(
    self,
    batches: Sequence[types.Batch],
    turns: Sequence[types.Turn],
    reference: types.Params,
    *,
    kind: str,
  ) -> tuple[list[types.Batch], list[float]]:
    """Adds a policy's log-probs to the batches; also the KL to it per turn."""
    logprobs = self._logprobs(reference, batches)
    sums = [
      float(np.sum(kl))
      for kl in batching.to_turns(
        batches, _kls(batches, logprobs, kind=kind), turns=len(turns)
      )
    ]
    batches = [
      batch.replace(ref_logprobs=scored)
      for batch, scored in zip(batches, logprobs, strict=True)
    ]
    return batches, sums

  def _logprobs(
    self, params: types.Params, batches: Sequence[types.Batch]
  ) -> list[np.ndarray]:
    """A policy's log-probs of the tokens, [rows, length] of every batch."""
    return [
      sharding.gather(self._learner.logprobs(params, batch))
      for batch in batches
    ]

  def _values(
    self,
    state: types.TrainState,
    batches: Sequence[types.Batch],
    turns: Sequence[types.Turn],
  ) -> list[np.ndarray]:
    """The critic's values per turn; 0 for turns that are not trained on."""
    values = [
      sharding.gather(self._learner.values(state, batch)) for batch in batches
    ]
    by_turn = batching.to_turns(batches, values, turns=len(turns))
    return [
      value if len(value) else np.zeros(len(turn.response.tokens))
      for value, turn in zip(by_turn, turns, strict=True)
    ]


def _kls(
  batches: Sequence[types.Batch], logprobs: Sequence[np.ndarray], *, kind: str
) -> list[np.ndarray]:
  """KL of the sampled policy to a scored one per token; 0 outside the mask."""
  return [
    np.asarray(
      losses.kl_penalty(batch.sampler_logprobs, scored, batch.mask, kind=kind)
    )
    for batch, scored in zip(batches, logprobs, strict=True)
  ]


def _sampled_tokens(batches: Sequence[types.Batch], turns: int) -> list[float]:
  """Sampled tokens of every turn; those of discarded attempts do not count."""
  masks = [np.asarray(batch.mask) for batch in batches]
  by_turn = batching.to_turns(batches, masks, turns=turns)
  return [float(np.sum(mask)) for mask in by_turn]


def _charged(
  data: episodes.Episodes, sums: Sequence[float], beta: float
) -> episodes.Episodes:
  """Subtracts beta times a sum per turn from the episodes' rewards."""
  rewards, start = [], 0
  for reward in data.rewards:
    charge = np.array(sums[start : start + len(reward)])
    rewards.append(reward - beta * charge)
    start += len(reward)
  return dataclasses.replace(data, rewards=tuple(rewards))


def turn_advantages(estimate: episodes.Advantages) -> list[list[float]]:
  """One advantage per turn of each trajectory; token means for `gae`."""
  if estimate.tokens is None:
    return [turns.tolist() for turns in estimate.turns]
  return [
    [float(np.mean(turn)) if len(turn) else 0.0 for turn in turns]
    for turns in estimate.tokens
  ]


def _by_trajectory(
  values: Sequence[Any], data: episodes.Episodes
) -> tuple[tuple[Any, ...], ...]:
  """Groups values per turn of the rollout by trajectory."""
  nested, start = [], 0
  for reward in data.rewards:
    nested.append(tuple(values[start : start + len(reward)]))
    start += len(reward)
  return tuple(nested)


def _fill(
  batch: types.Batch,
  turns: Sequence[types.Turn],
  estimate: episodes.Advantages,
  values: list[np.ndarray] | None,
  discarded: float = 0.0,
) -> types.Batch:
  """Arranges advantages, and with a critic its old values and targets.

  Args:
    batch: packed rows.
    turns: of the rollout.
    estimate: their advantages.
    values: of a critic, before.
    discarded: advantage of the discarded attempts, numbered after the turns.
  """
  if estimate.tokens is not None:
    tokens = [turn for of_turns in estimate.tokens for turn in of_turns]
  else:
    per_turn = np.concatenate([np.zeros(0), *estimate.turns])
    tokens = [
      np.full(len(turn.response.tokens), number)
      for turn, number in zip(turns, per_turn, strict=True)
    ]
  if discarded:
    tokens += [
      np.full(len(attempt.tokens), discarded)
      for turn in turns
      for attempt in turn.discarded
    ]
  batch = batch.replace(advantages=batching.from_turns(batch, tokens))
  if values is None or estimate.targets is None:
    return batch
  targets = [turn for of_turns in estimate.targets for turn in of_turns]
  return batch.replace(
    old_values=batching.from_turns(batch, values),
    value_targets=batching.from_turns(batch, targets),
  )
