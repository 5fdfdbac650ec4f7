"""Settings of language models, shared by the presets of all tasks."""

from typing import TYPE_CHECKING, Any, TypeAlias

from ml_collections import config_dict

from t2po_jax.configs import algorithms

if TYPE_CHECKING:
  # Its attributes are known when it runs, not before.
  ConfigDict: TypeAlias = Any
else:
  ConfigDict = config_dict.ConfigDict


def from_scratch(c: ConfigDict, *, max_prompt: int, max_response: int) -> None:
  """A small model from scratch, first taught by the environment's expert.

  Args:
    c: a configuration with its environment.
    max_prompt: tokens of the longest prompt.
    max_response: tokens of the longest response.
  """
  c.rollout.max_prompt = max_prompt
  c.rollout.max_response = max_response
  c.control.thinking.window = 4
  c.control.thinking.max_tokens = 36
  c.optimizer.warmup = 10
  c.cold_start.kind = "expert"
  c.cold_start.learning_rate = 3e-3
  algorithms.kl_rate(c)  # Keeps training alive: docs/study.md.
  c.guard.action = "rollback"  # Saves most of what still collapses.
  c.eval.tasks = 100


def smollm2(c: ConfigDict, *, max_prompt: int, max_response: int = 96) -> None:
  """SmolLM2-135M-Instruct on a CPU: few episodes, one row at a time.

  Args:
    c: a configuration with its environment.
    max_prompt: tokens of the longest prompt.
    max_response: tokens of the longest response.
  """
  c.name += "-smollm2"
  c.env.wording = "full"
  c.model.source = "smollm2-135m-instruct"
  c.model.remat = "dots"  # 14 % faster on CPUs: fewer allocations.
  c.rollout.tasks = 4
  c.rollout.group_size = 4
  c.rollout.slots = 16
  c.rollout.max_prompt = max_prompt
  c.rollout.max_response = max_response
  c.rollout.prefill_tokens = 128
  c.rollout.prefill_rows = 1
  c.rollout.live_tokens = 512
  c.control.thinking.window = 8
  c.control.thinking.max_tokens = 72
  c.cold_start.kind = "expert"
  c.cold_start.epochs = 1
  c.cold_start.batch_size = 8
  c.cold_start.micro_rows = 1
  c.cold_start.learning_rate = 2e-4
  c.optimizer.learning_rate = 1e-5
  c.optimizer.target_kl = 0.0  # Another scoring, as it takes a single step.
  c.train.updates = 50
  c.train.mini_batches = 1
  c.train.row_tokens = max_prompt + max_response  # One turn.
  c.train.micro_rows = 1
  c.train.eval_every = 10
  c.eval.tasks = 16


def qwen3_4b(c: ConfigDict) -> None:
  """Qwen3-4B for accelerators; `paper` is the published setting."""
  c.name += "-qwen3-4b"
  c.env.wording = "full"
  c.model.source = "Qwen/Qwen3-4B"
  c.model.dtype = "bfloat16"
  c.model.remat = "full"
  c.rollout.tasks = 16
  c.rollout.group_size = 8
  # Per process; this fits beside the weights on four chips of 16 GB, as on a
  # host of a TPU v5e.
  c.rollout.slots = 32
  c.rollout.tensor = 4
  c.rollout.prefill_rows = 4
  c.rollout.max_response = 500
  c.control.thinking.window = 8
  c.control.thinking.min_tokens = 16
  c.control.thinking.max_tokens = 450
  c.control.resampling.eta = "0.3"
  c.guard.action = "warn"  # A policy to stay close to does not fit beside.
  c.cold_start.kind = "rft"
  c.cold_start.learning_rate = 1e-5
  c.cold_start.batch_size = 32
  c.cold_start.micro_rows = 4
  c.optimizer.learning_rate = 1e-6
  c.optimizer.target_kl = 0.0  # Not measured at this size.
  c.optimizer.warmup = 0
  c.train.updates = 200
  c.train.mini_batches = 4
  c.train.micro_rows = 4
  c.mesh.data = 1
  c.mesh.fsdp = -1
  c.mesh.tensor = 4  # So that no chip ever holds the whole embedding table.


def paper(c: ConfigDict) -> None:
  """The published setting (arXiv 2605.02178), common to all tasks.

  On top of `qwen3_4b`. "Text" is the paper, "script" and "code" its release.
  Not published as numbers, and therefore ours: epsilon of the thinking
  intervention, its window and its minimum number of tokens.
  """
  algorithms.t2po(c)
  c.control.alpha = 0.4  # Text: weight of the entropy.
  c.control.thinking.max_tokens = 450  # Text: thinking budget.
  c.control.resampling.eta = "0.3"  # Code: threshold of a turn's change.
  c.control.resampling.max_tries = 2  # Text: B_max.
  c.reward.format_penalty = 0.1  # Script: coefficient of invalid actions,
  c.reward.invalid_penalty = 0.1  # which malformed responses are as well.
  c.reward.penalties = "largest"  # Code: charged once.
  c.advantage.discount = 0.95  # Script: gamma.
  c.advantage.step_weight = 1.0  # Script: weight of GiGPO's step part.
  c.advantage.per = "turn"  # Code: every row of a batch counts.
  c.advantage.penalty = "return"  # Code: comes off the return of its row.
  c.loss.clip_low = c.loss.clip_high = 0.2  # Code: default of the trainer.
  c.loss.dual_clip = 3.0  # Code: likewise.
  c.loss.aggregation = "token_mean"  # Code: likewise.
  c.loss.old_logprobs = "recompute"  # Code: the trainer's own log-probs,
  c.loss.importance = "off"  # without a correction for the sampler's.
  c.optimizer.learning_rate = 1e-6  # Script.
  c.optimizer.schedule = "constant"  # Code: default of the trainer.
  c.optimizer.warmup = 0  # Script, but for Search QA.
  c.optimizer.b1 = 0.9  # Code: default of the optimizer,
  c.optimizer.b2 = 0.999  # likewise.
  c.optimizer.weight_decay = 0.01  # Code: default of the trainer.
  c.optimizer.clip_norm = 1.0  # Code: likewise.
  c.train.epochs = 1  # Code: likewise.
  c.eval.temperature = 0.6  # Script.
  c.eval.top_p = 0.95  # Script.
  c.eval.top_k = 20  # Script.


def paper_code(c: ConfigDict) -> None:
  """Where the released code differs from the paper's text, on every task."""
  algorithms.released(c)
