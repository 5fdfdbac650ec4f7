"""Writes a trained agent for other programs: `experiments/export.py`.

  python experiments/export.py --workdir=runs/mine --out=models/mine
  python experiments/export.py --workdir=runs/mine --out=models/mine \\
    --push=my-name/my-agent

The result is a Hugging Face directory (config, safetensors, tokenizer,
generation config) for transformers, or for `--config.model.source` here. With
`--kind=adapter`, only the adapters of a run with `lora.rank` are written, in
the format of the PEFT library. `--push` uploads the folder to the Hugging Face
hub, as a private repository unless `--public` is given; the token is read from
HF_TOKEN. Without `--workdir`, an existing folder is uploaded.
"""

import pathlib
from typing import Any

from absl import flags

from t2po_jax.experiments import command_line
from t2po_jax.training import export, publish


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
  """All flags of this program."""
  own: dict[str, Any] = {"flag_values": given}
  flags.DEFINE_string(
    "workdir", None, "Folder of the run; omit it to only push --out.", **own
  )
  flags.DEFINE_string("out", None, "New folder for the model.", **own)
  flags.DEFINE_string(
    "step",
    "best",
    "Checkpoint: best, latest, or the number of an update.",
    **own,
  )
  flags.DEFINE_string("kind", "merged", "merged or adapter.", **own)
  flags.DEFINE_string(
    "dtype", "", "float32 or bfloat16; default: that of the run.", **own
  )
  flags.DEFINE_string(
    "push",
    "",
    "OWNER/NAME of a repository on the Hugging Face hub to upload to.",
    **own,
  )
  flags.DEFINE_bool("public", False, "Whether the repository is public.", **own)
  flags.mark_flag_as_required("out", given)


def write(given: flags.FlagValues) -> None:
  """Writes the model, and uploads it if requested.

  Raises:
    ValueError: if there is no such run or checkpoint, the folder exists, or
      the hub rejects the upload.
    OSError: if the folder cannot be written.
  """
  out = pathlib.Path(given.out)
  if given.push:
    publish.check(given.push)  # Before anything is written.
  elif given.workdir is None:
    raise ValueError("--workdir: found none; name the folder of a run")
  if given.workdir is not None:
    update = export.export(
      pathlib.Path(given.workdir),
      out,
      step=given.step,
      kind=given.kind,
      dtype=given.dtype,
    )
    print(f"update {update} written to {out}", flush=True)
  if given.push:
    print(publish.push(out, given.push, public=given.public))


def run() -> None:
  """The command `t2po-export`."""
  command_line.run(write, define_flags)


if __name__ == "__main__":
  run()
