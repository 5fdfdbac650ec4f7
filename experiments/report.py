"""Reports on runs: `experiments/report.py RUN [RUN ...]`.

Reads `metrics.jsonl` in each run's folder (or `label=folder`) and prints a
table of its evaluations. `--out=FILE.md` or `FILE.html` writes a full report:
settings that differ from the default, results with intervals over the runs of
one label, categories, curves, stage times, tokens, where exploration control
acted, alarms, commit and hardware. `--plot=FILE` draws held-out success and
tokens per episode over updates (needs matplotlib, in the extra `dev`). For an
ablation's folder, all its runs are used, with one label per preset.
"""

from collections.abc import Sequence
import pathlib
import re
from typing import Any

from absl import app, flags

from t2po_jax.experiments import command_line
from t2po_jax.training import metrics
from t2po_jax.viewing import report
from t2po_jax.viewing import runs as runs_lib


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
  """All flags of this program."""
  own: dict[str, Any] = {"flag_values": given}
  flags.DEFINE_string("plot", None, "Picture to write, e.g. curve.svg.", **own)
  flags.DEFINE_string("out", None, "Report to write, .md or .html.", **own)


COLUMNS = ("eval/success", "eval/tokens", "eval/turns", "elapsed")


def read_run(argument: str) -> tuple[str, list[dict[str, float]]]:
  """The label of a run and its metric lines that include an evaluation.

  Raises:
    ValueError: if there is no such run, or it has no evaluation.
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


def find_runs(arguments: Sequence[str]) -> list[str]:
  """Finds the runs that arguments name; an ablation's folder names several.

  Args:
    arguments: folders, optionally as `label=folder`. An ablation's folder
      contains runs named `preset-seed0`.

  Returns:
    `label=folder` for every run.
  """
  named = []
  for argument in arguments:
    label, _, folder = argument.rpartition("=")
    path = pathlib.Path(folder)
    inside = sorted(file.parent for file in path.glob(f"*/{metrics.FILE}"))
    if (path / metrics.FILE).is_file() or not inside:
      named.append(f"{label or path.name}={folder}")
      continue
    for place in inside:
      preset = re.sub(r"-seed\d+$", "", place.name)
      named.append(f"{preset}={place}")
  return named


def write_report(arguments: Sequence[str], path: pathlib.Path) -> None:
  """Writes a full report.

  Raises:
    ValueError: if the file's suffix is unknown, or there is no run.
  """
  if path.suffix not in (".md", ".html"):
    raise ValueError(f"--out: found {path.name!r}, expected .md or .html")
  blocks = report.build(runs_lib.open_runs(arguments))
  to_text = report.to_html if path.suffix == ".html" else report.to_markdown
  path.write_text(to_text(blocks), encoding="utf-8")
  print(f"report written to {path}")


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


def print_report(given: flags.FlagValues, *folders: str) -> None:
  """Prints the evaluations of runs; writes the requested files.

  Args:
    given: the flags.
    *folders: of runs or ablations, optionally as `label=folder`.

  Raises:
    ValueError: if no folder is given, or one contains no run.
  """
  if not folders:
    raise app.UsageError("name at least one run's folder")
  arguments = find_runs(folders)
  runs = [read_run(argument) for argument in arguments]
  for label, lines in runs:
    print(f"{label}\n  update  " + "  ".join(f"{c:>12}" for c in COLUMNS))
    for line in lines:
      cells = "  ".join(f"{line.get(c, float('nan')):12.3f}" for c in COLUMNS)
      print(f"  {int(line['step']):6d}  {cells}")
  if given.plot:
    draw(runs, given.plot)
  if given.out:
    write_report(arguments, pathlib.Path(given.out))


def run() -> None:
  """The command `t2po-report`."""
  command_line.run(print_report, define_flags, positional=True)


if __name__ == "__main__":
  run()
