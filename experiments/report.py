"""Draws learning curves of runs: `experiments/report.py RUN [RUN ...]`.

Reads `metrics.jsonl` of each run's folder (or `label=folder`) and prints a
table of its evaluations; `--plot=FILE` draws held-out success and tokens per
episode over updates (needs matplotlib, in the extra `dev`).
"""

from collections.abc import Sequence
import pathlib
import sys

from absl import app, flags

from t2po_jax.training import metrics

_PLOT = flags.DEFINE_string("plot", None, "Picture to write, e.g. curve.svg.")

COLUMNS = ("eval/success", "eval/tokens", "eval/turns", "elapsed")


def read_run(argument: str) -> tuple[str, list[dict[str, float]]]:
  """The label of a run and its lines with an evaluation.

  Raises:
    ValueError: if there is no such run, or it holds no evaluation.
  """
  label, _, folder = argument.rpartition("=")
  path = pathlib.Path(folder)
  if not (path / metrics.FILE).is_file():
    raise ValueError(
      f"{path}: no {metrics.FILE} there, expected a run's folder"
    )
  lines = [
    line for line in metrics.read(path / metrics.FILE) if "eval/success" in line
  ]
  if not lines:
    raise ValueError(f"{path / metrics.FILE}: holds no evaluation yet")
  return label or path.name, lines


def draw(runs: Sequence[tuple[str, list[dict[str, float]]]], path: str) -> None:
  """Writes the picture."""
  try:
    from matplotlib import pyplot
  except ImportError:
    raise ValueError(
      "--plot needs matplotlib: pip install matplotlib"
    ) from None
  figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
  for axis, key, title in zip(
    axes,
    ("eval/success", "eval/tokens"),
    ("held-out success", "response tokens per episode"),
    strict=True,
  ):
    for label, lines in runs:
      axis.plot(
        [line["step"] for line in lines],
        [line[key] for line in lines],
        marker="o",
        markersize=3,
        label=label,
      )
    axis.set(xlabel="update", title=title, ylim=(0, None))
    axis.grid(alpha=0.3)
  axes[0].set_ylim(0, 1)
  axes[0].legend()
  figure.savefig(path)


def main(argv: list[str]) -> None:
  if len(argv) < 2:
    raise app.UsageError("name at least one run's folder")
  try:
    runs = [read_run(argument) for argument in argv[1:]]
    for label, lines in runs:
      print(f"{label}\n  update  " + "  ".join(f"{c:>12}" for c in COLUMNS))
      for line in lines:
        cells = "  ".join(f"{line.get(c, float('nan')):12.3f}" for c in COLUMNS)
        print(f"  {int(line['step']):6d}  {cells}")
    if _PLOT.value:
      draw(runs, _PLOT.value)
  except ValueError as error:
    sys.exit(f"error: {error}")


def run() -> None:
  """The command `t2po-report`."""
  app.run(main)


if __name__ == "__main__":
  run()
