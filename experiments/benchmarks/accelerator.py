"""Everything worth measuring on a borrowed accelerator, in a few minutes.

  python experiments/benchmarks/accelerator.py --minutes=8 --json=FILE

runs its parts one after the other, each in a separate process and within its
share of the time: the device and its peak rates (`facts`), agreement with a CPU
(`parity`), decoding (`sampler`), the update (`learner`), PyTorch and vLLM on
the same work (`torch`, `vllm`), and training for the remaining minutes
(`train`). The file is written after each measurement, so an interrupted run
keeps its results; `--parts` selects parts. Weights are random and nothing is
downloaded. It is long because it is meant to be copied as a single file.

Besides a stock image with jax, flax, optax, transformers, sentencepiece and
absl it needs wheels of 2.8 MB in total: ml-collections, gguf, tensorboardX,
PyStemmer and rich (with markdown-it-py, mdurl and pygments); flax includes
orbax-checkpoint.
"""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from t2po_jax import types

# Parts run one after the other, and PyTorch needs memory as well.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from absl import flags  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from t2po_jax.distributed import sharding  # noqa: E402
from t2po_jax.experiments import command_line  # noqa: E402
from t2po_jax.learning import (  # noqa: E402
  batching,
  learner,
  objectives,
  optimizers,
)
from t2po_jax.models import config as model_config  # noqa: E402
from t2po_jax.models import decoder  # noqa: E402
from t2po_jax.rollout import draw  # noqa: E402
from t2po_jax.rollout import sampler as samplers  # noqa: E402
from t2po_jax.rollout import slots as slots_lib  # noqa: E402
from t2po_jax.setup import roofline  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Part -> its share of the time; training takes what remains.
SHARES = {
  "facts": 0.06,
  "parity": 0.14,
  "sampler": 0.32,
  "learner": 0.2,
  "torch": 0.1,
  "vllm": 0.08,
  "train": 0.1,
}


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
  """All flags of this program."""
  own: dict[str, Any] = {"flag_values": given}
  flags.DEFINE_float("minutes", 8.0, "Most minutes in total.", **own)
  flags.DEFINE_string("json", None, "File for all measurements.", **own)
  flags.DEFINE_list("parts", list(SHARES), "What to measure.", **own)
  flags.DEFINE_bool("tiny", False, "Tiny sizes, to try it on a CPU.", **own)
  flags.DEFINE_string(
    "only", "", "Run this part in this process, for --seconds.", **own
  )
  flags.DEFINE_float("seconds", 60.0, "Time for --only.", **own)
  flags.mark_flag_as_required("json", given)


Write = Callable[[dict[str, Any]], None]


class Clock:
  """The remaining time, and the longest measurement so far."""

  def __init__(self, seconds: float) -> None:
    self._end = time.perf_counter() + seconds
    self._longest = 0.0

  def left(self) -> float:
    return self._end - time.perf_counter()

  def each(self, items: Iterable[Any]) -> Iterator[Any]:
    """Yields items while the longest so far fits the remaining time."""
    for item in items:
      if self.left() < max(self._longest, 1.0):
        return
      start = time.perf_counter()
      yield item
      self._longest = max(self._longest, time.perf_counter() - start)


def sizes(tiny: bool) -> dict[str, model_config.ModelConfig]:
  """The models to measure."""
  if tiny:
    return {"nano": model_config.named("nano")}
  return {n: model_config.named(n) for n in ("smollm2-135m", "qwen3-4b")}


def random_params(
  shape: model_config.ModelConfig, dtype: jnp.dtype
) -> dict[str, Any]:
  """Random parameters, leaf by leaf, to limit memory."""

  def fill(number: int, path: Any, leaf: Any) -> jax.Array:
    if path[-1].key not in ("kernel", "table"):
      return jnp.ones(leaf.shape, jnp.float32)
    noise = jax.random.normal(jax.random.key(number), leaf.shape, dtype)
    return noise * jnp.asarray(leaf.shape[-1] ** -0.5, dtype)

  leaves, tree = jax.tree.flatten_with_path(decoder.shapes(shape))
  made = [
    jax.jit(fill, static_argnums=(0, 1, 2))(n, path, leaf)
    for n, (path, leaf) in enumerate(leaves)
  ]
  return jax.tree.unflatten(tree, made)


