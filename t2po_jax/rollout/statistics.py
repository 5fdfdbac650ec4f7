"""Metrics of a rollout's trajectories.

Generic: independent of the environment. Metrics reported by an environment
(`StepResult.info`) are averaged under their own names.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import numpy as np

from t2po_jax import types
from t2po_jax.rollout import mechanism


def _mean(values: Sequence[Any] | np.ndarray) -> float:
  return float(np.mean(values)) if len(values) else float("nan")


def _spread(name: str, values: Any) -> dict[str, float]:
  """Mean and quantiles; NaN without values."""
  values = np.asarray(values, np.float64)
  if not values.size:
    return {f"{name}_mean": float("nan")}
  quantiles = np.quantile(values, (0.1, 0.5, 0.9))
  return {
    f"{name}_mean": float(values.mean()),
    **{
      f"{name}_p{percent}": float(value)
      for percent, value in zip((10, 50, 90), quantiles, strict=True)
    },
  }


def describe(trajectories: Sequence[types.Trajectory]) -> dict[str, float]:
  """Scores, lengths, control and format of a rollout.

  Args:
    trajectories: the episodes; aborted ones are only counted.

  Returns:
    Values by name. `return` is the undiscounted reward minus penalties and
    `reward` the environment's part of it; `tokens` are response tokens of kept
    attempts per trajectory, forced ones included, and `tokens_discarded` those
    of discarded attempts. Rates are per response. `mechanism` adds its own.
  """
  played = [t for t in trajectories if not t.aborted]
  turns = [turn for t in played for turn in t.turns]
  kept = [turn.response for turn in turns]
  fired = [attempt for attempt in kept if attempt.fired_at >= 0]
  phi_changes = [
    turn.phi_change for turn in turns if np.isfinite(turn.phi_change)
  ]
  sampled = [attempt.entropy[~attempt.forced] for attempt in kept]
  metrics = {
    "episodes": float(len(trajectories)),
    "aborted": float(len(trajectories) - len(played)),
    "return": _mean([t.episode_return for t in played]),
    "reward": _mean([sum(turn.reward for turn in t.turns) for t in played]),
    "success": _mean([t.success for t in played]),
    "turns": _mean([len(t.turns) for t in played]),
    "tokens": _mean(
      [sum(len(turn.response.tokens) for turn in t.turns) for t in played]
    ),
    "tokens_discarded": _mean(
      [
        sum(len(a.tokens) for turn in t.turns for a in turn.discarded)
        for t in played
      ]
    ),
    "response_tokens": _mean([len(attempt.tokens) for attempt in kept]),
    "thinking_tokens": _mean([attempt.thinking_tokens for attempt in kept]),
    "prompt_tokens": _mean([len(turn.prompt) for turn in turns]),
    "prompt_shortened": _mean([turn.prompt_shortened for turn in turns]),
    "format_valid": _mean([turn.format_valid for turn in turns]),
    "action_valid": _mean([turn.action_valid for turn in turns]),
    "repetition": _mean([repetition(attempt.tokens) for attempt in kept]),
    "cut_off": _mean([attempt.finish == "length" for attempt in kept]),
    "intervention_rate": _mean([a.fired_at >= 0 for a in kept]),
    "intervention_at": _mean([attempt.fired_at for attempt in fired]),
    "resample_rate": _mean([bool(turn.discarded) for turn in turns]),
    "entropy": _mean(np.concatenate([*sampled, np.zeros(0)])),
    **_spread("phi", [attempt.phi for attempt in kept]),
    **_spread("phi_change", phi_changes),
  }
  metrics |= mechanism.describe(played)
  for name in sorted({name for turn in turns for name in turn.info}):
    metrics[name] = _mean(
      [turn.info[name] for turn in turns if name in turn.info]
    )
  return metrics


def repetition(tokens: np.ndarray, *, size: int = 4) -> float:
  """The fraction of a response's n-grams that occurred earlier in it.

  Args:
    tokens: [T] int32.
    size: n.

  Returns:
    From 0 to 1; 0 for a response shorter than n tokens.
  """
  grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
  return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def staleness(
  trajectories: Sequence[types.Trajectory], newest: int
) -> dict[str, float]:
  """How many updates the sampling policies lag behind the newest.

  Args:
    trajectories: the episodes.
    newest: the last update before the one that learns from them.

  Returns:
    `staleness_mean` and `staleness_max` over turns, in updates.
  """
  lags = [newest - turn.version for t in trajectories for turn in t.turns]
  return {
    "staleness_mean": _mean(lags),
    "staleness_max": float(max(lags, default=0)),
  }


def by_category(
  trajectories: Sequence[types.Trajectory],
) -> dict[str, tuple[float, int]]:
  """Success and number of episodes per category, sorted by name."""
  groups: dict[str, list[bool]] = {}
  for trajectory in trajectories:
    if not trajectory.aborted:
      groups.setdefault(trajectory.category, []).append(trajectory.success)
  return {
    name: (_mean(values), len(values))
    for name, values in sorted(groups.items())
  }


def score_table(*evaluations: Mapping[str, float]) -> str:
  """A readable table of success per category.

  Args:
    *evaluations: metrics with `step`, `eval/success` and, per category,
      `eval/success/...`; the last one also has `eval/episodes...`.

  Returns:
    Lines: a header, one per category, and one for all of them if there are
      several.
  """
  key, last = "eval/success/", evaluations[-1]
  names = sorted(name for name in last if name.startswith(key))
  width = max(len(name) for name in ("held-out success", *names)) + 1
  rows = [["episodes", *(f"update {e['step']:.0f}" for e in evaluations)]]
  labels = ["held-out success"]
  for name in [*names, "eval/success"] if len(names) > 1 else ["eval/success"]:
    labels.append(name.removeprefix(key) if name in names else "all")
    episodes = last.get(name.replace("success", "episodes", 1), math.nan)
    scores = [f"{e.get(name, math.nan):.2f}" for e in evaluations]
    rows.append([f"{episodes:.0f}", *scores])
  return "\n".join(
    label.ljust(width) + f"{count:>9}" + "".join(f"{s:>11}" for s in scores)
    for label, (count, *scores) in zip(labels, rows, strict=True)
  )
