"""Diagnostics of a rollout: repetition, diversity, effects of the control.

Metrics that help explain why training is stable or not, from trajectories
alone; docs/study.md shows them for runs that collapse. Generic like
`statistics`: a turn counts as *useless* if it led the agent nowhere new,
whatever the environment.
"""

from collections.abc import Sequence
import itertools
from typing import Any

import numpy as np

from t2po_jax import types


def _mean(values: Sequence[Any] | np.ndarray) -> float:
  return float(np.mean(values)) if len(values) else float("nan")


def describe(trajectories: Sequence[types.Trajectory]) -> dict[str, float]:
  """Diagnostic metrics of a rollout.

  Args:
    trajectories: the episodes that were not aborted.

  Returns:
    `return_std`, the deviation of episode returns, and `group_std`, its mean
    within groups (population deviations; groups of one are left out);
    `return_error`, the standard error of the mean return, estimated from group
    means because episodes of a task are correlated; `repeated_actions` and
    `useless_turns` as shares of turns; `prompt_dependence`;
    `intervention_success` and `free_success`, the success of episodes with and
    without a thinking intervention; `resample_changed`, the share of resampled
    turns that ended with an action that no discarded attempt had. NaN where
    undefined.
  """
  returns = [t.episode_return for t in trajectories]
  deviations = [
    np.std([t.episode_return for t in members])
    for members in by_group(trajectories)
    if len(members) > 1
  ]
  means = [
    np.mean([t.episode_return for t in members])
    for members in by_group(trajectories)
  ]
  error = float("nan")
  if len(means) > 1:
    error = float(np.std(means, ddof=1) / np.sqrt(len(means)))
  stirred: dict[bool, list[bool]] = {True: [], False: []}
  for trajectory in trajectories:
    fired = any(turn.response.fired_at >= 0 for turn in trajectory.turns)
    stirred[fired].append(trajectory.success)
  again = [turn for t in trajectories for turn in t.turns if turn.discarded]
  return {
    "return_std": float(np.std(returns)) if returns else float("nan"),
    "return_error": error,
    "group_std": _mean(deviations),
    "repeated_actions": _mean(
      [flag for t in trajectories for flag in repeats(t)]
    ),
    "useless_turns": _mean(
      [flag for t in trajectories for flag in useless_turns(t)]
    ),
    "prompt_dependence": prompt_dependence(trajectories),
    "intervention_success": _mean(stirred[True]),
    "free_success": _mean(stirred[False]),
    "resample_changed": _mean(
      [
        action_part(turn.response.text)
        not in {action_part(attempt.text) for attempt in turn.discarded}
        for turn in again
      ]
    ),
  }


def by_group(
  trajectories: Sequence[types.Trajectory],
) -> list[list[types.Trajectory]]:
  """The trajectories by their group's number."""
  groups: dict[int, list[types.Trajectory]] = {}
  for trajectory in trajectories:
    groups.setdefault(trajectory.group, []).append(trajectory)
  return [groups[number] for number in sorted(groups)]


def action_part(text: str) -> str:
  """A response after its thought; all of it if the thought is unfinished."""
  return text.rsplit("</think>", 1)[-1].strip()


def repeats(trajectory: types.Trajectory) -> list[bool]:
  """Per turn, whether it repeats an action from the same observation."""
  seen: set[tuple[str, str]] = set()
  flags = []
  for turn in trajectory.turns:
    done = (turn.anchor, turn.action)
    flags.append(bool(turn.action) and done in seen)
    seen.add(done)
  return flags


def useless_turns(trajectory: types.Trajectory) -> list[bool]:
  """Per turn, whether it led nowhere new.

  That is a turn without a valid action, or one followed by an observation
  already seen in this episode. The last turn is followed by none: it is useless
  if the episode failed.
  """
  seen: set[str] = set()
  flags = []
  following = [turn.anchor for turn in trajectory.turns[1:]]
  for turn, after in itertools.zip_longest(trajectory.turns, following):
    seen.add(turn.anchor)
    if after is None:
      flags.append(not trajectory.success)
    else:
      flags.append(not turn.action_valid or after in seen)
  return flags


def prompt_dependence(trajectories: Sequence[types.Trajectory]) -> float:
  """How much more alike first responses are within a task than between tasks.

    mean J(own task) - mean J(next task)

  with J the Jaccard similarity of the responses' token bigrams, over every
  member paired with its successor in the group, and with the same successor in
  the next group. It is 0 for a policy that ignores its prompt, whether its
  output is constant or random; a cheap proxy for the mutual information of
  prompt and response (RAGEN-2, arXiv 2604.06268).

  Args:
    trajectories: the episodes of a rollout.

  Returns:
    From -1 to 1; NaN without two groups of at least two.
  """
  groups = [
    [_pairs(t.turns[0].response.tokens) for t in members if t.turns]
    for members in by_group(trajectories)
  ]
  groups = [members for members in groups if len(members) > 1]
  if len(groups) < 2:
    return float("nan")
  within, between = [], []
  for number, members in enumerate(groups):
    others = groups[(number + 1) % len(groups)]
    for place, grams in enumerate(members):
      within.append(_jaccard(grams, members[(place + 1) % len(members)]))
      between.append(_jaccard(grams, others[(place + 1) % len(others)]))
  return _mean(within) - _mean(between)


def _pairs(tokens: np.ndarray) -> frozenset[tuple[int, int]]:
  """The token bigrams; for a single token, that token twice."""
  ids = [int(token) for token in tokens]
  if len(ids) == 1:
    ids *= 2
  return frozenset(itertools.pairwise(ids))


def _jaccard(one: frozenset, other: frozenset) -> float:
  """Jaccard similarity of two sets; 1 for two empty ones."""
  return len(one & other) / len(one | other) if one | other else 1.0


def roc_area(scores: Sequence[float], labels: Sequence[bool]) -> float:
  """Area under the ROC curve; ties count half.

  Args:
    scores: larger for presumed positives; NaN is left out.
    labels: the positives.

  Returns:
    The area, 0.5 for an uninformative score; NaN without positives or without
    negatives.
  """
  values = np.asarray(scores, float)
  known = ~np.isnan(values)
  values, positive = values[known], np.asarray(labels, bool)[known]
  count, rest = int(positive.sum()), int((~positive).sum())
  if not count or not rest:
    return float("nan")
  distinct, index = np.unique(values, return_inverse=True)
  sizes = np.bincount(index, minlength=len(distinct))
  # Mean rank, from 1, of each distinct value.
  ranks = (np.cumsum(sizes) - (sizes - 1) / 2.0)[index]
  wins = ranks[positive].sum() - count * (count + 1) / 2.0
  return float(wins / (count * rest))


def thought_curve(
  attempts: Sequence[types.Attempt], *, bins: int
) -> np.ndarray:
  """Mean uncertainty M over the positions of a thought.

  Args:
    attempts: responses; thoughts of fewer than `bins` tokens and forced tokens
      are left out.
    bins: number of equal parts of a thought.

  Returns:
    [bins] float64, with equal weight per thought; NaN without thoughts.
  """
  curves = []
  for attempt in attempts:
    sampled = ~attempt.forced[: attempt.thinking_tokens]
    values = attempt.uncertainty[: attempt.thinking_tokens][sampled]
    if len(values) >= bins:
      parts = np.array_split(np.asarray(values, float), bins)
      curves.append([part.mean() for part in parts])
  if not curves:
    return np.full(bins, np.nan)
  return np.mean(curves, axis=0)
