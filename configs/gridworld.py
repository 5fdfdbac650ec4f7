"""Gridworld: walk to a goal around walls, without feedback from them.

  python experiments/main.py --config=configs/gridworld.py

trains a small model from scratch on maps of its own; docs/study.md says what
the presets `loops` and `lake` are for and what has been measured.
"""

from t2po_jax.configs import base, environment, models


def get_config(presets: str = "") -> base.ConfigDict:
  """The default grid; `presets` are names of `PRESETS`."""
  c = base.get_config()
  c.name = "gridworld"
  c.env = environment.section(
    "gridworld", expert_loop=0.5, expert_hesitation=1.0
  )
  models.from_scratch(c, max_prompt=144, max_response=40)
  c.control.thinking.min_tokens = 8
  c.control.thinking.max_tokens = 30
  c.cold_start.episodes = 700
  c.cold_start.epochs = 2
  c.train.updates = 40
  c.train.mini_batches = 2
  c.train.row_tokens = 192
  return base.apply_presets(c, presets, PRESETS)


def loops(c: base.ConfigDict) -> None:
  """Long walks in few turns, by a policy that tends to repeat itself. Turns are
  not penalised: the cost of repetition is lost turns.
  """
  c.env.size = 7
  c.env.walls = 0.3
  c.env.shortest = 6
  c.env.longest = 9
  c.env.expert_loop = 0.75
  c.env.expert_hesitation = 0.0
  c.reward.format_penalty = 0.0
  c.reward.invalid_penalty = 0.0


def lake(c: base.ConfigDict) -> None:
  """A slippery lake in five turns with a sparse reward, after RAGEN.

  The whole dialogue is the prompt, tasks are few and groups large.
  """
  c.env.size = 4
  c.env.walls = 0.0
  c.env.holes = 0.2
  c.env.slip = 0.3
  c.env.shortest = 2
  c.env.longest = 4
  c.env.max_turns = 5
  c.env.expert_loop = 0.3
  c.rollout.context = "append"
  c.rollout.tasks = 8
  c.rollout.group_size = 16


PRESETS = {"loops": loops, "lake": lake}
