"""The string bandit behind a slow line, for `whole_loop.py` and its peers.

A step's time is log-normal; a share of the steps never answers. Both belong to
the task, the turn and the response, so that who plays the same episodes waits
for the same times. Nothing here imports JAX: other libraries play it too.
"""

import dataclasses
import hashlib
import threading
import time

import numpy as np

from t2po_jax import keys
from t2po_jax.envs import base, toy


@dataclasses.dataclass(frozen=True)
class Settings(toy.Settings):
  """The bandit's keys, and how long it thinks."""

  latency: float = keys.key(0.0, "Median seconds of a step.", least=0.0)
  spread: float = keys.key(
    0.5, "Standard deviation of their logarithm.", least=0.0
  )
  hang: float = keys.key(
    0.0, "Share of steps that never answer.", least=0.0, most=1.0
  )


class SlowToy(toy.ToyBenchmark):
  """The string bandit behind a slow line."""

  Settings = Settings
  settings: Settings

  def env(self) -> "SlowEnv":
    """A new environment."""
    return SlowEnv(self)


class SlowEnv(toy.ToyEnv):
  """One game."""

  def __init__(self, benchmark: SlowToy) -> None:
    super().__init__(benchmark)
    self._settings = benchmark.settings

  def seconds(self, response: str) -> float:
    """How long the next step takes; infinite if it never answers."""
    name = repr((self.category, self.shown, self.turn, response)).encode()
    seed = int.from_bytes(hashlib.sha256(name).digest()[:8], "little")
    generator = np.random.default_rng(seed)
    drawn = generator.lognormal(0, self._settings.spread)
    if generator.random() < self._settings.hang:
      return float("inf")
    return self._settings.latency * drawn

  def step(self, response: str) -> base.StepResult:
    """Thinks, then judges."""
    seconds = self.seconds(response)
    if seconds == float("inf"):
      threading.Event().wait()
    time.sleep(seconds)
    return super().step(response)
