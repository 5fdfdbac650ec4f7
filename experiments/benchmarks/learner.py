"""Speed and memory of the update, compared with other libraries.

  python experiments/benchmarks/learner.py --json=learner.json
  python experiments/benchmarks/learner.py --peers=ours,torch,tunix \\
    --tunix_python=OTHER_VENV/bin/python

There are two workloads. `padded`: rows of equal length without padding, every
position projected to the vocabulary, so that all contestants do the same matrix
products. `dialogue`: turns of an agent, with long prompts and short responses;
we pack them into rows and project only response positions, the others pad every
turn to the longest. Each contestant is a separate process; they take turns,
step by step, so that a slowdown of the machine affects all of them. Reported
are medians of `--steps` steps, and ratios of adjacent steps.

FLOPs are those that the turns require, three passes through the layers for
every token and through the vocabulary projection for response tokens: padding
does not count as work. Their rate is divided by the device's peak, from its
data sheet if known, else from a large matrix product measured in the same run.
"""

from collections.abc import Sequence
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from absl import flags
import jax
import numpy as np

from t2po_jax.experiments import command_line
from t2po_jax.models import config as model_config
from t2po_jax.models import decoder, weights


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
  """All flags of this program."""
  own: dict[str, Any] = {"flag_values": given}
  flags.DEFINE_string("model", "smollm2-135m", "Named model size.", **own)
  flags.DEFINE_string("dtype", "float32", "float32 or bfloat16.", **own)
  flags.DEFINE_integer("rows", 2, "Rows of a micro-batch.", **own)
  flags.DEFINE_integer("length", 512, "Tokens of a row in `padded`.", **own)
  flags.DEFINE_integer("turns", 16, "Turns in `dialogue`.", **own)
  flags.DEFINE_integer("prompt", 384, "Median prompt of a turn, tokens.", **own)
  flags.DEFINE_integer("response", 48, "Median response, tokens.", **own)
  flags.DEFINE_integer(
    "row_tokens", 1024, "Ours: tokens of a row in `dialogue`.", **own
  )
  flags.DEFINE_string("remat", "dots", "Ours: none, dots or full.", **own)
  flags.DEFINE_integer(
    "chunk",
    128,
    "Ours: positions projected at once; 0 keeps all logits.",
    **own,
  )
  flags.DEFINE_integer("steps", 5, "Timed steps of each workload.", **own)
  flags.DEFINE_list("peers", ["ours", "torch"], "The contestants.", **own)
  flags.DEFINE_string(
    "tunix_python", sys.executable, "Python with Tunix installed.", **own
  )
  flags.DEFINE_list(
    "memory_at",
    ["8", "512"],
    "Rows and tokens for which to ask XLA about memory.",
    **own,
  )
  flags.DEFINE_integer(
    "peak_size", 2048, "Size of the matrices of the peak rate.", **own
  )
  flags.DEFINE_string("json", "", "File for all results.", **own)


# bfloat16 FLOP/s without sparsity, from data sheets.
DATA_SHEETS = {
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
}


