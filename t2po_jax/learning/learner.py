"""The update: rows in, better parameters out.

`Learner` compiles its functions for a mesh: one optimizer step, the log-probs
of a batch, and the values of a batch if there is a critic. Where other code
bases of this field use `jax.pmap`, here it is `jax.jit` with explicit shardings
(see `sharding.py`): parameters, optimizer state and rows are laid out by name,
and the state is donated.

A step walks over the micro-batches of its batch and adds up gradients. The
weight of every token is computed from the whole batch first, so the sum is the
gradient of the big batch, whatever the micro-batch size, packing or mesh.
Micro-batches without content are not computed. Only response positions are
projected to the vocabulary, a chunk at a time, and a chunk's logits are
computed again in the backward pass: [B, T, V] never exists. Nothing is
transferred between host and devices inside a step.
"""

import collections
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from t2po_jax import types
from t2po_jax.distributed import sharding
from t2po_jax.learning import losses, objectives, optimizers, scoring


class Policy(Protocol):
  """What the learner needs of a network; see `models.decoder.Policy`."""

  def init(self, key) -> types.Params: ...

  def hidden(self, params, tokens, positions, segments) -> types.Array: ...

  def head(self, params) -> types.Params: ...

  def logits(self, params, hidden) -> types.Array: ...


class Critic(Protocol):
  """What the learner needs of a critic; see `models.critic.Critic`."""

  def init(self, params) -> types.Params: ...

  def logical_axes(self, params) -> sharding.Axes: ...

  def hidden(
    self, params, of_policy, tokens, positions, segments
  ) -> types.Array: ...

  def values(self, params, hidden) -> types.Array: ...


class Adapters(Protocol):
  """What the learner needs to train adapters; see `lora.Adapters`."""

  def init(self) -> types.Params: ...

  def logical_axes(self) -> sharding.Axes: ...

  def freeze(self, params: types.Params) -> types.Params: ...

  def attach(
    self, base: types.Params, adapters: types.Params
  ) -> types.Params: ...

  def merge(
    self, base: types.Params, adapters: types.Params
  ) -> types.Params: ...


