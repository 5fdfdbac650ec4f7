"""One contestant of `learner.py`, in a separate process.

Started as `learner_worker.py NAME SETTINGS`, it builds the model, then answers
lines on its input with one JSON object each: a workload's name runs one
optimizer step on it, `peak` measures matrix products, `memory` asks XLA for
the temporaries of an update, and `quit` reports the peak memory.
All contestants compute the same loss on the same turns: the clipped surrogate,
averaged over the response tokens of all turns.
"""

from collections.abc import Sequence
import json
import pathlib
import resource
import sys
import time
from typing import Any

import numpy as np

CLIP = 0.2
RATE = 1e-6
NORM = 1.0


def turns_of(workload: dict[str, Any], vocab: int) -> list[dict[str, Any]]:
  """The turns of a workload, the same for all contestants.

  Args:
    workload: `turns`, pairs of prompt and response length, and a `seed`.
    vocab: V.

  Returns:
    Dicts with `tokens` [T], `prompt` (its length), `advantage`, `logprobs`.
  """
  rng = np.random.default_rng(workload["seed"])
  turns = []
  for prompt, response in workload["turns"]:
    tokens = rng.integers(0, vocab, prompt + response).astype(np.int32)
    logprobs = rng.normal(-np.log(vocab), 0.3, response).astype(np.float32)
    advantage = float(rng.choice([-1.0, 1.0]))
    turns.append(
      {
        "tokens": tokens,
        "prompt": prompt,
        "advantage": advantage,
        "logprobs": logprobs,
      }
    )
  return turns


def padded_rows(
  turns: list[dict[str, Any]], rows: int
) -> list[dict[str, np.ndarray]]:
  """Micro-batches of one turn per row, padded to the longest of all.

  Position t predicts token t + 1; the mask is 1 if that belongs to a response.
  """
  length = max(len(turn["tokens"]) for turn in turns)
  batches = []
  for start in range(0, len(turns), rows):
    some = turns[start : start + rows]
    batch = {
      name: np.zeros((len(some), length), dtype)
      for name, dtype in (
        ("tokens", np.int32),
        ("there", np.int32),
        ("mask", np.float32),
        ("advantages", np.float32),
        ("old", np.float32),
      )
    }
    for row, turn in enumerate(some):
      size = len(turn["tokens"])
      answer = slice(turn["prompt"] - 1, size - 1)
      batch["tokens"][row, :size] = turn["tokens"]
      batch["there"][row, :size] = 1
      batch["mask"][row, answer] = 1.0
      batch["advantages"][row, answer] = turn["advantage"]
      batch["old"][row, answer] = turn["logprobs"]
    batches.append(batch)
  return batches


