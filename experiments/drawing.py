"""Pictures of a comparison; needs matplotlib, in the extra `dev`."""

from collections.abc import Sequence
import pathlib
from typing import Any

import numpy as np

from t2po_jax.experiments import results


def _presets(runs: Sequence[results.Result]) -> list[str]:
  return list(dict.fromkeys(run.preset for run in runs))


def _settings(runs: Sequence[results.Result]) -> list[results.Setting]:
  return list(dict.fromkeys(run.setting for run in runs))


def words(setting: results.Setting) -> str:
  """A setting as the title of a picture, e.g. `mini_batches=4`."""
  return " ".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in setting)


def savings(
  runs: Sequence[results.Result], baseline: str
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Response tokens that each preset saves relative to another, by update.

  Args:
    runs: finished runs of one setting.
    baseline: the preset that the others are compared with.

  Returns:
    preset -> updates [n] and saved fraction [n] of the baseline's tokens, both
    means over seeds; only updates at which every run of both was evaluated.
    Empty without the baseline; negative where more tokens are used.
  """
  tokens = {
    preset: [
      {point.update: point.tokens for point in run.curve}
      for run in runs
      if run.preset == preset
    ]
    for preset in _presets(runs)
  }
  base = tokens.pop(baseline, None)
  if base is None:
    return {}
  saved = {}
  for preset, members in tokens.items():
    shared = sorted(set.intersection(*map(set, (*members, *base))))
    used, usual = (
      np.array([[run[update] for update in shared] for run in group]).mean(0)
      for group in (members, base)
    )
    saved[preset] = np.array(shared), 1.0 - used / usual
  return saved


def curves(
  runs: Sequence[results.Result], path: pathlib.Path, baseline: str
) -> None:
  """Learning curves and saved tokens, one row of pictures per setting.

  Success and tokens are means over seeds, with a band from the least to the
  greatest; the second picture shows success against tokens sampled in training.

  Raises:
    ImportError: without matplotlib.
  """
  from matplotlib import pyplot

  settings = _settings(runs)
  figure, rows = pyplot.subplots(
    len(settings),
    4,
    figsize=(17, 3.4 * len(settings)),
    layout="constrained",
    squeeze=False,
  )
  for setting, axes in zip(settings, rows, strict=True):
    here = [run for run in runs if run.setting == setting]
    _row(here, axes, baseline)
    titles = (
      "held-out success",
      "success by sampled tokens",
      "response tokens per episode",
      f"tokens saved against {baseline}, %",
    )
    for axis, title in zip(axes, titles, strict=True):
      axis.set_title(title)
      axis.grid(alpha=0.3)
      axis.set_xlabel("update")
    axes[1].set_xlabel("thousands of tokens sampled")
    axes[0].set_ylabel(words(setting))
    axes[0].set_ylim(0, 1)
    axes[1].set_ylim(0, 1)
    axes[2].set_ylim(0, None)
    axes[3].axhline(0, color="black", linewidth=0.8)
  rows[0][0].legend(fontsize=8)
  figure.savefig(path)
  pyplot.close(figure)


def _row(runs: Sequence[results.Result], axes: Any, baseline: str) -> None:
  """The four pictures of one setting."""
  colours = {}
  for number, preset in enumerate(_presets(runs)):
    members = [run.curve for run in runs if run.preset == preset]
    size = min(len(curve) for curve in members)
    updates, success, tokens, sampled = (
      np.array([[getattr(p, name) for p in curve[:size]] for curve in members])
      for name in ("update", "success", "tokens", "sampled")
    )
    colours[preset] = colour = f"C{number % 10}"
    for axis, x, values in (
      (axes[0], updates[0], success),
      (axes[1], sampled.mean(0), success),
      (axes[2], updates[0], tokens),
    ):
      axis.plot(x, values.mean(0), label=preset, color=colour)
      axis.fill_between(
        x, values.min(0), values.max(0), alpha=0.12, color=colour
      )
  for preset, (updates, saved) in savings(runs, baseline).items():
    axes[3].plot(updates, 100 * saved, label=preset, color=colours[preset])


def stability(runs: Sequence[results.Result], path: pathlib.Path) -> None:
  """A map per preset: how runs end over the grid.

  The last key of the grid varies along x, all others together along y. Colour
  and number show the mean of the last held-out success, and below it the number
  of collapsed runs out of all.

  Raises:
    ImportError: without matplotlib.
  """
  from matplotlib import pyplot

  presets = _presets(runs)
  across = list(dict.fromkeys(run.setting[-1:] for run in runs))
  down = list(dict.fromkeys(run.setting[:-1] for run in runs))
  figure, axes = pyplot.subplots(
    1,
    len(presets),
    figsize=(1.6 + 1.3 * len(across) * len(presets), 1.8 + 0.9 * len(down)),
    layout="constrained",
    squeeze=False,
  )
  for axis, preset in zip(axes[0], presets, strict=True):
    values = np.full((len(down), len(across)), np.nan)
    for (row, column), _ in np.ndenumerate(values):
      here = [
        run
        for run in runs
        if run.preset == preset and run.setting == down[row] + across[column]
      ]
      if not here:
        continue
      values[row, column] = np.mean([run.scores["success"] for run in here])
      collapsed = sum(run.collapsed for run in here)
      axis.text(
        column,
        row,
        f"{values[row, column]:.2f}\n{collapsed}/{len(here)}",
        ha="center",
        va="center",
        fontsize=8,
      )
    axis.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axis.set_title(preset)
    axis.set_xlabel(across[0][0][0].rsplit(".", 1)[-1])
    axis.set_xticks(range(len(across)), [pair[0][1] for pair in across])
    axis.set_yticks(range(len(down)), [words(setting) for setting in down])
  figure.suptitle("last held-out success, runs that collapsed", fontsize=9)
  figure.savefig(path)
  pyplot.close(figure)
