"""Your own environment, with a small model from scratch.

  python experiments/main.py --config=configs/own.py:my_package.my_module:MyGame

The first part after the colon is its `module:class`, or its name if an
installed package provides it; presets follow, joined by commas. Its settings
are keys of `config.env`. docs/environments.md shows how to write one.
"""

from t2po_jax.configs import base, environment, models


def get_config(presets: str = "") -> base.ConfigDict:
  """A cold start by the environment's expert, then reinforcement learning.

  Args:
    presets: the environment, then names of `PRESETS`.

  Raises:
    ValueError: if no environment is named.
  """
  name, _, presets = presets.partition(",")
  if not name:
    raise ValueError(
      "name an environment: --config=configs/own.py:my_module:MyBenchmark"
    )
  c = base.get_config()
  c.name = name.rpartition(":")[2].lower()
  c.env = environment.section(name)
  models.from_scratch(c, max_prompt=96, max_response=32)
  c.rollout.tasks = 8
  c.rollout.memory = 2
  c.control.thinking.window = 2
  c.control.thinking.min_tokens = 2
  c.control.thinking.max_tokens = 16
  c.optimizer.warmup = 5
  c.cold_start.episodes = 256
  c.cold_start.epochs = 2
  c.train.updates = 20
  c.train.row_tokens = 128
  c.eval.tasks = 64
  return base.apply_presets(c, presets, PRESETS)


def smollm2(c: base.ConfigDict) -> None:
  """SmolLM2-135M-Instruct; prompts and responses of its length."""
  wording = c.env.get("wording")
  models.smollm2(c, max_prompt=448)
  if wording is None:
    del c.env.wording
  c.cold_start.episodes = 96


PRESETS = {"smollm2": smollm2}
