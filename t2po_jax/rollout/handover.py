"""Episodes that two rollouts share: begun with one, finished with the next.

A rollout ends when the last of its own episodes does. So that the slots do not
idle meanwhile, the first groups of the next rollout are begun with it
(`rollout.oversample`), and what of them has not ended by then is handed on.
Groups are used in the order in which they were begun, whole, each in the
update that its number says: nothing is ever dropped or chosen for having ended
soon, so long episodes are learned from as often as short ones.

Between two rollouts an episode stands between two turns. It is written down as
the turns it has had (`Suspended`), plain values that go into a checkpoint. A
run that was killed plays them to a fresh environment again, response by
response, and goes on from there (`replay`).
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
import dataclasses
from typing import Any

from absl import logging
import numpy as np

from t2po_jax import types
from t2po_jax.envs import base
from t2po_jax.rollout import environments


@dataclasses.dataclass(frozen=True)
class Early:
  """Episodes of the next rollout that are begun with this one.

  Attributes:
    tasks: (task id, group, member) of each, numbered as in that rollout.
    seed: names that rollout.
  """

  tasks: Sequence[tuple[str, int, int]]
  seed: tuple[int, ...]


@dataclasses.dataclass
class Episode:
  """An episode under way.

  Attributes:
    task_id: the environment's task.
    group: index of its task group in the rollout that it belongs to.
    member: index inside the group.
    seat: its environment's place in the pool.
    due: decode calls until its environment's answer is taken.
    seed: names the rollout that it belongs to.
    version: of the parameters that it is played by.
    early: whether it belongs to the next rollout.
    observation: what it stands before; None before the first.
    memory: (observation, action) pairs so far.
    turns: the finished ones.
    prompt: of the turn under way.
    shortened: whether that prompt had to be cut.
    discarded: attempts at this turn that were thrown away.
    attempt: the response that the environment has been given; None if its
      answer has been taken.
    spoken_by: the version that gave that response.
    phi_change: of that response.
    signal: what the uncertainty signal carries.
    success: whether the task was solved.
    deltas: what calibrates epsilon, one array per response.
    phi_changes: what calibrates eta.
    result: the trajectory, once it has ended.
  """

  task_id: str
  group: int
  member: int
  seat: Any
  due: int
  seed: tuple[int, ...] = ()
  version: int = 0
  early: bool = False
  observation: base.Observation | None = None
  memory: list[tuple[str, str]] = dataclasses.field(default_factory=list)
  turns: list[types.Turn] = dataclasses.field(default_factory=list)
  prompt: np.ndarray | None = None
  shortened: bool = False
  discarded: list[types.Attempt] = dataclasses.field(default_factory=list)
  attempt: types.Attempt | None = None
  spoken_by: int = 0
  phi_change: float = float("nan")
  signal: np.ndarray | None = None
  success: bool = False
  deltas: list[np.ndarray] = dataclasses.field(default_factory=list)
  phi_changes: list[float] = dataclasses.field(default_factory=list)
  result: types.Trajectory | None = None


@dataclasses.dataclass(frozen=True)
class Handed:
  """An episode between two rollouts.

  Attributes:
    episode: it; no response of it is being sampled.
    answer: what its environment says to it; None if it has ended.
  """

  episode: Episode
  answer: futures.Future | None


@dataclasses.dataclass(frozen=True)
class Suspended:
  """An episode between two rollouts, as it is written down.

  Attributes:
    task_id: the environment's task.
    group: index of its task group in the rollout that it belongs to.
    member: index inside the group.
    seed: names that rollout.
    version: of the parameters that played it last.
    turns: the finished ones.
    attempt: the response whose answer has not been taken; None if none is.
    discarded: attempts at the turn under way that were thrown away.
    phi_change: of `attempt`.
    signal: what the uncertainty signal carries.
    deltas: what calibrates epsilon, of all responses.
    phi_changes: what calibrates eta.
    result: the trajectory, if it has ended.
  """

  task_id: str
  group: int
  member: int
  seed: tuple[int, ...]
  version: int
  turns: tuple[types.Turn, ...]
  attempt: types.Attempt | None
  discarded: tuple[types.Attempt, ...]
  phi_change: float
  signal: np.ndarray | None
  deltas: np.ndarray
  phi_changes: tuple[float, ...]
  result: types.Trajectory | None


def write_down(handed: Handed) -> Suspended:
  """An episode as it stands now; going on with it does not change that."""
  episode = handed.episode
  return Suspended(
    task_id=episode.task_id,
    group=episode.group,
    member=episode.member,
    seed=episode.seed,
    version=episode.version,
    turns=tuple(episode.turns),
    attempt=episode.attempt,
    discarded=tuple(episode.discarded),
    phi_change=episode.phi_change,
    signal=episode.signal,
    deltas=np.concatenate([*episode.deltas, np.zeros(0, np.float32)]),
    phi_changes=tuple(episode.phi_changes),
    result=episode.result,
  )


def replay(
  suspended: Sequence[Suspended], pool: environments.Pool
) -> tuple[Handed, ...]:
  """Episodes that were written down, to go on with in fresh environments.

  Args:
    suspended: what was written down.
    pool: the environments; those of different episodes answer side by side.

  Returns:
    The same episodes in this order. Where an environment fails, or answers
    otherwise than it did, the failure is the answer.
  """
  steps = [_play_again(one, pool) for one in suspended]
  handed: list[Handed | None] = [None] * len(steps)
  # One call of every episode at a time.
  while any(one is None for one in handed):
    for number, step in enumerate(steps):
      if handed[number] is None:
        handed[number] = next(step)
  return tuple(one for one in handed if one is not None)


def _play_again(
  one: Suspended, pool: environments.Pool
) -> Iterator[Handed | None]:
  """Yields None while an answer is awaited, then the episode."""
  episode = Episode(
    one.task_id,
    one.group,
    one.member,
    seat=None,
    due=0,
    seed=one.seed,
    version=one.version,
    early=True,
    memory=[(turn.anchor, turn.action) for turn in one.turns],
    turns=list(one.turns),
    discarded=list(one.discarded),
    attempt=one.attempt,
    spoken_by=one.version,
    phi_change=one.phi_change,
    signal=one.signal,
    deltas=[one.deltas],
    phi_changes=list(one.phi_changes),
    result=one.result,
  )
  if one.result is not None:
    yield Handed(episode, None)
    return
  episode.seat, answer = pool.start(one.task_id)
  responses = [turn.response.text for turn in one.turns]
  if one.attempt is not None:
    responses.append(one.attempt.text)
  for number, text in enumerate(responses):
    yield None
    try:
      episode.observation = _observation(answer.result())
      if number < len(one.turns):
        _require_same(one, number, episode.observation)
    except base.EnvError as error:
      logging.warning("episode %s: %s", one.task_id, error)
      answer = futures.Future()
      answer.set_exception(error)
      break
    answer = pool.step(episode.seat, text)
  else:
    if one.turns and one.attempt is None:
      yield None
      answer = _only_observation(answer)
  yield Handed(episode, answer)


def _observation(
  answer: base.Observation | base.StepResult,
) -> base.Observation:
  if isinstance(answer, base.StepResult):
    return answer.observation
  return answer


def _only_observation(answer: futures.Future) -> futures.Future:
  """What a turn that is recorded already leads to."""
  seen = futures.Future()
  try:
    seen.set_result(_observation(answer.result()))
  except base.EnvError as error:
    seen.set_exception(error)
  return seen


def _require_same(
  one: Suspended, number: int, replayed: base.Observation
) -> None:
  if replayed.text != one.turns[number].anchor:
    raise base.EnvError(
      f"played again, turn {number + 1} began differently than before"
    )


def drop(handed: Sequence[Handed], pool: environments.Pool) -> None:
  """Gives the seats of episodes back that nobody goes on with."""
  for one in handed:
    if one.answer is not None:
      futures.wait([one.answer])  # A seat is for one call at a time.
      pool.give_back(one.episode.seat)


# What `to_json` can hold besides plain values.
_RECORDS: Mapping[str, type] = {
  record.__name__: record
  for record in (Suspended, types.Trajectory, types.Turn, types.Attempt)
}


def to_json(value: Any) -> Any:
  """A record of the domain, or a sequence of them, as JSON can hold it."""
  if dataclasses.is_dataclass(value):
    fields = {
      field.name: to_json(getattr(value, field.name))
      for field in dataclasses.fields(value)
    }
    return {"record": type(value).__name__, "fields": fields}
  if isinstance(value, np.ndarray):
    data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
    return {"array": data, "dtype": value.dtype.str, "shape": value.shape}
  if isinstance(value, Mapping):
    return {"map": {name: to_json(part) for name, part in value.items()}}
  if isinstance(value, list | tuple):
    return [to_json(part) for part in value]
  return value.item() if isinstance(value, np.generic) else value


def from_json(value: Any) -> Any:
  """Undoes `to_json`; sequences become tuples."""
  if isinstance(value, list):
    return tuple(from_json(part) for part in value)
  if not isinstance(value, Mapping):
    return value
  if "map" in value:
    return {name: from_json(part) for name, part in value["map"].items()}
  if "array" in value:
    data = base64.b64decode(value["array"])
    flat = np.frombuffer(data, np.dtype(value["dtype"]))
    return flat.reshape(value["shape"]).copy()
  fields = {name: from_json(part) for name, part in value["fields"].items()}
  return _RECORDS[value["record"]](**fields)
