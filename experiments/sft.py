"""Fine-tunes a model on your own chats: `experiments/sft.py`.

  python experiments/sft.py --config=configs/searchqa.py:smollm2 \
    --data=chats.jsonl --out=models/mine

Each line of the file is `{"messages": [{"role": ..., "content": ...}, ...]}`;
every message of the assistant is learned. The settings are those of
`cold_start` (epochs, learning_rate, batch_size, micro_rows) and
`train.row_tokens`. The result is a Hugging Face directory: give it as
`--config.model.source` to train it further by reinforcement learning, or load
it with transformers.
"""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from t2po_jax.experiments import command_line
from t2po_jax.learning import batching, chats
from t2po_jax.setup import build, validate
from t2po_jax.training import cold_start, metrics

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_DATA = flags.DEFINE_string("data", None, "JSON Lines file of chats.")
_OUT = flags.DEFINE_string("out", None, "New folder for the model.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  logging.set_verbosity(logging.WARNING)
  out = pathlib.Path(_OUT.value)
  try:
    if out.exists():
      raise ValueError(f"--out: {out} exists already; name a new folder")
    config = validate.read(_CONFIG.value)
    agent = build.agent(config, build.benchmark(config))
    pairs = chats.read_pairs(
      _DATA.value, agent.tokenizer, max_length=config.train.row_tokens
    )
    metrics.print_line(f"{len(pairs)} messages to learn from")
    report = {"source": config.model.source, "messages": len(pairs)}
    agent = cold_start.imitate(
      config,
      agent,
      batching.pair_segments(pairs),
      config.cold_start.epochs,
      report,
    )
    cold_start.store(out, agent, report)
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
  print(f"written to {out}")


def run() -> None:
  """The command `t2po-sft`."""
  flags.mark_flags_as_required(["config", "data", "out"])
  app.run(main, flags_parser=command_line.parse_flags)


if __name__ == "__main__":
  run()
