"""Every setting of Sokoban: default, meaning and bounds."""

import dataclasses

from t2po_jax import keys
from t2po_jax.envs import base

WORDINGS = ("compact", "full")


@dataclasses.dataclass(frozen=True)
class Settings(base.Settings):
  """The keys of `config.env` for Sokoban."""

  wording: str = base.wording_key(*WORDINGS)
  size: int = keys.key(
    6, "Rows and columns of a level, outer walls included.", least=5, most=9
  )
  boxes: int = keys.key(1, "Boxes (and goals) of a level.", least=1, most=3)
  walls: int = keys.key(2, "Most inner walls of a level.", least=0, most=8)
  least_moves: int = keys.key(
    3, "Fewest moves of the shortest solution.", least=1
  )
  most_moves: int = keys.key(
    10, "Most moves of the shortest solution.", least=1
  )
  max_turns: int = keys.key(15, "Moves until an episode ends.", least=1)
  reward_success: float = keys.key(10.0, "Reward of a solved level.")
  reward_box: float = keys.key(
    0.0, "Reward for pushing a box onto a goal; lost when it leaves the goal."
  )
  seed: int = keys.key(0, "Seed of the levels.")
  train_tasks: int = keys.key(1000, "Levels to train on.", least=1)
  valid_tasks: int = keys.key(100, "Levels to validate on.", least=1)
  test_tasks: int = keys.key(200, "Levels to test on.", least=1)
  expert_hesitation: float = base.hesitation_key(1.0)
  expert_doubt: float = base.doubt_key(0.3, "of a random move")

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.most_moves < self.least_moves:
      raise ValueError(
        f"env.most_moves: found {self.most_moves}, expected at least "
        f"env.least_moves {self.least_moves}"
      )