class Ours:
  """The learner of this project."""

  def __init__(self, settings: dict[str, Any]) -> None:
    import jax

    from t2po_jax.models import weights

    self.settings = settings
    self.jax = jax
    self.shape, params = weights.load(settings["model"])
    self.learner = self.build(settings["remat"], settings["chunk"])
    self.state = self.learner.init_state(params)
    self.batches = {
      name: self.pack(workload)
      for name, workload in settings["workloads"].items()
    }

  def build(self, remat: str, chunk: int | None, rows: int = 0) -> Any:
    from t2po_jax.distributed import sharding
    from t2po_jax.learning import learner, objectives, optimizers
    from t2po_jax.learning.policy_losses import record
    from t2po_jax.models import decoder
    from t2po_jax.setup import build

    policy = decoder.Policy(
      self.shape, dtype=build.DTYPES[self.settings["dtype"]], remat=remat
    )
    return learner.Learner(
      policy,
      decoder.logical_axes(decoder.shapes(self.shape)),
      sharding.create_mesh(devices=self.jax.devices()[:1]),
      optimizer=optimizers.OptimizerConfig(
        learning_rate=RATE, max_grad_norm=NORM
      ),
      objective=objectives.PolicyObjective(
        settings=record.DualClip(dual_clip=0.0)
      ),
      rows=rows or self.settings["rows"],
      chunk=chunk,
    )

  def pack(self, workload: dict[str, Any]) -> Sequence[Any]:
    from t2po_jax.learning import batching

    segments = []
    for number, turn in enumerate(turns_of(workload, self.shape.vocab_size)):
      size = len(turn["tokens"])
      index = np.arange(turn["prompt"] - 1, size - 1, dtype=np.int32)
      segments.append(
        batching.Segment(
          tokens=turn["tokens"],
          index=index,
          targets=turn["tokens"][index + 1],
          mask=np.ones(len(index), np.float32),
          turn=np.full(len(index), number, np.int32),
          advantages=np.full(len(index), turn["advantage"], np.float32),
          logprobs=turn["logprobs"],
        )
      )
    packed = batching.pack_close(
      segments,
      longest=workload["row_tokens"],
      rows=self.settings["rows"],
      by_row=self.learner.skips_rows,
    )
    return packed.batches

  def step(self, name: str) -> float:
    self.state, metrics = self.learner.update(self.state, self.batches[name])
    self.jax.block_until_ready(self.state)
    return float(metrics["loss"])

  def memory(self) -> dict[str, int | None]:
    """XLA's temporaries at a given size: ours, and keeping all logits."""
    rows, length = self.settings["memory_shape"]
    plain = self.jax.ShapeDtypeStruct((rows, length), np.int32)
    real = self.jax.ShapeDtypeStruct((rows, length), np.float32)
    batch = self.batches[next(iter(self.batches))][0]
    batch = self.jax.tree.map(
      lambda x: real if x.dtype == np.float32 else plain, batch
    )
    return {
      name: self.build(remat, chunk, rows).temporary_bytes(batch)
      for name, remat, chunk in (
        ("naive, no remat", "none", None),
        ("chunked, no remat", "none", 128),
        ("chunked, remat full", "full", 128),
      )
    }

  def peak(self) -> float:
    """FLOP/s of a large matrix product, the best of several."""
    jnp, size = self.jax.numpy, self.settings["peak_size"]
    x = jnp.ones((size, size), self.settings["dtype"])
    product = self.jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    times = []
    for _ in range(5):
      start = time.perf_counter()
      product(x).block_until_ready()
      times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)

  def device_bytes(self) -> int:
    stats = self.jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", 0)


class Torch:
  """Transformers' model and PyTorch's AdamW, in a straightforward loop."""

  def __init__(self, settings: dict[str, Any]) -> None:
    import torch
    import transformers

    self.torch, self.settings = torch, settings
    self.device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(settings["threads"])
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
      settings["model"], dtype=torch.float32
    )
    self.model = model.to(self.device).train()
    self.optimizer = torch.optim.AdamW(
      self.model.parameters(), lr=RATE, weight_decay=0.0
    )
    vocab = self.model.config.vocab_size
    self.batches = {
      name: [
        {key: torch.tensor(x).to(self.device) for key, x in batch.items()}
        for batch in padded_rows(turns_of(workload, vocab), settings["rows"])
      ]
      for name, workload in settings["workloads"].items()
    }

  def loss(self, batch: Any, count: Any) -> Any:
    torch = self.torch
    with torch.autocast(
      self.device, torch.bfloat16, enabled=self.settings["dtype"] == "bfloat16"
    ):
      logits = self.model(
        batch["tokens"].long(), attention_mask=batch["there"]
      ).logits
    chosen = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    targets = batch["tokens"][:, 1:, None].long()
    chosen = chosen.gather(-1, targets)[..., 0]
    ratio = torch.exp(chosen - batch["old"][:, :-1])
    advantages = batch["advantages"][:, :-1]
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP) * advantages
    terms = -torch.minimum(ratio * advantages, clipped)
    return (terms * batch["mask"][:, :-1]).sum() / count

  def step(self, name: str) -> float:
    batches, total = self.batches[name], 0.0
    count = sum(batch["mask"].sum() for batch in batches)
    self.optimizer.zero_grad()
    for batch in batches:
      loss = self.loss(batch, count)
      loss.backward()
      total += loss.detach()
    self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), NORM)
    self.optimizer.step()
    return float(total)

  def device_bytes(self) -> int:
    if self.device == "cpu":
      return 0
    return self.torch.cuda.max_memory_allocated()


