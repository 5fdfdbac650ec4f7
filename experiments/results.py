"""The result of a training run: its curve, its cost, its outcome.

A run has *collapsed* if it `fell`, that is, its last held-out success is below
`COLLAPSE` times its own best, or if the collapse guard `stopped` it. Alarms of
the guard are counted separately and are not in themselves a collapse: a run
that was rolled back and recovered has had an alarm but has not collapsed.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib

import numpy as np

from t2po_jax.training import metrics

# Column -> metric of the last evaluation.
SCORES = {
  "success": "eval/success",
  "return": "eval/return",
  "tokens": "eval/tokens",
  "turns": "eval/turns",
}
# Columns: the scores of the last evaluation, the best success, and costs.
COLUMNS = (*SCORES, "best", "yield", "sampled", "minutes")
# Seconds that are no part of a run's minutes: the cold start, which may come
# from the cache, and rollouts, which are part of a stage or run beside them.
_NOT_COUNTED = ("seconds/cold_start", "seconds/rollout")
# A run fell if it ends below this fraction of its own best score.
COLLAPSE = 0.5

# Values of the grid's keys, as given; empty without a grid.
Setting = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Point:
  """One evaluation of a run.

  Attributes:
    update: the update after which it was made.
    success: held-out success.
    tokens: response tokens per episode.
    sampled: thousands of tokens sampled in training up to then.
  """

  update: int
  success: float
  tokens: float
  sampled: float


@dataclasses.dataclass(frozen=True)
class Result:
  """One run.

  Attributes:
    preset: the preset.
    seed: seed of the run.
    scores: one number per entry of `COLUMNS`: the last evaluation; `best`, the
      largest held-out success of all evaluations, which is biased upwards by
      selection; `yield`, successful training episodes per thousand sampled
      tokens; thousands of tokens sampled in training, including discarded ones;
      minutes without the cold start.
    curve: the evaluations.
    alarms: alarms of the collapse guard.
    rollbacks: how often it was rolled back to a checkpoint.
    stopped: whether the guard ended the run.
    finished: whether all updates were made, or the guard stopped it.
    setting: the run's point in the grid.
  """

  preset: str
  seed: int
  scores: Mapping[str, float]
  curve: tuple[Point, ...]
  alarms: int = 0
  rollbacks: int = 0
  stopped: bool = False
  finished: bool = True
  setting: Setting = ()

  @property
  def fell(self) -> bool:
    """Whether the last held-out success is far below the run's best."""
    return has_fallen([point.success for point in self.curve])

  @property
  def collapsed(self) -> bool:
    """Whether it fell or was stopped; see the module's docstring."""
    return self.fell or self.stopped


def has_fallen(successes: Sequence[float]) -> bool:
  """Whether the last of a run's held-out scores is below half of the best.

  Args:
    successes: of the run's evaluations, in order; at least one.
  """
  return successes[-1] < COLLAPSE * max(successes)


def mean_over_tokens(result: Result, budget: float) -> float:
  """Mean held-out success over the tokens that training samples.

    1 / X  integral from 0 to X of s(x) dx,

  where s interpolates the evaluations linearly in x, the thousands of tokens
  sampled, so that learning faster counts as much as learning more.

  Args:
    result: the run.
    budget: X, in thousands of tokens, the same for all compared runs; beyond
      the tokens that the run has sampled, its last score is used.

  Returns:
    A success rate; the first evaluation's for a budget of 0.
  """
  sampled = np.array([point.sampled for point in result.curve])
  success = np.array([point.success for point in result.curve])
  if budget <= 0.0:
    return float(success[0])
  inside = sampled < budget
  x = np.append(sampled[inside], budget)
  s = np.append(success[inside], np.interp(budget, sampled, success))
  return float(np.sum(np.diff(x) * (s[1:] + s[:-1]) / 2.0) / budget)


def success_at(result: Result, budget: float) -> float:
  """Held-out success at a budget of sampled tokens, interpolated."""
  return float(
    np.interp(
      budget,
      [point.sampled for point in result.curve],
      [point.success for point in result.curve],
    )
  )


def read_run(
  preset: str, seed: int, folder: pathlib.Path, setting: Setting = ()
) -> Result | None:
  """Reads a run's result; None if it has no evaluation yet."""
  if not (folder / metrics.FILE).is_file():
    return None
  lines = metrics.read(folder / metrics.FILE)
  if not any("eval/success" in line for line in lines):
    return None
  settings = json.loads((folder / "config.json").read_text())
  stopped = any(line.get("guard/stopped", 0.0) for line in lines)
  curve, sampled, won, evaluation = [], 0.0, 0.0, {}
  for line in lines:
    sampled += line.get("sampler/slot_steps_used", 0.0) / 1000
    episodes = line.get("train/episodes", 0.0) - line.get("train/aborted", 0.0)
    if episodes > 0:
      won += line["train/success"] * episodes
    if "eval/success" in line:
      evaluation = line
      curve.append(
        Point(
          update=int(line["step"]),
          success=line["eval/success"],
          tokens=line["eval/tokens"],
          sampled=sampled,
        )
      )
  seconds = sum(
    value
    for line in lines
    for key, value in line.items()
    if key.startswith("seconds/") and key not in _NOT_COUNTED
  )
  scores = {name: evaluation[key] for name, key in SCORES.items()} | {
    "best": max(point.success for point in curve),
    "yield": won / sampled if sampled else 0.0,
    "sampled": sampled,
    "minutes": seconds / 60,
  }
  return Result(
    preset=preset,
    seed=seed,
    setting=setting,
    scores=scores,
    curve=tuple(curve),
    alarms=int(sum(line.get("guard/alarms", 0.0) for line in lines)),
    rollbacks=int(lines[-1].get("guard/rollbacks", 0.0)),
    stopped=stopped,
    finished=stopped or lines[-1]["step"] >= settings["train.updates"],
  )
