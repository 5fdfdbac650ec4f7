"""Steps many environments concurrently while the device keeps decoding.

Every call returns a future. Environments that answer in microseconds are called
synchronously: the rollout, and everything after it, is then bit-identical in
every run. Environments that wait for a server run in threads, engines that may
crash in processes (`workers`); the order of their answers may change which
prompts share a device call, and thereby the rounding of the results, unless
`rollout.one_size` or `rollout.env_calls` is set (see docs/overlap.md). If the
infrastructure fails or times out, the future raises `EnvError`.
"""

import collections
from collections.abc import Callable, Sequence
from concurrent import futures
import threading
from typing import Any, Protocol

from t2po_jax.envs import base


class Pool(Protocol):
  """A pool of concurrent environments.

  A seat is one environment; to the caller it is an opaque handle.
  """

  def prepare(self, task_ids: Sequence[str]) -> None:
    """Resets environments in advance, if that saves time."""

  def start(self, task_id: str) -> tuple[Any, futures.Future]:
    """A seat for one episode, and the future of its first `Observation`."""
    ...

  def step(self, seat: Any, response: str) -> futures.Future:
    """Executes a response; resolves to a `StepResult`."""
    ...

  def give_back(self, seat: Any) -> None:
    """Makes a seat free for the next episode."""

  def close(self) -> None:
    """Closes all environments."""


class Seat:
  """One environment of the pool; plays one episode after another.

  A call that times out is abandoned: the seat gets a new environment, and the
  stuck one is left behind with its thread.
  """

  def __init__(self, make: Callable[[], base.Env], timeout: float) -> None:
    self._make = make
    self._timeout = timeout
    self._env: base.Env | None = None

  def call(
    self, method: str, argument: str
  ) -> base.Observation | base.StepResult:
    """Calls `reset` or `step` in the calling thread, within the time limit."""
    if self._env is None:
      self._env = self._make()
    env, answer = self._env, futures.Future()

    def run() -> None:
      try:
        answer.set_result(getattr(env, method)(argument))
      # Passed on between threads; must not get lost.
      except BaseException as error:
        answer.set_exception(error)

    if self._timeout:
      threading.Thread(target=run, daemon=True).start()
    else:
      run()
    try:
      return answer.result(self._timeout or None)
    except futures.TimeoutError:
      self._env = None
      raise base.EnvError(
        f"{method} took longer than {self._timeout} s"
      ) from None
    except base.EnvError:
      self._env = None
      raise

  def close(self) -> None:
    """Closes the environment, if one was made."""
    if self._env is not None:
      self._env.close()
      self._env = None


class _OnTheSpot(futures.Executor):
  """Runs a call synchronously on submission."""

  def submit(
    self, function: Callable[..., Any], /, *args: Any
  ) -> futures.Future:
    future = futures.Future()
    try:
      future.set_result(function(*args))
    except Exception as error:
      future.set_exception(error)
    return future


class EnvironmentPool:
  """Environments in threads or called synchronously; implements `Pool`.

  Args:
    make: builds one environment.
    threads: the most concurrent calls; 0: synchronous calls.
    timeout: seconds until a call is abandoned; 0: no limit, which saves a
      thread per call.
  """

  def __init__(
    self, make: Callable[[], base.Env], *, threads: int, timeout: float = 0.0
  ) -> None:
    self._make = make
    self._timeout = timeout
    self._executor = (
      futures.ThreadPoolExecutor(threads, "environment")
      if threads
      else _OnTheSpot()
    )
    self._free: collections.deque[Seat] = collections.deque()

  def prepare(self, task_ids: Sequence[str]) -> None:
    """Does nothing: these environments need no preparation."""

  def start(self, task_id: str) -> tuple[Seat, futures.Future]:
    """A seat for one episode, and the future of its first `Observation`."""
    seat = Seat(self._make, self._timeout)
    if self._free:
      seat = self._free.popleft()
    return seat, self._executor.submit(seat.call, "reset", task_id)

  def give_back(self, seat: Seat) -> None:
    """Makes a seat free for the next episode."""
    self._free.append(seat)

  def step(self, seat: Seat, response: str) -> futures.Future:
    """Executes a response; resolves to a `StepResult`."""
    return self._executor.submit(seat.call, "step", response)

  def close(self) -> None:
    """Stops the threads and closes every environment."""
    self._executor.shutdown(wait=False, cancel_futures=True)
    while self._free:
      self._free.popleft().close()
