"""Compiles a run's programs for devices that need not be here.

  python experiments/compile.py --config=configs/searchqa.py:qwen3-4b \
    --topology=v5e:4x4

tells for each program what a device holds, computes and exchanges, and the
time that the chip's peaks allow at least; refuses what does not fit. TPUs need
libtpu, but no TPU; `--topology=gpu` and `cpu` mean the devices that are here.
No weight is read.
"""

import json
import os
import pathlib
import sys

from absl import app, flags, logging
import jax
from ml_collections import config_flags

from t2po_jax.experiments import command_line
from t2po_jax.setup import compile_plan, validate

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_TOPOLOGY = flags.DEFINE_string(
  "topology", "v5e:2x2", "E.g. v5e:4x4 or v5p:2x2x2; cpu or gpu: what is here."
)
_PROGRAMS = flags.DEFINE_enum(
  "programs",
  "all",
  ["all", "largest"],
  "Every program of the run, or the largest of each kind.",
)
_KINDS = flags.DEFINE_list(
  "kinds", [], "Kinds of programs, as their names begin; all by default."
)
_JSON = flags.DEFINE_string("json", None, "File for everything found.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  logging.set_verbosity(logging.WARNING)
  if _TOPOLOGY.value not in ("cpu", "gpu"):
    # A host with other devices must not wait for them.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
  try:
    config = validate.read(_CONFIG.value)
    plan = compile_plan.Plan(config, compile_plan.target(_TOPOLOGY.value))
    found: list[compile_plan.Program] = []
    for program in plan.compile(
      every_size=_PROGRAMS.value == "all",
      kinds=_KINDS.value,
      progress=lambda name: print(f"compiling {name}", file=sys.stderr),
    ):
      found.append(program)
      if _JSON.value:  # After each: some take minutes.
        text = json.dumps(compile_plan.to_json(plan, found), indent=2)
        pathlib.Path(_JSON.value).write_text(text)
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
  print(compile_plan.table(found, plan.target))
  memory = plan.measured(found)
  print(memory.table())
  if found:
    most = max(found, key=lambda program: program.total)
    print(
      f"  by the compiler         {most.total / 1e9:.3f} ({most.name}), "
      f"{100 * (most.total / memory.total - 1):+.1f} %"
    )


def run() -> None:
  """The command `t2po-compile`."""
  flags.mark_flag_as_required("config")
  app.run(main, flags_parser=command_line.parse_flags)


if __name__ == "__main__":
  run()
