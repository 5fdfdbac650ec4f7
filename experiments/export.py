"""Writes a trained agent for other programs: `experiments/export.py`.

  python experiments/export.py --workdir=runs/mine --out=models/mine

The result is a Hugging Face directory (config, safetensors, tokenizer,
generation config) for transformers, or for `--config.model.source` here. With
`--kind=adapter` a run with `lora.rank` gives its adapters alone, as the PEFT
library stores them.
"""

import pathlib
from typing import Any

from absl import flags

from t2po_jax.experiments import command_line
from t2po_jax.training import export


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
  """All flags of this program."""
  own: dict[str, Any] = {"flag_values": given}
  flags.DEFINE_string("workdir", None, "Folder of the run.", **own)
  flags.DEFINE_string("out", None, "New folder for the model.", **own)
  flags.DEFINE_string(
    "step",
    "best",
    "Checkpoint: best, latest, or the number of an update.",
    **own,
  )
  flags.DEFINE_string("kind", "merged", "merged, or adapter.", **own)
  flags.DEFINE_string(
    "dtype", "", "float32 or bfloat16; default: as the run computed.", **own
  )
  flags.mark_flags_as_required(["workdir", "out"], given)


def write(given: flags.FlagValues) -> None:
  """Writes the model.

  Raises:
    ValueError: if there is no such run or checkpoint, or the folder exists.
  """
  out = pathlib.Path(given.out)
  update = export.export(
    pathlib.Path(given.workdir),
    out,
    step=given.step,
    kind=given.kind,
    dtype=given.dtype,
  )
  print(f"update {update} written to {out}")


def run() -> None:
  """The command `t2po-export`."""
  command_line.run(write, define_flags)


if __name__ == "__main__":
  run()
