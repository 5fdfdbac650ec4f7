"""Compares algorithms over seeds: `experiments/ablate.py`.

  python experiments/ablate.py --config=configs/searchqa.py \
    --presets=t2po,gigpo,grpo --seeds=0,1,2 --workdir=runs/ablation

trains every preset with every seed by `experiments/main.py`, `--jobs` of them
at the same time, each on its share of the cores. Presets that belong together
are joined by a plus: `rft+t2po`. Flags that start with
`--config.` go to every run. Start the same command again to go on after a
stop: finished runs are kept, the others continue. At the end, and with
`--jobs=0` at once, it prints a table and writes `ablation.json` (everything)
and `ablation.svg` (learning curves; needs matplotlib, in the extra `dev`).
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from absl import app, flags  # noqa: E402
import numpy as np  # noqa: E402

from t2po_jax import metrics  # noqa: E402

_CONFIG = flags.DEFINE_string(
  "config", None, "Configuration of all runs, presets after a colon."
)
_PRESETS = flags.DEFINE_list(
  "presets", None, "What is compared; each is added to the configuration."
)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of each preset.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/ablation", "Folder of all.")
_JOBS = flags.DEFINE_integer(
  "jobs", 1, "Runs at the same time; 0 only reports what there is."
)
_BASELINE = flags.DEFINE_string(
  "baseline", None, "Preset that tokens are compared with; default the last."
)

# Column -> metric of the last evaluation.
SCORES = {
  "success": "eval/success",
  "return": "eval/return",
  "tokens": "eval/tokens",
  "turns": "eval/turns",
}
COLUMNS = (*SCORES, "train tokens", "minutes")
# A run has collapsed if it ends below this fraction of its own best score.
COLLAPSE = 0.5
RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Result:
  """One run.

  Attributes:
    preset: what was compared.
    seed: of the run.
    scores: a number per entry of `COLUMNS`: the last evaluation; tokens that
      were sampled per training episode, discarded ones included; minutes
      without the cold start.
    curve: per evaluation the update, success and tokens.
    collapsed: whether it ended far below its best.
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
  alarms = int(sum(line.get("guard/alarms", 0.0) for line in lines))
  success = [line["eval/success"] for line in evaluations]
  scores = {name: evaluations[-1][key] for name, key in SCORES.items()}
  sampled = [
    line["train/tokens"] + line["train/tokens_discarded"]
    for line in lines
    if "train/tokens" in line
  ]
  scores["train tokens"] = float(np.mean(sampled)) if sampled else float("nan")
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
    collapsed=success[-1] < COLLAPSE * max(success),
    alarms=alarms,
    finished=lines[-1]["step"] >= settings["train.updates"]
    or (alarms > 0 and settings["guard.action"] == "stop"),
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


def draw(results: Sequence[Result], path: pathlib.Path) -> None:
  """Learning curves: the mean over seeds in the band of all seeds.

  Raises:
    ImportError: without matplotlib.
  """
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
  for preset in dict.fromkeys(result.preset for result in results):
    curves = [np.array(r.curve) for r in results if r.preset == preset]
    size = min(len(curve) for curve in curves)
    stacked = np.stack([curve[:size] for curve in curves])
    for axis, column in zip(axes, (1, 2), strict=True):
      values, updates = stacked[:, :, column], stacked[0, :, 0]
      (line,) = axis.plot(updates, values.mean(0), label=preset)
      axis.fill_between(
        updates,
        values.min(0),
        values.max(0),
        alpha=0.12,
        color=line.get_color(),
      )
  for axis, title in zip(
    axes, ("held-out success", "response tokens per episode"), strict=True
  ):
    axis.set(xlabel="update", title=title, ylim=(0, None))
    axis.grid(alpha=0.3)
  axes[0].set_ylim(0, 1)
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
    draw(results, workdir / "ablation.svg")
  except ImportError:
    print("no picture: pip install matplotlib")


def _start(command: list[str], log: pathlib.Path, cores: set[int]):
  """Starts one run on its cores, its output in a file."""
  log.parent.mkdir(parents=True, exist_ok=True)

  def pin():
    os.sched_setaffinity(0, cores)

  with log.open("a") as output:
    return subprocess.Popen(
      command,
      stdout=output,
      stderr=subprocess.STDOUT,
      preexec_fn=pin if cores else None,
    )


