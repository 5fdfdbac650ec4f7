"""How many turns training episodes may last, by update.

Long horizons from the start can make training collapse; growing them in stages
is what ScalingInter-RL does (AgentGym-RL, arXiv 2509.08755).
"""

import re

_STAGE = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*")


def parse(text: str) -> list[tuple[int, int]]:
  """Reads `rollout.horizon`.

  Args:
    text: `turns:update` of each stage, separated by commas; may be empty.

  Returns:
    (turns, last update) of each stage, in order.

  Raises:
    ValueError: if a stage cannot be read, lasts 0 turns or does not end after
      the one before it.
  """
  stages, last = [], 0
  for part in text.split(",") if text.strip() else ():
    stage = _STAGE.fullmatch(part)
    turns, until = map(int, stage.groups()) if stage else (0, 0)
    if turns < 1 or until <= last:
      raise ValueError(
        f"rollout.horizon: found {text!r}, expected stages such as "
        "'4:10,8:20', turns and the last update, which must increase"
      )
    stages.append((turns, until))
    last = until
  return stages


def turns(text: str, update: int) -> int:
  """The most turns of an episode of an update; 0 = the environment's limit.

  Args:
    text: as of `parse`.
    update: its number, from 1.
  """
  return next((most for most, last in parse(text) if update <= last), 0)
