"""Steps many environments at once while the device goes on decoding.

Every call returns a future. Environments that answer in microseconds are
called on the spot: then the rollout, and with it every later number, is the
same to the last bit in every run. Environments that wait for a server run in
threads, engines that may crash in processes (`workers`); the order of their
answers may change which prompts share a device call, and so the rounding of
the results, unless `rollout.one_size` or `rollout.env_calls` is set (see
docs/overlap.md). When the infrastructure fails or does not answer in time, the
future raises `EnvError`.
"""

import collections
from collections.abc import Callable, Sequence
from concurrent import futures
import threading
from typing import Any, Protocol

from t2po_jax.envs import base


class Pool(Protocol):
  """Environments that play at the same time.

  A seat is one environment; it is only handed from one call to the next.
  """

  def prepare(self, task_ids: Sequence[str]) -> None:
    """Resets environments ahead of time, if that saves any."""

  def start(self, task_id: str) -> tuple[Any, futures.Future]:
    """A seat for one episode, and the future of its first `Observation`."""
    ...

  def step(self, seat: Any, response: str) -> futures.Future:
    """Executes a response; resolves to a `StepResult`."""
    ...

  def give_back(self, seat: Any) -> None:
    """Makes a seat free for the next episode."""

  def close(self) -> None:
    """Ends everything."""


class Seat:
  """One environment of the pool; plays one episode after another.

  A call that does not answer in time is given up: the seat gets a new
  environment, and the stuck one is abandoned with its thread.
  """

  def __init__(self, make: Callable[[], base.Env], timeout: float):
    self._make = make
    self._timeout = timeout
    self._env: base.Env | None = None

  def call(self, method: str, argument: str):
    """Calls `reset` or `step` in the calling thread, within the time limit."""
    if self._env is None:
      self._env = self._make()
    env, answer = self._env, futures.Future()

    def run():
      try:
        answer.set_result(getattr(env, method)(argument))
      except BaseException as error:  # Crosses a thread: must not get lost.
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
  """Runs a call when it is submitted."""

  def submit(self, function: Callable[..., Any], /, *args: Any):
    future = futures.Future()
    try:
      future.set_result(function(*args))
    except Exception as error:
      future.set_exception(error)
    return future


class EnvironmentPool:
  """Environments, in threads or on the spot; implements `Pool`.

  Args:
    make: builds one environment.
    threads: how many calls may run at the same time; 0 calls on the spot.
    timeout: seconds until a call is given up; 0 waits for ever, without the
      extra thread that watching costs.
  """

  def __init__(
    self, make: Callable[[], base.Env], *, threads: int, timeout: float = 0.0
  ):
    self._make = make
    self._timeout = timeout
    self._executor = (
      futures.ThreadPoolExecutor(threads, "environment")
      if threads
      else _OnTheSpot()
    )
    self._free: collections.deque[Seat] = collections.deque()

  def prepare(self, task_ids: Sequence[str]) -> None:
    """Does nothing: these environments are ready at once."""

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