class Learner:
  """Compiled updates of one policy on one mesh.

  With adapters these are what is trained: wherever parameters come in or go
  out, of the state or of a reference, they are the adapters'. The policy's own
  parameters, the base, are given once, are part of no state, and never change.

  Attributes:
    mesh: the mesh.
    rows: rows of a micro-batch over the whole mesh.
    chunk: response positions per row whose logits exist at once, or None.
    traces: how often each function was traced; more than once per shape of a
      batch means recompilation.
  """

  def __init__(
    self,
    policy: Policy,
    axes: sharding.Axes,
    mesh: jax.sharding.Mesh,
    *,
    optimizer: optimizers.OptimizerConfig,
    objective: objectives.Objective,
    rows: int,
    chunk: int | None = 128,
    critic: Critic | None = None,
    critic_optimizer: optimizers.OptimizerConfig | None = None,
    adapters: Adapters | None = None,
  ):
    """Plans the layout; nothing is compiled or allocated yet.

    Args:
      policy: the network.
      axes: tuples of logical axis names in the structure of the parameters.
      mesh: from `sharding.create_mesh`.
      optimizer: of the update.
      objective: what is minimised.
      rows: rows of a micro-batch over the whole mesh.
      chunk: see `scoring.target_logprobs`.
      critic: learns values beside the policy, in the same steps; None for
        none.
      critic_optimizer: of the critic's own parameters; by default as the
        policy's.
      adapters: are trained in place of the policy's parameters; None for none.

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
    # What is trained, by name: each part with its own optimizer and norm.
    self._optimizers = {"policy": optimizer}
    if critic is not None:
      self._optimizers["critic"] = critic_optimizer or optimizer
    self.traces = collections.Counter()
    self._policy, self._critic = policy, critic
    self._adapters, self._base = adapters, None
    self._objective = objective
    self.rows, self.chunk = rows, chunk
    self._learning_rate = optimizers.learning_rate(optimizer)
    whole = sharding.replicated(mesh)
    by_row = sharding.row_sharding(mesh, dimension=1)
    self._batch_sharding = by_row
    self._abstract_base, self._state = self._plan(axes)
    self._state_sharding = jax.tree.map(lambda x: x.sharding, self._state)
    base = jax.tree.map(lambda x: x.sharding, self._abstract_base)
    self._base_sharding = base
    self._step = jax.jit(
      self._optimizer_step,
      in_shardings=(self._state_sharding, base, by_row, whole),
      out_shardings=(self._state_sharding, whole),
      donate_argnums=0,
    )
    self._score = jax.jit(
      self._batch_logprobs,
      in_shardings=(self._state_sharding.params, base, by_row),
      out_shardings=by_row,
    )
    self._value = jax.jit(
      self._batch_values,
      in_shardings=(
        self._state_sharding.params,
        self._state_sharding.critic,
        base,
        by_row,
      ),
      out_shardings=by_row,
    )
    self._merge = jax.jit(_merge_metrics, out_shardings=whole)
    if adapters is not None:
      self._merge_adapters = jax.jit(adapters.merge, out_shardings=base)

  def abstract_state(self) -> types.TrainState:
    """The state as shapes, dtypes and shardings, to restore into."""
    return self._state

  def abstract_base(self) -> types.Params | None:
    """The frozen base likewise; None without adapters."""
    return self._abstract_base

  def temporary_bytes(self, batch: types.Batch) -> int | None:
    """What one optimizer step holds besides its arguments, by XLA's account.

    Args:
      batch: the shapes of a batch, as `jax.ShapeDtypeStruct`.

    Returns:
      Bytes on a device; None where the compiler does not tell.
    """

    def cut(x):
      shape = (x.shape[0] // self.rows, self.rows, *x.shape[1:])
      return jax.ShapeDtypeStruct(shape, x.dtype)

    lowered = self.lower_update(jax.tree.map(cut, batch))
    found = lowered.compile().memory_analysis()
    return None if found is None else found.temp_size_in_bytes

  def place_params(self, params: types.Params) -> types.Params:
    """Copies parameters to the devices, laid out as the state's are."""
    return sharding.put(params, self._state_sharding.params, alias=False)

  def place_reference(self, params: types.Params) -> types.Params:
    """The reference policy, as `update` and `logprobs` take it.

    Args:
      params: the policy's own. With adapters they are the base already, and
        adapters that change nothing stand for them.

    Returns:
      Parameters on the devices.
    """
    if self._adapters is not None:
      params = self._adapters.init()
    return self.place_params(params)

  def load_base(self, params: types.Params) -> None:
    """Takes the parameters that adapters build on; nothing without adapters."""
    if self._adapters is None:
      return
    frozen = jax.eval_shape(self._adapters.freeze, params)
    params = jax.tree.map(lambda x, like: x.astype(like.dtype), params, frozen)
    self._base = sharding.put(params, self._base_sharding, alias=False)

  def policy_params(self, state: types.TrainState) -> types.Params:
    """The policy's parameters, for sampling; adapters are merged."""
    if self._adapters is None:
      return state.params
    return self._merge_adapters(self._base, state.params)

  def init_state(self, params: types.Params) -> types.TrainState:
    """A state before its first step.

    Args:
      params: of the policy, on the host or on devices, any float dtype;
        copied, because the state is donated by the first update.

    Returns:
      The state: float32 master weights of what is trained, laid out over the
      mesh.
    """
    if self._adapters is not None:
      self.load_base(params)
      params = self._adapters.init()
    master = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    master = self.place_params(master)
    layout = self._state_sharding
    critic = None
    if self._critic is not None:
      critic = sharding.put(
        self._critic.init(master), layout.critic, alias=False
      )
    start = jax.jit(self._init_optimizers, out_shardings=layout.opt_state)
    return types.TrainState(
      step=sharding.put(np.int32(0), layout.step),
      params=master,
      opt_state=start(_join(master, critic)),
      critic=critic,
    )

  def renew_optimizer(self, state: types.TrainState) -> types.TrainState:
    """The state with an optimizer that has seen no gradient.

    Its schedule begins anew too; `step` goes on counting.
    """
    start = jax.jit(
      self._init_optimizers, out_shardings=self._state_sharding.opt_state
    )
    return state.replace(opt_state=start(_join(state.params, state.critic)))

  def update(
    self,
    state: types.TrainState,
    batches: Sequence[types.Batch],
    *,
    epochs: int = 1,
    ref_params: types.Params | None = None,
    rate: float = 1.0,
  ) -> tuple[types.TrainState, dict[str, types.Array]]:
    """One optimizer step per batch and epoch.

    A step whose gradient is not finite changes nothing and is counted.

    Args:
      state: donated: not usable afterwards.
      batches: from `batching.pack`, numpy arrays of equal shapes.
      epochs: how often to go through the batches, >= 1.
      ref_params: of the reference policy, from `place_reference`; only if the
        objective needs them and the batches lack them.
      rate: multiplies the learning rate, above 0.

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
          batch.replace(
            old_logprobs=self._score(state.params, self._base, batch)
          )
          for batch in placed
        ]
      if self._objective.needs_reference and ref_params is not None:
        placed = [
          batch.replace(ref_logprobs=self._score(ref_params, self._base, batch))
          for batch in placed
        ]
      rate = sharding.put(np.float32(rate), sharding.replicated(self.mesh))
      found = []
      for _ in range(epochs):
        for batch in placed:
          state, metrics = self._step(state, self._base, batch, rate)
          found.append(metrics)
      return state, self._merge(found) if found else {}

  def lower_update(self, batch: types.Batch) -> jax.stages.Lowered:
    """One optimizer step as a program, to be read instead of run.

    Args:
      batch: shapes [micro-batches, rows, ...] as `jax.ShapeDtypeStruct`.

    Returns:
      The lowered step; its `compile()` tells text, memory and cost.
    """
    whole = sharding.replicated(self.mesh)
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    with jax.set_mesh(self.mesh):
      return self._step.lower(self._state, self._abstract_base, batch, rate)

  def logprobs(self, params: types.Params, batch: types.Batch) -> types.Array:
    """Log-probs of a batch's targets under any parameters of this policy.

    Args:
      params: from `place_params` or `place_reference`, or a state's.
      batch: from `batching.pack`, numpy arrays.

    Returns:
      [B, R] float32 on the devices, at the temperature of the objective.
    """
    with jax.set_mesh(self.mesh):
      found = self._score(params, self._base, self._place(batch))
      return found.reshape(batch.targets.shape)

  def values(self, state: types.TrainState, batch: types.Batch) -> types.Array:
    """The critic's values before each response token.

    Args:
      state: the learner's state.
      batch: from `batching.pack`, numpy arrays.

    Returns:
      [B, R] float32 on the devices.
    """
    with jax.set_mesh(self.mesh):
      found = self._value(
        state.params, state.critic, self._base, self._place(batch)
      )
      return found.reshape(batch.targets.shape)

  def _plan(self, axes) -> tuple[types.Params | None, types.TrainState]:
    """The shapes and shardings of the base, if any, and of the state."""
    params = jax.eval_shape(self._policy.init, jax.random.key(0))
    params = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params
    )
    layout = sharding.params_sharding(self.mesh, params, axes)
    base = None
    if self._adapters is not None:
      frozen = jax.eval_shape(self._adapters.freeze, params)
      base = sharding.describe(frozen, layout)
      params = jax.eval_shape(self._adapters.init)
      layout = sharding.params_sharding(
        self.mesh, params, self._adapters.logical_axes()
      )
    critic = critic_layout = None
    if self._critic is not None:
      critic = jax.eval_shape(self._critic.init, params)
      critic_layout = sharding.params_sharding(
        self.mesh, critic, self._critic.logical_axes(params)
      )
    opt_state = jax.eval_shape(self._init_optimizers, _join(params, critic))
    whole = sharding.replicated(self.mesh)
    layouts = _join(layout, critic_layout)
    opt_layout = {
      name: optax.tree.map_params(
        optimizers.create(config),
        lambda _, place: place,
        opt_state[name],
        layouts[name],
        transform_non_params=lambda _: whole,
      )
      for name, config in self._optimizers.items()
    }

    return base, types.TrainState(
      step=jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
      params=sharding.describe(params, layout),
      opt_state=sharding.describe(opt_state, opt_layout),
      critic=sharding.describe(critic, critic_layout),
    )

  def _init_optimizers(self, trained):
    """The optimizer states of everything that is trained."""
    return {
      name: optimizers.create(config).init(trained[name])
      for name, config in self._optimizers.items()
    }

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

  def _complete(self, base, trained):
    """The parameters that the policy applies."""
    if self._adapters is None:
      return trained
    return self._adapters.attach(base, trained)

  def _hidden(self, params, batch):
    """Hidden states [B, T, D] of one micro-batch."""
    hidden = self._policy.hidden(
      params, batch.tokens, batch.positions, batch.segments
    )
    return sharding.constrain(hidden, "rows", "length", "activation_width")

  def _token_logprobs(self, params, hidden, batch):
    """Log-probs and entropies [B, R] of one micro-batch."""

    def score(head, hidden, targets):
      return scoring.target_logprobs(
        self._policy.logits,
        head,
        hidden,
        targets,
        temperature=self._objective.temperature,
        chunk=self.chunk,
        entropy_gradient=self._objective.entropy_coefficient != 0,
      )

    return sharding.over_rows(score, self.mesh)(
      self._policy.head(params), _at_responses(hidden, batch), batch.targets
    )

  def _token_values(self, critic, hidden, batch):
    """Values [B, R] of one micro-batch."""
    hidden = self._critic.hidden(
      critic, hidden, batch.tokens, batch.positions, batch.segments
    )
    return self._critic.values(critic, _at_responses(hidden, batch))

  def _part_loss(self, trained, base, batch, weights, shares, asked):
    """Loss of one micro-batch, in the form `value_and_grad` wants."""
    params = self._complete(base, trained["policy"])
    critic = trained.get("critic")
    hidden = self._hidden(params, batch)
    logprobs, entropy = self._token_logprobs(params, hidden, batch)
    parts = self._objective.evaluate(logprobs, entropy, batch, weights, shares)
    loss, means = parts.loss, parts.means
    if critic is not None:
      values = self._token_values(critic, hidden, batch)
      error, found = self._objective.evaluate_values(values, batch, asked)
      loss, means = loss + error, means | found
    return loss, (means, parts.maxima)

  def _gradient(self, trained, base, batch):
    """Gradient, means and maxima of the whole batch."""
    weighed = self._weigh(batch)
    differentiate = jax.grad(self._part_loss, has_aux=True)

    def part(i):
      return differentiate(
        trained, base, *jax.tree.map(lambda x: x[i], (batch, *weighed))
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
    """Weights of all tokens, for the loss, the metrics and the critic."""

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
    asked = (turn >= 0) & jnp.isfinite(flat(batch.value_targets))
    asked = losses.token_weights(asked, turn, mode="token_mean")
    return back(weights), back(shares), back(asked)

  def _optimizer_step(self, state, base, batch, rate):
    """One step; see `update`."""
    self.traces["update"] += 1
    trained = _join(state.params, state.critic)
    grads, metrics = self._gradient(trained, base, batch)
    finite = jnp.isfinite(optax.tree.norm(grads))
    found = {
      name: optimizers.update(
        config,
        grads[name],
        state.opt_state[name],
        trained[name],
        finite=finite,
      )
      for name, config in self._optimizers.items()
    }
    updates = {
      name: jax.tree.map(lambda x: rate * x, pair[0])
      for name, pair in found.items()
    }
    trained = optax.apply_updates(trained, updates)
    new = types.TrainState(
      step=state.step + finite,
      params=trained["policy"],
      opt_state={name: pair[1] for name, pair in found.items()},
      critic=trained.get("critic"),
    )
    metrics |= {
      "grad_norm": optax.tree.norm(grads["policy"]),
      "update_norm": optax.tree.norm(updates["policy"]),
      "learning_rate": rate * self._learning_rate(state.step),
      "skipped": 1.0 - finite,
      "tokens": jnp.sum(batch.mask),
      "steps": jnp.ones(()),
    }
    return new, metrics

  def _batch_logprobs(self, params, base, batch):
    """[micro-batches, rows, R] log-probs; those without content are 0."""
    self.traces["logprobs"] += 1
    params = self._complete(base, params)

    def score(part):
      hidden = self._hidden(params, part)
      return self._token_logprobs(params, hidden, part)[0]

    return _by_part(score, batch)

  def _batch_values(self, params, critic, base, batch):
    """[micro-batches, rows, R] values; those without content are 0."""
    self.traces["values"] += 1
    params = self._complete(base, params)

    def score(part):
      return self._token_values(critic, self._hidden(params, part), part)

    return _by_part(score, batch)


def _join(params, critic):
  """What is trained, by name."""
  parts = {"policy": params, "critic": critic}
  return {name: part for name, part in parts.items() if part is not None}


def _at_responses(hidden, batch):
  """[B, T, D] -> [B, R, D], the positions that predict response tokens."""
  return jnp.take_along_axis(hidden, batch.index[..., None], axis=1)


def _by_part(score, batch):
  """Applies a score [rows, R] to every micro-batch with content."""

  def add(i, found):
    part = jax.tree.map(lambda x: x[i], batch)
    return found.at[i].set(score(part))

  empty = jnp.zeros(batch.targets.shape, jnp.float32)
  return jax.lax.fori_loop(0, _filled(batch), add, empty)


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
