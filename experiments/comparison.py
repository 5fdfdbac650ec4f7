"""What runs of several algorithms and seeds say.

A table of means with deviations and intervals, learning curves, the tokens
saved, and one JSON file with everything.
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
COLUMNS = (*SCORES, "sampled", "minutes")
# A run has collapsed if it ends below this fraction of its own best score.
COLLAPSE = 0.5
RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Result:
  """One run.

  Attributes:
    preset: what was compared.
    seed: of the run.
    scores: a number per entry of `COLUMNS`: the last evaluation; thousands of
      tokens sampled in training, whatever became of them; minutes without the
      cold start.
    curve: per evaluation the update, success and tokens.
    collapsed: whether it ended far below its best, or the guard stopped it.
    alarms: alarms of the collapse guard.
    finished: whether all updates were made, or the guard stopped it.
  """

  preset: str
  seed: int
  scores: Mapping[str, float]
  curve: tuple[tuple[float, float, float], ...]
  collapsed: bool
  alarms: int
  finished: bool


def read_run(preset: str, seed: int, folder: pathlib.Path) -> Result | None:
  """Reads what a run has written; None if it has no evaluation yet."""
  if not (folder / metrics.FILE).is_file():
    return None
  lines = metrics.read(folder / metrics.FILE)
  evaluations = [line for line in lines if "eval/success" in line]
  if not evaluations:
    return None
  settings = json.loads((folder / "config.json").read_text())
  stopped = any(line.get("guard/stopped", 0.0) for line in lines)
  alarms = int(sum(line.get("guard/alarms", 0.0) for line in lines))
  success = [line["eval/success"] for line in evaluations]
  scores = {name: evaluations[-1][key] for name, key in SCORES.items()}
  sampled = sum(line.get("sampler/slot_steps_used", 0.0) for line in lines)
  scores["sampled"] = sampled / 1000
  seconds = sum(
    value
    for line in lines
    for key, value in line.items()
    if key.startswith("seconds/") and key != "seconds/cold_start"
  )
  scores["minutes"] = seconds / 60
  return Result(
    preset=preset,
    seed=seed,
    scores=scores,
    curve=tuple(
      (line["step"], line["eval/success"], line["eval/tokens"])
      for line in evaluations
    ),
    collapsed=stopped or success[-1] < COLLAPSE * max(success),
    alarms=alarms,
    finished=stopped or lines[-1]["step"] >= settings["train.updates"],
  )


def interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
  """The 95 % bootstrap interval of a mean (percentile method).

  Args:
    values: one per seed.
    seed: of the resampling.

  Returns:
    Its ends; equal for a single value. With few seeds it is too narrow: three
    values can only be drawn in ten ways.
  """
  values = np.asarray(values, float)
  drawn = np.random.default_rng(seed).choice(values, (RESAMPLES, len(values)))
  low, high = np.quantile(drawn.mean(axis=1), (0.025, 0.975))
  return float(low), float(high)


def summarise(results: Sequence[Result]) -> dict[str, dict[str, dict]]:
  """Mean, deviation and interval per preset and column.

  Args:
    results: finished runs.

  Returns:
    preset -> column -> `mean`, `std` (ddof 1, 0 for one seed), `low`, `high`;
    and under `runs` the number of `seeds`, `collapsed` and `alarms`.
  """
  summary: dict[str, dict[str, dict]] = {}
  for preset in dict.fromkeys(result.preset for result in results):
    runs = [result for result in results if result.preset == preset]
    columns: dict[str, dict] = {}
    for column in COLUMNS:
      values = [run.scores[column] for run in runs]
      low, high = interval(values)
      columns[column] = {
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
        "low": low,
        "high": high,
      }
    columns["runs"] = {
      "seeds": len(runs),
      "collapsed": sum(run.collapsed for run in runs),
      "alarms": sum(run.alarms for run in runs),
    }
    summary[preset] = columns
  return summary


def table(summary: Mapping[str, Mapping[str, Mapping]], baseline: str) -> str:
  """The summary as a Markdown table: mean ± deviation [interval]."""
  head = ["preset", *COLUMNS, f"tokens vs {baseline}", "collapsed", "alarms"]
  rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
  for preset, columns in summary.items():
    cells = [preset]
    for column in COLUMNS:
      c = columns[column]
      digits = 3 if column in ("success", "return") else 1
      mean, std, low, high = (
        f"{c[key]:.{digits}f}" for key in ("mean", "std", "low", "high")
      )
      cells.append(f"{mean} ± {std} [{low}, {high}]")
    base = summary.get(baseline)
    saved = "-"
    if base is not None:
      change = columns["tokens"]["mean"] / base["tokens"]["mean"] - 1
      saved = f"{100 * change:+.0f} %"
    runs = columns["runs"]
    collapsed = f"{runs['collapsed']} of {runs['seeds']}"
    cells += [saved, collapsed, str(runs["alarms"])]
    rows.append("| " + " | ".join(cells) + " |")
  return "\n".join(rows)


def savings(
  results: Sequence[Result], baseline: str
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Response tokens that each preset saves against another, by update.

  Args:
    results: finished runs.
    baseline: the preset that the others are compared with.

  Returns:
    preset -> updates [n] and saved fraction [n] of the baseline's tokens, both
    means over seeds; only updates that every run of both has evaluated.
    Without the baseline: nothing. Negative where more tokens are used.
  """
  tokens = {
    preset: [
      {update: used for update, _, used in result.curve}
      for result in results
      if result.preset == preset
    ]
    for preset in dict.fromkeys(result.preset for result in results)
  }
  base = tokens.pop(baseline, None)
  if base is None:
    return {}
  saved = {}
  for preset, runs in tokens.items():
    shared = sorted(set.intersection(*map(set, (*runs, *base))))
    used, usual = (
      np.array([[run[update] for update in shared] for run in group]).mean(0)
      for group in (runs, base)
    )
    saved[preset] = np.array(shared), 1.0 - used / usual
  return saved


