"""Decoding speed of the sampler and other libraries, alternating in one run.

  python experiments/benchmarks/sampler.py --json=sampler.json
  python experiments/benchmarks/sampler.py --batches=8 --peers=hf_static

All decode the same model dimensions from prompts of the same length, sampling
from the full distribution at temperature 1; times exclude prefill. The Hugging
Face model has the same weights; Tunix and llama.cpp (through
`llama-batched-bench` and a GGUF file of the same model) have the same sizes.
Peers that are not installed are named and skipped. On a shared machine only
ratios within one run are meaningful, so every round runs each of them once.

`control_overhead` is the time of a step with exploration control (entropy,
top-j confidence, thinking intervention) relative to one without, minus one. The
floor is the time to read weights and live cache once per step at the bandwidth
measured in the same run.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import math
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from t2po_jax.experiments import command_line
from t2po_jax.models import config as model_config
from t2po_jax.models import decoder, weights
from t2po_jax.rollout import draw, slots
from t2po_jax.rollout import sampler as samplers

ROOT = pathlib.Path(__file__).resolve().parents[2]


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
  """All flags of this program."""
  own: dict[str, Any] = {"flag_values": given}
  flags.DEFINE_string("size", "smollm2-135m", "Named model size.", **own)
  flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "bfloat16"],
    "Dtype of weights and computation.",
    **own,
  )
  flags.DEFINE_list("batches", ["1", "8", "32"], "Batch sizes.", **own)
  flags.DEFINE_integer("prompt", 256, "Tokens of each prompt.", **own)
  flags.DEFINE_integer("tokens", 32, "Tokens decoded per run.", **own)
  flags.DEFINE_integer("chunk", 16, "Ours: tokens per device call.", **own)
  flags.DEFINE_integer("rounds", 5, "Rounds after an untimed one.", **own)
  flags.DEFINE_list(
    "peers",
    ["hf_dynamic", "hf_static", "tunix", "llama_cpp"],
    "Libraries to compare with.",
    **own,
  )
  flags.DEFINE_string("gguf", "", "llama_cpp: model file of this size.", **own)
  flags.DEFINE_string("json", "", "File for all results.", **own)


@dataclasses.dataclass(frozen=True)
class Work:
  """The work that all contestants do.

  Attributes:
    config: the model's sizes.
    dtype: name of the dtype of weights and computation.
    params: parameters in the training layout.
    weights: folder that `transformers` loads the same parameters from.
    prompts: [B, T] int32.
    tokens: tokens to decode per row.
    chunk: tokens per call of our sampler.
    gguf: for llama.cpp, the file of the same model.
  """

  config: model_config.ModelConfig
  dtype: str
  params: dict
  weights: str
  prompts: np.ndarray
  tokens: int
  chunk: int = 16
  gguf: str = ""


class Missing(Exception):
  """A peer is not installed; the message says what is missing."""


def ours(work: Work, control: slots.Control) -> Callable[[], float]:
  """Our sampler; the runners return seconds per decode step."""
  policy = decoder.Policy(work.config, dtype=jnp.dtype(work.dtype))
  rows, length = work.prompts.shape
  device = samplers.Sampler(
    policy,
    samplers.Vocabulary(
      token_bytes=[b"x"] * work.config.vocab_size,
      eos=(),
      closing=(1, 2),
      stops=("</action>",),
    ),
    control,
    slots=rows,
    max_prompt=length,
    max_response=work.tokens,
    chunk=work.chunk,
  )
  device.load(work.params)
  device.prefill(
    [(row, prompt[:-1], 0) for row, prompt in enumerate(work.prompts)]
  )
  requests = [
    samplers.Request(
      ticket=row,
      prompt=prompt,
      key=np.asarray([7, row], np.uint32),
      limit=work.tokens,
    )
    for row, prompt in enumerate(work.prompts)
  ]

  def run() -> float:
    device.assign(range(rows), requests)
    device.fetch([])  # Waits.
    start, steps = time.perf_counter(), 0
    while device.active.any():
      steps += device.decode(draw.Sampling(), 0.0)[0]
    return (time.perf_counter() - start) / steps

  return run


def hugging_face(work: Work, cache: str | None) -> Callable[[], float]:
  """`generate` of transformers, with its dynamic (None) or another cache."""
  try:
    import torch
    import transformers
  except ImportError as error:
    raise Missing(str(error)) from error
  model: Any = transformers.AutoModelForCausalLM.from_pretrained(
    work.weights, dtype=work.dtype
  ).eval()
  prompts = torch.from_numpy(work.prompts.astype(np.int64))
  stamps = []

  def stamp(tokens: Any, scores: Any, **options: Any) -> Any:
    del scores, options
    stamps.append(time.perf_counter())
    return torch.zeros(len(tokens), dtype=torch.bool)

  def run() -> float:
    stamps.clear()
    torch.manual_seed(0)
    with torch.inference_mode():
      model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=None,
        pad_token_id=0,
        max_new_tokens=work.tokens,
        cache_implementation=cache,
        stopping_criteria=transformers.StoppingCriteriaList([stamp]),
      )
    # The first token comes from the prefill.
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1)

  return run


class _Numbers:
  """A tokenizer whose text is a list of ids; Tunix needs one."""

  def encode(self, text: str) -> list[int]:
    return [int(word) for word in text.split()]

  def decode(self, ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))

  def bos_id(self) -> int:
    return 0  # Means none.

  def eos_id(self) -> int:
    return -1

  def pad_id(self) -> int:
    return 0


def tunix(work: Work) -> Callable[[], float]:
  """Tunix's vanilla sampler on its Llama model."""
  try:
    from flax import nnx
    from tunix.generate import sampler as peer
    from tunix.models.llama3 import model as llama
  except ImportError as error:
    raise Missing(str(error)) from error
  config = work.config
  if config.family != "llama":
    raise Missing(f"a model of family {config.family}")
  model = llama.Llama3(
    llama.ModelConfig(
      num_layers=config.layers,
      vocab_size=config.vocab_size,
      embed_dim=config.width,
      hidden_dim=config.mlp_width,
      num_heads=config.heads,
      head_dim=config.head_width,
      num_kv_heads=config.kv_heads,
      rope_theta=int(config.rope_theta),
      norm_eps=config.norm_eps,
      weight_tying=config.tied_embeddings,
    ),
    rngs=nnx.Rngs(0),
  )
  nnx.update(
    model,
    jax.tree.map(lambda x: x.astype(work.dtype), nnx.state(model, nnx.Param)),
  )
  length = work.prompts.shape[1]
  generate = peer.Sampler(
    model,
    _Numbers(),
    peer.CacheConfig(
      cache_size=length + work.tokens,
      num_layers=config.layers,
      num_kv_heads=config.kv_heads,
      head_dim=config.head_width,
    ),
  )
  prompts = [" ".join(map(str, prompt)) for prompt in work.prompts]
  seconds = []
  decode = generate._compiled_decode_fn

  def timed(params: Any, state: Any) -> Any:
    jax.block_until_ready(jax.tree.leaves(state))
    start = time.perf_counter()
    state = decode(params, state)
    jax.block_until_ready(jax.tree.leaves(state))
    seconds.append(time.perf_counter() - start)
    return state

  generate._compiled_decode_fn = timed

  def run() -> float:
    generate(
      prompts,
      max_generation_steps=work.tokens,
      max_prompt_length=length,
      eos_tokens=[-1],
      temperature=1.0,
      top_p=1.0,
      seed=0,
    )
    # The first token comes from the prefill.
    return seconds[-1] / (work.tokens - 1)

  return run


