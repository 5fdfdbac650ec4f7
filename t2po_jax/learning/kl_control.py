"""What a measured KL adapts: the coefficient of a penalty, the learning rate.

The coefficient follows the proportional controller of Ziegler et al. 2019,
"Fine-tuning language models from human preferences" (arXiv 1909.08593), section
2.2. The learning rate follows the KL of an update, as is usual in robotics
(Rudin et al. 2021, arXiv 2109.11978); the rule is ours.
"""

from collections.abc import Mapping, Sequence
import math

import numpy as np

MEANS = ("token", "turn")

# The relative error is clipped to this.
_ERROR_BOUND = 0.2
# From one update to the next, the factor of the learning rate changes by these.
_SMALLEST, _LARGEST = 0.25, 1.25
# And it never gets below this.
_LEAST = 1e-3


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


class RateController:
  """Reduces the learning rate while updates move the policy too far.

  Attributes:
    scale: factor of the learning rate, in (0, 1].
  """

  def __init__(self, target: float) -> None:
    """Starts with the full learning rate.

    Args:
      target: the largest KL of an update, nats per token; 0 keeps the scale.
    """
    self.scale = 1.0
    self._target = target

  def advance(self, kl: float) -> None:
    """Updates the scale with the KL of an update.

    scale <- min(1, scale clip(sqrt(target / kl), 1/4, 5/4)): the KL of a small
    step grows with the square of its size. It falls faster than it recovers.

    Args:
      kl: from the policy that sampled to the updated one, nats per token. One
        that is not finite counts as far too large.
    """
    if not self._target:
      return
    factor = _SMALLEST
    if math.isfinite(kl):
      factor = math.sqrt(self._target / kl) if kl > 0 else _LARGEST
    factor = min(max(factor, _SMALLEST), _LARGEST)
    self.scale = min(max(self.scale * factor, _LEAST), 1.0)

  def state_dict(self) -> dict[str, float]:
    """Everything that `load` needs to resume exactly from here."""
    return {"scale": self.scale}

  def load(self, state: Mapping[str, float]) -> None:
    """Restores a `state_dict`, unless the scale is fixed now.

    A run that was begun before there was a scale has none: it starts at 1.
    """
    if self._target:
      self.scale = state.get("scale", 1.0)
