"""The gradient of a batch, micro-batch by micro-batch.

Token weights are computed from the whole batch first, so the sum over
micro-batches is the gradient of the whole batch, whatever their size, the
packing or the mesh. Empty micro-batches are skipped.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t2po_jax import types
from t2po_jax.learning import losses, networks, objectives


def batch_gradient(
  nets: networks.Networks,
  objective: objectives.Objective,
  trained: Mapping[str, types.Params],
  base: types.Params | None,
  batch: types.Batch,
) -> tuple[Mapping[str, types.Params], dict[str, types.Array]]:
  """The gradient of the objective, and its metrics.

  Args:
    nets: the networks.
    objective: what is minimised.
    trained: parameters by name, see `layout.join`.
    base: frozen parameters under the adapters; None without adapters.
    batch: [micro-batches, rows, ...].

  Returns:
    The gradient in the structure of `trained`, and means and maxima over the
    tokens of the whole batch.
  """
  one = _part_gradient(nets, objective, trained, base, batch)

  def add(i: types.Array, total: Any):
    grads, (means, maxima) = one(i)
    return (
      jax.tree.map(jnp.add, total[0], grads),
      (
        jax.tree.map(jnp.add, total[1][0], means),
        jax.tree.map(jnp.maximum, total[1][1], maxima),
      ),
    )

  if batch.tokens.shape[0] == 1:
    grads, (means, maxima) = one(0)
  else:
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0)
    )
    grads, (means, maxima) = jax.lax.fori_loop(
      0, count_filled(batch), add, zeros
    )
  return grads, means | maxima


def agreement(
  nets: networks.Networks,
  objective: objectives.Objective,
  trained: Mapping[str, types.Params],
  base: types.Params | None,
  batch: types.Batch,
) -> types.Array:
  """How much the micro-batches of a batch agree on the policy's gradient.

    |sum_i g_i| / sum_i |g_i|

  with g_i the part of the gradient from micro-batch i: 1 where all point the
  same way, about 1 / sqrt(n) where n of them are noise. Costs a gradient.

  Args:
    nets: the networks.
    objective: what is minimised.
    trained: parameters by name, see `layout.join`.
    base: frozen parameters under the adapters; None without adapters.
    batch: [micro-batches, rows, ...].

  Returns:
    Scalar float32; 0 where the gradient is zero.
  """
  one = _part_gradient(nets, objective, trained, base, batch)

  def add(i: types.Array, total: Any):
    grads, _ = one(i)
    policy = grads["policy"]
    return (
      jax.tree.map(jnp.add, total[0], policy),
      total[1] + optax.tree.norm(policy),
    )

  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0)[0]["policy"]
  )
  whole, norms = jax.lax.fori_loop(
    0, count_filled(batch), add, (zeros, jnp.zeros(()))
  )
  return optax.tree.norm(whole) / jnp.maximum(
    norms, jnp.finfo(jnp.float32).tiny
  )


def _part_gradient(
  nets: networks.Networks,
  objective: objectives.Objective,
  trained: types.Params,
  base: types.Params,
  batch: types.Batch,
):
  """Returns a function: index of a micro-batch -> its gradient and metrics."""
  weights = batch_weights(objective, batch)

  def loss(
    trained: types.Params, base: types.Params, part: types.Batch, weights: Any
  ):
    return _part_loss(nets, objective, trained, base, part, *weights)

  differentiate = jax.grad(loss, has_aux=True)

  def one(i: types.Array | int):
    part, of_part = jax.tree.map(lambda x: x[i], (batch, weights))
    return differentiate(trained, base, part, of_part)

  return one


def _part_loss(
  nets: networks.Networks,
  objective: objectives.Objective,
  trained: types.Params,
  base: types.Params,
  part: types.Batch,
  weights: types.Array,
  token_weights: types.Array,
  value_weights: types.Array,
):
  """Loss of one micro-batch, in the form `grad` wants."""
  params = nets.complete(base, trained["policy"])
  critic = trained.get("critic")
  hidden = nets.hidden(params, part)
  logprobs, entropy = nets.logprobs(
    params,
    hidden,
    part,
    temperature=objective.temperature,
    entropy_gradient=objective.entropy_coefficient != 0,
  )
  parts = objective.evaluate(logprobs, entropy, part, weights, token_weights)
  loss, means = parts.loss, parts.means
  if critic is not None:
    values = nets.values(critic, hidden, part)
    error, of_values = objective.evaluate_values(values, part, value_weights)
    loss, means = loss + error, means | of_values
  return loss, (means, parts.maxima)


def batch_weights(
  objective: objectives.Objective, batch: types.Batch
) -> tuple[types.Array, types.Array, types.Array]:
  """Three weights per token, each [micro-batches, rows, R], summing to <= 1.

  Returns:
    Weights of the loss, as the objective aggregates; equal weights of all
    tokens, for metrics; equal weights of all tokens with a value target, for
    the critic.
  """

  def flat(x: types.Array):
    # Rows first, so that they stay on their devices.
    return jnp.swapaxes(x, 0, 1).reshape(-1, x.shape[-1])

  def back(x: types.Array):
    parts = batch.mask.shape[0]
    return jnp.swapaxes(x.reshape(-1, parts, x.shape[-1]), 0, 1)

  mask, turn = flat(batch.mask), flat(batch.turn)
  weights = losses.token_weights(
    mask, turn, mode=objective.aggregation, horizon=objective.horizon
  )
  token_weights = losses.token_weights(mask, turn, mode="token_mean")
  targeted = (turn >= 0) & jnp.isfinite(flat(batch.value_targets))
  value_weights = losses.token_weights(targeted, turn, mode="token_mean")
  return back(weights), back(token_weights), back(value_weights)


def map_parts(
  score: Callable[[types.Batch], types.Array], batch: types.Batch
) -> types.Array:
  """Applies `score` to every non-empty micro-batch; 0 for empty ones."""

  def put(i: types.Array, scores: jax.Array):
    part = jax.tree.map(lambda x: x[i], batch)
    return scores.at[i].set(score(part))

  empty = jnp.zeros(batch.targets.shape, jnp.float32)
  return jax.lax.fori_loop(0, count_filled(batch), put, empty)


def count_filled(batch: types.Batch) -> types.Array:
  """The number of leading non-empty micro-batches."""
  used = jnp.any(batch.segments > 0, axis=(1, 2))
  return jnp.max(jnp.where(used, jnp.arange(used.shape[0]) + 1, 0))
