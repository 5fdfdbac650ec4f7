"""The episodes of one update: chooses tasks, plays and filters groups.

Tasks come in epochs of fresh permutations; a cursor counts those taken, so that
a restarted run continues with the next ones. With group filtering (dynamic
sampling of DAPO, arXiv 2503.14476) groups with equal returns, which give no
signal, are replaced by groups of new tasks. Groups with little signal can be
left out (RAGEN-2, arXiv 2604.06268), and episodes of early updates can be kept
short (ScalingInter-RL of AgentGym-RL, arXiv 2509.08755). Estimators with a
greedy baseline get one greedy episode per task here.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from t2po_jax import types
from t2po_jax.configs import base as settings
from t2po_jax.distributed import processes
from t2po_jax.learning.estimators import episodes
from t2po_jax.rollout import actor as actors
from t2po_jax.rollout import collect, handover, horizon
from t2po_jax.setup import build
from t2po_jax.training import metrics

# Identifies the greedy episodes of an update; larger than any attempt.
_GREEDY = 1 << 16


@dataclasses.dataclass(frozen=True)
class Position:
  """How far the rollouts of a run have come.

  Attributes:
    cursor: number of tasks taken from the split so far.
    suspended: episodes of later groups that have been started.
  """

  cursor: int = 0
  suspended: tuple[handover.Suspended, ...] = ()

  @property
  def groups(self) -> set[tuple[int, int]]:
    """The groups that have been started: how many rollouts later, and which."""
    return {(one.early, one.group) for one in self.suspended}


@dataclasses.dataclass(frozen=True)
class Experience:
  """The episodes that one update learns from.

  Attributes:
    trajectories: the episodes to learn from, groups numbered from 0.
    played: all sampled episodes, those of replaced groups included.
    baselines: [E] float64, the return of a greedy episode of each trajectory's
      task; None unless the estimator needs them.
    deltas: see `collect.Rollout`; of all sampled episodes.
    phi_changes: see `collect.Rollout`; of all sampled episodes.
    cursor: number of tasks taken from the split so far, including these.
    scalars: metrics to log.
    handed_on: episodes of the next updates that have been started.
    suspended: the records of the same episodes.
  """

  trajectories: list[types.Trajectory]
  played: list[types.Trajectory]
  baselines: np.ndarray | None
  deltas: np.ndarray
  phi_changes: np.ndarray
  cursor: int
  scalars: dict[str, float]
  handed_on: tuple[handover.Handed, ...] = ()
  suspended: tuple[handover.Suspended, ...] = ()


@dataclasses.dataclass(frozen=True)
class Carried:
  """What a rollout takes over from the previous one.

  Attributes:
    handed: episodes that have been started.
    older: (epsilon, eta) of the versions that continue them, by version; all
      others are played by the rollout's own.
  """

  handed: Sequence[handover.Handed] = ()
  older: Mapping[int, tuple[float, float]] = dataclasses.field(
    default_factory=dict
  )


def tasks_of(
  split: tuple[str, ...], start: int, count: int, *, seed: int
) -> list[str]:
  """Tasks from the endless sequence of freshly permuted epochs.

  Args:
    split: all task ids.
    start: number of tasks taken before.
    count: number of tasks to take.
    seed: of the permutations.

  Returns:
    Task ids; every task is played once before one is played again.
  """
  tasks, orders = [], {}
  for place in range(start, start + count):
    epoch, index = divmod(place, len(split))
    if epoch not in orders:
      generator = np.random.default_rng((seed, epoch))
      orders[epoch] = generator.permutation(len(split))
    tasks.append(split[orders[epoch][index]])
  return tasks


def greedy_baselines(
  trajectories: list[types.Trajectory],
  greedy: list[types.Trajectory],
  *,
  discount: float,
) -> np.ndarray:
  """The return of a greedy episode of each trajectory's task.

  Args:
    trajectories: the sampled episodes.
    greedy: one episode per group, in order. Where it was aborted the mean of
      the group's sampled episodes takes its place.
    discount: per turn, as the estimator discounts.

  Returns:
    [E] float64, 0 for a group whose episodes were all aborted.
  """

  def score(episode: types.Trajectory) -> float:
    rewards = [turn.net_reward for turn in episode.turns]
    to_go = episodes.returns_to_go(np.array(rewards), discount=discount)
    return float(to_go[0]) if len(to_go) else 0.0

  scores = []
  for group, episode in enumerate(greedy):
    others = [t for t in trajectories if t.group == group and not t.aborted]
    played = others if episode.aborted else [episode]
    scores.append(np.mean([score(t) for t in played]) if played else 0.0)
  return np.array([scores[t.group] for t in trajectories], float)


def gather(
  config: settings.Config,
  actor: actors.Actor,
  *,
  update: int,
  cursor: int,
  epsilon: float,
  eta: float,
  version: int = 0,
  carried: Carried = Carried(),  # noqa: B008
) -> Experience:
  """Plays the tasks of an update with the sampler's parameters.

  Args:
    config: the run's configuration.
    actor: what plays; its sampler has been given the parameters.
    update: number of the update, from 1.
    cursor: number of tasks taken before.
    epsilon: threshold of the thinking intervention.
    eta: threshold of turn-level resampling.
    version: the update that produced the sampler's parameters.
    carried: episodes that the last rollout has started.

  Returns:
    The experience. With group filtering there may be fewer groups than
    `rollout.tasks` after the last attempt, and with `rollout.variance_kept`
    below 1 there usually are; if no group has a signal, those of
    the last attempt are returned.
  """
  rollout = config.rollout
  rules = build.rules(
    config, build.train_sampling(config), epsilon=epsilon, eta=eta
  )
  turns = horizon.turns(rollout.horizon, update)
  rules = dataclasses.replace(rules, max_turns=turns)
  rounds, kept, tasks, cursor = _play_rounds(
    config,
    actor,
    rules,
    update=update,
    cursor=cursor,
    version=version,
    carried=carried,
  )
  played = _numbered(
    [group for part in rounds for group in _groups(part.trajectories)]
  )
  if rollout.variance_kept < 1:
    chosen = episodes.most_varied(
      [[t.episode_return for t in group if not t.aborted] for group in kept],
      rollout.variance_kept,
    )
    kept = [kept[index] for index in chosen]
    tasks = [tasks[index] for index in chosen]
  trajectories = _numbered(kept)
  scalars = {"train/horizon": float(turns)} if turns else {}
  if rollout.filter_groups or rollout.variance_kept < 1:
    scalars |= _cost(rounds, played, trajectories, groups_left=len(kept))
  baselines = None
  if "baselines" in build.estimator(config).needs:
    rules = dataclasses.replace(rules, sampling=build.GREEDY, max_tries=0)
    greedy = _play(config, actor, rules, tasks, 1, (update, _GREEDY), version)
    baselines = greedy_baselines(
      trajectories, greedy.trajectories, discount=build.turn_discount(config)
    )
    scalars["train/greedy_return"] = float(np.mean(baselines))
  return Experience(
    trajectories=trajectories,
    played=played,
    baselines=baselines,
    deltas=np.concatenate([part.deltas for part in rounds]),
    phi_changes=np.concatenate([part.phi_changes for part in rounds]),
    cursor=cursor,
    scalars=scalars,
    handed_on=rounds[-1].handed_on,
    suspended=tuple(handover.write_down(one) for one in rounds[-1].handed_on),
  )


def _early(
  config: settings.Config, actor: actors.Actor, *, update: int, cursor: int
) -> list[handover.Early]:
  """The first groups of the next updates that start with this one's."""
  rollout = config.rollout
  updates = min(rollout.updates_early, config.train.updates - update)
  tasks = tasks_of(
    actor.benchmark.splits[config.train.split],
    cursor,
    min(rollout.oversample, updates * rollout.tasks),
    seed=config.seed,
  )
  return [
    handover.Early(
      [
        (task, group, member)
        for group, task in enumerate(
          tasks[later * rollout.tasks : (later + 1) * rollout.tasks]
        )
        for member in range(rollout.group_size)
      ],
      seed=(config.seed, update + later + 1),
    )
    for later in range(updates)
  ]


