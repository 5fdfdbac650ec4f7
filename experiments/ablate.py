"""Compares algorithms over seeds: `experiments/ablate.py`.

  python experiments/ablate.py --config=configs/searchqa.py \
    --presets=t2po,gigpo,grpo --seeds=0,1,2 --workdir=runs/ablation

trains every preset with every seed using `experiments/main.py`, `--jobs` runs
at a time, each on its share of the cores. Presets are combined with a plus:
`rft+t2po`. Flags that start with `--config.` are passed to every run. Run the
same command again to resume: finished runs are kept, the others continue. At
the end, or immediately with `--jobs=0`, it prints a table and writes
`ablation.json` (everything) and `ablation.svg` (learning curves and tokens
saved; needs matplotlib, in the extra `dev`).

  --grid=optimizer.learning_rate=3e-4,1e-3,3e-3 --grid=train.mini_batches=1,4

repeats this for every combination of values and gives a map of where training
is stable: one row per preset and setting, and `stability.svg`. `results.py`
defines when a run has collapsed.
"""

from collections.abc import Sequence
import dataclasses
import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

from absl import flags

from t2po_jax import keys
from t2po_jax.experiments import command_line, comparison, results
from t2po_jax.setup import validate


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
  """All flags of this program."""
  own: dict[str, Any] = {"flag_values": given}
  flags.DEFINE_string(
    "config", None, "Configuration of all runs, presets after a colon.", **own
  )
  flags.DEFINE_list(
    "presets",
    None,
    "Presets to compare; each is added to the configuration.",
    **own,
  )
  flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of each preset.", **own)
  flags.DEFINE_multi_string(
    "grid", [], "An axis, key=value,value,...; may be repeated.", **own
  )
  flags.DEFINE_string("workdir", "runs/ablation", "Folder of all runs.", **own)
  flags.DEFINE_integer(
    "jobs",
    1,
    "Concurrent runs; 0 only reports on existing ones.",
    lower_bound=0,
    **own,
  )
  flags.DEFINE_string(
    "baseline",
    None,
    "Preset whose tokens the others are compared with; default: the last.",
    **own,
  )
  flags.mark_flags_as_required(["config", "presets"], given)


def _start(
  command: list[str], log: pathlib.Path, cores: set[int]
) -> subprocess.Popen[bytes]:
  """Starts one run on its cores, with its output in a file."""
  log.parent.mkdir(parents=True, exist_ok=True)

  def pin() -> None:
    os.sched_setaffinity(0, cores)

  with log.open("a") as output:
    return subprocess.Popen(
      command,
      stdout=output,
      stderr=subprocess.STDOUT,
      preexec_fn=pin if cores else None,
    )


def _split_cores(jobs: int) -> list[set[int]]:
  """The cores of each job; empty sets if they cannot be chosen."""
  if jobs == 1 or not hasattr(os, "sched_setaffinity"):
    return [set() for _ in range(jobs)]
  cores = sorted(os.sched_getaffinity(0))
  return [
    set(cores[job::jobs]) or {cores[job % len(cores)]} for job in range(jobs)
  ]


# How messages describe the type of a value.
_KINDS = {bool: "true or false", int: "a whole number", float: "a number"}


@dataclasses.dataclass(frozen=True)
class Entry:
  """One run of the plan.

  Attributes:
    preset: the preset that is compared.
    setting: its point in the grid.
    seed: seed of the run.
    folder: folder of the run.
  """

  preset: str
  setting: results.Setting
  seed: int
  folder: pathlib.Path

  def read(self) -> results.Result | None:
    """The run's result so far."""
    return results.read_run(self.preset, self.seed, self.folder, self.setting)


def parse_grid(axes: Sequence[str]) -> list[results.Setting]:
  """All settings of a grid.

  Args:
    axes: `key=value,value,...`; a leading `config.` of the key is dropped.

  Returns:
    Every combination, with the last axis varying fastest; a single empty
    setting without axes.

  Raises:
    ValueError: for an axis without values, or a duplicate key or value.
  """
  parsed: dict[str, list[str]] = {}
  for axis in axes:
    key, equals, values = axis.partition("=")
    key = key.strip().removeprefix("config.")
    chosen = [value.strip() for value in values.split(",")]
    if not key or not equals or not all(chosen):
      raise ValueError(f"--grid: found {axis!r}, expected key=value,value,...")
    if key in parsed or len(set(chosen)) < len(chosen):
      raise ValueError(
        f"--grid: found {axis!r}, expected no key and no value twice"
      )
    parsed[key] = chosen
  return [
    tuple(zip(parsed, values, strict=True))
    for values in itertools.product(*parsed.values())
  ]


