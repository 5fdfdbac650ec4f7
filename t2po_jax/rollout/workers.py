"""Environments in worker processes that may hang, crash or leak.

Engines that are not safe between threads are played by processes of their
own (`envs.worker`), several environments in each, one call at a time. A call
that is not answered in time, or whose process dies, raises `EnvError`: it
costs this one episode. The process is replaced, and the other episodes it was
playing are played again up to where they stood, call by call; one that then
reads differently raises `EnvError` too, so that no wrong reward gets through.
A process that has grown too large is replaced in the same way before its next
episode.

Processes are started afresh, never forked: the trainer has threads. They do
not import the main module either, which would bring JAX along.
"""

import collections
from collections.abc import Callable, Sequence
from concurrent import futures
import contextlib
import dataclasses
import multiprocessing
import os
import pickle
import queue
import shutil
import subprocess
import sys
import tempfile
import threading

from absl import logging

from t2po_jax.envs import base, worker

# Not `-m`: what a main module defines cannot be sent elsewhere.
_PROGRAM = "from t2po_jax.envs import worker; worker.main()"
# Seconds that a process may take to make its benchmark, which can be large.
_START_SECONDS = 600.0
# Seconds that a process gets to end by itself.
_STOP_SECONDS = 5.0


class _Child:
  """A running process; used by one thread.

  Attributes:
    grown: MB by which it has grown since it was ready.
  """

  def __init__(self, recipe: Callable[[], base.Benchmark]):
    ours, theirs = multiprocessing.Pipe()
    self._folder = tempfile.mkdtemp(prefix="t2po-worker-")
    paths = [path or os.getcwd() for path in sys.path]
    with theirs:
      pipe = theirs.fileno()
      self._process = subprocess.Popen(
        [sys.executable, "-P", "-c", _PROGRAM, str(pipe), self._folder],
        pass_fds=(pipe,),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL,
      )
    self._connection = ours
    self._size = self.grown = 0.0
    self._recipe = recipe

  def get_ready(self) -> None:
    """Waits until the benchmark is made.

    Raises:
      RuntimeError: if it cannot be made; no episode could ever be played.
    """
    try:
      answer = self._ask(self._recipe, _START_SECONDS, "starting")
    except base.EnvError as error:
      raise RuntimeError(f"an environment worker: {error}") from None
    if answer.error is not None:
      raise RuntimeError(
        f"an environment worker: {answer.error}"
      ) from answer.error
    self._size = answer.memory

  def call(self, message: tuple[int, str, str], timeout: float):
    """What a method of an environment returns or raises."""
    answer = self._ask(message, timeout, message[1])
    self.grown = answer.memory - self._size
    if answer.error is not None:
      raise answer.error
    return answer.value

  def _ask(self, message: object, timeout: float, what: str) -> worker.Answer:
    try:
      self._connection.send(message)
      if self._connection.poll(timeout or None):
        return self._connection.recv()
    except (EOFError, OSError):
      self.kill()
      raise base.EnvError(
        f"the worker process died (exit code {self._process.returncode})"
      ) from None
    self.kill()
    raise base.EnvError(f"{what} took longer than {timeout} s")

  def is_alive(self) -> bool:
    """Whether the process is running."""
    return self._process.poll() is None

  def kill(self) -> None:
    """Ends the process at once."""
    self._process.kill()
    self._process.wait()
    shutil.rmtree(self._folder, ignore_errors=True)

  def stop(self) -> None:
    """Lets the process end; kills it if it takes too long."""
    self._connection.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(_STOP_SECONDS)
    self.kill()


@dataclasses.dataclass(eq=False)
class Seat:
  """One environment of a worker; plays one episode after another.

  Attributes:
    worker: where it is.
    number: its number there.
    task_id: what it plays.
    child: the process that holds the episode.
    calls: the episode's calls so far, `reset` first.
    answers: what was answered to them.
  """

  worker: "_Worker"
  number: int
  task_id: str = ""
  child: _Child | None = None
  calls: list[tuple[str, str]] = dataclasses.field(default_factory=list)
  answers: list = dataclasses.field(default_factory=list)


