"""ALFWorld: household tasks in text.

  python experiments/main.py --config=configs/alfworld.py

Settings for generated scenes and for SmolLM2; not yet run to an end.
"""

from configs import base


def get_config(presets: str = "") -> base.ConfigDict:
  """Small generated scenes and a small model; see `PRESETS`."""
  c = base.get_config()
  c.name = "alfworld"
  c.env = base.ConfigDict(
    {
      "name": "alfworld",
      "data_dir": "",  # Folder or archive of games; empty = generated scenes.
      "engine": "twin",  # Or the original: `cached`, `stock`.
      "size": "small",  # Of generated scenes: `small` or `full`.
      "wording": "compact",  # Or `full`, for language models.
      "max_turns": 16,  # The benchmark has 50.
      "reward_success": 10.0,
      "valid_tasks": 0,  # Most validation tasks, a fixed draw; 0 = all.
      "expert_mode": "explore",  # Or `walkthrough`.
      "expert_hesitation": 1.0,  # Needless rounds per thought, on average.
      "expert_doubt": 0.45,  # Chance per round to do something else.
    }
  )
  c.rollout.memory = 2
  c.rollout.max_prompt = 256
  c.control.thinking.window = 4
  c.control.thinking.max_tokens = 36
  c.optimizer.warmup = 10
  c.cold_start.kind = "expert"
  c.cold_start.episodes = 600
  c.cold_start.epochs = 2
  c.cold_start.learning_rate = 3e-3
  c.train.mini_batches = 2
  c.train.row_tokens = 320
  return base.apply_presets(c, presets, PRESETS)


def smollm2(c: base.ConfigDict) -> None:
  """SmolLM2-135M-Instruct; give `env.data_dir` for the real games."""
  c.name = "alfworld-smollm2"
  c.env.wording = "full"
  c.env.max_turns = 50
  c.model.source = "smollm2-135m-instruct"
  c.rollout.prefill_tokens = 128
  c.rollout.prefill_rows = 1
  c.rollout.live_tokens = 512
  c.rollout.tasks = 4
  c.rollout.group_size = 4
  c.rollout.slots = 16
  c.rollout.max_prompt = 1472
  c.rollout.max_response = 64
  c.control.thinking.window = 8
  c.control.thinking.max_tokens = 48
  c.cold_start.episodes = 12
  c.cold_start.epochs = 1
  c.cold_start.batch_size = 8
  c.cold_start.micro_rows = 1
  c.cold_start.learning_rate = 1e-4
  c.optimizer.learning_rate = 1e-5
  c.train.mini_batches = 1
  c.train.row_tokens = 1536
  c.train.micro_rows = 1
  # Games stand in order of their task type: draw, do not take the first.
  c.env.valid_tasks = 12
  c.env.expert_mode = "walkthrough"
  c.eval.tasks = 12


PRESETS = {"smollm2": smollm2}
