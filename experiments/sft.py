"""Fine-tunes a model on your own chats: `experiments/sft.py`.

  python experiments/sft.py --config=configs/searchqa.py:smollm2 \
    --data=chats.jsonl --out=models/mine

Each line of the file is `{"messages": [{"role": ..., "content": ...}, ...]}`;
every assistant message is a training target. The settings are those of
`cold_start` (epochs, learning_rate, batch_size, micro_rows) and
`train.row_tokens`. The result is a Hugging Face directory: give it as
`--config.model.source` to train it further by reinforcement learning, or load
it with transformers.
"""

import pathlib
from typing import Any

from absl import flags
from ml_collections import config_flags

from t2po_jax.experiments import command_line
from t2po_jax.learning import batching, chats
from t2po_jax.setup import build, validate
from t2po_jax.training import cold_start, metrics


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
  """All flags of this program."""
  own: dict[str, Any] = {"flag_values": given}
  config_flags.DEFINE_config_file("config", lock_config=True, **own)
  flags.DEFINE_string("data", None, "JSON Lines file of chats.", **own)
  flags.DEFINE_string("out", None, "New folder for the model.", **own)
  flags.mark_flags_as_required(["config", "data", "out"], given)


def fine_tune(given: flags.FlagValues) -> None:
  """Fine-tunes and stores the model.

  Raises:
    ValueError: if the folder exists, or the settings or a chat are wrong.
  """
  out = pathlib.Path(given.out)
  if out.exists():
    raise ValueError(f"--out: {out} exists already; name a new folder")
  config = validate.read(given.config)
  agent = build.agent(config, build.benchmark(config))
  pairs = chats.read_pairs(
    given.data, agent.tokenizer, max_length=config.train.row_tokens
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
  print(f"written to {out}")


def run() -> None:
  """The command `t2po-sft`."""
  command_line.run(fine_tune, define_flags)


if __name__ == "__main__":
  run()
