"""Writes a trained agent for other programs: `experiments/export.py`.

  python experiments/export.py --workdir=runs/mine --out=models/mine

The result is a Hugging Face directory (config, safetensors, tokenizer,
generation config) for transformers, or for `--config.model.source` here. With
`--kind=adapter` a run with `lora.rank` gives its adapters alone, as the PEFT
library stores them.
"""

import pathlib
import sys

from absl import app, flags, logging

from t2po_jax.training import export

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_OUT = flags.DEFINE_string("out", None, "New folder for the model.")
_STEP = flags.DEFINE_string(
  "step", "best", "Checkpoint: best, latest, or the number of an update."
)
_KIND = flags.DEFINE_string("kind", "merged", "merged, or adapter.")
_DTYPE = flags.DEFINE_string(
  "dtype", "", "float32 or bfloat16; default: as the run computed."
)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  logging.set_verbosity(logging.WARNING)
  out = pathlib.Path(_OUT.value)
  try:
    update = export.export(
      pathlib.Path(_WORKDIR.value),
      out,
      step=_STEP.value,
      kind=_KIND.value,
      dtype=_DTYPE.value,
    )
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
  print(f"update {update} written to {out}")


def run() -> None:
  """The command `t2po-export`."""
  flags.mark_flags_as_required(["workdir", "out"])
  app.run(main)


if __name__ == "__main__":
  run()
