"""The whole loop on the toy bandit, to check an installation.

python experiments/main.py --config=configs/smoke.py
"""

from t2po_jax.configs import base, environment


def get_config(presets: str = "") -> base.ConfigDict:
  """A cold start and a few updates of a tiny model."""
  c = base.get_config()
  c.name = "smoke"
  c.env = environment.section("toy")
  c.model.size = "nano"
  c.model.vocab_size = 512
  c.rollout.tasks = 4
  c.rollout.group_size = 4
  c.rollout.slots = 16
  c.rollout.memory = 0
  c.rollout.max_prompt = 32
  c.rollout.max_response = 16
  c.control.thinking.window = 1
  c.control.thinking.min_tokens = 2
  c.control.thinking.max_tokens = 8
  c.control.calibration.every = 2
  c.cold_start.kind = "expert"
  c.cold_start.episodes = 128
  c.cold_start.epochs = 2
  c.cold_start.learning_rate = 3e-3
  c.train.updates = 4
  c.train.row_tokens = 64
  c.train.micro_rows = 8
  c.train.eval_every = 2
  c.train.save_every = 1
  c.eval.tasks = 8
  return base.apply_presets(c, presets, PRESETS)


PRESETS = {}