def _shares(jobs: int) -> list[set[int]]:
  """The cores of each job; empty sets where they cannot be chosen."""
  if jobs == 1 or not hasattr(os, "sched_setaffinity"):
    return [set() for _ in range(jobs)]
  cores = sorted(os.sched_getaffinity(0))
  return [
    set(cores[job::jobs]) or {cores[job % len(cores)]} for job in range(jobs)
  ]


def run_all(
  plan: Sequence[tuple[str, int, pathlib.Path]],
  *,
  config: str,
  options: Sequence[str],
  jobs: int,
) -> list[pathlib.Path]:
  """Trains everything in the plan that is not finished.

  Args:
    plan: preset, seed and folder of each run, in order.
    config: path of the configuration, presets after a colon.
    options: further flags of every run.
    jobs: runs at the same time.

  Returns:
    The folders of the runs that failed.
  """
  waiting = [
    entry
    for entry in plan
    if (found := read_run(*entry)) is None or not found.finished
  ]
  print(f"{len(plan) - len(waiting)} of {len(plan)} runs are finished")
  free, running, failed = _shares(jobs), {}, []
  while waiting or running:
    while waiting and free:
      preset, seed, folder = waiting.pop(0)
      command = [
        sys.executable,
        str(ROOT / "experiments" / "main.py"),
        f"--config={config}{',' if ':' in config else ':'}"
        + preset.replace("+", ","),
        f"--workdir={folder}",
        f"--config.seed={seed}",
        *options,
      ]
      cores = free.pop()
      log = folder.with_suffix(".log")
      running[folder] = (_start(command, log, cores), cores, time.time())
    time.sleep(0.2)
    for folder, (process, cores, since) in list(running.items()):
      if process.poll() is None:
        continue
      del running[folder]
      free.append(cores)
      minutes = (time.time() - since) / 60
      if process.returncode:
        failed.append(folder)
        log = folder.with_suffix(".log")
        last = log.read_text().strip().splitlines()[-1:]
        print(f"{folder.name} failed after {minutes:.1f} min: {last}")
      else:
        print(f"{folder.name} finished after {minutes:.1f} min", flush=True)
  return failed


def parse_flags(argv: list[str]) -> list[str]:
  """Parses our own flags; what starts with `--config.` is left over."""
  try:
    return flags.FLAGS(argv, known_only=True)
  except flags.Error as error:
    sys.exit(f"error: {error}")


def main(argv: list[str]) -> None:
  options = argv[1:]
  for option in options:
    if not option.startswith("--config."):
      sys.exit(f"error: unexpected argument {option!r}")
  presets, workdir = _PRESETS.value, pathlib.Path(_WORKDIR.value)
  baseline = _BASELINE.value or presets[-1]
  if baseline not in presets:
    sys.exit(
      f"error: --baseline: found {baseline!r}, expected one of {presets}"
    )
  try:
    seeds = [int(seed) for seed in _SEEDS.value]
  except ValueError:
    sys.exit(f"error: --seeds: found {_SEEDS.value}, expected whole numbers")
  # All seeds of a preset first: their cold starts differ, and the presets that
  # follow find them done.
  plan = [
    (preset, seed, workdir / f"{preset}-seed{seed}")
    for preset in presets
    for seed in seeds
  ]
  workdir.mkdir(parents=True, exist_ok=True)
  failed = []
  if _JOBS.value:
    failed = run_all(
      plan, config=_CONFIG.value, options=options, jobs=_JOBS.value
    )
  found = [result for entry in plan if (result := read_run(*entry))]
  if not found:
    sys.exit(f"error: no run under {workdir} has an evaluation")
  for result in found:
    if not result.finished:
      print(f"{result.preset} seed {result.seed} is not finished")
  report(workdir, found, baseline)
  if failed:
    sys.exit(f"error: {len(failed)} runs failed; their logs are in {workdir}")


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "presets"])
  app.run(main, flags_parser=parse_flags)
