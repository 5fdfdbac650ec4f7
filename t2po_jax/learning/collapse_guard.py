"""Notices when training collapses, and says how to go on more carefully.

Multi-turn training fails in known ways. Two kinds of limits look for them in
the metrics of every update:

`LIMITS` are fixed: entropy runs to zero or away, steps grow too large,
responses repeat themselves, the format is lost, sampler and trainer drift
apart. A limit that is passed in several updates in a row is an alarm.

`FALLS` compare with the run's own best:
  `eval/success`            the held-out score is lost,
  `train/return`            the training return is,
  `train/group_std`         returns of a group become alike although they are
                            not at their best: what comes tens of updates
                            before the score falls (RAGEN, arXiv 2504.20073),
  `train/prompt_dependence` responses no longer depend on their prompt, which
                            entropy does not see (template collapse, RAGEN-2,
                            arXiv 2604.06268; ours is a cheaper proxy).
Metrics of training are noisy, so they are averaged over a window of updates,
and a fall counts only if it is beyond the noise. The best of many noisy values
is too high, so that takes more standard errors than a single comparison would:
as many as keep a simulated run that is well from alarms (docs/study.md).
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

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
# Option -> metric that must not fall so far below its own best.
FALLS = {
  "max_score_fall": "eval/success",
  "max_return_fall": "train/return",
  "max_deviation_fall": "train/group_std",
  "max_dependence_fall": "train/prompt_dependence",
}
# What a fall of the return is measured in.
_SCALES = ("train/return_std", "train/return_error")
# Standard errors that a held-out score must have fallen, of the difference.
_SCORE_ERRORS = 4.0
# Likewise the training return, of one window's mean; and while groups become
# alike, which they also do when tasks are solved.
_RETURN_ERRORS = 5.0
_DIP_ERRORS = 4.0
# A best dependence below this is noise: responses never depended on prompts.
_LEAST_DEPENDENCE = 0.1


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What one update looked like.

  Attributes:
    violations: one line for every limit that this update violates.
    alarms: those of them that were violated `patience` times in a row, and
      again at every multiple of it.
  """

  violations: tuple[str, ...]
  alarms: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Caution:
  """How a run goes on after it was rolled back.

  Attributes:
    rate: multiplies the learning rate, in (0, 1].
    reuse: multiplies optimizer steps per rollout, in (0, 1].
    kl: nats of KL to the good policy cost this much reward, >= 0.
  """

  rate: float = 1.0
  reuse: float = 1.0
  kl: float = 0.0

  def steps(self, configured: int) -> int:
    """Passes or mini-batches that are left of so many, at least 1."""
    return max(1, int(configured * self.reuse))


def escalate(
  rollbacks: int, *, rate_factor: float, reuse_factor: float, kl: float
) -> Caution:
  """What follows so many rollbacks: smaller steps, fewer, closer by.

    rate = rate_factor^n,  reuse = reuse_factor^n,  kl = n kl.

  Args:
    rollbacks: n, so far.
    rate_factor: of the learning rate, per rollback.
    reuse_factor: of optimizer steps per rollout, per rollback.
    kl: coefficient of the KL to the good policy, per rollback.
  """
  return Caution(
    rate=rate_factor**rollbacks,
    reuse=reuse_factor**rollbacks,
    kl=kl * rollbacks,
  )