def _play_rounds(
  config: settings.Config,
  actor: actors.Actor,
  rules: collect.Rules,
  *,
  update: int,
  cursor: int,
  version: int,
  carried: Carried,
) -> tuple[list[collect.Rollout], list[list[types.Trajectory]], list[str], int]:
  """Plays until enough groups have a signal, or the attempts are used up.

  Returns:
    All rollouts, the kept groups, their tasks, and the new cursor.
  """
  rollout = config.rollout
  tries = 1 + (rollout.filter_tries if rollout.filter_groups else 0)
  rounds, kept, tasks = [], [], []
  for attempt in range(tries):
    chosen = tasks_of(
      actor.benchmark.splits[config.train.split],
      cursor,
      rollout.tasks - len(kept),
      seed=config.seed,
    )
    cursor += len(chosen)
    # The first attempt is identified by the update alone.
    name = (update, attempt) if attempt else (update,)
    played_now = _play(
      config,
      actor,
      rules,
      chosen,
      rollout.group_size,
      name,
      version,
      early=_early(config, actor, update=update, cursor=cursor),
      carried=carried,
    )
    rounds.append(played_now)
    groups = _groups(played_now.trajectories)
    if not rollout.filter_groups:
      kept, tasks = groups, chosen
      break
    for task, group in zip(chosen, groups, strict=True):
      if episodes.mixed_groups(group) > 0:
        kept.append(group)
        tasks.append(task)
    metrics.print_line(
      f"update {update}, try {attempt + 1}: {len(kept)} of {rollout.tasks} "
      "groups with unequal returns"
    )
    if len(kept) == rollout.tasks:
      break
  if not kept:
    kept, tasks = groups, chosen
  return rounds, kept, tasks, cursor


