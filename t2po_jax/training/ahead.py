"""Rollouts that run beside updates, on a schedule fixed by update numbers.

Version v of the policy is what update v left behind; version 0 is the policy
at the start. The rollout of update n is played by version n - 1 - k, with k
`rollout.ahead`, and by the oldest there is before that. With k = 0 nothing
overlaps: a rollout is played when it is asked for. With k > 0 one thread plays
rollout after rollout, each as soon as its version exists, while the learner
goes on: up to k of them are finished or under way before they are needed.

Which version plays what never depends on the clock. So two runs are equal to
the last bit however fast rollouts and updates are, and a killed run goes on as
if never killed: a checkpoint keeps the versions that rollouts still to come
are played by, and these are played again from their recorded randomness.
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
  """A policy that acts, with the thresholds that belong to it.

  Attributes:
    update: the update that left it; 0 at the start.
    params: what is trained, as the learner's state holds it.
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
    result: what the play function returned.
    version: the update that left the policy that played.
    seconds: how long it took.
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
    """Starts nothing yet.

    Args:
      play: (update, tasks taken before, version) -> what was played, and tasks
        taken after it. Runs in a thread of its own if `ahead` is above 0.
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
    """Those that rollouts still to be taken may need, oldest first."""
    return [self._versions[update] for update in sorted(self._versions)]

  def begin(
    self, update: int, cursor: int, versions: Sequence[Version]
  ) -> None:
    """Starts over after an update; rollouts under way are dropped.

    Args:
      update: the last one done.
      cursor: tasks that its rollouts have taken.
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
    """Tells that an update is done."""
    self._versions[version.update] = version
    # The next rollout to be taken is that of the update after this one.
    needed = self._player(version.update + 1)
    self._versions = {k: v for k, v in self._versions.items() if k >= needed}
    self._start_rollouts()

  def take(self, update: int) -> Played[T]:
    """The rollout of an update; every update takes its own, in order."""
    if self._thread is None:
      return self._run(update, self._versions[self._player(update)])
    return self._started.pop(update).result()

  def between(self, job: Callable[[], U]) -> U:
    """Runs something else on the rollouts' slots, between two of them."""
    return job() if self._thread is None else self._thread.submit(job).result()

  def wait(self) -> None:
    """Waits until nothing is under way."""
    futures.wait(self._started.values())

  def close(self) -> None:
    """Drops what is waiting, waits for what is under way."""
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