def draw(results: Sequence[Result], path: pathlib.Path, baseline: str) -> None:
  """Learning curves and saved tokens.

  Success and tokens are means over seeds in the band of all seeds.

  Raises:
    ImportError: without matplotlib.
  """
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(1, 3, figsize=(14, 3.6), layout="constrained")
  colours = {}
  for preset in dict.fromkeys(result.preset for result in results):
    curves = [np.array(r.curve) for r in results if r.preset == preset]
    size = min(len(curve) for curve in curves)
    stacked = np.stack([curve[:size] for curve in curves])
    for axis, column in zip(axes[:2], (1, 2), strict=True):
      values, updates = stacked[:, :, column], stacked[0, :, 0]
      (line,) = axis.plot(
        updates, values.mean(0), label=preset, color=colours.get(preset)
      )
      colours[preset] = line.get_color()
      axis.fill_between(
        updates,
        values.min(0),
        values.max(0),
        alpha=0.12,
        color=colours[preset],
      )
  for preset, (updates, saved) in savings(results, baseline).items():
    axes[2].plot(updates, 100 * saved, label=preset, color=colours[preset])
  titles = (
    "held-out success",
    "response tokens per episode",
    f"tokens saved against {baseline}, %",
  )
  for axis, title in zip(axes, titles, strict=True):
    axis.set(xlabel="update", title=title)
    axis.grid(alpha=0.3)
  axes[0].set_ylim(0, 1)
  axes[1].set_ylim(0, None)
  axes[2].axhline(0, color="black", linewidth=0.8)
  axes[0].legend(fontsize=8)
  figure.savefig(path)
  pyplot.close(figure)


def report(workdir: pathlib.Path, results: Sequence[Result], base: str) -> None:
  """Prints the table; writes the JSON file and the picture."""
  summary = summarise(results)
  print(table(summary, base))
  record = {
    "summary": summary,
    "runs": [dataclasses.asdict(result) for result in results],
  }
  (workdir / "ablation.json").write_text(json.dumps(record, indent=2) + "\n")
  try:
    draw(results, workdir / "ablation.svg", base)
  except ImportError:
    print("no picture: pip install matplotlib")
