"""Episodes that rollouts share: started in one, finished in a later one.

A rollout ends when the last of its own episodes ends. To keep the slots busy
until then, the first groups of the next rollouts are started with it
(`rollout.oversample`), and those of their episodes that have not ended are
handed over. Groups are used in the order in which they were started, complete,
each in the update of its number: nothing is ever dropped, or chosen because it
ended early, so long episodes are trained on as often as short ones.

Between two rollouts an episode is between two turns. It is recorded as its
past turns (`Suspended`), plain values that go into a checkpoint. A killed run
replays them to a fresh environment, response by response, and continues from
there (`replay`).
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
  """Episodes of one later rollout that are started with this one.

  Attributes:
    tasks: (task id, group, member) of each, numbered as in that rollout.
    seed: identifies that rollout.
  """

  tasks: Sequence[tuple[str, int, int]]
  seed: tuple[int, ...]


@dataclasses.dataclass
class Episode:
  """An episode in progress.

  Attributes:
    task_id: the environment's task.
    group: index of its task group in the rollout that it belongs to.
    member: index inside the group.
    seat: its environment's place in the pool.
    due: decode calls until its environment's answer is taken.
    seed: identifies the rollout that it belongs to.
    version: the version of the parameters that plays it.
    early: how many rollouts after this one it belongs to; 0 = to this one.
    observation: the current observation; None before the first.
    memory: (observation, action) pairs so far.
    turns: the finished turns.
    prompt: the prompt of the current turn.
    shortened: whether that prompt had to be truncated.
    discarded: discarded attempts at this turn.
    attempt: the response that was sent to the environment; None if its answer
      has been taken.
    spoken_by: the version that sampled that response.
    phi_change: |dPhi| of that response.
    signal: the state of the uncertainty signal.
    success: whether the task was solved.
    deltas: values that calibrate epsilon, one array per response.
    phi_changes: values that calibrate eta.
    result: the trajectory, once it has ended.
  """

  task_id: str
  group: int
  member: int
  seat: Any
  due: int
  seed: tuple[int, ...] = ()
  version: int = 0
  early: int = 0
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
    episode: the episode; no response of it is being sampled.
    answer: its environment's pending answer; None if it has ended.
  """

  episode: Episode
  answer: futures.Future | None


@dataclasses.dataclass(frozen=True)
class Suspended:
  """The record of an episode between two rollouts.

  Attributes:
    task_id: the environment's task.
    group: index of its task group in the rollout that it belongs to.
    member: index inside the group.
    seed: identifies that rollout.
    version: the version of the parameters that played it last.
    turns: the finished turns.
    attempt: the response whose answer has not been taken; None if there is
      none.
    discarded: discarded attempts at the current turn.
    phi_change: |dPhi| of `attempt`.
    signal: the state of the uncertainty signal.
    deltas: values that calibrate epsilon, of all responses.
    phi_changes: values that calibrate eta.
    result: the trajectory, if it has ended.
    early: how many rollouts after the one before it belongs to, at least 1.
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
  early: int = 1


def write_down(handed: Handed) -> Suspended:
  """Records an episode; continuing it does not change the record."""
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
    early=episode.early,
  )


def replay(
  suspended: Sequence[Suspended], pool: environments.Pool
) -> tuple[Handed, ...]:
  """Replays recorded episodes in fresh environments, to continue them.

  Args:
    suspended: the records.
    pool: the environments; those of different episodes answer concurrently.

  Returns:
    The same episodes in the same order. If an environment fails, or answers
    differently than before, the failure is its answer.
  """
  steps = [_play_again(one, pool) for one in suspended]
  handed: list[Handed | None] = [None] * len(steps)
  # Every episode has at most one call in progress.
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
    early=one.early,
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
  """Only the observation of an answer whose turn is already recorded."""
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
  """Frees the seats of episodes that will not be continued."""
  for one in handed:
    if one.answer is not None:
      futures.wait([one.answer])  # A seat is for one call at a time.
      pool.give_back(one.episode.seat)


# The types that `to_json` accepts besides plain values.
_RECORDS: Mapping[str, type] = {
  record.__name__: record
  for record in (Suspended, types.Trajectory, types.Turn, types.Attempt)
}


def to_json(value: Any) -> Any:
  """A record of the domain, or a sequence of them, as JSON values."""
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
