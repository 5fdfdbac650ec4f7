"""Plays episodes: tasks in, a rollout out.

With several processes each plays a share, every n-th task group, with its own
environments and slots, and all receive the whole rollout. Because random keys
are derived from the trajectory, and groups keep their numbers, the result is
what a single process would have got.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import types as python_types

import numpy as np

from t2po_jax.distributed import processes
from t2po_jax.envs import base
from t2po_jax.models import tokenizer as tokenizer_lib
from t2po_jax.rollout import collect, environments, handover
from t2po_jax.rollout import sampler as samplers
from t2po_jax.rollout import scheduler as schedulers

_NONE: Mapping[int, collect.Rules] = python_types.MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Actor:
  """Everything needed to play episodes.

  Attributes:
    benchmark: tasks and wording.
    pool: the environments.
    tokenizer: the policy's tokenizer.
    sampler: the device side; holds the policy's parameters.
    scheduler: the host side.
    loop: makes the loop that plays a rollout; takes the arguments of
      `collect.Loop`.
  """

  benchmark: base.Benchmark
  pool: environments.Pool
  tokenizer: tokenizer_lib.Tokenizer
  sampler: samplers.Sampler
  scheduler: schedulers.Scheduler
  loop: Callable[..., collect.Loop] = collect.Loop

  def play(
    self,
    tasks: Sequence[str],
    *,
    group_size: int,
    rules: collect.Rules,
    seed: tuple[int, ...],
    version: int = 0,
    progress: Callable[[int], None] = lambda count: None,
    early: Sequence[handover.Early] = (),
    handed: Sequence[handover.Handed] = (),
    older: Mapping[int, collect.Rules] = _NONE,
  ) -> collect.Rollout:
    """Plays every task `group_size` times; all processes must call this.

    Args:
      tasks: all task ids, one per group.
      group_size: trajectories per task, G.
      rules: how episodes are played.
      seed: non-negative integers that identify the rollout, e.g. (seed,
        update).
      version: the update that produced the sampler's parameters, for the
        record.
      progress: called with the number of episodes finished here.
      early: episodes of the next rollouts, in order, to start as well; only
        with a single process.
      handed: episodes of this rollout and of the next ones that earlier ones
        started; their groups are not started again.
      older: rules of the versions that continue them, see `collect.Loop`.

    Returns:
      The rollout of all processes, the same in each, independent of the number
      of slots and of the order of serving.

    Raises:
      ValueError: if the processes have different arguments.
    """
    # `early` counts from the last rollout; this one is its next.
    started = {(one.episode.early - 1, one.episode.group) for one in handed}
    plan = [
      (task, group, member)
      for group, task in processes.share(list(enumerate(tasks)))
      for member in range(group_size)
      if (0, group) not in started
    ]
    early = [
      dataclasses.replace(
        part,
        tasks=[task for task in part.tasks if (n, task[1]) not in started],
      )
      for n, part in enumerate(early, 1)
    ]
    self.scheduler.forget()
    loop = self.loop(
      self.benchmark,
      self.pool,
      self.tokenizer,
      self.scheduler,
      rules,
      seed,
      version,
      older,
    )
    rollout = loop.run(plan, progress, early=early, handed=handed)
    if processes.count() == 1:
      return rollout
    settings = repr((list(tasks), group_size, rules, seed))
    parts = processes.gather((settings, rollout))
    for number, (other, _) in enumerate(parts):
      if other != settings:
        raise ValueError(
          f"rollout {seed}: process {number} played {other}, process "
          f"{processes.index()} {settings}; all must have the same "
          "configuration"
        )
    return merge([part for _, part in parts])


def merge(parts: Sequence[collect.Rollout]) -> collect.Rollout:
  """Merges the parts of a rollout, in the order of a single process."""
  trajectories = [t for part in parts for t in part.trajectories]
  return collect.Rollout(
    trajectories=sorted(trajectories, key=lambda t: (t.group, t.member)),
    deltas=np.sort(np.concatenate([part.deltas for part in parts])),
    phi_changes=np.sort(np.concatenate([part.phi_changes for part in parts])),
    aborted=sum(part.aborted for part in parts),
  )