class Guard:
  """Compares the metrics of every update with limits and the run's best."""

  def __init__(
    self,
    limits: Mapping[str, float],
    *,
    patience: int,
    window: int = 3,
  ):
    """Starts without a memory.

    Args:
      limits: values by names of `LIMITS` and `FALLS`, >= 0; 0 turns one off.
        `max_return_fall` is in standard deviations of episodes' returns at
        the best; the other falls are fractions of the best.
      patience: updates in a row, >= 1, until a violated limit is an alarm. A
        held-out score needs none: it is measured every few updates only.
      window: updates, >= 1, over which falling metrics of training are
        averaged.

    Raises:
      ValueError: for an unknown limit, or a number out of range.
    """
    known = [*LIMITS, *FALLS]
    unknown = sorted(set(limits) - set(known))
    if unknown:
      raise ValueError(
        f"guard.{unknown[0]}: unknown, expected one of {', '.join(known)}"
      )
    for name, value in (("patience", patience), ("window", window)):
      if value < 1:
        raise ValueError(f"guard.{name}: found {value}, expected at least 1")
    self._limits = {name: limit for name, limit in limits.items() if limit}
    self._patience = patience
    self._window = window
    self._score: dict[str, float] = {}
    self.forget()

  def forget(self) -> None:
    """Begins anew, after a rollback; only the best held-out score stays."""
    self._streaks = dict.fromkeys(self._limits, 0)
    self._recent: dict[str, list[float]] = {}
    self._best: dict[str, float] = {}

  def check(self, scalars: Mapping[str, float]) -> Verdict:
    """Looks at one update; a metric that is missing or NaN says nothing."""
    self._remember(scalars)
    violations, alarms = [], []
    for name, limit in self._limits.items():
      if name in LIMITS:
        line = _passes(name, limit, scalars)
      elif name == "max_score_fall":
        line = self._score_fall(limit, scalars)
      else:
        line = self._fall(name, limit, scalars)
      if line is None:
        continue
      self._streaks[name] = self._streaks[name] + 1 if line else 0
      if line:
        violations.append(line)
        patience = 1 if name == "max_score_fall" else self._patience
        if self._streaks[name] % patience == 0:
          alarms.append(line)
    return Verdict(tuple(violations), tuple(alarms))

  def _remember(self, scalars: Mapping[str, float]) -> None:
    """Takes what falls are measured on into the windows and the bests."""
    for metric in (*FALLS.values(), *_SCALES):
      value = scalars.get(metric, math.nan)
      if metric == "eval/success" or math.isnan(value):
        continue
      recent = [*self._recent.get(metric, []), float(value)]
      self._recent[metric] = recent[-self._window :]
    for metric in FALLS.values():
      if len(self._recent.get(metric, [])) < self._window:
        continue
      mean = self._mean(metric)
      if mean > self._best.get(metric, -math.inf):
        self._best[metric] = mean
        if metric == "train/return":
          # What a fall is measured in: as it was at the best.
          self._best |= {n: self._mean(n) for n in _SCALES if n in self._recent}

  def _mean(self, metric: str) -> float:
    recent = self._recent[metric]
    return sum(recent) / len(recent)

  def _score_fall(
    self, limit: float, scalars: Mapping[str, float]
  ) -> str | None:
    """A line if the held-out score is lost; None if it was not measured."""
    score = scalars.get("eval/success", math.nan)
    episodes = scalars.get("eval/episodes", math.nan)
    if math.isnan(score) or math.isnan(episodes) or episodes < 1:
      return None
    best = self._score.get("best", -math.inf)
    if score >= best:
      self._score = {"best": float(score)}
      return ""
    variance = best * (1.0 - best) + score * (1.0 - score)
    beyond = best - score > _SCORE_ERRORS * math.sqrt(variance / episodes)
    return _fallen("eval/success", "max_score_fall", score, best, limit, beyond)

  def _fall(
    self, name: str, limit: float, scalars: Mapping[str, float]
  ) -> str | None:
    """A line if a metric of training fell; None if nothing can be said."""
    metric = FALLS[name]
    missing = math.isnan(scalars.get(metric, math.nan))
    if missing or metric not in self._best:
      return None
    mean, best = self._mean(metric), self._best[metric]
    if metric == "train/return":
      loss, spread = best - mean, self._best.get("train/return_std", 0.0)
      if not spread or loss <= limit * spread or not self._dips(_RETURN_ERRORS):
        return ""
      return (
        f"{metric} is {mean:.4g}, {loss / spread:.2g} deviations below its "
        f"best {best:.4g}; guard.{name} is {limit:g}"
      )
    if metric == "train/group_std":
      return _fallen(metric, name, mean, best, limit, self._dips(_DIP_ERRORS))
    return _fallen(metric, name, mean, best, limit, best > _LEAST_DEPENDENCE)

  def _dips(self, errors: float) -> bool:
    """Whether the return is below its best by so many standard errors."""
    if "train/return" not in self._best:
      return False
    loss = self._best["train/return"] - self._mean("train/return")
    # A best is the better the smaller its error happens to look.
    now = self._mean("train/return_error") if self._has_error() else 0.0
    error = max(self._best.get("train/return_error", 0.0), now)
    return loss > errors * error / math.sqrt(self._window)

  def _has_error(self) -> bool:
    return "train/return_error" in self._recent

  def state_dict(self) -> dict[str, Any]:
    """Everything that `load` needs to go on exactly from here."""
    return {
      "streaks": dict(self._streaks),
      "recent": {name: list(values) for name, values in self._recent.items()},
      "best": dict(self._best),
      "score": dict(self._score),
    }

  def load(self, state: Mapping[str, Any]) -> None:
    """Goes on from a `state_dict`; limits that are new begin at 0."""
    streaks = state.get("streaks", {})
    self._streaks = {name: streaks.get(name, 0) for name in self._limits}
    self._recent = {k: list(v) for k, v in state.get("recent", {}).items()}
    self._best = dict(state.get("best", {}))
    self._score = dict(state.get("score", {}))


def _passes(
  name: str, limit: float, scalars: Mapping[str, float]
) -> str | None:
  """A line if a fixed limit is passed, "" if not, None without a value."""
  metric, above = LIMITS[name]
  value = scalars.get(metric, math.nan)
  if math.isnan(value):
    return None
  if value < limit if above else value > limit:
    return f"{metric} is {value:.4g}, guard.{name} is {limit:g}"
  return ""


def _fallen(
  metric: str,
  name: str,
  value: float,
  best: float,
  limit: float,
  counts: bool,
) -> str:
  """A line if a value is below its best by more than a fraction of it."""
  if counts and value < (1.0 - limit) * best:
    return (
      f"{metric} is {value:.4g}, its best was {best:.4g}; guard.{name} is "
      f"{limit:g}"
    )
  return ""
