"""One rollout of all processes: each plays its share, all get the whole.

A process takes every n-th task group. Because randomness belongs to the
trajectory, and a group keeps its number, what comes out is what one process
alone would have got.
"""

from collections.abc import Callable, Sequence

import numpy as np

from t2po_jax.distributed import processes
from t2po_jax.rollout import collect
from t2po_jax.setup import build


def play(
  actor: build.Actor,
  tasks: Sequence[str],
  *,
  group_size: int,
  rules: collect.Rules,
  seed: tuple[int, ...],
  progress: Callable[[int], None] = lambda count: None,
) -> collect.Rollout:
  """Plays every task `group_size` times; all processes must call this.

  Args:
    actor: what plays here; its sampler has been given the parameters.
    tasks: all task ids, one per group.
    group_size: trajectories per task, G.
    rules: how episodes are played.
    seed: non-negative integers that name this rollout.
    progress: called with the number of episodes finished here.

  Returns:
    The rollout of all processes, the same in each.

  Raises:
    ValueError: if the processes were about to play different things.
  """
  tasks = list(tasks)
  rollout = collect.collect(
    processes.share(tasks),
    groups=processes.share(range(len(tasks))),
    group_size=group_size,
    benchmark=actor.benchmark,
    pool=actor.pool,
    tokenizer=actor.tokenizer,
    scheduler=actor.scheduler,
    rules=rules,
    seed=seed,
    progress=progress,
  )
  if processes.count() == 1:
    return rollout
  asked = repr((tasks, group_size, rules, seed))
  found = processes.gather((asked, rollout))
  for number, (other, _) in enumerate(found):
    if other != asked:
      raise ValueError(
        f"rollout {seed}: process {number} played {other}, process "
        f"{processes.index()} {asked}; all must have the same configuration"
      )
  return merge([part for _, part in found])


def merge(parts: Sequence[collect.Rollout]) -> collect.Rollout:
  """Several parts of one rollout as the whole, in the order of one process."""
  trajectories = [t for part in parts for t in part.trajectories]
  return collect.Rollout(
    trajectories=sorted(trajectories, key=lambda t: (t.group, t.member)),
    deltas=np.sort(np.concatenate([part.deltas for part in parts])),
    gammas=np.sort(np.concatenate([part.gammas for part in parts])),
    aborted=sum(part.aborted for part in parts),
  )