class _Worker(threading.Thread):
  """A process, its replacements, and the thread that waits for them.

  Attributes:
    tasks: what is being played here: task id -> number of seats.
    free: seats without an episode.
    seats: how many there are.
    restarts: how often the process was replaced.
  """

  def __init__(
    self,
    recipe: Callable[[], base.Benchmark],
    *,
    number: int,
    timeout: float,
    memory: float,
  ):
    # A daemon: a worker that hangs must not keep the trainer from ending.
    super().__init__(name=f"environment worker {number}", daemon=True)
    self._recipe = recipe
    self._timeout = timeout
    self._memory = memory
    self._jobs: queue.SimpleQueue = queue.SimpleQueue()
    self._child: _Child | None = None
    self._closed = False
    self.tasks: collections.Counter[str] = collections.Counter()
    self.free: list[Seat] = []
    self.seats = 0
    self.restarts = 0

  @property
  def grown(self) -> float:
    """MB by which the process has grown since it was ready."""
    return self._child.grown if self._child is not None else 0.0

  def submit(self, seat: Seat, method: str, argument: str) -> futures.Future:
    """Queues a call; resolves to what it returns."""
    future = futures.Future()
    self._jobs.put((future, seat, method, argument))
    return future

  def close(self) -> None:
    """Ends the process, also in the middle of a call."""
    self._closed = True
    self._jobs.put(None)
    if self._child is not None:
      self._child.kill()
    self.join(_STOP_SECONDS)

  def run(self) -> None:
    """Serves the queue; the process is started ahead of the first call."""
    with contextlib.suppress(Exception):
      self._start()  # If it fails, the first call meets the reason again.
    while (job := self._jobs.get()) is not None:
      future, *call = job
      try:
        future.set_result(self._call(*call))
      except BaseException as error:  # Crosses a thread: must not get lost.
        future.set_exception(error)
    if self._child is not None:
      self._child.stop()

  def _start(self) -> _Child:
    """The process, started if there is none."""
    if self._closed:
      raise base.EnvError("the environments have been closed")
    if self._child is None or not self._child.is_alive():
      if self._child is not None:
        self.restarts += 1
        self._child.stop()
        logging.warning("%s: started again", self.name)
      self._child = _Child(self._recipe)
      try:
        self._child.get_ready()
      except RuntimeError:
        self._child.kill()
        raise
    return self._child

  def _call(self, seat: Seat, method: str, argument: str):
    if method == "reset":
      seat.calls, seat.answers = [], []
      self._replace_if_grown()
    child = self._start()
    if seat.calls and seat.child is not child:
      self._play_again(child, seat)
    seat.child = child
    answer = child.call((seat.number, method, argument), self._timeout)
    seat.calls.append((method, argument))
    seat.answers.append(answer)
    return answer

  def _replace_if_grown(self) -> None:
    child = self._child
    if child is not None and 0 < self._memory < child.grown:
      logging.warning(
        "%s: grew by %.0f MB, replaced (rollout.env_memory is %.0f)",
        self.name,
        child.grown,
        self._memory,
      )
      child.stop()

  def _play_again(self, child: _Child, seat: Seat) -> None:
    """Brings an episode that was lost to where it stood."""
    for (method, argument), before in zip(
      seat.calls, seat.answers, strict=True
    ):
      answer = child.call((seat.number, method, argument), self._timeout)
      if answer != before:
        raise base.EnvError(
          f"task {seat.task_id}: played again after its worker was replaced, "
          f"{method} {argument!r} was answered differently"
        )


class WorkerPool:
  """Environments in processes; implements `environments.Pool`.

  Episodes of one task are played in one process, which then loads its game
  once: more processes than tasks are of no use.
  """

  def __init__(
    self,
    recipe: Callable[[], base.Benchmark],
    *,
    workers: int,
    timeout: float = 0.0,
    memory: float = 0.0,
  ):
    """Starts the processes.

    Args:
      recipe: makes the benchmark, in every process anew; can be pickled.
      workers: number of processes, at least 1.
      timeout: seconds until a call is given up; 0 waits for ever.
      memory: MB by which a process may grow until it is replaced; 0 = any.
    """
    pickle.dumps(recipe)  # Else each process would meet the error alone.
    self._workers = [
      _Worker(recipe, number=number, timeout=timeout, memory=memory)
      for number in range(workers)
    ]
    self._prepared: dict[
      str, collections.deque[tuple[Seat, futures.Future]]
    ] = {}
    for thread in self._workers:
      thread.start()

  @property
  def restarts(self) -> int:
    """How often a process was replaced."""
    return sum(thread.restarts for thread in self._workers)

  @property
  def grown(self) -> list[float]:
    """MB by which each process has grown since it was ready."""
    return [thread.grown for thread in self._workers]

  def prepare(self, task_ids: Sequence[str]) -> None:
    """Resets environments ahead of time; forgets what was prepared before.

    Args:
      task_ids: the tasks that will be started next, one as often as it will.
    """
    for waiting in self._prepared.values():
      for seat, _ in waiting:
        self.give_back(seat)
    self._prepared = {task_id: collections.deque() for task_id in task_ids}
    for task_id in task_ids:
      self._prepared[task_id].append(self._begin(task_id))

  def start(self, task_id: str) -> tuple[Seat, futures.Future]:
    """A seat for one episode, and the future of its first `Observation`."""
    if self._prepared.get(task_id):
      return self._prepared[task_id].popleft()
    return self._begin(task_id)

  def _begin(self, task_id: str) -> tuple[Seat, futures.Future]:
    home = next(
      (thread for thread in self._workers if thread.tasks[task_id]),
      min(self._workers, key=lambda thread: thread.tasks.total()),
    )
    if home.free:
      seat = home.free.pop()
    else:
      seat = Seat(home, home.seats)
      home.seats += 1
    seat.task_id = task_id
    home.tasks[task_id] += 1
    return seat, home.submit(seat, "reset", task_id)

  def step(self, seat: Seat, response: str) -> futures.Future:
    """Executes a response; resolves to a `StepResult`."""
    return seat.worker.submit(seat, "step", response)

  def give_back(self, seat: Seat) -> None:
    """Makes a seat free for the next episode."""
    seat.worker.tasks[seat.task_id] -= 1
    # Zero counts would pile up.
    seat.worker.tasks += collections.Counter()
    seat.worker.free.append(seat)

  def close(self) -> None:
    """Ends all processes."""
    for thread in self._workers:
      thread.close()
