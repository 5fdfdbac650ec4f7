"""The policies that play rollouts, and what one rollout leaves to the next.

A version is given to the sampler in the form that it needs: copied, if updates
continue meanwhile and would overwrite it, and moved, if other devices sample.
Episodes that a rollout has started for the next one stay here with their
environments; the position that the loop keeps contains their records. If a
position comes from a checkpoint, or is not the one that the last rollout left,
its episodes are replayed from these records.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from t2po_jax import types
from t2po_jax.configs import base as settings
from t2po_jax.distributed import processes
from t2po_jax.learning import learner as learners
from t2po_jax.rollout import actor as actors
from t2po_jax.rollout import handover
from t2po_jax.training import ahead, experience

# An update's episodes, and the sampler's counters for them.
Played = tuple[experience.Experience, collections.Counter[str]]


class Players:
  """Plays the rollouts of one run."""

  def __init__(
    self,
    config: settings.Config,
    learner: learners.Learner,
    actor: actors.Actor,
  ) -> None:
    """Starts without a policy.

    Args:
      config: the run's configuration.
      learner: updates the policies.
      actor: plays them.
    """
    rollout = config.rollout
    self._config, self._learner, self._actor = config, learner, actor
    # For how many rollouts episodes keep the policy that started them.
    self.carry = 0 if rollout.refresh else rollout.updates_early
    # Whether versions outlive the state that they come from.
    self.lasting = rollout.ahead > 0 or self.carry > 0
    # Of programs that span several devices, only the updates' thread may run
    # those on its devices; otherwise two could deadlock.
    self._moved = rollout.ahead > 0 and (
      config.mesh.rollout_devices > 0 or processes.count() > 1
    )
    self._handed: tuple[handover.Handed, ...] = ()
    self._position: experience.Position | None = None
    self._begun_by: dict[int, ahead.Version] = {}

  def load(self, params: types.Params) -> None:
    """Gives the sampler the parameters of a state."""
    self._actor.sampler.load(self._learner.policy_params(params))

  def version(
    self, update: int, state: types.TrainState, thresholds: Mapping[str, float]
  ) -> ahead.Version:
    """The policy that resulted from an update, for playing."""
    params = state.params
    if self.lasting:
      params = self._learner.snapshot(state)
    return self._move(ahead.Version(update, params, **thresholds))

  def restore(
    self,
    recorded: Sequence[Mapping[str, Any]],
    params: Sequence[types.Params],
  ) -> list[ahead.Version]:
    """Earlier versions, from a checkpoint.

    Args:
      recorded: what `record` returned for each, oldest first.
      params: the parameters of each.
    """
    versions = [
      self._move(ahead.Version(params=of_version, **record))
      for record, of_version in zip(recorded, params, strict=True)
    ]
    self._begun_by = {version.update: version for version in versions}
    return versions

  def play(
    self, update: int, position: experience.Position, version: ahead.Version
  ) -> tuple[Played, experience.Position]:
    """Plays an update's tasks.

    Args:
      update: its number.
      position: the position after the previous rollout.
      version: the policy.

    Returns:
      The rollout, and the position after it.
    """
    before = self._actor.scheduler.counters.copy()
    self._use(version)
    older = self._older(position, version)
    loaded = [version.update]
    for one in older:
      self._use(one, keep=loaded)
      loaded.append(one.update)
    gathered = experience.gather(
      self._config,
      self._actor,
      update=update,
      cursor=position.cursor,
      epsilon=version.epsilon,
      eta=version.eta,
      version=version.update,
      carried=experience.Carried(
        self._resume(position),
        {one.update: (one.epsilon, one.eta) for one in older},
      ),
    )
    work = self._actor.scheduler.counters - before
    self._handed = gathered.handed_on
    self._position = experience.Position(gathered.cursor, gathered.suspended)
    under_way = _versions(gathered.suspended)
    playing = {one.update: one for one in (version, *older)}
    self._begun_by = {n: one for n, one in playing.items() if n in under_way}
    return (gathered, work), self._position

  def drop(self) -> None:
    """Drops the episodes that were started for a next rollout."""
    handover.drop(self._handed, self._actor.pool)
    self._handed, self._position = (), None

  def _move(self, version: ahead.Version) -> ahead.Version:
    """Moves a version to the devices that will play it, if necessary."""
    if not self._moved:
      return version
    params = self._learner.policy_params(version.params)
    prepared = self._actor.sampler.weights.prepare(params)
    return dataclasses.replace(version, prepared=prepared)

  def _use(self, version: ahead.Version, *, keep: Sequence[int] = ()) -> None:
    """Gives the sampler a policy to play with."""
    weights, number = self._actor.sampler.weights, version.update
    if version.prepared is not None:
      weights.take(version.prepared, version=number, keep=keep)
      return
    params = self._learner.policy_params(version.params)
    weights.load(params, version=number, keep=keep)

  def _older(
    self, position: experience.Position, version: ahead.Version
  ) -> list[ahead.Version]:
    """The policies other than `version` that continue a position's episodes."""
    if not self.carry:
      return []
    older = _versions(position.suspended) - {version.update}
    return [self._begun_by[number] for number in sorted(older)]

  def _resume(
    self, position: experience.Position
  ) -> tuple[handover.Handed, ...]:
    """The episodes of a position, ready to be continued."""
    if position is self._position:
      handed, self._handed = self._handed, ()
      return handed
    self.drop()
    return handover.replay(position.suspended, self._actor.pool)


def _versions(suspended: Sequence[handover.Suspended]) -> set[int]:
  """The policies that started the episodes that have not ended."""
  return {one.version for one in suspended if one.result is None}


def record(version: ahead.Version) -> dict[str, Any]:
  """What a checkpoint stores of a version besides its parameters."""
  return {
    "update": version.update,
    "epsilon": version.epsilon,
    "eta": version.eta,
  }