def llama_cpp(work: Work) -> Callable[[], float]:
  """llama.cpp's own benchmark of batched decoding."""
  program = shutil.which("llama-batched-bench")
  if program is None or not work.gguf:
    raise Missing("llama-batched-bench in the PATH, and --gguf")
  rows, length = work.prompts.shape
  command = [
    *(program, "-m", work.gguf, "-c", str(rows * (length + work.tokens))),
    *("-npp", str(length), "-ntg", str(work.tokens), "-npl", str(rows)),
    *("-t", str(os.cpu_count()), "--output-format", "jsonl"),
  ]

  def run() -> float:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1])["t_tg"] / work.tokens

  return run


PEERS: Mapping[str, Callable[[Work], Callable[[], float]]] = {
  "hf_dynamic": lambda work: hugging_face(work, None),
  "hf_static": lambda work: hugging_face(work, "static"),
  "tunix": tunix,
  "llama_cpp": llama_cpp,
}


def bandwidth(size: int) -> Callable[[], float]:
  """Reads `size` bytes; the runner returns bytes per second."""
  rows = 64
  data = jax.random.normal(jax.random.key(0), (rows, size // 4 // rows))
  read = jax.jit(lambda x: jnp.sum(x, axis=1))

  def run() -> float:
    start = time.perf_counter()
    jax.block_until_ready(read(data))
    return data.nbytes / (time.perf_counter() - start)

  return run


def step_bytes(work: Work) -> float:
  """Bytes that a decode step must read: all weights and the live cache."""
  config = work.config
  width = jnp.dtype(work.dtype).itemsize
  rows, length = work.prompts.shape
  held = length + work.tokens / 2  # On average.
  cache = 2 * config.layers * config.kv_heads * config.head_width * held * rows
  count = sum(leaf.size for leaf in jax.tree.leaves(work.params))
  return width * (count + cache)


def alternate(
  runners: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
  """Runs each contestant once per round; the first round is a warm-up."""
  seconds = {name: [] for name in runners}
  for number in range(rounds + 1):
    for name, run in runners.items():
      value = run()
      if number:
        seconds[name].append(value)
  return seconds


def measure(work: Work, peers: Sequence[str], rounds: int) -> dict:
  """All results of one batch size; see `report`."""
  missing = {}
  runners = {
    "ours": ours(work, slots.Control()),
    "ours_without_control": ours(work, slots.Control(signal="none")),
  }
  for name in peers:
    try:
      runners[name] = PEERS[name](work)
    except Missing as reason:
      missing[name] = str(reason)
  needed = step_bytes(work)
  weights_size = needed - needed % (1 << 20) + (1 << 20)
  runners["bandwidth"] = bandwidth(int(weights_size))
  seconds = alternate(runners, rounds)
  speed = statistics.median(seconds.pop("bandwidth"))
  step = {name: statistics.median(values) for name, values in seconds.items()}
  # Round by round, so that drift of a shared machine cancels out.
  overhead = statistics.median(
    on / off - 1
    for on, off in zip(
      seconds["ours"], seconds["ours_without_control"], strict=True
    )
  )
  floor = needed / speed
  rows = len(work.prompts)
  return {
    "tokens_per_s": rows / step["ours"],
    "ratio": {
      name: step[name] / step["ours"] for name in peers if name in step
    },
    "roofline_fraction": floor / step["ours"],
    "control_overhead": overhead,
    "bandwidth_gb_per_s": speed / 1e9,
    "step_ms": {
      name: {
        "median": 1e3 * step[name],
        "least": 1e3 * min(values),
        "most": 1e3 * max(values),
        "roofline_fraction": floor / step[name],
      }
      for name, values in seconds.items()
    },
    "missing": missing,
  }


def report(batch: int, numbers: dict) -> str:
  """The table of one batch size."""
  lines = [
    f"batch {batch}: {numbers['tokens_per_s']:.1f} tokens/s, exploration "
    f"control {100 * numbers['control_overhead']:+.1f} %, read bandwidth "
    f"{numbers['bandwidth_gb_per_s']:.1f} GB/s",
    f"{'':22}{'ms per step':>12}{'least':>9}{'most':>9}"
    f"{'tokens/s':>11}{'over ours':>11}{'of floor':>10}",
  ]
  first = numbers["step_ms"]["ours"]["median"]
  for name, step in numbers["step_ms"].items():
    lines.append(
      f"{name:22}{step['median']:12.2f}{step['least']:9.2f}{step['most']:9.2f}"
      f"{1e3 * batch / step['median']:11.1f}{step['median'] / first:11.2f}"
      f"{100 * step['roofline_fraction']:9.0f}%"
    )
  for name, reason in numbers["missing"].items():
    lines.append(f"{name:22}left out: needs {reason}")
  return "\n".join(lines)


def hardware() -> dict[str, str]:
  """The hardware and the versions of the libraries."""
  device = jax.devices()[0]
  info = pathlib.Path("/proc/cpuinfo")
  model = platform.processor()
  if info.is_file():
    names = [x for x in info.read_text().splitlines() if "model name" in x]
    model = names[0].split(":")[1].strip() if names else model
  commit = subprocess.run(
    ["git", "rev-parse", "--short", "HEAD"],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  return {
    "device": f"{device.platform} {device.device_kind}",
    "processor": f"{model}, {os.cpu_count()} cores",
    "commit": commit.stdout.strip(),
    "date": time.strftime("%Y-%m-%d"),
    "jax": jax.__version__,
  }


def measure_all(given: flags.FlagValues) -> dict:
  """Measures every batch size and prints the tables as they become known."""
  unknown = sorted(set(given.peers) - set(PEERS))
  if unknown:
    raise ValueError(
      f"--peers: found {unknown[0]!r}, expected some of {', '.join(PEERS)}"
    )
  if given.tokens < 2:
    raise ValueError(f"--tokens: found {given.tokens}, expected at least 2")
  config = model_config.named(given.size)
  params = jax.jit(decoder.Policy(config).init)(jax.random.key(0))
  place = hardware()
  print(", ".join(place.values()))
  print(
    f"{given.size}, {given.dtype}, prompt {given.prompt}, "
    f"{given.tokens} tokens, {given.rounds} rounds"
  )
  batches = {}
  with tempfile.TemporaryDirectory() as folder:
    if any(name.startswith("hf") for name in given.peers):
      weights.save(params, config, folder)
    for batch in map(int, given.batches):
      generator = np.random.default_rng(batch)
      shape = (batch, given.prompt)
      work = Work(
        config=config,
        dtype=given.dtype,
        params=params,
        weights=folder,
        prompts=generator.integers(1, config.vocab_size, shape, np.int32),
        tokens=given.tokens,
        chunk=given.chunk,
        gguf=given.gguf,
      )
      batches[str(batch)] = measure(work, given.peers, given.rounds)
      print("\n" + report(batch, batches[str(batch)]), flush=True)
  settings = {
    "size": given.size,
    "dtype": given.dtype,
    "prompt": given.prompt,
    "tokens": given.tokens,
    "rounds": given.rounds,
  }
  return {"hardware": place, "settings": settings, "batches": batches}


def compare(given: flags.FlagValues) -> None:
  """Measures all contestants and prints the results.

  Raises:
    ValueError: if a peer is unknown.
  """
  numbers = measure_all(given)
  assert all(
    math.isfinite(batch["tokens_per_s"])
    for batch in numbers["batches"].values()
  )
  if given.json:
    pathlib.Path(given.json).write_text(json.dumps(numbers, indent=2) + "\n")


def run() -> None:
  """Runs this program."""
  command_line.run(compare, define_flags)


if __name__ == "__main__":
  run()
