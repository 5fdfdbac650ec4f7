"""Evaluation of a policy on a fixed panel of held-out tasks."""

from collections.abc import Callable

from t2po_jax import types
from t2po_jax.configs import base as settings
from t2po_jax.envs import base
from t2po_jax.rollout import actor as actors
from t2po_jax.rollout import statistics
from t2po_jax.setup import build

# Rollouts of training are identified by their update; evaluation by this.
SEED = 1 << 32


def panel(
  config: settings.Config, benchmark: base.Benchmark
) -> tuple[str, ...]:
  """The first `eval.tasks` tasks of the split, the same in every run."""
  return tuple(benchmark.splits[config.eval.split][: config.eval.tasks])


def evaluate(
  config: settings.Config,
  actor: actors.Actor,
  *,
  epsilon: float,
  eta: float,
  progress: Callable[[int], None] = lambda count: None,
) -> tuple[dict[str, float], list[types.Trajectory]]:
  """Plays the panel once with the sampler's parameters.

  The exploration control acts as in training: it is part of the evaluated
  policy.

  Args:
    config: the run's configuration.
    actor: plays episodes; its sampler holds the parameters.
    epsilon: threshold of the thinking intervention.
    eta: threshold of turn-level resampling.
    progress: called with the number of finished episodes.

  Returns:
    `eval/...` scalars, including success per category, and the episodes.
  """
  rollout = actor.play(
    panel(config, actor.benchmark),
    group_size=1,
    rules=build.rules(
      config, build.eval_sampling(config), epsilon=epsilon, eta=eta
    ),
    seed=(config.seed, SEED),
    progress=progress,
  )
  described = statistics.describe(rollout.trajectories)
  scalars = {f"eval/{name}": value for name, value in described.items()}
  for name, (success, episodes) in statistics.by_category(
    rollout.trajectories
  ).items():
    scalars[f"eval/success/{name}"] = success
    scalars[f"eval/episodes/{name}"] = float(episodes)
  return scalars, rollout.trajectories
