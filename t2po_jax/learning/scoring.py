"""Log-probs of tokens from hidden states, without all the logits at once.

The logits are the largest array of an update: [B, R, V] in float32 exceeds
everything else. Here they only exist for a chunk of positions at a time, in the
forward pass and, recomputed, in the backward pass. The backward pass is written
by hand: it computes the gradient of the logits from softmax and cotangents in
one pass, whereas automatic differentiation would keep and traverse several
arrays of that size.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from t2po_jax import types
from t2po_jax.control import uncertainty

# Parameters and hidden states [..., D] -> logits [..., V] float32, all finite.
Project = Callable[[Any, types.Array], types.Array]


def target_logprobs(
  project: Project,
  head: Any,
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
    project: (head, hidden states [..., D]) -> logits [..., V] float32, finite.
    head: parameters of the projection; differentiated, like hidden states.
    hidden: [B, R, D].
    targets: [B, R] int32 token ids.
    temperature: above 0.
    chunk: positions per row whose logits exist at the same time, rounded down
      to a divisor of R; None keeps all logits for the backward pass.
    entropy_gradient: whether the entropy is differentiated.

  Returns:
    [B, R] float32 log-probs and [B, R] float32 entropies, nats.
  """

  def scale(head: types.Params, hidden: types.Array) -> types.Array:
    return project(head, hidden) / temperature

  score = functools.partial(_score, scale, chunk is None, entropy_gradient)
  if chunk is None:
    return score(head, hidden, targets)
  size = targets.shape[1]
  width = max(c for c in range(1, min(chunk, size) + 1) if size % c == 0)

  def cut(x: types.Array) -> jax.Array:
    parts = x.reshape(x.shape[0], size // width, width, *x.shape[2:])
    return jnp.moveaxis(parts, 1, 0)

  def join(x: types.Array) -> jax.Array:
    return jnp.moveaxis(x, 0, 1).reshape(targets.shape)

  scores = jax.lax.map(
    lambda part: score(head, *part), (cut(hidden), cut(targets))
  )
  return jax.tree.map(join, scores)


def _hits(logits: types.Array, targets: types.Array) -> types.Array:
  """One-hot targets, by a comparison: that splits over devices."""
  return jnp.arange(logits.shape[-1]) == targets[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _score(
  project: Project,
  keep: bool,
  entropy_gradient: bool,
  head: types.Params,
  hidden: types.Array,
  targets: types.Array,
) -> tuple[types.Array, types.Array]:
  """Log-probs and entropies; `keep` keeps the logits for the backward pass."""
  scores, _ = _score_forward(
    project, keep, entropy_gradient, head, hidden, targets
  )
  return scores


def _score_forward(
  project: Project,
  keep: bool,
  entropy_gradient: bool,
  head: types.Params,
  hidden: types.Array,
  targets: types.Array,
) -> tuple[tuple[types.Array, types.Array], tuple[Any, ...]]:
  del entropy_gradient
  logits = project(head, hidden)
  top, total, weighted = uncertainty.moments(logits)
  normaliser = top + jnp.log(total)
  entropy = jnp.log(total) - weighted / total
  chosen = jnp.sum(logits * _hits(logits, targets), axis=-1)
  saved = (head, hidden, targets, normaliser, entropy)
  return (chosen - normaliser, entropy), (*saved, logits if keep else None)


def _score_backward(
  project: Project,
  keep: bool,
  entropy_gradient: bool,
  saved: tuple[Any, ...],
  cotangents: tuple[types.Array, types.Array],
) -> tuple[Any, ...]:
  """dz_v = g (1[v = target] - p_v) - g_H p_v (log p_v + H)."""
  head, hidden, targets, normaliser, entropy, logits = saved
  again, pull = jax.vjp(project, head, hidden)
  logits = logits if keep else again
  of_logprob, of_entropy = (g[..., None] for g in cotangents)
  logp = logits - normaliser[..., None]
  slope = of_logprob
  if entropy_gradient:
    slope = slope + of_entropy * (logp + entropy[..., None])
  hit = jnp.where(_hits(logits, targets), of_logprob, 0.0)
  return *pull(hit - jnp.exp(logp) * slope), None


_score.defvjp(_score_forward, _score_backward)
