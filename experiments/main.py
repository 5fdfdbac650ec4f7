"""Trains an agent: `python experiments/main.py --config=configs/searchqa.py`.

Presets follow a colon and any key can be set on the command line:
`--config=configs/searchqa.py:smollm2 --config.train.updates=2`.
Run the same command with the same `--workdir` again to go on after a stop.
Several processes: `docs/scaling.md`.
"""

import os
import pathlib
import time
import traceback

from absl import app, flags, logging
import jax
from ml_collections import config_flags

from t2po_jax.distributed import processes
from t2po_jax.experiments import command_line
from t2po_jax.setup import build, validate
from t2po_jax.training import loop
from t2po_jax.viewing import report

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; default runs/<config>-<time>."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  os.environ.get("JAX_COORDINATOR_ADDRESS"),
  "host:port where process 0 listens for the others.",
)
_PROCESSES = flags.DEFINE_string(
  "processes",
  os.environ.get("JAX_NUM_PROCESSES", "1"),
  "How many processes train together, or `auto` on a cluster that JAX knows: "
  "Cloud TPU, SLURM, Open MPI, Kubernetes.",
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id",
  os.environ.get("JAX_PROCESS_ID"),
  "Which of them this one is, from 0.",
)
_HEARTBEAT = flags.DEFINE_integer(
  "heartbeat",
  100,
  "Seconds without a sign of life after which all end for a dead process.",
  lower_bound=1,
)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  logging.set_verbosity(logging.WARNING)
  name = _CONFIG.value.name
  workdir = _WORKDIR.value or str(
    pathlib.Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
  )
  try:
    processes.start(
      _COORDINATOR.value,
      _PROCESSES.value,
      _PROCESS_ID.value,
      heartbeat=_HEARTBEAT.value,
    )
    config = validate.read(_CONFIG.value)
    workdir = processes.gather(workdir)[0]
    cache = build.cache_dir(config) / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    loop.train(config, workdir, report=report.write)
  except (ValueError, OSError) as error:
    processes.end(f"error: {error}")
  except jax.errors.JaxRuntimeError as error:
    if processes.count() == 1:
      raise
    # Whether another process is gone or this one is wrong, the error does not
    # say; whoever looks for the cause needs all of it.
    traceback.print_exc()
    reason = processes.first_line(error)
    processes.end(
      f"error: process {processes.index()} ended ({reason}); if another one "
      "ended first, see what it says, then start all of them again with the "
      "same --workdir to go on"
    )
  except loop.CollapseError as error:
    processes.end(f"stopped by the collapse guard: {error}")


def run() -> None:
  """The command `t2po-train`."""
  flags.mark_flag_as_required("config")
  app.run(main, flags_parser=command_line.parse_flags)


if __name__ == "__main__":
  run()
