"""Compiles a run's programs for devices that need not be present.

  python experiments/compile.py --config=configs/searchqa.py:qwen3-4b \
    --topology=v5e:4x4

reports for each program the memory, FLOPs and communication of a device, and a
lower bound on its time from the chip's peak rates; it fails if a program does
not fit. TPU topologies need libtpu, but no TPU; `--topology=gpu` and `cpu` mean
the local devices. No weights are read.
"""

import json
import os
import pathlib
import sys
from typing import Any

from absl import flags
import jax
from ml_collections import config_flags

from t2po_jax.experiments import command_line
from t2po_jax.setup import compile_plan, validate


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
  """All flags of this program."""
  own: dict[str, Any] = {"flag_values": given}
  config_flags.DEFINE_config_file("config", lock_config=True, **own)
  flags.DEFINE_string(
    "topology",
    "v5e:2x2",
    "E.g. v5e:4x4 or v5p:2x2x2; cpu or gpu: the local devices.",
    **own,
  )
  flags.DEFINE_enum(
    "programs",
    "all",
    ["all", "largest"],
    "Every program of the run, or the largest of each kind.",
    **own,
  )
  flags.DEFINE_list(
    "kinds",
    [],
    "Kinds of programs, by the beginning of their names; default: all.",
    **own,
  )
  flags.DEFINE_string("json", None, "File for all results.", **own)
  flags.mark_flag_as_required("config", given)


def compile_run(given: flags.FlagValues) -> None:
  """Compiles, and prints what the programs require.

  Raises:
    ValueError: if the configuration is wrong, or there is no such device.
  """
  if given.topology not in ("cpu", "gpu"):
    # Other devices of this host must not be initialised.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    # Programs for absent devices cannot be read back from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
  config = validate.read(given.config)
  plan = compile_plan.Plan(config, compile_plan.target(given.topology))
  compiled: list[compile_plan.Program] = []
  for program in plan.compile(
    every_size=given.programs == "all",
    kinds=given.kinds,
    progress=lambda name: print(f"compiling {name}", file=sys.stderr),
  ):
    compiled.append(program)
    if given.json:  # After each: some take minutes.
      text = json.dumps(compile_plan.to_json(plan, compiled), indent=2)
      pathlib.Path(given.json).write_text(text)
  print(compile_plan.table(compiled, plan.target))
  memory = plan.measured(compiled)
  print(memory.table())
  if compiled:
    most = max(compiled, key=lambda program: program.total)
    print(
      f"  by the compiler         {most.total / 1e9:.3f} ({most.name}), "
      f"{100 * (most.total / memory.total - 1):+.1f} %"
    )


def run() -> None:
  """The command `t2po-compile`."""
  command_line.run(compile_run, define_flags)


if __name__ == "__main__":
  run()
