"""Rollouts that overlap with updates, on a schedule fixed by update numbers.

Version v of the policy is the result of update v; version 0 is the initial
policy. The rollout of update n is played by version n - 1 - k, with k
`rollout.ahead`, or by the oldest version before that. With k = 0 nothing
overlaps: a rollout is played when it is requested. With k > 0 a thread plays
rollout after rollout, each as soon as its version exists, while the learner
continues: up to k of them are finished or in progress before they are needed.

Which version plays which rollout never depends on the clock. So two runs are
bit-identical however fast rollouts and updates are, and a killed run resumes as
if never killed: a checkpoint keeps the versions needed by pending rollouts,
which are replayed with the same random keys.
"""

from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import time
from typing import Generic, TypeVar

from t2po_jax import types

T = TypeVar("T")
U = TypeVar("U")


@dataclasses.dataclass(frozen=True)
class Version:
  """A version of the policy, with its thresholds.

  Attributes:
    update: the update that produced it; 0 at the start.
    params: the trained parameters, as in the learner's state.
    epsilon: threshold of the thinking intervention.
    eta: threshold of turn-level resampling.
  """

  update: int
  params: types.Params
  epsilon: float
  eta: float


@dataclasses.dataclass(frozen=True)
class Played(Generic[T]):
  """One rollout.

  Attributes:
    result: the return value of the play function.
    version: the version of the policy that played it.
    seconds: its duration.
  """

  result: T
  version: int
  seconds: float


class Rollouts(Generic[T]):
  """Plays the rollouts of a run, up to `ahead` of them in advance."""

  def __init__(
    self,
    play: Callable[[int, int, Version], tuple[T, int]],
    *,
    ahead: int,
    last: int,
  ):
    """Creates the schedule without starting any rollout.

    Args:
      play: (update, tasks taken before, version) -> the rollout, and the tasks
        taken after it. Runs in a separate thread if `ahead` is above 0.
      ahead: k, the most updates that a version lags behind.
      last: number of the last update.
    """
    self._play, self._ahead, self._last = play, ahead, last
    self._thread = futures.ThreadPoolExecutor(1, "rollout") if ahead else None
    self._started: dict[int, futures.Future[Played[T]]] = {}
    self._versions: dict[int, Version] = {}
    self._oldest = self._next = self._cursor = 0

  @property
  def versions(self) -> list[Version]:
    """The versions that pending rollouts may need, oldest first."""
    return [self._versions[update] for update in sorted(self._versions)]

  def begin(
    self, update: int, cursor: int, versions: Sequence[Version]
  ) -> None:
    """Restarts after an update; rollouts in progress are dropped.

    Args:
      update: the last finished update.
      cursor: tasks taken by its rollouts.
      versions: oldest first; the last is the current one.
    """
    for future in self._started.values():
      future.cancel()
    self.wait()
    self._started = {}
    self._cursor, self._next = cursor, update + 1
    self._versions = {version.update: version for version in versions}
    self._oldest = versions[0].update
    self._start_rollouts()

  def publish(self, version: Version) -> None:
    """Publishes the version of a finished update."""
    self._versions[version.update] = version
    # The next rollout to be taken is that of the following update.
    needed = self._player(version.update + 1)
    self._versions = {k: v for k, v in self._versions.items() if k >= needed}
    self._start_rollouts()

  def take(self, update: int) -> Played[T]:
    """Returns the rollout of an update; they must be taken in order."""
    if self._thread is None:
      return self._run(update, self._versions[self._player(update)])
    return self._started.pop(update).result()

  def between(self, job: Callable[[], U]) -> U:
    """Runs another function on the rollouts' slots, between two rollouts."""
    return job() if self._thread is None else self._thread.submit(job).result()

  def wait(self) -> None:
    """Waits for all rollouts in progress."""
    futures.wait(self._started.values())

  def close(self) -> None:
    """Cancels waiting rollouts and waits for the one in progress."""
    if self._thread is not None:
      self._thread.shutdown(cancel_futures=True)

  def _player(self, update: int) -> int:
    """The version that plays the rollout of an update."""
    return max(update - 1 - self._ahead, self._oldest)

  def _start_rollouts(self) -> None:
    """Queues every rollout whose version exists."""
    while (
      self._thread is not None
      and self._next <= self._last
      and self._player(self._next) in self._versions
    ):
      version = self._versions[self._player(self._next)]
      self._started[self._next] = self._thread.submit(
        self._run, self._next, version
      )
      self._next += 1

  def _run(self, update: int, version: Version) -> Played[T]:
    start = time.perf_counter()
    result, self._cursor = self._play(update, self._cursor, version)
    return Played(result, version.update, time.perf_counter() - start)
