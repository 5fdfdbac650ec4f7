"""FrozenLake of TextArena, with random holes in every game.

  python experiments/main.py --config=configs/textarena.py

trains a small model from scratch: held-out success 0.10 after the cold start
and 0.24 at update 30 (seed 0, 50 games, two shared cores of an Intel Xeon,
2026-11-30). Needs the extra `textarena`. Any other
single-player game: `--config.env.game=Mastermind-v0`, with `smollm2` or a
larger model, the full wording and no expert.
"""

from t2po_jax.configs import base, environment, models


def get_config(presets: str = "") -> base.ConfigDict:
  """Sixteen cells, three holes, four corners; see `PRESETS`."""
  c = base.get_config()
  c.name = "textarena"
  c.env = environment.section(
    "textarena",
    game="FrozenLake-v0-random",
    wording="compact",
    describe="t2po_jax.envs.adapters.frozen_lake:describe",
    expert="t2po_jax.envs.adapters.frozen_lake:expert",
    actions=("up", "down", "left", "right"),
    distinct=True,
    max_turns=12,
    expert_hesitation=2.0,
    expert_doubt=0.5,
  )
  small_game(c)
  return base.apply_presets(c, presets, PRESETS)


def small_game(c: base.ConfigDict) -> None:
  """Lengths and a cold start for a game of few words."""
  models.from_scratch(c, max_prompt=48, max_response=48)
  c.rollout.tasks = 16
  c.rollout.memory = 2
  c.control.thinking.min_tokens = 4
  c.optimizer.warmup = 5
  c.cold_start.episodes = 400
  c.train.updates = 30
  c.train.mini_batches = 2
  c.train.row_tokens = 192
  c.train.eval_every = 10
  c.eval.tasks = 50


def smollm2(c: base.ConfigDict) -> None:
  """SmolLM2-135M-Instruct, with the game's own words and no expert."""
  models.smollm2(c, max_prompt=896)
  c.env.describe = c.env.expert = ""
  c.env.expert_hesitation = c.env.expert_doubt = 0.0
  c.cold_start.kind = "none"
  c.control.thinking.min_tokens = 16


PRESETS = {"smollm2": smollm2}
