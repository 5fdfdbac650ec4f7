"""Compares runs of several algorithms, settings and seeds.

The runs of one preset in one setting of the grid are a *cell*. The results are
a table with one row per cell (means with standard deviations and intervals) and
a JSON file with everything; `drawing` makes the pictures.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from t2po_jax.experiments import drawing, results

RESAMPLES = 10_000
# Columns that compare at equal tokens: all runs of one setting are truncated to
# the tokens of the cheapest one.
AT_BUDGET = ("area", "success_at_budget")
COLUMNS = (*results.COLUMNS, *AT_BUDGET)
# Columns of the table; the others are only in the JSON file.
SHOWN = ("success", "best", "tokens", "turns", "area", "yield", "sampled")
SHOWN = (*SHOWN, "minutes")
_RATES = ("success", "return", "best", "area", "success_at_budget")


def interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
  """The 95 % bootstrap interval of a mean (percentile method).

  Args:
    values: one per seed.
    seed: seed of the resampling.

  Returns:
    Its ends; equal for a single value. With few seeds the interval is too
    narrow: three values have only ten distinct resamples.
  """
  numbers = np.asarray(values, float)
  drawn = np.random.default_rng(seed).choice(numbers, (RESAMPLES, len(numbers)))
  low, high = np.quantile(drawn.mean(axis=1), (0.025, 0.975))
  return float(low), float(high)


def difference(
  values: Sequence[float], others: Sequence[float], *, seed: int = 0
) -> tuple[float, float, float]:
  """The difference of two means, with its 95 % bootstrap interval.

  Both sides are resampled independently: runs with equal seeds share only their
  cold start.

  Args:
    values: one per seed.
    others: one per seed, to compare with.
    seed: seed of the resampling.

  Returns:
    The difference of the means and the ends of its interval.
  """
  generator = np.random.default_rng(seed)
  one, two = np.asarray(values, float), np.asarray(others, float)
  drawn = generator.choice(one, (RESAMPLES, len(one))).mean(axis=1)
  drawn = drawn - generator.choice(two, (RESAMPLES, len(two))).mean(axis=1)
  low, high = np.quantile(drawn, (0.025, 0.975))
  return float(one.mean() - two.mean()), float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Cell:
  """All runs of one preset in one setting.

  Attributes:
    preset: the preset.
    setting: the point in the grid.
    runs: one per seed.
    budget: thousands of sampled tokens to which columns `AT_BUDGET` are
      truncated.
    columns: column -> `mean`, `std` (ddof 1, 0 for one seed), `low`, `high`.
  """

  preset: str
  setting: results.Setting
  runs: tuple[results.Result, ...]
  budget: float
  columns: Mapping[str, Mapping[str, float]]

  def count(self, attribute: str) -> int:
    """Number of runs with a true attribute, e.g. `collapsed` or `alarms`."""
    return sum(bool(getattr(run, attribute)) for run in self.runs)

  def record(self) -> dict[str, Any]:
    """Everything except the runs, for JSON."""
    return {
      "preset": self.preset,
      "setting": dict(self.setting),
      "budget": self.budget,
      "seeds": [run.seed for run in self.runs],
      **{
        name: self.count(attribute)
        for name, attribute in (
          ("collapsed", "collapsed"),
          ("fell", "fell"),
          ("stopped", "stopped"),
          ("alarmed", "alarms"),
          ("rolled_back", "rollbacks"),
        )
      },
      "columns": dict(self.columns),
    }


def cells(runs: Sequence[results.Result]) -> list[Cell]:
  """The runs by setting and preset, in the order in which they appear.

  Args:
    runs: finished runs.
  """
  grouped = []
  for setting in dict.fromkeys(run.setting for run in runs):
    here = [run for run in runs if run.setting == setting]
    budget = min(run.scores["sampled"] for run in here)
    for preset in dict.fromkeys(run.preset for run in here):
      members = tuple(run for run in here if run.preset == preset)
      grouped.append(
        Cell(preset, setting, members, budget, _describe(members, budget))
      )
  return grouped


def _describe(
  runs: Sequence[results.Result], budget: float
) -> dict[str, dict[str, float]]:
  """Mean, standard deviation and interval of every column."""
  described = {}
  for column in COLUMNS:
    if column == "area":
      values = [results.mean_over_tokens(run, budget) for run in runs]
    elif column == "success_at_budget":
      values = [results.success_at(run, budget) for run in runs]
    else:
      values = [run.scores[column] for run in runs]
    low, high = interval(values)
    described[column] = {
      "mean": float(np.mean(values)),
      "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
      "low": low,
      "high": high,
    }
  return described


def table(cells: Sequence[Cell], baseline: str) -> str:
  """One row per cell as a Markdown table: mean ± standard deviation [interval].

  `collapsed` counts runs, with the numbers that fell and that the guard stopped
  in parentheses; `alarms` counts runs with an alarm of the guard.

  Args:
    cells: the cells to compare.
    baseline: the preset whose tokens the others are compared with.
  """
  keys = [key for key, _ in cells[0].setting] if cells else []
  head = ["preset", *(_short(key) for key in keys), *SHOWN]
  head += [f"tokens vs {baseline}", "collapsed", "alarms"]
  rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
  base = {cell.setting: cell for cell in cells if cell.preset == baseline}
  for cell in cells:
    texts = [cell.preset, *(value for _, value in cell.setting)]
    for column in SHOWN:
      c = cell.columns[column]
      digits = 3 if column in _RATES else 1
      mean, std, low, high = (
        f"{c[key]:.{digits}f}" for key in ("mean", "std", "low", "high")
      )
      texts.append(f"{mean} ± {std} [{low}, {high}]")
    saved = "-"
    if cell.setting in base:
      usual = base[cell.setting].columns["tokens"]["mean"]
      saved = f"{100 * (cell.columns['tokens']['mean'] / usual - 1):+.0f} %"
    total = len(cell.runs)
    collapsed = f"{cell.count('collapsed')} of {total}"
    if cell.count("collapsed"):
      collapsed += f" (fell {cell.count('fell')}"
      collapsed += f", stopped {cell.count('stopped')})"
    texts += [saved, collapsed, f"{cell.count('alarms')} of {total}"]
    rows.append("| " + " | ".join(texts) + " |")
  return "\n".join(rows)


def _short(key: str) -> str:
  """The last part of a dotted key."""
  return key.rsplit(".", 1)[-1]


def differences(cells: Sequence[Cell], baseline: str) -> list[dict[str, Any]]:
  """Compares every cell with the baseline's in the same setting.

  Args:
    cells: the cells to compare.
    baseline: the preset to compare with.

  Returns:
    For each cell of another preset, the differences of `success`, `area` (at
    equal tokens) and `sampled`, each with its interval.
  """
  base = {cell.setting: cell for cell in cells if cell.preset == baseline}
  compared = []
  for cell in cells:
    other = base.get(cell.setting)
    if other is None or other is cell:
      continue
    entry: dict[str, Any] = {
      "preset": cell.preset,
      "setting": dict(cell.setting),
      "baseline": baseline,
    }
    for column, read in {
      "success": lambda run: run.scores["success"],
      "area": lambda run, x=cell.budget: results.mean_over_tokens(run, x),
      "sampled": lambda run: run.scores["sampled"],
    }.items():
      mean, low, high = difference(
        [read(run) for run in cell.runs], [read(run) for run in other.runs]
      )
      entry[column] = {"mean": mean, "low": low, "high": high}
    compared.append(entry)
  return compared


def report(
  workdir: pathlib.Path, runs: Sequence[results.Result], base: str
) -> None:
  """Prints the table; writes the JSON file and the pictures."""
  compared = cells(runs)
  print(table(compared, base))
  record = {
    "collapse": (
      f"fell: last held-out success below {results.COLLAPSE:g} of the run's "
      "best; stopped: by the collapse guard; collapsed: either"
    ),
    "cells": [cell.record() for cell in compared],
    "differences": differences(compared, base),
    "runs": [
      dataclasses.asdict(run) | {"fell": run.fell, "collapsed": run.collapsed}
      for run in runs
    ],
  }
  (workdir / "ablation.json").write_text(json.dumps(record, indent=2) + "\n")
  try:
    drawing.curves(runs, workdir / "ablation.svg", base)
    if any(run.setting for run in runs):
      drawing.stability(runs, workdir / "stability.svg")
  except ImportError:
    print("no picture: pip install matplotlib")
