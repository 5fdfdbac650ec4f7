"""Every setting of ALFWorld: default, meaning and bounds."""

import dataclasses

from t2po_jax import keys
from t2po_jax.envs import base
from t2po_jax.envs.alfworld import expert, problem, rooms

ENGINES = ("twin", "cached", "stock")
WORDINGS = ("compact", "full", "reference")


@dataclasses.dataclass(frozen=True)
class Settings(base.PromptSettings):
  """The keys of `config.env` for ALFWorld."""

  wording: str = base.wording_key(*WORDINGS)
  engine: str = keys.key(
    "twin",
    "The engine: the twin in Python, or the original, `cached` or `stock`.",
    choices=ENGINES,
  )
  data_dir: str = keys.key(
    "",
    "Folder or archive of the benchmark's games; `~` and `$ALFWORLD_DATA` are "
    "expanded; empty: embedded scenes.",
  )
  cache_dir: str = keys.key(
    "", "Where an archive is unpacked; empty: the run's cache."
  )
  max_turns: int = keys.key(
    16, "Turns until an episode ends; the benchmark has 50.", least=1
  )
  reward_success: float = keys.key(10.0, "Reward of a solved task.")
  seed: int = keys.key(0, "Seed of the embedded scenes.")
  size: str = keys.key(
    "small", "Size of the embedded scenes.", choices=tuple(rooms.SIZES)
  )
  task_types: tuple[str, ...] = keys.key(
    problem.TASK_TYPES, "The task types to play, out of six."
  )
  train_tasks: int = keys.key(
    0,
    "Most tasks of the split; 0 for all game files, or for the default number "
    "of scenes (2000, 60, 120). A subset of the games is a fixed sample.",
    least=0,
  )
  valid_tasks: int = keys.key(0, "Likewise.", least=0)
  test_tasks: int = keys.key(0, "Likewise.", least=0)
  expert_mode: str = keys.key(
    "explore",
    "How the expert finds objects; `walkthrough` knows where they are.",
    choices=expert.MODES,
  )
  expert_hesitation: float = base.hesitation_key(1.0)
  expert_doubt: float = base.doubt_key(
    0.45, "that the expert does something else"
  )

  def __post_init__(self) -> None:
    super().__post_init__()
    if not self.task_types:
      raise ValueError("env.task_types: none given; must name at least one")
    for task_type in self.task_types:
      if task_type not in problem.TASK_TYPES:
        raise ValueError(
          f"env.task_types: found {task_type!r}, expected some of "
          f"{', '.join(problem.TASK_TYPES)}"
          f"{keys.nearest(task_type, problem.TASK_TYPES)}"
        )