def dialogue_lengths(
  turns: int, prompt: int, response: int, limit: int
) -> list[tuple[int, int]]:
  """Prompt and response lengths of turns, distributed as in episodes.

  Args:
    turns: number of turns.
    prompt: median length.
    response: median length.
    limit: the most tokens of both together.

  Returns:
    Pairs; lengths are lognormal with standard deviations 0.5 and 0.6.
  """
  rng = np.random.default_rng(0)
  pairs = []
  for _ in range(turns):
    response_length = int(
      np.clip(response * rng.lognormal(0, 0.6), 2, limit // 2)
    )
    prompt_length = int(
      np.clip(prompt * rng.lognormal(0, 0.5), 2, limit - response_length)
    )
    pairs.append((prompt_length, response_length))
  return pairs


def useful_flops(
  config: model_config.ModelConfig, turns: list[tuple[int, int]]
) -> float:
  """FLOPs of one step on these turns, forward and backward.

  6 per weight of the layers and token, 6 V D per response token, and for
  attention 6 H N per pair of positions, in every layer.
  """
  shapes = decoder.shapes(config)["layers"]
  matrices = sum(
    leaf.size
    for path, leaf in jax.tree.leaves_with_path(shapes)
    if path[-1].key == "kernel"
  )
  tokens = sum(prompt + response for prompt, response in turns)
  pairs = sum((prompt + response) ** 2 for prompt, response in turns)
  responses = sum(response for _, response in turns)
  attention = config.layers * config.heads * config.head_width * pairs
  projection = config.vocab_size * config.width * responses
  return 6.0 * (matrices * tokens + projection + attention)


class Contestant:
  """A worker process and what it has measured."""

  def __init__(self, name: str, python: str, settings: dict) -> None:
    python = python if name == "tunix" else sys.executable
    worker = pathlib.Path(__file__).with_name("learner_worker.py")
    self.name = name
    self.process = subprocess.Popen(
      [python, str(worker), name, json.dumps(settings)],
      env={
        # Every step allocates gigabytes; with small pages, the kernel takes a
        # fifth of a step to provide them.
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        **os.environ,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
      },
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self.read()

  def read(self) -> dict:
    assert self.process.stdout is not None
    line = self.process.stdout.readline()
    if not line:
      raise RuntimeError(f"{self.name} ended with {self.process.wait()}")
    return json.loads(line)

  def ask(self, word: str) -> dict:
    print(word, file=self.process.stdin, flush=True)
    return self.read()

  def stop(self) -> None:
    self.process.kill()
    self.process.wait()


def make_workloads(given: flags.FlagValues, limit: int) -> dict[str, dict]:
  """Both workloads, by name."""
  rows, length = given.rows, given.length
  return {
    "padded": {
      "seed": 1,
      "turns": [(1, length - 1)] * rows,
      "row_tokens": length,
    },
    "dialogue": {
      "seed": 2,
      "turns": dialogue_lengths(
        given.turns, given.prompt, given.response, limit
      ),
      "row_tokens": limit,
    },
  }


def summarise(
  seconds: list[float],
  ours: list[float],
  turns: Sequence[tuple[int, int]],
  flops: float,
  rate: float,
) -> dict[str, float]:
  """The results of one contestant on one workload."""
  median = statistics.median(seconds)
  tokens = sum(prompt + response for prompt, response in turns)
  return {
    "seconds": median,
    "fastest": min(seconds),
    "slowest": max(seconds),
    "tokens_per_second": tokens / median,
    "utilisation": flops / median / rate,
    "ours_is_faster_by": statistics.median(
      theirs / mine for theirs, mine in zip(seconds, ours, strict=True)
    ),
  }


def measure(given: flags.FlagValues, folder: pathlib.Path) -> dict:
  """Runs everything; returns the contents of the JSON file."""
  config = model_config.named(given.model)
  params = jax.jit(decoder.Policy(config).init)(jax.random.key(0))
  weights.save(params, config, folder)
  del params
  workloads = make_workloads(given, given.row_tokens)
  settings = {
    "model": str(folder),
    "dtype": given.dtype,
    "rows": given.rows,
    "remat": given.remat,
    "chunk": given.chunk or None,
    "threads": os.cpu_count(),
    "peak_size": given.peak_size,
    "memory_shape": [int(x) for x in given.memory_at],
    "workloads": workloads,
  }
  contestants = [
    Contestant(name, given.tunix_python, settings) for name in given.peers
  ]
  try:
    return {
      "model": given.model,
      "dtype": given.dtype,
      "device": jax.devices()[0].device_kind,
      **race(given, contestants, config, workloads),
    }
  finally:
    for contestant in contestants:
      contestant.stop()


def print_progress(text: str) -> None:
  """Prints progress to stderr, apart from the table."""
  print(text, file=sys.stderr, flush=True)


def race(
  given: flags.FlagValues,
  contestants: Sequence[Contestant],
  config: model_config.ModelConfig,
  workloads: dict[str, dict],
) -> dict:
  """Lets the contestants take turns."""
  times = {name: {c.name: [] for c in contestants} for name in workloads}
  losses = {name: {} for name in workloads}
  for name in workloads:
    for contestant in contestants:
      # The first step compiles; its loss is that of the given weights.
      first = contestant.ask(name)
      losses[name][contestant.name] = first["loss"]
      print_progress(
        f"{name}, warm-up: {contestant.name} {first['seconds']:.1f} s"
      )
    for step in range(1, given.steps + 1):
      for contestant in contestants:
        seconds = contestant.ask(name)["seconds"]
        times[name][contestant.name].append(seconds)
        print_progress(
          f"{name}, step {step} of {given.steps}: {contestant.name} "
          f"{seconds:.1f} s"
        )
  ours = next(c for c in contestants if c.name == "ours")
  kind = jax.devices()[0].device_kind
  known = [v for k, v in DATA_SHEETS.items() if kind.startswith(k)]
  rate = known[0] if known else ours.ask("peak")["flops"]
  temporary = ours.ask("memory")["bytes"] if given.memory_at else {}
  memory = {c.name: c.ask("quit") for c in contestants}
  measured = {"peak_flops": rate, "xla_temporary_bytes": temporary}
  measured |= {"memory": memory, "first_loss": losses, "workloads": {}}
  for name, workload in workloads.items():
    turns = workload["turns"]
    measured["workloads"][name] = {
      contestant: summarise(
        seconds,
        times[name]["ours"],
        turns,
        useful_flops(config, turns),
        rate,
      )
      for contestant, seconds in times[name].items()
    }
  return measured


def table(measured: dict) -> str:
  """The results as a Markdown table."""
  lines = [
    f"{measured['model']}, {measured['dtype']}, {measured['device']}, peak "
    f"{measured['peak_flops'] / 1e9:.0f} GFLOP/s",
    "",
    "| workload | | s per step [min-max] | tokens/s | FLOP utilisation | ours "
    "faster by | peak memory GB |",
    "|---|---|---|---|---|---|---|",
  ]
  for name, contestants in measured["workloads"].items():
    for who, numbers in contestants.items():
      memory = measured["memory"][who]
      held = memory["device_bytes"] or memory["host_bytes"]
      lines.append(
        f"| {name} | {who} | {numbers['seconds']:.3g} "
        f"[{numbers['fastest']:.3g}-{numbers['slowest']:.3g}] "
        f"| {numbers['tokens_per_second']:.4g} "
        f"| {numbers['utilisation']:.0%} "
        f"| {numbers['ours_is_faster_by']:.2f}x | {held / 1e9:.2f} |"
      )
  for name, size in measured["xla_temporary_bytes"].items():
    lines.append(f"XLA temporaries, {name}: {size / 1e9:.3f} GB")
  return "\n".join(lines)


def compare(given: flags.FlagValues) -> None:
  """Measures all contestants and prints the table.

  Raises:
    ValueError: if a contestant is unknown or ends early.
  """
  if "ours" not in given.peers:
    raise ValueError(f"--peers: found {given.peers}, expected 'ours' in it")
  with tempfile.TemporaryDirectory() as folder:
    try:
      measured = measure(given, pathlib.Path(folder))
    except RuntimeError as error:
      raise ValueError(str(error)) from None
  print(table(measured))
  if given.json:
    text = json.dumps(measured, indent=2) + "\n"
    pathlib.Path(given.json).write_text(text)


def run() -> None:
  """Runs this program."""
  command_line.run(compare, define_flags)


if __name__ == "__main__":
  run()