def _play(
  config: settings.Config,
  actor: actors.Actor,
  rules: collect.Rules,
  tasks: Sequence[str],
  group_size: int,
  name: tuple[int, ...],
  version: int,
  *,
  early: Sequence[handover.Early] = (),
  carried: Carried = Carried(),  # noqa: B008
) -> collect.Rollout:
  """One call of the loop, under a progress bar; `name` is (update, ...)."""
  total = len(processes.share(tasks)) * group_size
  with metrics.progress(f"update {name[0]}", total) as advance:
    return actor.play(
      tasks,
      group_size=group_size,
      rules=rules,
      seed=(config.seed, *name),
      version=version,
      progress=advance,
      early=early,
      handed=carried.handed,
      older={
        older: dataclasses.replace(rules, epsilon=epsilon, eta=eta)
        for older, (epsilon, eta) in carried.older.items()
      },
    )


def _groups(
  trajectories: list[types.Trajectory],
) -> list[list[types.Trajectory]]:
  """The trajectories by group, in order."""
  groups: dict[int, list[types.Trajectory]] = {}
  for trajectory in trajectories:
    groups.setdefault(trajectory.group, []).append(trajectory)
  return [groups[number] for number in sorted(groups)]


def _numbered(
  groups: list[list[types.Trajectory]],
) -> list[types.Trajectory]:
  """The trajectories of the groups, numbered in this order."""
  return [
    dataclasses.replace(trajectory, group=number)
    for number, group in enumerate(groups)
    for trajectory in group
  ]


def _cost(
  rounds: Sequence[Any],
  played: Sequence[types.Trajectory],
  trajectories: Sequence[types.Trajectory],
  *,
  groups_left: int,
) -> dict[str, float]:
  """The cost of group filtering, beyond the kept episodes."""
  return {
    "filter/tries": float(len(rounds)),
    "filter/groups_left": float(groups_left),
    "filter/episodes_left_out": float(len(played) - len(trajectories)),
    "filter/tokens_left_out": float(
      _count_tokens(played) - _count_tokens(trajectories)
    ),
  }


def _count_tokens(trajectories: Sequence[types.Trajectory]) -> int:
  """Response tokens, including those of discarded attempts."""
  return sum(
    len(attempt.tokens)
    for trajectory in trajectories
    for turn in trajectory.turns
    for attempt in (turn.response, *turn.discarded)
  )
