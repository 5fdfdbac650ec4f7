"""The update: rows in, better parameters out.

`Learner` compiles two functions for a mesh: one optimizer step and the
log-probs of a batch. Where other code bases of this field use `jax.pmap`, here
it is `jax.jit` with explicit shardings (see `sharding.py`): parameters,
optimizer state and rows are laid out by name, and the state is donated.

A step walks over the micro-batches of its batch and adds up gradients. The
weight of every token is computed from the whole batch first, so the sum is the
gradient of the big batch, whatever the micro-batch size, packing or mesh.
Micro-batches without content are not computed. Only response positions are
projected to the vocabulary, a chunk at a time, and a chunk's logits are
computed again in the backward pass: [B, T, V] never exists. Nothing is
transferred between host and devices inside a step.
"""

import collections
from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from t2po_jax import sharding, types
from t2po_jax.learning import losses, objectives

SCHEDULES = ("constant", "linear", "cosine")


class Policy(Protocol):
  """What the learner needs of a network; see `models.decoder.Policy`."""

  def init(self, key) -> types.Params: ...

  def hidden(self, params, tokens, positions, segments) -> types.Array: ...

  def logits(self, params, hidden) -> types.Array: ...


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW and its schedule.

  Attributes:
    learning_rate: the peak.
    schedule: after warm-up: `constant`, or `linear` or `cosine` to the end.
    warmup_steps: optimizer steps from 0 to the peak.
    total_steps: optimizer steps until the end, for `linear` and `cosine`.
    final_fraction: of the peak, at the end, from 0 to 1.
    b1: decay of the gradient's mean, from 0 to 1.
    b2: decay of the gradient's square, from 0 to 1.
    eps: added to the root of the square.
    weight_decay: per step, times the learning rate; on every parameter.
    max_grad_norm: the gradient's global norm is clipped to this; above 0.
  """

  learning_rate: float = 1e-6
  schedule: str = "constant"
  warmup_steps: int = 0
  total_steps: int = 0
  final_fraction: float = 0.0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.0
  max_grad_norm: float = 1.0

  def __post_init__(self):
    if self.schedule not in SCHEDULES:
      raise ValueError(
        f"schedule: found {self.schedule!r}, expected one of {SCHEDULES}"
      )
    if self.schedule != "constant" and self.total_steps <= self.warmup_steps:
      raise ValueError(
        f"total_steps: found {self.total_steps}, expected more than "
        f"warmup_steps ({self.warmup_steps}) for schedule {self.schedule!r}"
      )
    if self.max_grad_norm <= 0:
      raise ValueError(
        f"max_grad_norm: found {self.max_grad_norm}, expected above 0"
      )


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
  """The learning rate as a function of the optimizer step, from 0."""
  peak, end = config.learning_rate, config.learning_rate * config.final_fraction
  steps = config.total_steps - config.warmup_steps
  after = {
    "constant": lambda: optax.constant_schedule(peak),
    "linear": lambda: optax.linear_schedule(peak, end, steps),
    "cosine": lambda: optax.cosine_decay_schedule(
      peak, steps, config.final_fraction
    ),
  }[config.schedule]()
  if not config.warmup_steps:
    return after
  # The first step already moves: 1/n, 2/n, ... of the peak.
  first = peak / config.warmup_steps
  warmup = optax.linear_schedule(first, peak, config.warmup_steps - 1)
  return optax.join_schedules([warmup, after], [config.warmup_steps])


def create_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
  """AdamW behind global-norm clipping."""
  return optax.chain(
    optax.clip_by_global_norm(config.max_grad_norm),
    optax.adamw(
      learning_rate(config),
      b1=config.b1,
      b2=config.b2,
      eps=config.eps,
      weight_decay=config.weight_decay,
    ),
  )


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


class Learner:
  """Compiled updates of one policy on one mesh.

  Attributes:
    mesh: the mesh.
    rows: rows of a micro-batch over the whole mesh.
    optimizer: the optax transformation.
    traces: how often each function was traced; more than once per shape of a
      batch means recompilation.
  """

  def __init__(
    self,
    policy: Policy,
    axes: sharding.Axes,
    mesh: jax.sharding.Mesh,
    *,
    optimizer: OptimizerConfig,
    objective: objectives.Objective,
    rows: int,
    chunk: int | None = 128,
  ):
    """Plans the layout; nothing is compiled or allocated yet.

    Args:
      policy: the network.
      axes: tuples of logical axis names in the structure of the parameters.
      mesh: from `sharding.create_mesh`.
      optimizer: of the update.
      objective: what is minimised.
      rows: rows of a micro-batch over the whole mesh.
      chunk: see `target_logprobs`.

    Raises:
      ValueError: if the rows do not divide over the mesh.
    """
    shards = sharding.row_shards(mesh)
    if rows < 1 or rows % shards:
      raise ValueError(
        f"rows: found {rows} per micro-batch, expected a multiple of {shards} "
        f"(mesh data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']})"
      )
    self.mesh = mesh
    self.optimizer = create_optimizer(optimizer)
    self.traces = collections.Counter()
    self._policy, self._objective = policy, objective
    self.rows, self._chunk = rows, chunk
    self._learning_rate = learning_rate(optimizer)
    whole = sharding.replicated(mesh)
    by_row = sharding.row_sharding(mesh, dimension=1)
    self._batch_sharding = by_row
    self._state = self._plan(axes)
    self._state_sharding = jax.tree.map(lambda x: x.sharding, self._state)
    self._step = jax.jit(
      self._optimizer_step,
      in_shardings=(self._state_sharding, by_row),
      out_shardings=(self._state_sharding, whole),
      donate_argnums=0,
    )
    self._score = jax.jit(
      self._batch_logprobs,
      in_shardings=(self._state_sharding.params, by_row),
      out_shardings=by_row,
    )
    self._merge = jax.jit(_merge_metrics, out_shardings=whole)

  def abstract_state(self) -> types.TrainState:
    """The state as shapes, dtypes and shardings, to restore into."""
    return self._state

  def place_params(self, params: types.Params) -> types.Params:
    """Copies parameters to the devices, laid out as the state's are."""
    return jax.device_put(params, self._state_sharding.params, may_alias=False)

  def init_state(self, params: types.Params) -> types.TrainState:
    """A state before its first step.

    Args:
      params: on the host or on devices, any float dtype; copied, because the
        state is donated by the first update.

    Returns:
      The state: float32 master weights, laid out over the mesh.
    """

    master = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    master = self.place_params(master)
    layout = self._state_sharding
    start = jax.jit(self.optimizer.init, out_shardings=layout.opt_state)
    return types.TrainState(
      step=sharding.put(np.int32(0), layout.step),
      params=master,
      opt_state=start(master),
    )

  def update(
    self,
    state: types.TrainState,
    batches: Sequence[types.Batch],
    *,
    epochs: int = 1,
    ref_params: types.Params | None = None,
  ) -> tuple[types.TrainState, dict[str, types.Array]]:
    """One optimizer step per batch and epoch.

    A step whose gradient is not finite changes nothing and is counted.

    Args:
      state: donated: not usable afterwards.
      batches: from `batching.pack`, numpy arrays of equal shapes.
      epochs: how often to go through the batches, >= 1.
      ref_params: of the reference policy, from `place_params`; only if the
        objective needs them and the batches lack them.

    Returns:
      The new state, and metrics as scalars on the device: means over the
      steps; `tokens`, `skipped` and `steps` are sums, `*_max` maxima, and
      `mismatch_*` is of the first step, when the policy is still the one that
      sampled. Empty without batches.
    """
    with jax.set_mesh(self.mesh):
      placed = [self._place(batch) for batch in batches]
      if self._objective.recomputes_old:
        placed = [
          batch.replace(old_logprobs=self._score(state.params, batch))
          for batch in placed
        ]
      if self._objective.needs_reference and ref_params is not None:
        placed = [
          batch.replace(ref_logprobs=self._score(ref_params, batch))
          for batch in placed
        ]
      found = []
      for _ in range(epochs):
        for batch in placed:
          state, metrics = self._step(state, batch)
          found.append(metrics)
      return state, self._merge(found) if found else {}

  def logprobs(self, params: types.Params, batch: types.Batch) -> types.Array:
    """Log-probs of a batch's targets under any parameters of this policy.

    Args:
      params: from `place_params`, or a state's.
      batch: from `batching.pack`, numpy arrays.

    Returns:
      [B, R] float32 on the devices, at the temperature of the objective.
    """
    with jax.set_mesh(self.mesh):
      found = self._score(params, self._place(batch))
      return found.reshape(batch.targets.shape)

  def _plan(self, axes) -> types.TrainState:
    """The shapes and shardings of the state."""
    params = jax.eval_shape(self._policy.init, jax.random.key(0))
    params = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params
    )
    layout = sharding.params_sharding(self.mesh, params, axes)
    opt_state = jax.eval_shape(self.optimizer.init, params)
    whole = sharding.replicated(self.mesh)
    opt_layout = optax.tree.map_params(
      self.optimizer,
      lambda _, place: place,
      opt_state,
      layout,
      transform_non_params=lambda _: whole,
    )

    def describe(x, place):
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return types.TrainState(
      step=jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
      params=jax.tree.map(describe, params, layout),
      opt_state=jax.tree.map(describe, opt_state, opt_layout),
    )

  def _place(self, batch):
    """[B, ...] on the host -> [micro-batches, rows, ...] on the devices."""
    height = batch.tokens.shape[0]
    if height % self.rows:
      raise ValueError(
        f"batch of {height} rows does not divide into micro-batches of "
        f"{self.rows} rows"
      )

    def cut(x):
      return x.reshape(-1, self.rows, *x.shape[1:])

    return sharding.put(jax.tree.map(cut, batch), self._batch_sharding)

  def _token_logprobs(self, params, batch):
    """Log-probs and entropies [B, R] of one micro-batch."""
    hidden = self._policy.hidden(
      params, batch.tokens, batch.positions, batch.segments
    )
    hidden = sharding.constrain(hidden, "rows", "length", "activation_width")
    hidden = jnp.take_along_axis(hidden, batch.index[..., None], axis=1)
    return target_logprobs(
      lambda x: self._policy.logits(params, x),
      hidden,
      batch.targets,
      temperature=self._objective.temperature,
      chunk=self._chunk,
      entropy_gradient=self._objective.entropy_coefficient != 0,
    )

  def _part_loss(self, params, batch, weights, shares):
    """Loss of one micro-batch, in the form `value_and_grad` wants."""
    logprobs, entropy = self._token_logprobs(params, batch)
    parts = self._objective.evaluate(logprobs, entropy, batch, weights, shares)
    return parts.loss, (parts.means, parts.maxima)

  def _gradient(self, params, batch):
    """Gradient, means and maxima of the whole batch."""
    weights, shares = self._weigh(batch)
    differentiate = jax.grad(self._part_loss, has_aux=True)

    def part(i):
      return differentiate(
        params, *jax.tree.map(lambda x: x[i], (batch, weights, shares))
      )

    def add(i, total):
      grads, (means, maxima) = part(i)
      return (
        jax.tree.map(jnp.add, total[0], grads),
        (
          jax.tree.map(jnp.add, total[1][0], means),
          jax.tree.map(jnp.maximum, total[1][1], maxima),
        ),
      )

    if batch.tokens.shape[0] == 1:
      grads, (means, maxima) = part(0)
    else:
      zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, 0)
      )
      grads, (means, maxima) = jax.lax.fori_loop(0, _filled(batch), add, zeros)
    return grads, means | maxima

  def _weigh(self, batch):
    """Weights of all tokens, for the loss and for the metrics."""

    def flat(x):
      # Rows first: this keeps them on their devices.
      return jnp.swapaxes(x, 0, 1).reshape(-1, x.shape[-1])

    def back(x):
      parts = batch.mask.shape[0]
      return jnp.swapaxes(x.reshape(-1, parts, x.shape[-1]), 0, 1)

    mask, turn = flat(batch.mask), flat(batch.turn)
    weights = losses.token_weights(
      mask,
      turn,
      mode=self._objective.aggregation,
      horizon=self._objective.horizon,
    )
    shares = losses.token_weights(mask, turn, mode="token_mean")
    return back(weights), back(shares)

  def _optimizer_step(self, state, batch):
    """One step; see `update`."""
    self.traces["update"] += 1
    grads, metrics = self._gradient(state.params, batch)
    norm = optax.tree.norm(grads)
    updates, opt_state = self.optimizer.update(
      grads, state.opt_state, state.params
    )
    finite = jnp.isfinite(norm)
    moved = types.TrainState(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
    )
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), moved, state)
    metrics |= {
      "grad_norm": norm,
      "update_norm": jnp.where(finite, optax.tree.norm(updates), 0.0),
      "learning_rate": self._learning_rate(state.step),
      "skipped": 1.0 - finite,
      "tokens": jnp.sum(batch.mask),
      "steps": jnp.ones(()),
    }
    return new, metrics

  def _batch_logprobs(self, params, batch):
    """[micro-batches, rows, R] log-probs; those without content are 0."""
    self.traces["logprobs"] += 1

    def score(i, found):
      part = jax.tree.map(lambda x: x[i], batch)
      logprobs, _ = self._token_logprobs(params, part)
      return found.at[i].set(logprobs)

    empty = jnp.zeros(batch.targets.shape, jnp.float32)
    return jax.lax.fori_loop(0, _filled(batch), score, empty)


def _filled(batch) -> types.Array:
  """The number of leading micro-batches that hold everything."""
  used = jnp.any(batch.segments > 0, axis=(1, 2))
  return jnp.max(jnp.where(used, jnp.arange(used.shape[0]) + 1, 0))


def _merge_metrics(found: list[dict[str, Any]]) -> dict[str, types.Array]:
  """The metrics of several steps as one; see `Learner.update`."""

  def merge(name):
    values = jnp.stack([metrics[name] for metrics in found])
    if name.startswith("mismatch_"):
      return values[0]
    if name in ("tokens", "skipped", "steps"):
      return jnp.sum(values)
    return jnp.max(values) if name.endswith("_max") else jnp.mean(values)

  return {name: merge(name) for name in found[0]}
