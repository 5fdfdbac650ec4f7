"""WebShop: buy what an instruction asks for.

  python experiments/main.py --config=configs/webshop.py

Settings for the embedded catalogue and for SmolLM2; not yet run to an end.
"""

from configs import base


def get_config(presets: str = "") -> base.ConfigDict:
  """The embedded catalogue and a small model; see `PRESETS`."""
  c = base.get_config()
  c.name = "webshop"
  c.env = base.ConfigDict(
    {
      "name": "webshop",
      "catalogue": "embedded",  # Or the path of items_shuffle*.json.
      "goals": "synthetic",  # Or `human`.
      "products": 0,  # Products of a catalogue that are used; 0 = all.
      "wording": "compact",  # Or `full`, for language models.
      "max_turns": 10,
      "reward_success": 10.0,  # For a purchase of score 1.
      "expert_hesitation": 1.5,  # Needless rounds per thought, on average.
      "expert_doubt": 0.25,  # Chance per round that the expert goes wrong.
    }
  )
  c.rollout.memory = 2
  c.rollout.max_prompt = 112
  c.rollout.max_response = 64
  c.control.thinking.window = 4
  c.control.thinking.max_tokens = 48
  c.optimizer.warmup = 10
  c.cold_start.kind = "expert"
  c.cold_start.episodes = 1500
  c.cold_start.epochs = 2
  c.cold_start.learning_rate = 3e-3
  c.train.mini_batches = 2
  c.train.row_tokens = 176
  return base.apply_presets(c, presets, PRESETS)


def smollm2(c: base.ConfigDict) -> None:
  """SmolLM2-135M-Instruct; give `env.catalogue` for the published products."""
  c.name = "webshop-smollm2"
  c.env.wording = "full"
  c.env.max_turns = 15
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
  c.cold_start.episodes = 24
  c.cold_start.epochs = 1
  c.cold_start.batch_size = 8
  c.cold_start.micro_rows = 1
  c.cold_start.learning_rate = 1e-4
  c.optimizer.learning_rate = 1e-5
  c.train.mini_batches = 1
  c.train.row_tokens = 1536
  c.train.micro_rows = 1
  c.eval.tasks = 12


PRESETS = {"smollm2": smollm2}
