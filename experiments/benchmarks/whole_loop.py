"""Seconds per update of the whole training loop, with and without overlap.

Run by `rollout.py --mode=loop`. The policy starts from scratch and plays the
string bandit, each of whose steps takes a time drawn from a log-normal
distribution. What is compared, on the same tasks:

  on the spot  environments are called one after another: reproducible
  threads      environments answer in threads, their answers are taken as they
               come: fast, but rounding depends on the order
  logical      the same threads, answers taken in logical time: reproducible
  one size     the same threads, programs of one size: reproducible
  ahead        one size, and the next rollout is played beside the update

The variants alternate, so that only ratios depend on a quiet machine.
"""

from collections.abc import Sequence
import dataclasses
import hashlib
import pathlib
import statistics
import tempfile
import time

import numpy as np

from t2po_jax import keys
from t2po_jax.configs import base as settings
from t2po_jax.configs import environment, smoke
from t2po_jax.envs import base, toy
from t2po_jax.training import loop, metrics

# Name -> keys that differ from the others.
VARIANTS = {
  "on the spot": {"rollout.env_threads": 0},
  "threads": {},
  "logical": {"rollout.env_calls": 1},
  "one size": {"rollout.one_size": True},
  "ahead": {"rollout.one_size": True, "rollout.ahead": 1},
}


@dataclasses.dataclass(frozen=True)
class Settings(toy.Settings):
  """The bandit's keys, and how long it thinks."""

  latency: float = keys.key(0.0, "Median seconds of a step.", least=0.0)
  spread: float = keys.key(
    0.5, "Standard deviation of their logarithm.", least=0.0
  )


class SlowToy(toy.ToyBenchmark):
  """The string bandit behind a slow line."""

  Settings = Settings
  settings: Settings

  def env(self) -> "SlowEnv":
    """A new environment."""
    return SlowEnv(self)


class SlowEnv(toy.ToyEnv):
  """One game; a step's time belongs to its task and turn."""

  def __init__(self, benchmark: SlowToy) -> None:
    super().__init__(benchmark)
    self._settings = benchmark.settings

  def step(self, response: str) -> base.StepResult:
    """Thinks, then judges."""
    name = f"{self.category} {self.shown} {self.turn}".encode()
    seed = int.from_bytes(hashlib.sha256(name).digest()[:8], "little")
    drawn = np.random.default_rng(seed).lognormal(0, self._settings.spread)
    time.sleep(self._settings.latency * drawn)
    return super().step(response)


def config_of(
  variant: str,
  *,
  size: str,
  latency: float,
  updates: int,
  slots: int,
  epochs: int,
) -> settings.Config:
  """The configuration of one run."""
  config = smoke.get_config()
  config.env = environment.section(f"{__name__}:SlowToy", latency=latency)
  config.update_from_flattened_dict(
    {
      "model.size": size,
      "cold_start.kind": "none",
      "guard.action": "off",
      "rollout.slots": slots,
      "rollout.env_threads": 2 * slots,
      "train.updates": updates,
      "train.epochs": epochs,
      "train.eval_every": 0,
      "train.save_every": 0,
      "eval.tasks": 1,
      "log.tensorboard": False,
      "log.trajectories": 0,
      **VARIANTS[variant],
    }
  )
  return settings.read(config)


def time_updates(config: settings.Config) -> list[float]:
  """Seconds of every update of a run but the first two, which compile."""
  with tempfile.TemporaryDirectory() as folder:
    loop.train(config, folder)
    lines = metrics.read(pathlib.Path(folder) / metrics.FILE)
  elapsed = [float(line["elapsed"]) for line in lines]
  # The last update brings an evaluation and a checkpoint.
  return np.diff(elapsed)[2:-1].tolist()


def measure(
  *,
  size: str,
  latencies: Sequence[float],
  variants: Sequence[str],
  updates: int,
  slots: int,
  epochs: int,
  rounds: int,
) -> dict[str, dict[str, dict[str, float]]]:
  """Medians by latency and variant.

  Args:
    size: named model size.
    latencies: median seconds of a step.
    variants: names of `VARIANTS`.
    updates: per run, at least 5.
    slots: responses decoded at once.
    epochs: passes of an update over its rollout: how heavy it is.
    rounds: runs of every variant, alternating.

  Returns:
    Latency -> variant -> `seconds_per_update`, `updates_per_hour`,
    `trajectories_per_s`.
  """
  measured = {}
  for latency in latencies:
    seconds = {variant: [] for variant in variants}
    for _ in range(rounds):
      for variant in variants:
        config = config_of(
          variant,
          size=size,
          latency=latency,
          updates=updates,
          slots=slots,
          epochs=epochs,
        )
        seconds[variant] += time_updates(config)
    episodes = config.rollout.tasks * config.rollout.group_size
    measured[f"{latency:g}"] = {
      variant: {
        "seconds_per_update": statistics.median(times),
        "updates_per_hour": 3600 / statistics.median(times),
        "trajectories_per_s": episodes / statistics.median(times),
      }
      for variant, times in seconds.items()
    }
  return measured


def table(measured: dict[str, dict[str, dict[str, float]]]) -> str:
  """Seconds per update for people, and how much faster than the first."""
  variants = list(next(iter(measured.values())))
  lines = ["latency".ljust(10) + "".join(v.rjust(20) for v in variants)]
  for latency, found in measured.items():
    seconds = [found[v]["seconds_per_update"] for v in variants]
    cells = [f"{s:.3f} s ({seconds[0] / s:.2f}x)" for s in seconds]
    lines.append(f"{latency} s".ljust(10) + "".join(c.rjust(20) for c in cells))
  return "\n".join(lines)
