"""A thread that keeps the sampler's slots busy with concurrent requests.

Requests may come from any thread and start as soon as a slot is free, while
others are being decoded. Sampling settings are compiled into the decode
program, so only requests with equal sampling and exploration control are
decoded together. The others wait; once they have waited long enough, no further
requests overtake them, so that none starves.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import itertools
import threading
import time

from absl import logging
import numpy as np

from t2po_jax.rollout import draw, slots
from t2po_jax.rollout import sampler as samplers
from t2po_jax.rollout import scheduler as schedulers

# Seconds after which requests with other settings are no longer overtaken.
PATIENCE = 2.0


@dataclasses.dataclass(frozen=True)
class Setting:
  """The settings that requests must share to be decoded together.

  Attributes:
    sampling: how tokens are drawn.
    controlled: whether the exploration control acts.
    epsilon: its threshold.
  """

  sampling: draw.Sampling
  controlled: bool = False
  epsilon: float = 0.0


@dataclasses.dataclass(frozen=True)
class Job:
  """One response to sample.

  Attributes:
    prompt: [T] int32.
    setting: see `Setting`.
    limit: most tokens of the response.
    key: [2] uint32, its random key.
    signal: [W] float32, the state of the uncertainty signal; None at the start
      of an episode.
    watched: whether to call `progress`.
    progress: called with the completion so far, after every chunk.
    finished: called with the completion, or None if the engine failed.
  """

  prompt: np.ndarray
  setting: Setting
  limit: int
  key: np.ndarray
  signal: np.ndarray | None
  watched: bool
  progress: Callable[[samplers.Completion], None]
  finished: Callable[[samplers.Completion | None], None]


class Busy(RuntimeError):
  """The engine's queue is full."""


class Engine:
  """Serves jobs on the slots of one sampler until it is closed."""

  def __init__(
    self,
    sampler: samplers.Sampler,
    scheduler: schedulers.Scheduler,
    *,
    control: slots.Control,
    most_waiting: int = 1024,
  ) -> None:
    """Starts the thread.

    Args:
      sampler: holds the parameters.
      scheduler: of the sampler.
      control: the exploration control, for jobs that ask for it.
      most_waiting: the most jobs that may wait or run at the same time.
    """
    self._sampler = sampler
    self._scheduler = scheduler
    self._controls = {True: control, False: without_intervention(control)}
    self._most_waiting = most_waiting
    self._tickets = itertools.count()
    self._condition = threading.Condition()
    self._waiting: dict[int, tuple[Job, float]] = {}
    self._running: dict[int, Job] = {}
    self._cancelled: list[int] = []
    self._closed = False
    self._setting = Setting(draw.Sampling())
    self._thread = threading.Thread(
      target=self._run, name="engine", daemon=True
    )
    self._thread.start()

  @property
  def load(self) -> dict[str, int]:
    """The number of slots, of busy slots, and of jobs waiting and running."""
    with self._condition:
      return {
        "slots": self._sampler.slots,
        "slots_taken": self._scheduler.held,
        "waiting": len(self._waiting),
        "running": len(self._running),
      }

  def submit(self, job: Job) -> int:
    """Queues a job; returns its ticket.

    Raises:
      Busy: if too many are waiting, or the engine is closed.
    """
    with self._condition:
      under_way = len(self._waiting) + len(self._running)
      if self._closed or under_way >= self._most_waiting:
        raise Busy(f"{under_way} requests are under way")
      ticket = next(self._tickets)
      self._waiting[ticket] = job, time.monotonic()
      self._condition.notify()
    return ticket

  def cancel(self, tickets: Iterable[int]) -> None:
    """Cancels jobs; those that have already ended are unaffected."""
    with self._condition:
      self._cancelled.extend(tickets)
      self._condition.notify()

  def close(self) -> None:
    """Stops the thread; `finished` of unfinished jobs is called with None."""
    with self._condition:
      self._closed = True
      self._condition.notify()
    self._thread.join()

  def _run(self) -> None:
    try:
      while self._wait():
        self._drop()
        self._admit()
        self._decode()
    except Exception:  # Waiting requests must be told.
      logging.exception("the engine failed")
    with self._condition:
      self._closed = True
      left = [*self._running.values(), *(j for j, _ in self._waiting.values())]
      self._waiting, self._running = {}, {}
    for job in left:
      job.finished(None)

  def _wait(self) -> bool:
    """Sleeps while there is nothing to do; returns whether to continue."""
    with self._condition:
      self._condition.wait_for(
        lambda: (
          self._closed or self._waiting or self._running or self._cancelled
        )
      )
      return not self._closed

  def _drop(self) -> None:
    """Frees the slots of cancelled jobs."""
    with self._condition:
      cancelled, self._cancelled = self._cancelled, []
      running = [t for t in cancelled if self._running.pop(t, None)]
      for ticket in cancelled:
        self._waiting.pop(ticket, None)
    for ticket in running:
      self._scheduler.cancel(ticket)

  def _admit(self) -> None:
    """Submits all jobs that may be decoded together now to the scheduler."""
    with self._condition:
      if not self._waiting:
        return
      # The oldest first: dicts keep their order.
      oldest, since = next(iter(self._waiting.values()))
      if not self._running:
        self._setting = oldest.setting
      elif oldest.setting != self._setting:
        if time.monotonic() - since > PATIENCE:
          return
      chosen = [
        (ticket, job)
        for ticket, (job, _) in self._waiting.items()
        if job.setting == self._setting
      ]
      for ticket, job in chosen:
        del self._waiting[ticket]
        self._running[ticket] = job
    self._sampler.use(self._controls[self._setting.controlled])
    for ticket, job in chosen:
      self._scheduler.submit(
        samplers.Request(
          ticket=ticket,
          prompt=job.prompt,
          key=job.key,
          limit=job.limit,
          signal=job.signal,
        )
      )

  def _decode(self) -> None:
    """Decodes one chunk and calls the jobs' callbacks."""
    if not self._running:
      return
    setting = self._setting
    completions = self._scheduler.poll(setting.sampling, setting.epsilon)
    for completion in completions:
      self._scheduler.release(completion.ticket)
      with self._condition:
        job = self._running.pop(completion.ticket)
      job.finished(completion)
    watched = [t for t, job in self._running.items() if job.watched]
    for ticket, partial in self._scheduler.so_far(watched).items():
      if len(partial.attempt.tokens):
        self._running[ticket].progress(partial)


def without_intervention(control: slots.Control) -> slots.Control:
  """The same measurements without the intervention."""
  intervention = dataclasses.replace(control.intervention, enabled=False)
  return dataclasses.replace(control, intervention=intervention)


def key_of(seed: Sequence[int]) -> np.ndarray:
  """The random key of a request, [2] uint32."""
  return np.random.SeedSequence(tuple(seed)).generate_state(2)
