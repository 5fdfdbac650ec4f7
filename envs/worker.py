"""A worker process that runs environments on commands from a pipe.

Some engines are not thread-safe, crash, hang or leak: each worker process runs
several environments, one call at a time, and its parent may kill it at any
time. It calls `main` and imports only environments. The first message is a
function that creates the benchmark; each later one is (number of the
environment, method, argument). Every message gets one `Answer`. The process
exits when the pipe is closed or its parent has died, and removes its temporary
folder.
"""

from collections.abc import Callable
from multiprocessing import connection as connection_lib
import os
import pathlib
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from typing import Any, NamedTuple

from t2po_jax.envs import base


class Answer(NamedTuple):
  """A worker's answer to one message.

  Attributes:
    value: the method's return value.
    error: the exception raised instead.
    memory: resident memory of the process, in MB.
  """

  value: Any
  error: Exception | None
  memory: float


def read_memory() -> float:
  """Resident memory of this process in MB (its peak outside Linux)."""
  try:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
  except OSError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def _portable(error: Exception) -> Exception:
  """An error that can be sent through the pipe; its traceback is a note."""
  try:
    pickle.loads(pickle.dumps(error))
  except Exception:
    error = RuntimeError(f"{type(error).__name__}: {error}")
  else:
    error.add_note("in a worker process: " + traceback.format_exc())
  return error


def serve(connection: connection_lib.Connection) -> None:
  """Answers messages until the connection is closed."""

  def answer(function: Callable[..., Any], *args: Any) -> bool:
    value = error = None
    try:
      value = function(*args)
    except Exception as problem:
      error = _portable(problem)
    connection.send(Answer(value, error, read_memory()))
    return error is None

  benchmark: Any = None
  environments: dict[int, base.Env] = {}

  def make() -> None:
    nonlocal benchmark
    benchmark = connection.recv()()

  def call(
    number: int, method: str, argument: str
  ) -> base.Observation | base.StepResult:
    if benchmark is None:
      raise RuntimeError("no benchmark was made")
    if number not in environments:
      environments[number] = benchmark.env()
    try:
      return getattr(environments[number], method)(argument)
    except base.EnvError:
      # The failed episode is not continued.
      del environments[number]
      raise

  try:
    if answer(make):
      while True:
        answer(call, *connection.recv())
  except (EOFError, ConnectionError):
    pass


def _watch(parent: int, folder: str) -> None:
  """Exits this process when its parent dies, even in the middle of a call."""
  while os.getppid() == parent:
    time.sleep(1.0)
  shutil.rmtree(folder, ignore_errors=True)
  os._exit(1)


def main() -> None:
  """Serves an inherited pipe, given as the first argument of the process.

  The second argument is the folder for temporary files.
  """
  descriptor, folder = int(sys.argv[1]), sys.argv[2]
  # The trainer handles keyboard interrupts: it closes the pipe.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  os.environ["TMPDIR"] = tempfile.tempdir = folder
  threading.Thread(
    target=_watch, args=(os.getppid(), folder), daemon=True
  ).start()
  with connection_lib.Connection(descriptor) as connection:
    serve(connection)
  shutil.rmtree(folder, ignore_errors=True)
