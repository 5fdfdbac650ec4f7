"""The policies of a run that play, and what one rollout leaves to the next.

A version is played as the sampler wants it: copied, if updates go on meanwhile
and would overwrite it, and moved, if other devices do the sampling. Episodes
that a rollout has begun for the next one stay here with their environments.
What they are is also written down in the position that the loop keeps. Where a
position comes from a checkpoint, or is not the one that the last rollout left,
its episodes are played again from what is written.
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

# An update's episodes, and the sampler's counters of what they took.
Played = tuple[experience.Experience, collections.Counter[str]]


class Players:
  """Plays the rollouts of one run."""

  def __init__(
    self,
    config: settings.Config,
    learner: learners.Learner,
    actor: actors.Actor,
  ) -> None:
    """Has no policy yet.

    Args:
      config: the run's configuration.
      learner: what the policies come from.
      actor: what plays them.
    """
    rollout = config.rollout
    self._config, self._learner, self._actor = config, learner, actor
    # Whether episodes keep the policy that began them in the next rollout.
    self.mixed = rollout.oversample > 0 and not rollout.refresh
    # Whether versions outlive the state that they are of.
    self.lasting = rollout.ahead > 0 or self.mixed
    # Where programs of several devices meet, only the thread of the updates
    # may run those on its devices: else two could wait for each other.
    self._moved = rollout.ahead > 0 and (
      config.mesh.rollout_devices > 0 or processes.count() > 1
    )
    self._handed: tuple[handover.Handed, ...] = ()
    self._position: experience.Position | None = None
    self._begun_by: dict[int, ahead.Version] = {}

  def load(self, params: types.Params) -> None:
    """Gives the sampler parameters, as a state holds them."""
    self._actor.sampler.load(self._learner.policy_params(params))

  def version(
    self, update: int, state: types.TrainState, thresholds: Mapping[str, float]
  ) -> ahead.Version:
    """The policy that an update left, to play with."""
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
      recorded: what `record` returned, oldest first.
      params: of each.
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
      position: where the rollout before has left off.
      version: the policy.

    Returns:
      What was played, and where this rollout leaves off.
    """
    before = self._actor.scheduler.counters.copy()
    self._use(version)
    older = self._older(position, version)
    for one in older:
      self._use(one, keep=[version.update])
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
    self._begun_by = {version.update: version}
    return (gathered, work), self._position

  def drop(self) -> None:
    """Gives up the episodes that were begun for a next rollout."""
    handover.drop(self._handed, self._actor.pool)
    self._handed, self._position = (), None

  def _move(self, version: ahead.Version) -> ahead.Version:
    """Brings a version to where it will be played, if need be."""
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
    """The policies but `version` that go on with episodes of a position."""
    if not self.mixed:
      return []
    started = {one.version for one in position.suspended if one.result is None}
    return [self._begun_by[number] for number in started - {version.update}]

  def _resume(
    self, position: experience.Position
  ) -> tuple[handover.Handed, ...]:
    """The episodes of a position, to go on with."""
    if position is self._position:
      handed, self._handed = self._handed, ()
      return handed
    self.drop()
    return handover.replay(position.suspended, self._actor.pool)


def record(version: ahead.Version) -> dict[str, Any]:
  """What a checkpoint notes of a version beside its parameters."""
  return {
    "update": version.update,
    "epsilon": version.epsilon,
    "eta": version.eta,
  }
