"""Search QA: answer questions of one to three hops by searching.

  python experiments/main.py --config=configs/searchqa.py

trains a small model from scratch on the embedded world.
"""

from configs import base


def get_config(presets: str = "") -> base.ConfigDict:
  """The embedded default; `presets` are names of `PRESETS`."""
  c = base.get_config()
  c.name = "searchqa"
  c.env = base.ConfigDict(
    {
      "name": "searchqa",
      "data_dir": "",  # Real questions and corpus; empty = embedded world.
      "max_turns": 4,
      "wording": "",  # `compact` or `full`; empty = by the kind of data.
      "topk": 1,  # Passages per search.
      "passage_chars": 0,  # Longest passage shown; 0 = no limit.
      "expert_hesitation": 2.0,  # Needless rounds per thought, on average.
      "expert_doubt": 0.4,  # Chance per round that the expert goes wrong.
    }
  )
  c.rollout.max_prompt = 112
  c.control.thinking.window = 4
  c.control.thinking.min_tokens = 8  # A fact and a plan take seven.
  c.control.thinking.max_tokens = 36
  c.optimizer.warmup = 10
  c.cold_start.kind = "expert"
  c.cold_start.episodes = 3000
  c.cold_start.epochs = 2
  c.cold_start.learning_rate = 3e-3
  c.train.updates = 60
  c.train.mini_batches = 2
  c.train.row_tokens = 160
  c.eval.tasks = 100
  return base.apply_presets(c, presets, PRESETS)


def smollm2(c: base.ConfigDict) -> None:
  """SmolLM2-135M-Instruct; give `env.data_dir` for real questions.

  --config=configs/searchqa.py:smollm2 --config.env.data_dir=DIR
  """
  c.name = "searchqa-smollm2"
  c.env.wording = "full"
  c.env.topk = 3
  c.env.passage_chars = 240
  c.model.source = "smollm2-135m-instruct"
  c.rollout.prefill_tokens = 128
  c.rollout.prefill_rows = 1
  c.rollout.live_tokens = 512
  c.rollout.tasks = 4
  c.rollout.group_size = 4
  c.rollout.slots = 16
  c.rollout.max_prompt = 960
  c.rollout.max_response = 96
  c.rollout.temperature = 0.7
  c.control.thinking.window = 8
  c.control.thinking.min_tokens = 12
  c.control.thinking.max_tokens = 72
  c.cold_start.kind = "expert"
  c.cold_start.episodes = 96
  c.cold_start.only_successes = True
  c.cold_start.epochs = 1
  c.cold_start.batch_size = 8
  c.cold_start.micro_rows = 1
  c.cold_start.learning_rate = 2e-4
  c.optimizer.learning_rate = 1e-5
  c.train.updates = 50
  c.train.mini_batches = 1
  c.train.row_tokens = 1056
  c.train.micro_rows = 1
  c.train.eval_every = 10
  c.eval.tasks = 16


def qwen3_4b(c: base.ConfigDict) -> None:
  """The paper's setting, for accelerators; not yet run."""
  c.name = "searchqa-qwen3-4b"
  c.env.wording = "full"
  c.env.topk = 3
  c.model.source = "Qwen/Qwen3-4B"
  c.model.dtype = "bfloat16"
  c.model.remat = "full"
  c.rollout.tasks = 256
  c.rollout.group_size = 5
  c.rollout.slots = 256
  c.rollout.max_prompt = 4096
  c.rollout.max_response = 500
  c.control.thinking.window = 8
  c.control.thinking.min_tokens = 16
  c.control.thinking.max_tokens = 450
  c.control.resampling.eta = "0.3"
  c.cold_start.kind = "rft"
  c.optimizer.learning_rate = 1e-6
  c.train.updates = 200
  c.train.mini_batches = 4
  c.train.row_tokens = 4608
  c.train.micro_rows = 8
  c.eval.tasks = 512
  c.mesh.data = 1
  c.mesh.fsdp = -1


PRESETS = {"smollm2": smollm2, "qwen3-4b": qwen3_4b}