class Tunix:
  """Tunix's trainer step on its own Llama, with random weights."""

  def __init__(self, settings: dict[str, Any]) -> None:
    from flax import nnx
    import jax
    import jax.numpy as jnp
    import optax
    from tunix.models.llama3 import model as llama
    from tunix.rl import common
    from tunix.sft import peft_trainer

    self.jax = jax
    described = json.loads(
      (pathlib.Path(settings["model"]) / "config.json").read_text()
    )
    config = llama.ModelConfig(
      num_layers=described["num_hidden_layers"],
      vocab_size=described["vocab_size"],
      embed_dim=described["hidden_size"],
      hidden_dim=described["intermediate_size"],
      num_heads=described["num_attention_heads"],
      head_dim=described["head_dim"],
      num_kv_heads=described["num_key_value_heads"],
      rope_theta=int(described["rope_theta"]),
      norm_eps=described["rms_norm_eps"],
      weight_tying=described["tie_word_embeddings"],
    )
    model = llama.Llama3(config, rngs=nnx.Rngs(0))

    def loss(
      model: Any,
      tokens: Any,
      there: Any,
      mask: Any,
      advantages: Any,
      old: Any,
      count: Any,
    ) -> Any:
      size = tokens.shape[1]
      allowed = jnp.tril(jnp.ones((size, size), bool)) & (there[:, None] > 0)
      positions = jnp.broadcast_to(jnp.arange(size), tokens.shape)
      logits, _ = model(tokens, positions, None, allowed)
      chosen = common.selective_log_softmax(logits[:, :-1], tokens[:, 1:])
      ratio = jnp.exp(chosen - old[:, :-1])
      advantages = advantages[:, :-1]
      clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantages
      terms = -jnp.minimum(ratio * advantages, clipped)
      return jnp.sum(terms * mask[:, :-1]) / count

    self.batches = {}
    for name, workload in settings["workloads"].items():
      batches = padded_rows(
        turns_of(workload, config.vocab_size), settings["rows"]
      )
      count = np.float32(sum(batch["mask"].sum() for batch in batches))
      scaled = np.float32(count / len(batches))
      self.batches[name] = [{**batch, "count": scaled} for batch in batches]
    sizes = {len(batches) for batches in self.batches.values()}
    self.steps = {}
    for size in sizes:
      optimizer = optax.chain(
        optax.clip_by_global_norm(NORM), optax.adamw(RATE, weight_decay=0.0)
      )
      trainer = peft_trainer.PeftTrainer(
        model,
        optimizer,
        peft_trainer.TrainingConfig(
          eval_every_n_steps=1 << 30,
          gradient_accumulation_steps=size if size > 1 else None,
        ),
      ).with_loss_fn(loss)
      self.steps[size], _ = trainer.jit_train_and_eval_step()
    self.model = model

  def step(self, name: str) -> float:
    batches = self.batches[name]
    losses = [self.steps[len(batches)](batch)[0] for batch in batches]
    self.jax.block_until_ready(losses)
    return float(sum(losses)) / len(batches)

  def device_bytes(self) -> int:
    stats = self.jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", 0)


CONTESTANTS = {"ours": Ours, "torch": Torch, "tunix": Tunix}


def main(name: str, settings: dict[str, Any]) -> None:
  # Libraries print: their output goes to stderr, the answers to stdout.
  answers, sys.stdout = sys.stdout, sys.stderr

  def answer(**values: Any) -> None:
    print(json.dumps(values), file=answers, flush=True)

  contestant = CONTESTANTS[name](settings)
  answer(ready=True)
  for line in sys.stdin:
    word = line.strip()
    if word in settings["workloads"]:
      start = time.perf_counter()
      loss = contestant.step(word)
      answer(seconds=time.perf_counter() - start, loss=loss)
    elif word == "peak":
      answer(flops=contestant.peak())
    elif word == "memory":
      answer(bytes=contestant.memory())
    else:
      host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
      answer(host_bytes=host, device_bytes=contestant.device_bytes())
      return


if __name__ == "__main__":
  main(sys.argv[1], json.loads(sys.argv[2]))
