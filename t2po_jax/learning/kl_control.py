"""The coefficient of a KL penalty, fixed or adapted to a target KL.

The proportional controller of Ziegler et al. 2019, "Fine-tuning language
models from human preferences" (arXiv 1909.08593), section 2.2.
"""

from collections.abc import Mapping, Sequence

import numpy as np

MEANS = ("token", "turn")

# The relative error is clipped to this.
_ERROR_BOUND = 0.2


def measure(
  sums: Sequence[float],
  tokens: Sequence[float],
  *,
  mean: str,
  trajectories: int,
) -> tuple[float, int]:
  """The KL that a controller follows, and the number of samples.

  token (ours): the mean over all tokens, so that turns are weighted by length;
  n counts trajectories. turn (the reference's): the mean of per-turn means; n
  counts turns.

  Args:
    sums: KL of each turn, summed over its sampled tokens, nats.
    tokens: sampled tokens of each turn; turns without any are left out.
    mean: one of `MEANS`.
    trajectories: the number of trajectories that the turns belong to.

  Returns:
    nats per token (0 without tokens), and n for `KLController.advance`.

  Raises:
    ValueError: for an unknown mean.
  """
  if mean not in MEANS:
    raise ValueError(f"mean: found {mean!r}, expected one of {MEANS}")
  if mean == "token":
    return sum(sums) / max(sum(tokens), 1.0), trajectories
  means = [s / n for s, n in zip(sums, tokens, strict=True) if n > 0]
  return (float(np.mean(means)) if means else 0.0), len(means)


class KLController:
  """Holds the coefficient beta of KL(policy || reference) in the reward.

  Attributes:
    coefficient: the current beta.
  """

  def __init__(
    self, coefficient: float, *, target: float, horizon: float
  ) -> None:
    """Creates a controller.

    Args:
      coefficient: the initial beta, >= 0.
      target: target KL per token, nats; 0 keeps beta fixed.
      horizon: trajectories, or turns, over which an error of 1 doubles beta,
        above 0.
    """
    self.coefficient = coefficient
    self._initial = coefficient
    self._target = target
    self._horizon = horizon

  def advance(self, kl: float, count: int) -> None:
    """Updates beta with a measurement.

    beta <- beta (1 + clip(kl / target - 1, -0.2, 0.2) n / horizon).

    Args:
      kl: mean KL of the rollout, nats.
      count: n, the number of trajectories or turns.
    """
    if not self._target:
      return
    error = min(max(kl / self._target - 1.0, -_ERROR_BOUND), _ERROR_BOUND)
    self.coefficient *= 1.0 + error * count / self._horizon

  def state_dict(self) -> dict[str, float]:
    """Everything that `load` needs to resume exactly from here."""
    return {"initial": self._initial, "coefficient": self.coefficient}

  def load(self, state: Mapping[str, float]) -> None:
    """Restores a `state_dict`.

    If the coefficient is now fixed, or has a new initial value, the
    configuration takes precedence.
    """
    if self._target and state["initial"] == self._initial:
      self.coefficient = state["coefficient"]
