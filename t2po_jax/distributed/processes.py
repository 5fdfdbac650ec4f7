"""Multi-process training: who plays what, and how processes stay in step.

Every process runs the same program on its own devices (JAX's multi-controller
model). The rollout is divided: a process plays its share of the task groups
with its own environments and its own sampler. The finished episodes, small
compared with the weights, are then sent to all processes, so that each holds
the whole rollout, in the same order and bit for bit as if it had played it
alone. From there on all of them compute the same advantages, thresholds, rows
and decisions of the guard; the update itself runs on the mesh of all devices.

So only `gather` ever carries a value from one process to another, and a single
process runs the same code without it. A thread that plays rollouts beside the
updates exchanges its values without the devices (`stand_aside`).
"""

from collections.abc import Callable, Mapping, Sequence
import itertools
import os
import pickle
import sys
import threading
from typing import Any, NoReturn, TypeVar

import jax
from jax._src import distributed  # The client has no public name.
from jax.experimental import multihost_utils
import numpy as np

T = TypeVar("T")

# Bytes per process and transfer: a fixed size needs a single program.
PART = 1 << 20
# A dead process is detected by its missing heartbeat, not by this timeout.
_PATIENCE_MS = 7 * 24 * 3600 * 1000

_numbers = itertools.count()
# Of a thread that exchanges beside the main one.
_aside = threading.local()


def start(
  coordinator: str | None,
  processes: str,
  process_id: int | None,
  *,
  heartbeat: int = 100,
) -> None:
  """Joins the other processes; call it before anything else in JAX.

  Args:
    coordinator: `host:port` where process 0 listens.
    processes: their number, or `auto` to ask the cluster (Cloud TPU, SLURM,
      Open MPI, Kubernetes). `1` without a coordinator does nothing.
    process_id: which of them this one is, from 0.
    heartbeat: seconds without a heartbeat after which a process counts as dead
      and the others exit too.

  Raises:
    ValueError: if the arguments do not fit together or no cluster is found.
  """
  # Its handler would keep SIGTERM from ending the process; everything needed to
  # resume is in the checkpoint at any time.
  jax.config.update("jax_enable_preemption_service", False)
  if processes == "auto":
    try:
      jax.distributed.initialize(
        coordinator, None, process_id, heartbeat_timeout_seconds=heartbeat
      )
    except (ValueError, TypeError) as error:
      raise ValueError(
        "--processes: found 'auto' outside of a cluster that JAX knows "
        f"({first_line(error)}); give --coordinator, --processes and "
        "--process_id"
      ) from None
    return
  if not processes.isdigit() or int(processes) < 1:
    raise ValueError(
      f"--processes: found {processes!r}, expected a number from 1, or 'auto'"
    )
  number = int(processes)
  if number == 1 and coordinator is None:
    return
  if coordinator is None or ":" not in coordinator:
    raise ValueError(
      f"--coordinator: found {coordinator!r}, expected host:port of process 0 "
      f"with --processes {number}"
    )
  if process_id is None or not 0 <= process_id < number:
    raise ValueError(
      f"--process_id: found {process_id}, expected 0 to {number - 1}"
    )
  jax.distributed.initialize(
    coordinator,
    number,
    process_id,
    cluster_detection_method="deactivate",
    heartbeat_timeout_seconds=heartbeat,
  )


def count() -> int:
  """The number of processes."""
  return jax.process_count()


def index() -> int:
  """The number of this process; process 0 writes files and logs."""
  return jax.process_index()


def share(items: Sequence[T]) -> list[T]:
  """This process's share of a list: every n-th item."""
  return list(items[index() :: count()])