def plan_runs(
  workdir: pathlib.Path,
  presets: Sequence[str],
  settings: Sequence[results.Setting],
  seeds: Sequence[int],
) -> list[Entry]:
  """Every run, in the order in which it is started.

  All seeds of a preset come first: their cold starts differ, and the other
  presets then find them in the cache.
  """
  return [
    Entry(preset, setting, seed, workdir / _name(preset, setting, seed))
    for setting in settings
    for preset in presets
    for seed in seeds
  ]


def _name(preset: str, setting: results.Setting, seed: int) -> str:
  """The folder of a run."""
  parts = [f"{key}={value}" for key, value in setting]
  return "-".join([preset, *parts, f"seed{seed}"]).replace("/", "_")


def _beside(folder: pathlib.Path, ending: str) -> pathlib.Path:
  """A file next to a run's folder, whose name may contain dots."""
  return folder.with_name(folder.name + ending)


def plan_command(
  config: str, entry: Entry, options: Sequence[str]
) -> list[str]:
  """The command line of one run."""
  joint = "," if ":" in config else ":"
  return [
    sys.executable,
    "-m",
    "t2po_jax.experiments.main",
    f"--config={config}{joint}{entry.preset.replace('+', ',')}",
    f"--workdir={entry.folder}",
    f"--config.seed={entry.seed}",
    *options,
    *(f"--config.{key}={value}" for key, value in entry.setting),
  ]


def check_plan(
  config: str,
  presets: Sequence[str],
  settings: Sequence[results.Setting],
  options: Sequence[str] = (),
) -> None:
  """Builds every configuration once, so that mistakes show immediately.

  Args:
    config: path and presets, as on the command line.
    presets: the presets to compare.
    settings: the settings of the grid.
    options: `--config.key=value` options of all runs.

  Raises:
    ValueError: for a configuration, preset, key or value that does not exist.
  """
  path, _, first = config.partition(":")
  if not pathlib.Path(path).is_file():
    raise ValueError(f"--config: there is no file {path}")
  spec = importlib.util.spec_from_file_location("config", path)
  if spec is None or spec.loader is None:
    raise ValueError(f"--config: {path} is not a Python file")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  for preset in presets:
    for setting in settings:
      built = module.get_config(f"{first},{preset.replace('+', ',')}")
      for option in options:
        key, equals, value = option.removeprefix("--config.").partition("=")
        if equals:
          _set(built, key, value, flag="--config")
      for key, value in setting:
        _set(built, key, value, flag="--grid")
      validate.read(built)


def _set(config: Any, key: str, text: str, *, flag: str) -> None:
  """Sets a dotted key from the command line's text."""
  section, name = config, key
  while "." in name and section is not None:
    head, name = name.split(".", 1)
    section = section.get(head)
    section = section if hasattr(section, "keys") else None
  if section is None or name not in section:
    near = keys.nearest(name, section.keys()) if section is not None else ""
    raise ValueError(f"{flag}: there is no key {key!r}{near}")
  kind = type(section[name])
  try:
    if kind is bool:
      section[name] = {"true": True, "false": False}[text.lower()]
    else:
      section[name] = kind(text)
  except (KeyError, ValueError):
    wanted = _KINDS.get(kind, kind.__name__)
    raise ValueError(
      f"{flag}: {key}: found {text!r}, expected {wanted}"
    ) from None


def check_commands(
  plan: Sequence[tuple[pathlib.Path, list[str]]],
) -> None:
  """Records the command of a run; rejects a folder that another one used.

  Raises:
    ValueError: if a folder contains a run of another command.
  """
  for folder, command in plan:
    note = _beside(folder, ".json")
    wanted = command[2:]
    earlier = json.loads(note.read_text()) if note.is_file() else wanted
    if earlier != wanted:
      raise ValueError(
        f"--workdir: {folder} was run as {' '.join(earlier)}, not as "
        f"{' '.join(wanted)}; name another folder"
      )
    note.write_text(json.dumps(wanted) + "\n")


