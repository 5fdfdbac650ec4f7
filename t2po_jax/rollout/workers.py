"""Environments in worker processes that may hang, crash or leak.

Engines that are not thread-safe run in separate processes (`envs.worker`),
several environments in each, one call at a time. A call that times out, or
whose process dies, raises `EnvError`: this costs one episode. The process is
replaced, and its other episodes are replayed up to where they were, call by
call; if a replayed answer differs, `EnvError` is raised too, so that no wrong
reward gets through. A process that has grown too large is replaced in the same
way before its next episode.

Processes are spawned, never forked, because the trainer has threads. Nor do
they import the main module, which would import JAX.
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

# Not `-m`: objects defined in a main module cannot be pickled.
_PROGRAM = "from t2po_jax.envs import worker; worker.main()"
# Seconds that a process may take to make its benchmark, which may be large.
_START_SECONDS = 600.0
# Seconds that a process is given to exit.
_STOP_SECONDS = 5.0


class _Child:
  """A running process; used from one thread.

  Attributes:
    grown: its growth in MB since it was ready.
  """

  def __init__(self, recipe: Callable[[], base.Benchmark]) -> None:
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

  def call(
    self, message: tuple[int, str, str], timeout: float
  ) -> base.Observation | base.StepResult:
    """Returns or raises what a method of an environment does."""
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
    """Kills the process at once."""
    self._process.kill()
    self._process.wait()
    shutil.rmtree(self._folder, ignore_errors=True)

  def stop(self) -> None:
    """Lets the process exit; kills it if that takes too long."""
    self._connection.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(_STOP_SECONDS)
    self.kill()


@dataclasses.dataclass(eq=False)
class Seat:
  """One environment of a worker; plays one episode after another.

  Attributes:
    worker: its worker.
    number: its number in the worker.
    task_id: its current task.
    child: the process of the episode.
    calls: the episode's calls so far, `reset` first.
    answers: the answers to them.
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
    tasks: task id -> number of seats playing it.
    free: seats without an episode.
    seats: the number of seats.
    restarts: how often the process was replaced.
  """

  def __init__(
    self,
    recipe: Callable[[], base.Benchmark],
    *,
    number: int,
    timeout: float,
    memory: float,
  ) -> None:
    # A daemon: a hanging worker must not keep the trainer from exiting.
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
    """The growth of the process in MB since it was ready."""
    return self._child.grown if self._child is not None else 0.0

  def submit(self, seat: Seat, method: str, argument: str) -> futures.Future:
    """Queues a call; the future resolves to its result."""
    future = futures.Future()
    self._jobs.put((future, seat, method, argument))
    return future

  def close(self) -> None:
    """Ends the process, even in the middle of a call."""
    self._closed = True
    self._jobs.put(None)
    if self._child is not None:
      self._child.kill()
    self.join(_STOP_SECONDS)

  def run(self) -> None:
    """Serves the queue; the process is started before the first call."""
    with contextlib.suppress(Exception):
      self._start()  # If it fails, the first call fails for the same reason.
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

  def _call(
    self, seat: Seat, method: str, argument: str
  ) -> base.Observation | base.StepResult:
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
    """Replays a lost episode up to where it was."""
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

  Episodes of one task share a process, which then loads the game only once:
  more processes than tasks are of no use.
  """

  def __init__(
    self,
    recipe: Callable[[], base.Benchmark],
    *,
    workers: int,
    timeout: float = 0.0,
    memory: float = 0.0,
  ) -> None:
    """Starts the processes.

    Args:
      recipe: makes the benchmark in every process; must be picklable.
      workers: number of processes, at least 1.
      timeout: seconds until a call is abandoned; 0: no limit.
      memory: MB by which a process may grow before it is replaced; 0: no limit.
    """
    # Otherwise each process would run into the error on its own.
    pickle.dumps(recipe)
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
    """The growth of each process in MB since it was ready."""
    return [thread.grown for thread in self._workers]

  def prepare(self, task_ids: Sequence[str]) -> None:
    """Resets environments in advance; drops those prepared before.

    Args:
      task_ids: the tasks to be started next, each as often as it will be.
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
    # Zero counts would accumulate.
    seat.worker.tasks += collections.Counter()
    seat.worker.free.append(seat)

  def close(self) -> None:
    """Ends all processes."""
    for thread in self._workers:
      thread.close()