def gather(value: T) -> list[T]:
  """Sends one value from each process to all of them.

  All processes must call this in the same order; the first ones wait.

  Args:
    value: anything that can be pickled.

  Returns:
    The values, in the order of the processes.
  """
  if count() == 1:
    return [value]
  numbers = getattr(_aside, "numbers", None)
  if numbers is not None:
    return _gather_aside(value, next(numbers))
  # Processes with less to play wait here, without a timeout.
  _client().wait_at_barrier(f"t2po/gather/{next(_numbers)}", _PATIENCE_MS)
  data = np.frombuffer(pickle.dumps(value), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(data)))
  parts = []
  for begin in range(0, int(sizes.max()), PART):
    piece = data[begin : begin + PART]
    piece = np.pad(piece, (0, PART - len(piece)))
    parts.append(multihost_utils.process_allgather(piece))
  rows = np.concatenate(parts, axis=1)
  return [
    pickle.loads(row[:size].tobytes())
    for row, size in zip(rows, sizes, strict=True)
  ]


def stand_aside() -> None:
  """Lets this thread `gather` beside the main one, in every process.

  Programs that span processes must be started in the same order by all, so
  only one thread may start them. What this thread exchanges from now on goes
  through the coordination service instead, with numbers of its own.
  """
  _aside.numbers = itertools.count()


def _gather_aside(value: Any, number: int) -> list[Any]:
  """What `gather` does, without a program on the devices."""
  client, place = _client(), f"t2po/aside/{number}"
  data = pickle.dumps(value)
  for part, begin in enumerate(range(0, len(data), PART)):
    client.key_value_set_bytes(
      f"{place}/{index()}/{part}", data[begin : begin + PART]
    )
  client.key_value_set_bytes(f"{place}/{index()}/size", str(len(data)).encode())

  def read(name: str) -> bytes:
    return client.blocking_key_value_get_bytes(f"{place}/{name}", _PATIENCE_MS)

  values = []
  for other in range(count()):
    size = int(read(f"{other}/size"))
    parts = [read(f"{other}/{part}") for part in range(-(-size // PART))]
    values.append(pickle.loads(b"".join(parts)))
  # All have read it: nobody needs it any more.
  client.wait_at_barrier(f"{place}/read", _PATIENCE_MS)
  client.key_value_delete(f"{place}/{index()}/")
  return values


def require_equal(settings: Mapping[str, Any]) -> None:
  """Raises an error if the processes have different settings.

  Args:
    settings: the same names everywhere; values are compared as text.

  Raises:
    ValueError: with the first name and process that differs from process 0.
  """
  settings_of = gather({name: repr(value) for name, value in settings.items()})
  for name, expected in settings_of[0].items():
    for number, other in enumerate(settings_of):
      if other.get(name) != expected:
        raise ValueError(
          f"{name}: found {other.get(name)} in process {number}, expected "
          f"{expected} as in process 0"
        )


def first_alone(make: Callable[[], T]) -> T:
  """Calls a function in process 0 first, and then in all the others.

  In a shared cache its result is made by process 0 and found by the others;
  with separate caches each process makes its own.

  Args:
    make: called once in every process; must not communicate.

  Returns:
    Its result in this process.

  Raises:
    ValueError: in every process, if it failed in process 0.
  """
  if count() == 1:
    return make()
  key = f"t2po/first/{next(_numbers)}"
  if index() > 0:
    problem = _client().blocking_key_value_get(key, _PATIENCE_MS)
    if problem != "none":
      raise ValueError(problem)
    return make()
  try:
    made = make()
  except Exception as error:
    _client().key_value_set(key, f"process 0 failed: {first_line(error)}")
    raise
  _client().key_value_set(key, "none")
  return made


def end(message: str) -> NoReturn:
  """Exits this process with an error, without waiting for the others.

  At exit JAX would wait for them, and they for this one: a deadlock. They
  notice its death by the missing heartbeat.
  """
  if distributed.global_state.client is None:
    sys.exit(message)
  print(message, file=sys.stderr, flush=True)
  sys.stdout.flush()
  os._exit(1)


def _client() -> Any:
  """The client of JAX's coordination service, as Orbax uses it."""
  client = distributed.global_state.client
  assert client is not None, "only several processes have a client"
  return client


def first_line(error: BaseException) -> str:
  """The first line of an error's message; its type if that is empty."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0]
