"""Compares algorithms over seeds: `experiments/ablate.py`.

  python experiments/ablate.py --config=configs/searchqa.py \
    --presets=t2po,gigpo,grpo --seeds=0,1,2 --workdir=runs/ablation

trains every preset with every seed by `experiments/main.py`, `--jobs` of them
at the same time, each on its share of the cores. Presets that belong together
are joined by a plus: `rft+t2po`. Flags that start with `--config.` go to every
run. Start the same command again to go on after a stop: finished runs are kept,
the others continue. At the end, and with `--jobs=0` at once, it prints a table
and writes `ablation.json` (everything) and `ablation.svg` (learning curves and
tokens saved; needs matplotlib, in the extra `dev`).
"""

from collections.abc import Sequence
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time

from absl import app, flags

from t2po_jax.experiments import comparison
from t2po_jax.setup import validate


def define_flags() -> None:
  """Defines the command line; not on import, where another program reads it."""
  flags.DEFINE_string(
    "config", None, "Configuration of all runs, presets after a colon."
  )
  flags.DEFINE_list(
    "presets", None, "What is compared; each is added to the configuration."
  )
  flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of each preset.")
  flags.DEFINE_string("workdir", "runs/ablation", "Folder of all.")
  flags.DEFINE_integer(
    "jobs",
    1,
    "Runs at the same time; 0 only reports what there is.",
    lower_bound=0,
  )
  flags.DEFINE_string(
    "baseline", None, "Preset that tokens are compared with; default the last."
  )


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


def plan_command(
  config: str, preset: str, seed: int, folder: pathlib.Path, options
) -> list[str]:
  """The command line of one run."""
  joint = "," if ":" in config else ":"
  return [
    sys.executable,
    "-m",
    "t2po_jax.experiments.main",
    f"--config={config}{joint}{preset.replace('+', ',')}",
    f"--workdir={folder}",
    f"--config.seed={seed}",
    *options,
  ]


def check_presets(config: str, presets: Sequence[str]) -> None:
  """Builds every configuration once, so that a mistake shows at once.

  Raises:
    ValueError: for a configuration or preset that does not exist.
  """
  path, _, first = config.partition(":")
  if not pathlib.Path(path).is_file():
    raise ValueError(f"--config: there is no file {path}")
  spec = importlib.util.spec_from_file_location("config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  for preset in presets:
    validate.check(module.get_config(f"{first},{preset.replace('+', ',')}"))


def check_commands(
  plan: Sequence[tuple[pathlib.Path, list[str]]],
) -> None:
  """Notes what a run was started with; refuses to mix it with another.

  Raises:
    ValueError: if a folder holds a run of another command.
  """
  for folder, command in plan:
    note = folder.with_suffix(".json")
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
  """Trains everything that is not finished.

  Args:
    waiting: folder and command of each run, in order.
    jobs: runs at the same time.

  Returns:
    The folders of the runs that failed.
  """
  waiting, free, running, failed = list(waiting), _shares(jobs), {}, []
  try:
    while waiting or running:
      while waiting and free:
        folder, command = waiting.pop(0)
        cores = free.pop()
        process = _start(command, folder.with_suffix(".log"), cores)
        running[folder] = (process, cores, time.time())
      time.sleep(0.2)
      for folder, (process, cores, since) in list(running.items()):
        if process.poll() is None:
          continue
        del running[folder]
        free.append(cores)
        if process.returncode and not _was_stopped(folder):
          failed.append(folder)
        _say_end(folder, process.returncode, (time.time() - since) / 60)
  finally:
    for process, _, _ in running.values():
      process.terminate()
  return failed


def _was_stopped(folder: pathlib.Path) -> bool:
  """Whether the collapse guard ended a run: a result, not a failure."""
  found = comparison.read_run("", 0, folder)
  return found is not None and found.finished


def _say_end(folder: pathlib.Path, code: int, minutes: float) -> None:
  """Prints how a run ended; with its last line if it did not end well."""
  print(f"{folder.name}: {minutes:.1f} min", flush=True)
  if code:
    lines = folder.with_suffix(".log").read_text().strip().splitlines()
    print(f"  {''.join(lines[-1:])}", flush=True)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses our own flags; what starts with `--config.` is left over."""
  try:
    return flags.FLAGS(argv, known_only=True)
  except flags.Error as error:
    sys.exit(f"error: {error}")


def main(argv: list[str]) -> None:
  given, options = flags.FLAGS, argv[1:]
  for option in options:
    if not option.startswith("--config."):
      sys.exit(f"error: unexpected argument {option!r}")
  presets, workdir = given.presets, pathlib.Path(given.workdir)
  baseline = given.baseline or presets[-1]
  if baseline not in presets:
    sys.exit(
      f"error: --baseline: found {baseline!r}, expected one of {presets}"
    )
  try:
    seeds = [int(seed) for seed in given.seeds]
  except ValueError:
    sys.exit(f"error: --seeds: found {given.seeds}, expected whole numbers")
  for name, values in (("presets", presets), ("seeds", seeds)):
    if len(set(values)) < len(values):
      sys.exit(f"error: --{name}: found {values}, expected no value twice")
  # All seeds of a preset first: their cold starts differ, and the presets that
  # follow find them done.
  plan = [
    (preset, seed, workdir / f"{preset}-seed{seed}")
    for preset in presets
    for seed in seeds
  ]
  workdir.mkdir(parents=True, exist_ok=True)
  failed = []
  if given.jobs:
    commands = [
      (entry[2], plan_command(given.config, *entry, options)) for entry in plan
    ]
    try:
      check_presets(given.config, presets)
      check_commands(commands)
    except ValueError as error:
      sys.exit(f"error: {error}")
    done = {
      entry[2]
      for entry in plan
      if (found := comparison.read_run(*entry)) and found.finished
    }
    print(f"{len(done)} of {len(plan)} runs are finished", flush=True)
    failed = run_all(
      [pair for pair in commands if pair[0] not in done], jobs=given.jobs
    )
  found = [result for entry in plan if (result := comparison.read_run(*entry))]
  for result in found:
    if not result.finished:
      print(f"{result.preset} seed {result.seed} is not finished: left out")
  found = [result for result in found if result.finished]
  if not found:
    sys.exit(f"error: no run under {workdir} is finished")
  comparison.report(workdir, found, baseline)
  if failed:
    sys.exit(f"error: {len(failed)} runs failed; their logs are in {workdir}")


def run() -> None:
  """The command `t2po-ablate`."""
  define_flags()
  flags.mark_flags_as_required(["config", "presets"])
  app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
  run()
