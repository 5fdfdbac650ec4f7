"""Notices when training collapses.

Multi-turn training fails in known ways: the policy's entropy runs to zero or
away, steps grow too large, responses repeat themselves, the format is lost,
sampler and trainer drift apart. Each has a number in the metrics and a limit
here; a limit that is passed in several updates in a row is an alarm.
"""

from collections.abc import Mapping
import dataclasses
import math

ACTIONS = ("off", "warn", "stop", "rollback")

# Option -> metric, and whether the metric must stay above the option's value.
LIMITS = {
  "min_entropy": ("learn/entropy", True),
  "max_entropy": ("learn/entropy", False),
  "max_kl": ("learn/kl_old", False),
  "max_reference_kl": ("learn/kl", False),
  "max_grad_norm": ("learn/grad_norm", False),
  "max_repetition": ("train/repetition", False),
  "min_format": ("train/format_valid", True),
  "max_mismatch": ("learn/mismatch_mean", False),
  "max_skipped": ("learn/skipped", False),
}


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What one update looked like.

  Attributes:
    passed: one line for every limit that this update passed.
    alarms: those of them that were passed `patience` times in a row, and
      again at every multiple of it.
  """

  passed: tuple[str, ...]
  alarms: tuple[str, ...]


class Guard:
  """Compares the metrics of every update with limits."""

  def __init__(self, limits: Mapping[str, float], *, patience: int):
    """Starts without a memory.

    Args:
      limits: values by names of `LIMITS`, >= 0; 0 turns one off.
      patience: updates in a row, >= 1, until a passed limit is an alarm.

    Raises:
      ValueError: for an unknown limit, or a patience out of range.
    """
    unknown = sorted(set(limits) - set(LIMITS))
    if unknown:
      raise ValueError(
        f"guard.{unknown[0]}: unknown, expected one of {', '.join(LIMITS)}"
      )
    if patience < 1:
      raise ValueError(f"guard.patience: found {patience}, expected at least 1")
    self._limits = {name: limit for name, limit in limits.items() if limit}
    self._patience = patience
    self._streaks = dict.fromkeys(self._limits, 0)

  def judge(self, numbers: Mapping[str, float]) -> Verdict:
    """Looks at one update; a metric that is missing or NaN says nothing."""
    passed, alarms = [], []
    for name, limit in self._limits.items():
      metric, above = LIMITS[name]
      value = numbers.get(metric, math.nan)
      if math.isnan(value):
        continue
      offends = value < limit if above else value > limit
      self._streaks[name] = self._streaks[name] + 1 if offends else 0
      if offends:
        line = f"{metric} is {value:.4g}, guard.{name} is {limit:g}"
        passed.append(line)
        if self._streaks[name] % self._patience == 0:
          alarms.append(line)
    return Verdict(tuple(passed), tuple(alarms))

  def forget(self) -> None:
    """Begins to count anew, after a rollback."""
    self._streaks = dict.fromkeys(self._limits, 0)

  def state_dict(self) -> dict[str, int]:
    """Everything that `load` needs to go on exactly from here."""
    return dict(self._streaks)

  def load(self, state: Mapping[str, int]) -> None:
    """Goes on from a `state_dict`; limits that are new begin at 0."""
    self._streaks = {name: state.get(name, 0) for name in self._limits}
