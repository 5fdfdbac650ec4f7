"""The trained networks as pure functions: policy, critic, adapters.

`Networks` combines the parts for one mesh. With adapters only these are
trained, on top of the policy's own, frozen parameters, the base. Only response
positions reach the vocabulary, a chunk at a time: [B, T, V] never exists.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from t2po_jax import types
from t2po_jax.distributed import sharding
from t2po_jax.learning import scoring


class Policy(Protocol):
  """The interface of a policy; see `models.decoder.Policy`."""

  def init(self, key: types.Array) -> types.Params: ...

  def hidden(
    self,
    params: types.Params,
    tokens: types.Array,
    positions: types.Array,
    segments: types.Array,
  ) -> types.Array: ...

  def head(self, params: types.Params) -> types.Params: ...

  def logits(
    self, params: types.Params, hidden: types.Array
  ) -> types.Array: ...


class Critic(Protocol):
  """The interface of a critic; see `models.critic.Critic`."""

  def init(self, params: types.Params) -> types.Params: ...

  def logical_axes(self, params: types.Params) -> sharding.Axes: ...

  def hidden(
    self,
    params: types.Params,
    of_policy: types.Array,
    tokens: types.Array,
    positions: types.Array,
    segments: types.Array,
  ) -> types.Array: ...

  def values(
    self, params: types.Params, hidden: types.Array
  ) -> types.Array: ...


class Adapters(Protocol):
  """The interface of adapters; see `lora.Adapters`."""

  def init(self) -> types.Params: ...

  def logical_axes(self) -> sharding.Axes: ...

  def freeze(self, params: types.Params) -> types.Params: ...

  def attach(
    self, base: types.Params, adapters: types.Params
  ) -> types.Params: ...

  def merge(
    self, base: types.Params, adapters: types.Params
  ) -> types.Params: ...


@dataclasses.dataclass(frozen=True)
class Networks:
  """The networks of a learner on its mesh.

  Attributes:
    policy: the policy network.
    mesh: the mesh that rows are laid out over.
    chunk: response positions per row whose logits exist at once, or None.
    critic: the value network; None for none.
    adapters: trained instead of the policy's parameters; None for none.
  """

  policy: Policy
  mesh: jax.sharding.Mesh
  chunk: int | None = 128
  critic: Critic | None = None
  adapters: Adapters | None = None

  def complete(self, base: types.Params, trained: types.Params) -> types.Params:
    """The complete parameters of the policy."""
    if self.adapters is None:
      return trained
    return self.adapters.attach(base, trained)

  def hidden(self, params: types.Params, batch: types.Batch) -> types.Array:
    """Hidden states [B, T, D] of one micro-batch."""
    hidden = self.policy.hidden(
      params, batch.tokens, batch.positions, batch.segments
    )
    return sharding.constrain(hidden, "rows", "length", "activation_width")

  def logprobs(
    self,
    params: types.Params,
    hidden: types.Array,
    batch: types.Batch,
    *,
    temperature: float,
    entropy_gradient: bool,
  ) -> tuple[types.Array, types.Array]:
    """Log-probs and entropies [B, R] of one micro-batch."""

    def score(
      head: types.Params, hidden: types.Array, targets: types.Array
    ) -> tuple[types.Array, types.Array]:
      return scoring.target_logprobs(
        self.policy.logits,
        head,
        hidden,
        targets,
        temperature=temperature,
        chunk=self.chunk,
        entropy_gradient=entropy_gradient,
      )

    return sharding.over_rows(score, self.mesh)(
      self.policy.head(params), _at_responses(hidden, batch), batch.targets
    )

  def values(
    self, critic: types.Params, hidden: types.Array, batch: types.Batch
  ) -> types.Array:
    """Values [B, R] of one micro-batch."""
    assert self.critic is not None
    of_critic = self.critic.hidden(
      critic, hidden, batch.tokens, batch.positions, batch.segments
    )
    return self.critic.values(critic, _at_responses(of_critic, batch))


def _at_responses(hidden: types.Array, batch: types.Batch) -> jax.Array:
  """[B, T, D] -> [B, R, D], the positions that predict response tokens."""
  return jnp.take_along_axis(hidden, batch.index[..., None], axis=1)
