"""The coefficient of a KL penalty, fixed or steered towards a target.

The proportional controller of Ziegler et al. 2019, "Fine-tuning language
models from human preferences" (arXiv 1909.08593), section 2.2.
"""

from collections.abc import Mapping

# The relative error is clipped to this before it acts.
_ERROR_BOUND = 0.2


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
      horizon: trajectories over which a full error of 1 would double beta,
        above 0.
    """
    self.coefficient = coefficient
    self._initial = coefficient
    self._target = target
    self._horizon = horizon

  def advance(self, kl: float, trajectories: int) -> None:
    """Takes what was measured.

    beta <- beta (1 + clip(kl / target - 1, -0.2, 0.2) n / horizon).

    Args:
      kl: mean KL per token of the rollout, nats.
      trajectories: n, how many were measured.
    """
    if not self._target:
      return
    error = min(max(kl / self._target - 1.0, -_ERROR_BOUND), _ERROR_BOUND)
    self.coefficient *= 1.0 + error * trajectories / self._horizon

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
