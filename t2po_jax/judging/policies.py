"""Policies with weights: a run's checkpoints, or a model of a configuration.

A checkpoint is evaluated exactly as its run evaluated it: with the same
thresholds of the exploration control, sampling, tasks and random keys, so that
the first repeat reproduces what training measured. Switching the control off or
decoding greedily changes nothing else.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import pathlib

from t2po_jax import types
from t2po_jax.configs import base as settings
from t2po_jax.envs import base
from t2po_jax.models import agent as agents
from t2po_jax.setup import build
from t2po_jax.training import cold_start, evaluate, export, metrics

DECODINGS = ("sampled", "greedy")
CONTROLS = ("on", "off")
# Names of checkpoints; a number names an update.
STEPS = ("best", "latest", "all", "start", "base")


@dataclasses.dataclass(frozen=True)
class Weights:
  """Parameters to evaluate.

  Attributes:
    label: for tables, e.g. `update 30`.
    step: the update; 0 before the first.
    params: in the training layout, on the host.
    thresholds: `epsilon` and `eta` of the exploration control.
  """

  label: str
  step: int
  params: types.Params
  thresholds: dict[str, float]


def start_thresholds(config: settings.Config) -> dict[str, float]:
  """The thresholds before the first update."""
  return {name: t.value for name, t in build.calibrators(config).items()}


def weights_of(
  config: settings.Config,
  agent: agents.Agent,
  workdir: pathlib.Path | None,
  step: str,
) -> Iterator[Weights]:
  """Yields the parameters that `step` names.

  Args:
    config: of the run, or of the model.
    agent: the agent before any training.
    workdir: of the run; None without one.
    step: `base`, the model before any training; `start`, after the cold start;
      or, of a run, `best`, `latest`, `all` kept checkpoints or a number.

  Raises:
    ValueError: if it does not exist.
  """
  if step == "base":
    yield Weights("untrained", 0, agent.params, start_thresholds(config))
    return
  if step == "start":
    _, params = cold_start.initial_parameters(config, agent)
    yield Weights("cold start", 0, params, start_thresholds(config))
    return
  if workdir is None:
    raise ValueError(
      f"--step: found {step!r}, expected base or start; checkpoints need "
      "--workdir"
    )
  for checkpoint in export.read_checkpoints(workdir, config, agent, step):
    limits = start_thresholds(config)
    saved = build.calibrators(config)
    for name, threshold in saved.items():
      threshold.load(checkpoint.position["thresholds"][name])
      limits[name] = threshold.value
    yield Weights(
      f"update {checkpoint.step}", checkpoint.step, checkpoint.params, limits
    )


def with_control(config: settings.Config, control: str) -> settings.Config:
  """The configuration with its exploration control unchanged, or off."""
  if control == "on":
    return config
  acting = dataclasses.replace(
    config.control,
    thinking=dataclasses.replace(config.control.thinking, enabled=False),
    resampling=dataclasses.replace(config.control.resampling, max_tries=0),
  )
  return dataclasses.replace(config, control=acting)


class Sampled:
  """Plays weights with the sampler; one object per setting of the control."""

  def __init__(
    self,
    config: settings.Config,
    benchmark: base.Benchmark,
    agent: agents.Agent,
  ) -> None:
    """Allocates the slots.

    Args:
      config: includes the setting of the control.
      benchmark: what is played.
      agent: provides the network and the tokenizer.
    """
    self._config = config
    self.actor = build.actor(config, benchmark, agent)

  def play(
    self,
    weights: Weights,
    tasks: Sequence[str],
    *,
    decoding: str,
    repeats: int,
    label: str,
  ) -> list[types.Trajectory]:
    """Plays all episodes of some tasks.

    Args:
      weights: the weights to play.
      tasks: the panel's task ids.
      decoding: one of `DECODINGS`.
      repeats: episodes per task.
      label: for the progress bar.
    """
    config = self._config
    sampling = build.eval_sampling(config)
    if decoding == "greedy":
      sampling = build.GREEDY
    self.actor.sampler.load(weights.params)
    rules = build.rules(config, sampling, **weights.thresholds)
    with metrics.progress(label, len(tasks) * repeats) as advance:
      rollout = self.actor.play(
        tasks,
        group_size=repeats,
        rules=rules,
        seed=(config.seed, evaluate.SEED),
        progress=advance,
      )
    return rollout.trajectories

  def close(self) -> None:
    """Closes the environments."""
    self.actor.pool.close()