def seconds_of(run: Callable[[], Any], times: int = 5) -> float:
  """The median seconds of a call after a first, untimed one."""
  jax.block_until_ready(run())
  seconds = []
  for _ in range(times):
    start = time.perf_counter()
    jax.block_until_ready(run())
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds)


def facts(clock: Clock, write: Write, tiny: bool) -> None:
  """Name, memory, matrix-product and copy rates of the first device."""
  del clock
  device = jax.devices()[0]
  chip = roofline.of_device(device)
  measured: dict[str, Any] = {
    "device": device.device_kind,
    "devices": jax.device_count(),
    "platform": device.platform,
    "memory_gb": (device.memory_stats() or {}).get("bytes_limit", 0) / 1e9,
    "chip": chip and dataclasses.asdict(chip),
    "jax": jax.__version__,
    "date": time.strftime("%Y-%m-%d"),
    "commit": commit(),
  }
  write(measured)
  side = 256 if tiny else 8192
  for dtype in (jnp.bfloat16, jnp.float32):
    x = jnp.ones((side, side), dtype)
    product = jax.jit(lambda x: x @ x)
    taken = seconds_of(lambda product=product, x=x: product(x))
    measured[f"matrix_tflops_{jnp.dtype(dtype).name}"] = (
      2 * side**3 / taken / 1e12
    )
    write(measured)
  data = jnp.ones(2**18 if tiny else 2**29, jnp.float32)
  copy = jax.jit(lambda x: x + 1)
  read = jax.jit(jnp.sum)
  measured["copy_gb_per_s"] = (
    2 * data.nbytes / seconds_of(lambda: copy(data)) / 1e9
  )
  measured["read_gb_per_s"] = data.nbytes / seconds_of(lambda: read(data)) / 1e9
  write(measured)


def commit() -> str:
  """The commit of this checkout, empty without git."""
  with contextlib.suppress(OSError):
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()
  return ""


# Wide enough for every kernel.
PARITY = model_config.ModelConfig(
  "qwen3", 512, 256, 2, 4, 2, 64, 512, qk_norm=True
)