def run_all(
  waiting: Sequence[tuple[pathlib.Path, list[str]]], *, jobs: int
) -> list[pathlib.Path]:
  """Runs all unfinished training runs.

  Args:
    waiting: folder and command of each run, in order.
    jobs: number of concurrent runs.

  Returns:
    The folders of the runs that failed.
  """
  waiting, free, running, failed = list(waiting), _split_cores(jobs), {}, []
  try:
    while waiting or running:
      while waiting and free:
        folder, command = waiting.pop(0)
        cores = free.pop()
        process = _start(command, _beside(folder, ".log"), cores)
        running[folder] = (process, cores, time.time())
      time.sleep(0.2)
      for folder, (process, cores, since) in list(running.items()):
        if process.poll() is None:
          continue
        del running[folder]
        free.append(cores)
        if process.returncode and not _was_stopped(folder):
          failed.append(folder)
        _print_end(folder, process.returncode, (time.time() - since) / 60)
  finally:
    for process, _, _ in running.values():
      process.terminate()
  return failed


def _was_stopped(folder: pathlib.Path) -> bool:
  """Whether the collapse guard stopped a run: a result, not a failure."""
  run = results.read_run("", 0, folder)
  return run is not None and run.finished


def _print_end(folder: pathlib.Path, code: int, minutes: float) -> None:
  """Prints how a run ended, with its last line of output if it failed."""
  print(f"{folder.name}: {minutes:.1f} min", flush=True)
  if code:
    lines = _beside(folder, ".log").read_text().strip().splitlines()
    print(f"  {''.join(lines[-1:])}", flush=True)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the program's own flags; `--config.` options are left over."""
  try:
    return flags.FLAGS(argv, known_only=True)
  except flags.Error as error:
    sys.exit(f"error: {error}")


def compare(given: flags.FlagValues, *options: str) -> None:
  """Trains unfinished runs, then reports on all finished ones.

  Args:
    given: the flags.
    *options: `--config.KEY=VALUE` options of every run.

  Raises:
    ValueError: if flags, presets or an option are wrong.
  """
  for option in options:
    if not option.startswith("--config."):
      raise ValueError(f"unexpected argument {option!r}")
  presets, workdir = given.presets, pathlib.Path(given.workdir)
  baseline = given.baseline or presets[-1]
  if baseline not in presets:
    raise ValueError(
      f"--baseline: found {baseline!r}, expected one of {presets}"
    )
  try:
    seeds = [int(seed) for seed in given.seeds]
  except ValueError:
    raise ValueError(
      f"--seeds: found {given.seeds}, expected whole numbers"
    ) from None
  for name, values in (("presets", presets), ("seeds", seeds)):
    if len(set(values)) < len(values):
      raise ValueError(f"--{name}: found {values}, expected no value twice")
  failed = []
  settings = parse_grid(given.grid)
  plan = plan_runs(workdir, presets, settings, seeds)
  workdir.mkdir(parents=True, exist_ok=True)
  if given.jobs:
    check_plan(given.config, presets, settings, options)
    failed = train_all(plan, given.config, options, jobs=given.jobs)
  runs = []
  for entry in plan:
    result = entry.read()
    if result is not None and result.finished:
      runs.append(result)
    elif result is not None:
      print(f"{entry.folder.name} is not finished: left out")
  if not runs:
    raise ValueError(f"no run under {workdir} is finished")
  comparison.report(workdir, runs, baseline)
  if failed:
    sys.exit(f"error: {len(failed)} runs failed; their logs are in {workdir}")


def train_all(
  plan: Sequence[Entry], config: str, options: Sequence[str], *, jobs: int
) -> list[pathlib.Path]:
  """Trains unfinished runs; returns the folders of those that failed.

  Raises:
    ValueError: if a folder contains a run of another command.
  """
  commands = {
    entry.folder: plan_command(config, entry, options) for entry in plan
  }
  check_commands(list(commands.items()))
  done = {
    entry.folder
    for entry in plan
    if (result := entry.read()) and result.finished
  }
  print(f"{len(done)} of {len(plan)} runs are finished", flush=True)
  waiting = [pair for pair in commands.items() if pair[0] not in done]
  return run_all(waiting, jobs=jobs)


def run() -> None:
  """The command `t2po-ablate`."""
  command_line.run(compare, define_flags, parse=parse_flags, positional=True)


if __name__ == "__main__":
  run()
