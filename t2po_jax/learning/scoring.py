"""Log-probs of tokens from hidden states, without all the logits at once.

The projection to the vocabulary is the widest thing in an update: [B, R, V]
in float32 is larger than the rest of it. Here it exists for a chunk of
positions at a time, in the forward pass and, computed again, in the backward.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from t2po_jax import types
from t2po_jax.learning import losses


def target_logprobs(
  project: Callable[[types.Array], types.Array],
  hidden: types.Array,
  targets: types.Array,
  *,
  temperature: float = 1.0,
  chunk: int | None = None,
  entropy_gradient: bool = False,
) -> tuple[types.Array, types.Array]:
  """Log-probs of the targets, and entropies, from hidden states.

  logp = z_target - logsumexp(z), H = logsumexp(z) - sum softmax(z) z, with
  z = logits / temperature.

  Args:
    project: hidden states [..., D] -> logits [..., V] float32.
    hidden: [B, R, D].
    targets: [B, R] int32 token ids.
    temperature: above 0.
    chunk: positions per row whose logits exist at the same time, rounded down
      to a divisor of R; None keeps all logits for the backward pass.
    entropy_gradient: whether the entropy is differentiated.

  Returns:
    [B, R] float32 log-probs and [B, R] float32 entropies, nats.
  """

  def score(hidden, targets):
    logits = project(hidden) / temperature
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    # A comparison splits over devices and transposes without a scatter.
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    chosen = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    if not entropy_gradient:
      logits = jax.lax.stop_gradient(logits)
    return chosen - normaliser, losses.token_entropy(logits)

  if chunk is None:
    return score(hidden, targets)
  size = targets.shape[1]
  width = max(c for c in range(1, min(chunk, size) + 1) if size % c == 0)

  def cut(x):
    parts = x.reshape(x.shape[0], size // width, width, *x.shape[2:])
    return jnp.moveaxis(parts, 1, 0)

  def join(x):
    return jnp.moveaxis(x, 0, 1).reshape(targets.shape)

  found = jax.lax.map(
    lambda part: jax.checkpoint(score)(*part), (cut(hidden), cut(targets))
  )
  return jax.tree.map(join, found)
