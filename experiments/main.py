"""Trains an agent: `python experiments/main.py --config=configs/searchqa.py`.

Presets follow a colon and any key can be set on the command line:
`--config=configs/searchqa.py:smollm2 --config.train.updates=2`.
Run the same command with the same `--workdir` again to resume.
Several processes: `docs/scaling.md`.
"""

import os
import pathlib
import time
import traceback
from typing import Any

from absl import flags
import jax
from ml_collections import config_flags

from t2po_jax.distributed import processes
from t2po_jax.experiments import command_line
from t2po_jax.setup import build, validate
from t2po_jax.training import loop
from t2po_jax.viewing import report


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
  """All flags of this program."""
  own: dict[str, Any] = {"flag_values": given}
  config_flags.DEFINE_config_file("config", lock_config=True, **own)
  flags.DEFINE_string(
    "workdir", None, "Folder of the run; default runs/<config>-<time>.", **own
  )
  flags.DEFINE_string(
    "coordinator",
    os.environ.get("JAX_COORDINATOR_ADDRESS"),
    "host:port at which process 0 listens for the others.",
    **own,
  )
  flags.DEFINE_string(
    "processes",
    os.environ.get("JAX_NUM_PROCESSES", "1"),
    "Number of processes that train together, or `auto` on a cluster that JAX "
    "detects: Cloud TPU, SLURM, Open MPI, Kubernetes.",
    **own,
  )
  flags.DEFINE_integer(
    "process_id",
    os.environ.get("JAX_PROCESS_ID"),
    "The index of this process, from 0.",
    **own,
  )
  flags.DEFINE_integer(
    "heartbeat",
    100,
    "Seconds without a heartbeat after which a process counts as dead and all "
    "others exit.",
    lower_bound=1,
    **own,
  )
  flags.mark_flag_as_required("config", given)


def train(given: flags.FlagValues) -> None:
  """Trains; a process that fails exits in a way that the others notice."""
  name = given.config.name
  workdir = given.workdir or str(
    pathlib.Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
  )
  try:
    processes.start(
      given.coordinator,
      given.processes,
      given.process_id,
      heartbeat=given.heartbeat,
    )
    config = validate.read(given.config)
    workdir = processes.gather(workdir)[0]
    build.keep_programs(config)
    loop.train(config, workdir, report=report.write)
  except command_line.REPORTED as error:
    processes.end(f"error: {error}")
  except jax.errors.JaxRuntimeError as error:
    if processes.count() == 1:
      raise
    # The error does not tell whether another process died or this one failed,
    # so all of it is logged.
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
  command_line.run(train, define_flags)


if __name__ == "__main__":
  run()
