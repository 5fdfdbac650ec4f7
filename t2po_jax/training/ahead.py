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
from t2po_jax.distributed import processes

T = TypeVar("T")
P = TypeVar("P")
U = TypeVar("U")


@dataclasses.dataclass(frozen=True)
class Version:
  """A version of the policy, with its thresholds.

  Attributes:
    update: the update that produced it; 0 at the start.
    params: the trained parameters, as in the learner's state.
    epsilon: threshold of the thinking intervention.
    eta: threshold of turn-level resampling.
    prepared: the same parameters as the sampler takes them; None if it makes
      them when it needs them.
  """

  update: int
  params: types.Params
  epsilon: float
  eta: float
  prepared: types.Params | None = None


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


class Rollouts(Generic[T, P]):
  """Plays the rollouts of a run, up to `ahead` of them in advance."""

  def __init__(
    self,
    play: Callable[[int, P, Version], tuple[T, P]],
    *,
    ahead: int,
    last: int,
    carry: int = 0,
  ) -> None:
    """Creates the schedule without starting any rollout.

    Args:
      play: (update, position before, version) -> what was played, and the
        position after it, such as the number of tasks taken. Runs in a thread
        of its own if `ahead` is above 0.
      ahead: k, the most updates that a version lags behind.
      last: number of the last update.
      carry: how many rollouts later a version may still be needed, for
        episodes that it has begun.
    """
    self._play, self._ahead, self._last = play, ahead, last
    self._carry = carry
    self._position: P | None = None
    self._thread = None
    if ahead:
      self._thread = futures.ThreadPoolExecutor(
        1, "rollout", initializer=processes.stand_aside
      )
    self._started: dict[int, futures.Future[Played[T]]] = {}
    self._versions: dict[int, Version] = {}
    self._oldest = self._next = 0

  @property
  def versions(self) -> list[Version]:
    """The versions that pending rollouts may need, oldest first."""
    return [self._versions[update] for update in sorted(self._versions)]

  def begin(
    self, update: int, position: P, versions: Sequence[Version]
  ) -> None:
    """Restarts after an update; rollouts in progress are dropped.

    Args:
      update: the last finished update.
      position: after its rollout.
      versions: oldest first; the last is the current one.
    """
    for future in self._started.values():
      future.cancel()
    self.wait()
    self._started = {}
    self._position, self._next = position, update + 1
    self._versions = {version.update: version for version in versions}
    self._oldest = versions[0].update
    self._start_rollouts()

  def publish(self, version: Version) -> None:
    """Publishes the version of a finished update."""
    self._versions[version.update] = version
    # The next rollout to be taken is that of the following update.
    needed = self._player(version.update + 1 - self._carry)
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
    assert self._position is not None
    result, self._position = self._play(update, self._position, version)
    return Played(result, version.update, time.perf_counter() - start)
