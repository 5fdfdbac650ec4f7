"""Scores of episodes: one line per episode, means, pass@k, intervals.

Every task of a panel is played the same number of times. Intervals are
percentile bootstrap intervals over tasks, not over episodes: repeats of one
task are not independent of each other.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from t2po_jax import types

RESAMPLES = 10_000
# Bootstrap samples at once, to bound memory.
_BLOCK = 500


@dataclasses.dataclass(frozen=True)
class Episode:
  """One line of `episodes.jsonl`.

  Attributes:
    variant: what was evaluated, e.g. `greedy, control off`.
    split: of the task.
    task_id: the task.
    category: the part of the benchmark it belongs to.
    repeat: index of the episode among those of the task, from 0.
    success: whether the task was solved.
    aborted: whether the infrastructure failed; the episode is then not scored.
    episode_return: rewards less penalties.
    score: the benchmark's own score in [0, 1] (`task_score` of WebShop); NaN
      where there is none.
    turns: number of turns.
    tokens: response tokens, in the configuration's tokenizer.
    tokens_discarded: response tokens that resampling discarded.
    format_valid: fraction of responses that followed the grammar.
    prompt_tokens: prompt tokens of all turns; as an endpoint bills them.
    completion_tokens: response tokens; as an endpoint bills them.
  """

  variant: str
  split: str
  task_id: str
  category: str
  repeat: int
  success: bool
  aborted: bool
  episode_return: float
  score: float
  turns: int
  tokens: int
  tokens_discarded: int
  format_valid: float
  prompt_tokens: int
  completion_tokens: int


def episode(
  trajectory: types.Trajectory,
  *,
  variant: str,
  split: str,
  usage: tuple[int, int] | None = None,
) -> Episode:
  """The scores of a trajectory.

  Args:
    trajectory: the episode; its `member` is the repeat.
    variant: what was scored.
    split: of the task.
    usage: prompt and completion tokens as counted by an endpoint; by default as
      counted here.
  """
  turns = trajectory.turns
  tokens = sum(len(turn.response.tokens) for turn in turns)
  discarded = sum(len(a.tokens) for turn in turns for a in turn.discarded)
  prompts = sum(len(turn.prompt) for turn in turns)
  scores = [
    turn.info["task_score"] for turn in turns if "task_score" in turn.info
  ]
  valid = [turn.format_valid for turn in turns]
  billed = usage or (prompts, tokens + discarded)
  return Episode(
    variant=variant,
    split=split,
    task_id=trajectory.task_id,
    category=trajectory.category,
    repeat=trajectory.member,
    success=trajectory.success,
    aborted=trajectory.aborted,
    episode_return=trajectory.episode_return,
    score=float(scores[-1]) if scores else math.nan,
    turns=len(turns),
    tokens=tokens,
    tokens_discarded=discarded,
    format_valid=float(np.mean(valid)) if valid else math.nan,
    prompt_tokens=billed[0],
    completion_tokens=billed[1],
  )


def to_line(episode: Episode) -> dict[str, Any]:
  """An episode as a JSON object; NaN as null."""
  return {
    key: None if isinstance(value, float) and math.isnan(value) else value
    for key, value in dataclasses.asdict(episode).items()
  }


def from_line(line: Mapping[str, Any]) -> Episode:
  """The inverse of `to_line`.

  Raises:
    ValueError: if keys are missing or unknown.
  """
  try:
    known: dict[str, Any] = {
      key: math.nan if value is None else value for key, value in line.items()
    }
    return Episode(**known)
  except TypeError as error:
    raise ValueError(f"not an episode: {error}") from None


def pass_at(tries: int, solved: int, k: int) -> float:
  """The chance that at least one of k tries solves a task.

  1 - C(n - c, k) / C(n, k), the unbiased estimate from n tries of which c
  succeeded (arXiv 2107.03374, equation 1).

  Args:
    tries: n.
    solved: c.
    k: at most n.
  """
  return 1.0 - math.comb(tries - solved, k) / math.comb(tries, k)


def interval(
  values: Sequence[float], *, seed: int = 0, coverage: float = 0.95
) -> tuple[float, float]:
  """A percentile bootstrap interval of a mean.

  Args:
    values: one per task.
    seed: of the resampling.
    coverage: of the interval.

  Returns:
    Its bounds; NaN without values, both equal for a single value.
  """
  array = np.asarray(values, float)
  if not array.size:
    return math.nan, math.nan
  generator = np.random.default_rng(seed)
  means = []
  for _ in range(RESAMPLES // _BLOCK):
    drawn = generator.integers(array.size, size=(_BLOCK, array.size))
    means.append(array[drawn].mean(axis=1))
  tail = (1.0 - coverage) / 2
  low, high = np.quantile(np.concatenate(means), (tail, 1.0 - tail))
  return float(low), float(high)


def _mean(values: Iterable[float]) -> float:
  known = [v for v in values if not math.isnan(v)]
  return float(np.mean(known)) if known else math.nan


def summarise(episodes: Sequence[Episode]) -> dict[str, float]:
  """The scores of one variant on one set of tasks.

  Args:
    episodes: including aborted ones, which are only counted.

  Returns:
    `tasks`, `episodes`, `aborted`; `success` (avg@n), `low` and `high`, the
    ends of its 95 % interval; `pass@k` for k = 2, 4, ... up to the number of
    repeats that every task has; means of `return`, `score`, `turns`,
    `tokens`, `discarded` and `format`; and sums `prompt_tokens` and
    `completion_tokens`, aborted episodes included.
  """
  played = [e for e in episodes if not e.aborted]
  tasks: dict[tuple[str, str], list[Episode]] = {}
  for episode in played:
    tasks.setdefault((episode.split, episode.task_id), []).append(episode)
  rates = [
    float(np.mean([e.success for e in group])) for group in tasks.values()
  ]
  low, high = interval(rates)
  summary = {
    "tasks": float(len(tasks)),
    "episodes": float(len(episodes)),
    "aborted": float(len(episodes) - len(played)),
    "success": _mean(rates),
    "low": low,
    "high": high,
  }
  repeats = min((len(group) for group in tasks.values()), default=0)
  for k in _powers(repeats):
    summary[f"pass@{k}"] = _mean(
      pass_at(len(group), sum(e.success for e in group), k)
      for group in tasks.values()
    )
  return summary | {
    "return": _mean(e.episode_return for e in played),
    "score": _mean(e.score for e in played),
    "turns": _mean(e.turns for e in played),
    "tokens": _mean(e.tokens for e in played),
    "discarded": _mean(e.tokens_discarded for e in played),
    "format": _mean(e.format_valid for e in played),
    "prompt_tokens": float(sum(e.prompt_tokens for e in episodes)),
    "completion_tokens": float(sum(e.completion_tokens for e in episodes)),
  }


def _powers(repeats: int) -> list[int]:
  """2, 4, 8, ... up to and including the number of repeats."""
  powers = [2**i for i in range(1, 20) if 2**i <= repeats]
  return powers if repeats < 2 or repeats in powers else [*powers, repeats]
