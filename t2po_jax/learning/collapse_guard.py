"""Detects training collapse, and decides how to continue more cautiously.

Multi-turn training fails in known ways. Two kinds of limits detect them in the
metrics of every update:

`LIMITS` are fixed: entropy vanishes or explodes, steps become too large,
responses repeat themselves, the format is lost, sampler and trainer diverge. A
limit violated in several consecutive updates raises an alarm.

`FALLS` compare with the best values of the run:
  `eval/success`            the held-out score is lost,
  `train/return`            the training return is,
  `train/group_std`         returns of a group become alike although they are
                            not at their best: what comes tens of updates
                            before the score falls (RAGEN, arXiv 2504.20073),
  `train/prompt_dependence` responses no longer depend on their prompt, which
                            entropy does not see (template collapse, RAGEN-2,
                            arXiv 2604.06268; ours is a cheaper proxy).
Training metrics are noisy, so they are averaged over a window of updates, and a
fall counts only if it exceeds the noise. The best of many noisy values is
biased upwards, so more standard errors are required than for a single
comparison: enough to keep a simulated healthy run free of alarms
(docs/study.md).
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

ACTIONS = ("off", "warn", "stop", "rollback")

# Option -> metric, and whether the option is a lower bound on the metric.
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
# Option -> metric whose fall below its own best the option limits.
FALLS = {
  "max_score_fall": "eval/success",
  "max_return_fall": "train/return",
  "max_deviation_fall": "train/group_std",
  "max_dependence_fall": "train/prompt_dependence",
}
# The unit in which a fall of the return is measured.
_SCALES = ("train/return_std", "train/return_error")
# Standard errors of the difference by which a held-out score must fall.
_SCORE_ERRORS = 4.0
# Likewise for the training return, in standard errors of one window's mean; and
# while groups become uniform, which also happens when tasks are solved.
_RETURN_ERRORS = 5.0
_DIP_ERRORS = 4.0
# A best value below this is noise: responses never depended on prompts.
_LEAST_DEPENDENCE = 0.1


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The guard's assessment of one update.

  Attributes:
    violations: one line per limit that this update violates.
    alarms: those violated `patience` times in a row, repeated at every multiple
      of it.
  """

  violations: tuple[str, ...]
  alarms: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Caution:
  """How a run continues after a rollback.

  Attributes:
    lr_scale: factor of the learning rate, in (0, 1].
    reuse: factor of the optimizer steps per rollout, in (0, 1].
    kl: reward charged per nat of KL to the last good policy, >= 0.
  """

  lr_scale: float = 1.0
  reuse: float = 1.0
  kl: float = 0.0

  def steps(self, configured: int) -> int:
    """Scales a number of epochs or mini-batches; at least 1."""
    return max(1, int(configured * self.reuse))


def escalate(
  rollbacks: int, *, rate_factor: float, reuse_factor: float, kl: float
) -> Caution:
  """The caution after n rollbacks: smaller and fewer steps, a KL penalty.

    lr_scale = rate_factor^n,  reuse = reuse_factor^n,  kl = n kl.

  Args:
    rollbacks: n, the number so far.
    rate_factor: of the learning rate, per rollback.
    reuse_factor: of optimizer steps per rollout, per rollback.
    kl: coefficient of the KL to the good policy, per rollback.
  """
  return Caution(
    lr_scale=rate_factor**rollbacks,
    reuse=reuse_factor**rollbacks,
    kl=kl * rollbacks,
  )


class Guard:
  """Compares the metrics of every update with limits and earlier values."""

  def __init__(
    self,
    limits: Mapping[str, float],
    *,
    patience: int,
    window: int = 3,
  ) -> None:
    """Creates a guard without history.

    Args:
      limits: values by the names of `LIMITS` and `FALLS`, >= 0; 0 disables one.
        `max_return_fall` is in standard deviations of the episode returns at
        the best update; the other falls are fractions of the best value.
      patience: consecutive updates, >= 1, before a violated limit raises an
        alarm. It does not apply to the held-out score, which is only measured
        every few updates.
      window: updates, >= 1, over which the training metrics of `FALLS` are
        averaged.

    Raises:
      ValueError: for an unknown limit or a value out of range.
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
    """Resets the guard after a rollback; keeps only the best held-out score."""
    self._streaks = dict.fromkeys(self._limits, 0)
    self._recent: dict[str, list[float]] = {}
    self._best: dict[str, float] = {}

  def check(self, scalars: Mapping[str, float]) -> Verdict:
    """Checks one update; metrics that are missing or NaN are ignored."""
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
    """Updates the windows and the best values that falls are measured by."""
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
          # The unit of a fall, as it was at the best update.
          self._best |= {n: self._mean(n) for n in _SCALES if n in self._recent}

  def _mean(self, metric: str) -> float:
    recent = self._recent[metric]
    return sum(recent) / len(recent)

  def _score_fall(
    self, limit: float, scalars: Mapping[str, float]
  ) -> str | None:
    """A line if the held-out score fell; None if it was not measured."""
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
    """A line if a training metric fell; None if that cannot be decided."""
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
    """Whether the return is this many standard errors below its best."""
    if "train/return" not in self._best:
      return False
    loss = self._best["train/return"] - self._mean("train/return")
    # A best value looks better the smaller its error happens to be.
    now = self._mean("train/return_error") if self._has_error() else 0.0
    error = max(self._best.get("train/return_error", 0.0), now)
    return loss > errors * error / math.sqrt(self._window)

  def _has_error(self) -> bool:
    return "train/return_error" in self._recent

  def state_dict(self) -> dict[str, Any]:
    """Everything that `load` needs to resume exactly from here."""
    return {
      "streaks": dict(self._streaks),
      "recent": {name: list(values) for name, values in self._recent.items()},
      "best": dict(self._best),
      "score": dict(self._score),
    }

  def load(self, state: Mapping[str, Any]) -> None:
    """Restores a `state_dict`; new limits start at 0."""
    streaks = state.get("streaks", {})
    self._streaks = {name: streaks.get(name, 0) for name in self._limits}
    self._recent = {k: list(v) for k, v in state.get("recent", {}).items()}
    self._best = dict(state.get("best", {}))
    self._score = dict(state.get("score", {}))


def _passes(
  name: str, limit: float, scalars: Mapping[str, float]
) -> str | None:
  """A line if a fixed limit is violated, "" if not, None without a value."""
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
  """A line if a value is more than a fraction of its best below it."""
  if counts and value < (1.0 - limit) * best:
    return (
      f"{metric} is {value:.4g}, its best was {best:.4g}; guard.{name} is "
      f"{limit:g}"
    )
  return ""
