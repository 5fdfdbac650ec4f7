"""The loop that ours is measured against: all episodes turn by turn.

Every turn of all episodes is sampled, then every environment answers, then the
next turn is sampled. So each turn waits for the longest response and then for
the slowest environment, as loops do that treat a rollout as one batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
import types as python_types
from typing import Any

from t2po_jax import types
from t2po_jax.envs import base
from t2po_jax.models import tokenizer as tokenizers
from t2po_jax.rollout import collect, environments, handover, scheduler


class HeldPool:
  """Keeps steps back until they are sent; implements `environments.Pool`."""

  def __init__(self, pool: environments.Pool) -> None:
    self._pool = pool
    self._held: list[tuple[Any, str, futures.Future]] = []

  def prepare(self, task_ids: Sequence[str]) -> None:
    """As the pool does."""
    self._pool.prepare(task_ids)

  def start(self, task_id: str) -> tuple[Any, futures.Future]:
    """As the pool does, at once."""
    return self._pool.start(task_id)

  def step(self, seat: Any, response: str) -> futures.Future:
    """A step of the next `send`."""
    answer = futures.Future()
    self._held.append((seat, response, answer))
    return answer

  def send(self) -> None:
    """Makes all steps side by side."""
    held, self._held = self._held, []
    for seat, response, answer in held:
      self._pool.step(seat, response).add_done_callback(
        lambda done, answer=answer: _pass_on(done, answer)
      )

  def give_back(self, seat: Any) -> None:
    """As the pool does."""
    self._pool.give_back(seat)

  def close(self) -> None:
    """As the pool does."""
    self._pool.close()


def _pass_on(done: futures.Future, answer: futures.Future) -> None:
  error = done.exception()
  if error is not None:
    answer.set_exception(error)
  else:
    answer.set_result(done.result())


class LockStep(collect.Loop):
  """Plays all episodes turn by turn."""

  def __init__(
    self,
    benchmark: base.Benchmark,
    pool: environments.Pool,
    tokenizer: tokenizers.Tokenizer,
    under: scheduler.Scheduler,
    rules: collect.Rules,
    seed: tuple[int, ...],
    version: int = 0,
    older: Mapping[int, collect.Rules] = python_types.MappingProxyType({}),
  ) -> None:
    """Begins nothing yet; arguments as of `collect.Loop`."""
    self._steps = HeldPool(pool)
    super().__init__(
      benchmark, self._steps, tokenizer, under, rules, seed, version, older
    )

  def episodes(
    self,
    tasks: Sequence[tuple[str, int, int]],
    *,
    early: Sequence[handover.Early] = (),
    handed: Sequence[handover.Handed] = (),
  ) -> Iterator[types.Trajectory]:
    """The episodes of `run` as they end.

    Raises:
      ValueError: if episodes of two rollouts are to be played at once.
    """
    if early or handed:
      raise ValueError("lock step cannot begin episodes early")
    for task in tasks:
      self.start(*task)
    while self.waiting:
      self._steps.send()
      futures.wait(self.waiting)
      for future in list(self.waiting):
        yield from self.answered(self.waiting.pop(future), future)
      while self.scheduler.busy:
        for completion in self.scheduler.poll(
          self.rules.sampling, self.rules.epsilon
        ):
          self.sampled(completion)
