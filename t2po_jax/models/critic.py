"""The critic: a value at every position.

`trunk` is a linear head on the policy's last hidden states: it costs one dot
product, and the policy's layers learn from the value loss too. `separate` is a
second network with such a head, initialised as a copy of the policy: twice the
work and memory, but no interference. The head is initialised to zero, so the
first advantages are plain returns.
"""

import dataclasses

import jax
import jax.numpy as jnp

from t2po_jax import types
from t2po_jax.models import decoder

KINDS = ("trunk", "separate")


@dataclasses.dataclass(frozen=True)
class Critic:
  """A value function as pure functions of its parameters.

  Parameters are `value_head/kernel` [D], `value_head/bias` [] and, if
  separate, `trunk` like the policy's.

  Attributes:
    policy: the network that provides the hidden states.
    kind: one of `KINDS`.
  """

  policy: decoder.Policy
  kind: str = "trunk"

  def __post_init__(self) -> None:
    if self.kind not in KINDS:
      raise ValueError(
        f"critic: found {self.kind!r}, expected one of {', '.join(KINDS)}"
      )

  def init(self, params: types.Params) -> types.Params:
    """Initialises the critic's parameters from those of the policy."""
    head = {
      "kernel": jnp.zeros((self.policy.config.width,), jnp.float32),
      "bias": jnp.zeros((), jnp.float32),
    }
    if self.kind == "trunk":
      return {"value_head": head}
    return {"value_head": head, "trunk": jax.tree.map(jnp.asarray, params)}

  def logical_axes(self, params: types.Params) -> types.Params:
    """Names of the axes of the critic's parameters, given the policy's."""
    axes = {"value_head": {"kernel": ("width",), "bias": ()}}
    if self.kind == "separate":
      axes["trunk"] = decoder.logical_axes(params)
    return axes

  def hidden(
    self,
    params: types.Params,
    of_policy: types.Array,
    tokens: types.Array,
    positions: types.Array,
    segments: types.Array,
  ) -> types.Array:
    """The hidden states that the head is applied to.

    Args:
      params: of the critic.
      of_policy: [B, T, D], the policy's last hidden states.
      tokens: [B, T] int32.
      positions: [B, T] int32.
      segments: [B, T] int32.

    Returns:
      [B, T, D].
    """
    if self.kind == "trunk":
      return of_policy
    return self.policy.hidden(params["trunk"], tokens, positions, segments)

  def values(self, params: types.Params, hidden: types.Array) -> types.Array:
    """Values [...] float32 of hidden states [..., D]."""
    head = params["value_head"]
    return hidden.astype(jnp.float32) @ head["kernel"] + head["bias"]