def parity(clock: Clock, write: Write, tiny: bool) -> None:
  """Logits, log-probs and gradients against a CPU; rollouts by slot counts."""
  rows, length = 4, 128 if tiny else 512
  key = jax.random.key(1)
  tokens = jax.random.randint(key, (rows, length), 1, PARITY.vocab_size)
  positions = jnp.tile(jnp.arange(length) % 100, (rows, 1))
  segments = 1 + jnp.tile(jnp.arange(length) // 100, (rows, 1))

  def measure(
    device: types.Device, dtype: Any, kind: str
  ) -> tuple[Any, Any, np.ndarray]:
    policy = decoder.Policy(PARITY, dtype=dtype, attention=kind)

    def score(
      params: types.Params,
      tokens: types.Array,
      positions: types.Array,
      segments: types.Array,
    ) -> tuple[types.Array, tuple[types.Array, types.Array]]:
      hidden = policy.hidden(params, tokens, positions, segments)
      logits = policy.logits(params, hidden)
      chosen = jax.nn.log_softmax(logits)[:, :-1]
      chosen = jnp.take_along_axis(chosen, tokens[:, 1:, None], -1)
      return jnp.mean(chosen), (logits, chosen)

    params = decoder.Policy(PARITY).init(jax.random.key(0))
    arrays = jax.device_put((params, tokens, positions, segments), device)
    with jax.default_matmul_precision("highest"):
      run = jax.jit(jax.value_and_grad(score, has_aux=True))
      (_, (logits, chosen)), gradient = run(*arrays)
    leaves = [np.ravel(np.float64(x)) for x in jax.tree.leaves(gradient)]
    return np.float64(logits), np.float64(chosen), np.concatenate(leaves)

  wanted = measure(jax.devices("cpu")[0], jnp.float32, "einsum")
  measured: dict[str, Any] = {}
  cases = [
    (dtype, kind)
    for dtype in (jnp.float32, jnp.bfloat16)
    for kind in ("auto", "einsum")
    if kind == "auto" or not tiny  # A CPU has no other.
  ]
  for dtype, kind in clock.each(cases):
    here = measure(jax.devices()[0], dtype, kind)
    measured[f"{jnp.dtype(dtype).name} {kind}"] = {
      "logits_most": float(np.abs(here[0] - wanted[0]).max()),
      "logprobs_most": float(np.abs(here[1] - wanted[1]).max()),
      "gradient_relative": float(
        np.linalg.norm(here[2] - wanted[2]) / np.linalg.norm(wanted[2])
      ),
    }
    write(measured)
  params = decoder.Policy(PARITY).init(jax.random.key(0))
  dtypes = (jnp.float32, jnp.bfloat16)[: 1 if tiny else 2]
  for dtype in clock.each(dtypes):
    policy = decoder.Policy(PARITY, dtype=dtype)
    few, many = (rollout(policy, params, slots) for slots in (2, 8))
    equal = [np.array_equal(a, b) for a, b in zip(few, many, strict=True)]
    name = f"rollouts_equal_{jnp.dtype(dtype).name}"
    measured[name] = float(np.mean(equal))
    write(measured)


def rollout(
  policy: decoder.Policy, params: dict[str, Any], slots: int
) -> list[np.ndarray]:
  """Eight responses, decoded on a given number of slots."""
  device = make_sampler(policy, slots, prompt=16, tokens=24)
  device.load(params)
  prompts = np.random.default_rng(0).integers(1, 500, (8, 16), np.int32)
  responses = []
  for first in range(0, 8, slots):
    rows = range(slots)
    mine = prompts[first : first + slots]
    device.prefill([(row, mine[row][:-1], 0) for row in rows])
    device.assign(rows, [request(first + r, mine[r], 24) for r in rows])
    while device.active.any():
      device.decode(draw.Sampling(), 0.0)
    responses += [answer.attempt.tokens for answer in device.fetch(rows)]
  return responses


def request(number: int, prompt: np.ndarray, limit: int) -> samplers.Request:
  """A request, with a random key derived from its number."""
  return samplers.Request(
    ticket=number,
    prompt=prompt,
    key=np.asarray([7, number], np.uint32),
    limit=limit,
  )


def make_sampler(
  policy: decoder.Policy,
  slots: int,
  *,
  prompt: int,
  tokens: int,
  signal: str = "calibrated",
) -> samplers.Sampler:
  """A sampler whose responses end only at their length limit."""
  return samplers.Sampler(
    policy,
    samplers.Vocabulary(
      token_bytes=[b"x"] * policy.config.vocab_size,
      eos=(),
      closing=(1, 2),
      stops=("</action>",),
    ),
    slots_lib.Control(signal=signal),
    slots=slots,
    max_prompt=prompt,
    max_response=tokens,
    chunk=32,
  )


def sampler(clock: Clock, write: Write, tiny: bool) -> None:
  """Tokens per second by batch, with and without exploration control."""
  prompt, tokens = (16, 8) if tiny else (256, 128)
  batches = (2,) if tiny else (128, 8, 32, 512, 1)
  measured: dict[str, Any] = {"prompt": prompt, "tokens": tokens}
  models = {
    name: (shape, random_params(shape, jnp.bfloat16))
    for name, shape in clock.each(sizes(tiny).items())
  }
  cases = [
    (batch, name, signal)
    for batch in batches
    for name in models
    for signal in ("calibrated", "none")
    if signal == "calibrated" or batch in (2, 8, 128)
  ]
  chip = roofline.of_device(jax.devices()[0])
  for batch, name, signal in clock.each(cases):
    shape, params = models[name]
    policy = decoder.Policy(shape, dtype=jnp.bfloat16)
    device = make_sampler(
      policy, batch, prompt=prompt, tokens=tokens, signal=signal
    )
    device.load(params)
    words = np.arange(1, prompt + 1, dtype=np.int32)
    device.prefill([(0, words[:-1], 0)])
    device.fork([(0, row) for row in range(1, batch)])
    requests = [request(row, words, tokens) for row in range(batch)]
    device.warm_up([draw.Sampling()], kinds=("decode",))

    def run(
      device: samplers.Sampler = device, requests: Any = requests
    ) -> float:
      device.assign(range(len(requests)), requests)
      device.fetch([])  # Waits.
      start, steps = time.perf_counter(), 0
      while device.active.any():
        steps += device.decode(draw.Sampling(), 0.0)[0]
      return (time.perf_counter() - start) / steps

    run()
    step = statistics.median(run() for _ in range(3))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    held = batch * (prompt + tokens / 2)
    cache = 2 * shape.layers * shape.kv_heads * shape.head_width * held
    least = 2 * (count + cache)
    measured[f"{name} batch {batch} {signal}"] = {
      "tokens_per_s": batch / step,
      "step_ms": 1e3 * step,
      "bytes": least,
      # Relative to the data sheet; None on an unknown device.
      "roofline_fraction": chip and least / chip.bandwidth / step,
    }
    for one in batches:
      with_control = measured.get(f"{name} batch {one} calibrated")
      without = measured.get(f"{name} batch {one} none")
      if with_control and without:
        measured[f"{name} batch {one} control_overhead"] = (
          with_control["step_ms"] / without["step_ms"] - 1
        )
    write(measured)


def dialogues(turns: int, row: int) -> list[tuple[int, int]]:
  """Lengths of prompts and responses, distributed as in episodes."""
  rng = np.random.default_rng(0)
  pairs = []
  for _ in range(turns):
    response = int(np.clip(row / 20 * rng.lognormal(0, 0.6), 2, row // 4))
    prompt = int(np.clip(row / 4 * rng.lognormal(0, 0.5), 2, row - response))
    pairs.append((prompt, response))
  return pairs


def useful_flops(
  shape: model_config.ModelConfig, pairs: list[tuple[int, int]]
) -> float:
  """FLOPs that turns require: 6 per weight and token, responses projected."""
  layers = jax.tree.leaves(decoder.shapes(shape)["layers"])
  matrices = sum(leaf.size for leaf in layers if len(leaf.shape) == 3)
  tokens, responses = (sum(map(f, pairs)) for f in (sum, lambda p: p[1]))
  square = sum(sum(pair) ** 2 for pair in pairs)
  attention = shape.layers * shape.heads * shape.head_width * square
  return 6.0 * (
    matrices * tokens + shape.vocab_size * shape.width * responses + attention
  )


def work(tiny: bool) -> tuple[model_config.ModelConfig, str, int, int, int]:
  """Model, its name, tokens per row, rows per micro-batch, turns per step."""
  if tiny:
    return model_config.named("nano"), "nano", 64, 2, 6
  return model_config.named("smollm2-135m"), "smollm2-135m", 2048, 16, 256


def learn(
  kind: str, remat: str, tiny: bool
) -> tuple[Callable[[], Any], list[tuple[int, int]]]:
  """An optimizer step on packed turns, and their lengths."""
  shape, _, row, rows, turns = work(tiny)
  pairs = dialogues(turns, row)
  rng, segments = np.random.default_rng(1), []
  for number, (prompt, response) in enumerate(pairs):
    words = rng.integers(1, shape.vocab_size, prompt + response).astype(
      np.int32
    )
    index = np.arange(prompt - 1, prompt + response - 1, dtype=np.int32)
    segments.append(
      batching.Segment(
        tokens=words,
        index=index,
        targets=words[index + 1],
        mask=np.ones(response, np.float32),
        turn=np.full(response, number, np.int32),
        advantages=np.full(response, rng.normal(), np.float32),
        logprobs=np.full(response, -10.0, np.float32),
      )
    )
  policy = decoder.Policy(
    shape, dtype=jnp.bfloat16, remat=remat, attention=kind
  )
  trainer = learner.Learner(
    policy,
    decoder.logical_axes(decoder.shapes(shape)),
    sharding.create_mesh(devices=jax.devices()[:1]),
    optimizer=optimizers.OptimizerConfig(learning_rate=1e-6),
    objective=objectives.PolicyObjective(),
    rows=rows,
  )
  packed = batching.pack(segments, lengths=[row], rows=rows)
  state = [trainer.init_state(random_params(shape, jnp.float32))]

  def step() -> dict[str, types.Array]:
    state[0], metrics = trainer.update(state[0], packed.batches)
    return metrics

  return step, pairs


def learner_part(clock: Clock, write: Write, tiny: bool) -> None:
  """Tokens per second and model FLOPs utilisation of the update."""
  shape, name, *_ = work(tiny)
  chip = roofline.of_device(jax.devices()[0])
  measured: dict[str, Any] = {"model": name}
  cases = [("auto", "dots"), ("einsum", "dots"), ("auto", "none")]
  cases = cases[: 1 if tiny else None]
  for kind, remat in clock.each(cases):
    step, pairs = learn(kind, remat, tiny)
    taken = seconds_of(step, 3)
    needed = useful_flops(shape, pairs)
    measured[f"attention {kind}, remat {remat}"] = {
      "tokens_per_s": sum(map(sum, pairs)) / taken,
      "step_s": taken,
      "useful_tflops": needed / taken / 1e12,
      "mfu": chip and needed / taken / chip.flops,
    }
    write(measured)


def torch_part(clock: Clock, write: Write, tiny: bool) -> None:
  """PyTorch and Transformers on the same turns, padded, and decoding."""
  try:
    import torch
    import transformers
  except ImportError as error:
    write({"missing": str(error)})
    return
  if not tiny and not torch.cuda.is_available():
    write({"missing": "PyTorch sees no GPU"})
    return
  shape, name, row, rows, turns = work(tiny)
  device = "cuda" if torch.cuda.is_available() else "cpu"
  measured: dict[str, Any] = {"model": name, "torch": torch.__version__}
  model: Any = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(**llama_keys(shape))
  )
  model = model.to(device)
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
  pairs = dialogues(turns, row)

  def step() -> float:
    start = time.perf_counter()
    optimizer.zero_grad()
    for first in range(0, turns, rows):
      some = pairs[first : first + rows]
      longest = max(map(sum, some))
      words = torch.ones((len(some), longest), dtype=torch.long, device=device)
      there = torch.zeros_like(words)
      for line, pair in enumerate(some):
        there[line, : sum(pair)] = 1
      with torch.autocast(device, torch.bfloat16):
        logits = model(words, attention_mask=there).logits
      chosen = torch.log_softmax(logits.float(), -1)[..., 1]
      (chosen * there).mean().backward()
    optimizer.step()
    if device == "cuda":
      torch.cuda.synchronize()
    return time.perf_counter() - start

  step()
  taken = statistics.median(step() for _ in range(3))
  measured["train"] = {
    "tokens_per_s": sum(map(sum, pairs)) / taken,
    "step_s": taken,
  }
  write(measured)
  model = model.to(torch.bfloat16).eval()
  prompt, tokens = (16, 8) if tiny else (256, 128)
  for batch in clock.each((2,) if tiny else (128, 32, 8)):
    words = torch.ones((batch, prompt), dtype=torch.long, device=device)

    def generate(count: int, words: Any = words) -> float:
      start = time.perf_counter()
      with torch.no_grad():
        model.generate(
          words,
          max_new_tokens=count,
          min_new_tokens=count,
          do_sample=True,
          attention_mask=torch.ones_like(words),
          pad_token_id=0,
        )
      if device == "cuda":
        torch.cuda.synchronize()
      return time.perf_counter() - start

    generate(1)
    # Without the time of the prompt.
    taken = (generate(tokens) - generate(1)) / (tokens - 1)
    measured[f"decode batch {batch}"] = {
      "tokens_per_s": batch / taken,
      "step_ms": 1e3 * taken,
    }
    write(measured)


def llama_keys(shape: model_config.ModelConfig) -> dict[str, Any]:
  """The same sizes for Transformers."""
  return {
    "vocab_size": shape.vocab_size,
    "hidden_size": shape.width,
    "intermediate_size": shape.mlp_width,
    "num_hidden_layers": shape.layers,
    "num_attention_heads": shape.heads,
    "num_key_value_heads": shape.kv_heads,
    "head_dim": shape.head_width,
    "tie_word_embeddings": shape.tied_embeddings,
  }


def vllm_part(clock: Clock, write: Write, tiny: bool) -> None:
  """vLLM's decoding with random weights of the same sizes; never run so far."""
  del clock
  try:
    import vllm
  except ImportError as error:
    write({"missing": str(error)})
    return
  shape, name, *_ = work(tiny)
  with tempfile.TemporaryDirectory() as folder:
    keys = llama_keys(shape) | {
      "model_type": "llama",
      "architectures": ["LlamaForCausalLM"],
      "torch_dtype": "bfloat16",
      "max_position_embeddings": 1024,
    }
    (pathlib.Path(folder) / "config.json").write_text(json.dumps(keys))
    model = vllm.LLM(
      folder,
      load_format="dummy",
      skip_tokenizer_init=True,
      max_model_len=512,
    )
    measured: dict[str, Any] = {"model": name, "vllm": vllm.__version__}
    for batch in (128, 32, 8):
      prompts = [{"prompt_token_ids": [1] * 256} for _ in range(batch)]

      def run(count: int, prompts: Any = prompts) -> float:
        sampling = vllm.SamplingParams(
          max_tokens=count, min_tokens=count, detokenize=False
        )
        start = time.perf_counter()
        model.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start

      run(2)
      taken = (run(129) - run(1)) / 128
      measured[f"decode batch {batch}"] = {
        "tokens_per_s": batch / taken,
        "step_ms": 1e3 * taken,
      }
      write(measured)


def train(clock: Clock, write: Write, tiny: bool) -> None:
  """Search QA as configured, then with a larger model, until time is up."""
  runs = {
    "searchqa": ["--config=configs/searchqa.py"],
    "searchqa, smollm2-135m from scratch": [
      "--config=configs/searchqa.py",
      "--config.model.size=smollm2-135m",
      "--config.model.dtype=bfloat16",
      "--config.cold_start.learning_rate=5e-4",
    ],
  }
  if tiny:
    runs = {"smoke": ["--config=configs/smoke.py", "--config.train.updates=1"]}
  measured: dict[str, Any] = {}
  for number, (name, arguments) in enumerate(runs.items()):
    seconds = clock.left() / (len(runs) - number)
    with tempfile.TemporaryDirectory() as folder:
      command = [sys.executable, str(ROOT / "experiments" / "main.py")]
      command += [*arguments, f"--workdir={folder}/run"]
      command += [f"--config.cache_dir={folder}/cache"]
      reason = run_for(command, seconds)
      path = pathlib.Path(folder) / "run" / "metrics.jsonl"
      lines = path.read_text().splitlines() if path.is_file() else []
      measured[name] = {
        "ended": reason,
        "metrics": list(map(json.loads, lines)),
      }
    write(measured)


def run_for(command: list[str], seconds: float) -> str:
  """Runs a program with a time limit; returns how it ended, in words."""
  try:
    done = subprocess.run(
      command,
      cwd=ROOT,
      timeout=max(seconds, 1.0),
      env={**os.environ, "PYTHONPATH": str(ROOT)},
      stdout=sys.stderr,
    )
  except subprocess.TimeoutExpired:
    return "time was up"
  return "done" if done.returncode == 0 else f"failed with {done.returncode}"


PARTS: dict[str, Callable[[Clock, Write, bool], None]] = {
  "facts": facts,
  "parity": parity,
  "sampler": sampler,
  "learner": learner_part,
  "torch": torch_part,
  "vllm": vllm_part,
  "train": train,
}


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
  """Replaces a file atomically, so that a reader never sees half of it."""
  part = path.with_suffix(path.suffix + ".part")
  part.write_text(json.dumps(content, indent=2))
  part.replace(path)


def measure(given: flags.FlagValues) -> None:
  """Measures every part in a separate process, or one part in this one.

  Raises:
    ValueError: if there is no such part.
  """
  unknown = sorted(set(given.parts) - set(PARTS))
  if unknown:
    raise ValueError(
      f"--parts: found {unknown[0]!r}, expected some of {', '.join(PARTS)}"
    )
  path = pathlib.Path(given.json)
  if given.only:
    part = PARTS[given.only]
    write = functools.partial(write_json, path)
    part(Clock(given.seconds), write, given.tiny)
    return
  total, measured = Clock(60 * given.minutes), {}
  parts = [name for name in PARTS if name in given.parts]
  for number, name in enumerate(parts):
    rest = sum(SHARES[other] for other in parts[number:])
    seconds = total.left() * SHARES[name] / rest
    with tempfile.TemporaryDirectory() as folder:
      inner = pathlib.Path(folder) / "part.json"
      command = [sys.executable, __file__, f"--only={name}", f"--json={inner}"]
      command += [f"--seconds={0.9 * seconds}", f"--tiny={given.tiny}"]
      print(f"{name}: at most {seconds:.0f} s", flush=True)
      start = time.perf_counter()
      ended = run_for(command, seconds)
      kept = json.loads(inner.read_text()) if inner.is_file() else {}
    taken = time.perf_counter() - start
    measured[name] = {"ended": ended, "seconds": taken} | kept
    write_json(path, measured)
  print(f"written to {path}")


def run() -> None:
  """The command `t2po-accelerator`."""
  command_line.run(measure, define_flags)


if __name__ == "__main__":
  run()
