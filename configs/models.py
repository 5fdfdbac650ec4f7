"""What a language model brings to any task, shared by the tasks' presets."""

from typing import TypeAlias

from ml_collections import config_dict

ConfigDict: TypeAlias = config_dict.ConfigDict


def smollm2(c: ConfigDict) -> None:
  """SmolLM2-135M-Instruct on a CPU: few episodes, one row at a time."""
  c.name += "-smollm2"
  c.env.wording = "full"
  c.model.source = "smollm2-135m-instruct"
  c.model.remat = "dots"  # A seventh faster on CPUs: less memory to hand out.
  c.rollout.prefill_tokens = 128
  c.rollout.prefill_rows = 1
  c.rollout.live_tokens = 512
  c.control.thinking.window = 8
  c.cold_start.kind = "expert"
  c.cold_start.epochs = 1
  c.cold_start.batch_size = 8
  c.cold_start.micro_rows = 1
  c.cold_start.learning_rate = 2e-4
  c.optimizer.learning_rate = 1e-5
  c.train.updates = 50
  c.train.mini_batches = 1
  c.train.micro_rows = 1
  c.train.eval_every = 10


def qwen3_4b(c: ConfigDict) -> None:
  """Qwen3-4B as in the paper (arXiv 2605.02178), for accelerators."""
  c.name += "-qwen3-4b"
  c.env.wording = "full"
  c.model.source = "Qwen/Qwen3-4B"
  c.model.dtype = "bfloat16"
  c.model.remat = "full"
  c.rollout.tasks = 16
  c.rollout.group_size = 8
  c.rollout.slots = 128
  c.rollout.max_response = 500
  c.control.thinking.window = 8
  c.control.thinking.min_tokens = 16
  c.control.thinking.max_tokens = 450
  c.control.resampling.eta = "0.3"
  c.cold_start.kind = "rft"
  c.cold_start.learning_rate = 1e-5
  c.cold_start.batch_size = 32
  c.cold_start.micro_rows = 8
  c.optimizer.learning_rate = 1e-6
  c.optimizer.warmup = 0
  c.train.updates = 200
  c.train.mini_batches = 4
  c.train.micro_rows = 8
  c.mesh.data = 1
  c.mesh.fsdp = -1
