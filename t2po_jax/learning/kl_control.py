"""The coefficient of a KL penalty, fixed or steered towards a target.

The proportional controller of Ziegler et al. 2019, "Fine-tuning language
models from human preferences" (arXiv 1909.08593), section 2.2.
"""

from collections.abc import Mapping, Sequence

import numpy as np

MEANS = ("token", "turn")

# The relative error is clipped to this before it acts.
_ERROR_BOUND = 0.2


def measure(
  sums: Sequence[float],
  tokens: Sequence[float],
  *,
  mean: str,
  trajectories: int,
) -> tuple[float, int]:
  """The KL that a controller follows, and how much was measured.

  token (ours): a mean over all tokens, so that a turn weighs by its length;
  what counts are trajectories. turn (the reference's): the mean of the turns'
  own means; what counts are turns.

  Args:
    sums: KL of each turn, summed over its sampled tokens, nats.
    tokens: sampled tokens of each turn; turns without any are left out.
    mean: one of `MEANS`.
    trajectories: how many the turns belong to.

  Returns:
    nats per token, 0 without any token, and n of `KLController.advance`.

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
    coefficient: beta now.
  """

  def __init__(self, coefficient: float, *, target: float, horizon: float):
    """Starts at the given coefficient.

    Args:
      coefficient: beta to begin with, >= 0.
      target: KL per token to steer towards, nats; 0 keeps beta fixed.
      horizon: trajectories, or turns, over which an error of 1 doubles beta,
        above 0.
    """
    self.coefficient = coefficient
    self._initial = coefficient
    self._target = target
    self._horizon = horizon

  def advance(self, kl: float, count: int) -> None:
    """Takes what was measured.

    beta <- beta (1 + clip(kl / target - 1, -0.2, 0.2) n / horizon).

    Args:
      kl: mean KL of the rollout, nats.
      count: n, how many trajectories or turns were measured.
    """
    if not self._target:
      return
    error = min(max(kl / self._target - 1.0, -_ERROR_BOUND), _ERROR_BOUND)
    self.coefficient *= 1.0 + error * count / self._horizon

  def state_dict(self) -> dict[str, float]:
    """Everything that `load` needs to go on exactly from here."""
    return {"initial": self._initial, "coefficient": self.coefficient}

  def load(self, state: Mapping[str, float]) -> None:
    """Goes on from a `state_dict`.

    A coefficient that is fixed, or that now begins elsewhere, stays as
    configured.
    """
    if self._target and state["initial"] == self._initial:
      self.coefficient = state["coefficient"]
