"""Penalties on a turn's response, independent of the environment."""

import dataclasses

COMBINATIONS = ("sum", "largest")


@dataclasses.dataclass(frozen=True)
class Penalties:
  """The penalties.

  Attributes:
    malformed: for a response that violates the grammar, >= 0.
    impossible: for an action that is not possible, >= 0.
    combine: a response that is both costs the `sum` or the `largest`.
    overlong: for a response of the maximum length, >= 0.
    buffer: tokens below that length over which the penalty rises, >= 0.
    repeated: for the action of the previous turn, from the same observation, >=
      0.
  """

  malformed: float = 0.0
  impossible: float = 0.0
  combine: str = "sum"
  overlong: float = 0.0
  buffer: int = 0
  repeated: float = 0.0

  def __post_init__(self) -> None:
    if self.combine not in COMBINATIONS:
      raise ValueError(
        f"combine: found {self.combine!r}, expected one of {COMBINATIONS}"
      )

  def of(
    self,
    *,
    format_valid: bool,
    action_valid: bool,
    tokens: int,
    longest: int,
    repeated: bool = False,
  ) -> float:
    """The penalty of one response.

    Args:
      format_valid: whether it follows the grammar.
      action_valid: whether its action was possible.
      tokens: its length.
      longest: the greatest length.
      repeated: whether it does what the turn before did, from the same
        observation.
    """
    costs = (
      self.malformed * (not format_valid),
      self.impossible * (not action_valid),
    )
    validity = sum(costs) if self.combine == "sum" else max(costs)
    length = soft_overlong(tokens, longest=longest, buffer=self.buffer)
    return float(validity + self.overlong * length + self.repeated * repeated)


def soft_overlong(tokens: int, *, longest: int, buffer: int) -> float:
  """Soft overlong punishment (DAPO, arXiv 2503.14476, equation 13).

  0 up to `longest` - `buffer` tokens, from there linearly up to 1 at `longest`,
  and 1 beyond; subtracted from the reward.

  Args:
    tokens: length of the response.
    longest: L_max.
    buffer: L_cache; with 0 only lengths beyond `longest` are punished.
  """
  over = tokens - (longest - buffer)
  if buffer <= 0:
    return float(over > 0)
  return min(max(over / buffer, 0.0), 1.0)
