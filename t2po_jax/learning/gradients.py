"""The gradient of a batch, micro-batch by micro-batch.

Token weights are computed from the whole batch first, so the sum over
micro-batches is the gradient of the whole batch, whatever their size, the
packing or the mesh. Empty micro-batches are skipped. Of a partly filled one the
rows with content are computed one by one, so that no empty row costs anything.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t2po_jax import types
from t2po_jax.learning import losses, networks, objectives

# How a batch is computed. `whole`: non-empty micro-batches, including their
# empty rows. `rows`: the rows with content of a partly filled last micro-batch
# one by one. `one row`: the batch has a single row with content.
FILLS = ("whole", "rows", "one row")

# Metrics of a micro-batch: what adds up to the mean, and maxima.
_Sums = tuple[dict[str, types.Array], dict[str, types.Array]]
# A gradient with its metrics.
_Total = tuple[dict[str, types.Params], _Sums]


def batch_gradient(
  nets: networks.Networks,
  objective: objectives.Objective,
  trained: Mapping[str, types.Params],
  base: types.Params | None,
  batch: types.Batch,
  *,
  fill: str = "whole",
) -> tuple[Mapping[str, types.Params], dict[str, types.Array]]:
  """The gradient of the objective, and its metrics.

  Args:
    nets: the networks.
    objective: what is minimised.
    trained: parameters by name, see `layout.join`.
    base: frozen parameters under the adapters; None without adapters.
    batch: [micro-batches, rows, ...].
    fill: one of `FILLS`.

  Returns:
    The gradient in the structure of `trained`, and means and maxima over the
    tokens of the whole batch.
  """
  one = _part_gradient(nets, objective, trained, base, batch)

  def add(part: _Part, total: Any) -> _Total:
    grads, (means, maxima) = one(part)
    return (
      jax.tree.map(jnp.add, total[0], grads),
      (
        jax.tree.map(jnp.add, total[1][0], means),
        jax.tree.map(jnp.maximum, total[1][1], maxima),
      ),
    )

  if batch.tokens.shape[0] == 1 and fill != "rows":
    grads, (means, maxima) = one(_Part(0, 0 if fill == "one row" else None))
  else:
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype),
      jax.eval_shape(lambda: one(_Part(0))),
    )
    grads, (means, maxima) = _over_parts(batch, fill, add, zeros)
  return grads, means | maxima


class _Part(NamedTuple):
  """A micro-batch, or one of its rows."""

  number: types.Array | int
  row: types.Array | int | None = None

  def take(self, x: types.Array) -> types.Array:
    """[micro-batches, rows, ...] -> [rows, ...], or [1, ...]."""
    if self.row is None:
      return x[self.number]
    return jax.lax.dynamic_slice_in_dim(x[self.number], self.row, 1)

  def put(self, x: jax.Array, values: types.Array) -> jax.Array:
    """The other way round."""
    if self.row is None:
      return x.at[self.number].set(values)
    return x.at[self.number, self.row].set(values[0])


def _over_parts(
  batch: types.Batch,
  fill: str,
  add: Callable[[_Part, Any], Any],
  start: Any,
) -> Any:
  """Goes through what has content, and nothing else.

  Args:
    batch: [micro-batches, rows, ...], rows with content first.
    fill: one of `FILLS`.
    add: (part, total) -> total.
    start: the first total.

  Returns:
    The last total.
  """
  if fill == "one row":
    return add(_Part(0, 0), start)
  if fill == "whole":
    return jax.lax.fori_loop(
      0, count_filled(batch), lambda i, total: add(_Part(i), total), start
    )
  parts, rows = batch.segments.shape[:2]
  used = jnp.any(batch.segments > 0, axis=2).reshape(-1)
  filled = jnp.max(jnp.where(used, jnp.arange(used.shape[0]) + 1, 0))
  whole, rest = filled // rows, filled % rows
  if parts > 1:
    start = jax.lax.fori_loop(
      0, whole, lambda i, total: add(_Part(i), total), start
    )
  return jax.lax.fori_loop(
    0, rest, lambda row, total: add(_Part(whole, row), total), start
  )


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

  def add(i: types.Array, total: Any) -> tuple[types.Params, jax.Array]:
    grads, _ = one(_Part(i))
    policy = grads["policy"]
    return (
      jax.tree.map(jnp.add, total[0], policy),
      total[1] + optax.tree.norm(policy),
    )

  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(lambda: one(_Part(0))[0]["policy"]),
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
) -> Callable[[_Part], _Total]:
  """Returns a function: part of the batch -> its gradient and metrics."""
  weights = batch_weights(objective, batch)

  def loss(
    trained: types.Params, base: types.Params, part: types.Batch, weights: Any
  ) -> tuple[types.Array, _Sums]:
    return _part_loss(nets, objective, trained, base, part, *weights)

  differentiate = jax.grad(loss, has_aux=True)

  def one(which: _Part) -> _Total:
    part, of_part = jax.tree.map(which.take, (batch, weights))
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
) -> tuple[types.Array, _Sums]:
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

  def flat(x: types.Array) -> jax.Array:
    # Rows first, so that they stay on their devices.
    return jnp.swapaxes(x, 0, 1).reshape(-1, x.shape[-1])

  def back(x: types.Array) -> jax.Array:
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
  score: Callable[[types.Batch], types.Array],
  batch: types.Batch,
  *,
  fill: str = "whole",
) -> types.Array:
  """Applies `score` to every non-empty micro-batch; 0 for empty ones."""

  def put(which: _Part, scores: jax.Array) -> jax.Array:
    return which.put(scores, score(jax.tree.map(which.take, batch)))

  empty = jnp.zeros(batch.targets.shape, jnp.float32)
  return _over_parts(batch, fill, put, empty)


def count_filled(batch: types.Batch) -> types.Array:
  """The number of leading non-empty micro-batches."""
  used = jnp.any(batch.segments > 0, axis=(1, 2))
  return jnp.max(jnp.where(used, jnp.arange(used.shape[0]) + 1, 0))
