"""The update of the parameters, compiled for a mesh.

`Learner` compiles its functions for a mesh: one optimizer step, the log-probs
of a batch, and the values of a batch if there is a critic. Where other code
bases of this field use `jax.pmap`, here it is `jax.jit` with explicit shardings
(see `sharding.py`): parameters, optimizer state and rows are laid out by name,
and the state is donated.

A step loops over the micro-batches of its batch and accumulates gradients.
Token weights are computed from the whole batch first, so the sum is the
gradient of the whole batch, whatever the micro-batch size, packing or mesh.
Empty micro-batches are skipped, and on one device empty rows as well. Only
response positions are projected to the vocabulary, a chunk at a time, and the
logits of a chunk are recomputed in the backward pass: [B, T, V] never exists.
Nothing is transferred between host and devices inside a step.
"""

import collections
from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from t2po_jax import types
from t2po_jax.distributed import sharding
from t2po_jax.learning import (
  gradients,
  layout,
  networks,
  objectives,
  optimizers,
)


def micro_batches(batch: types.Batch, rows: int) -> types.Batch:
  """The shapes [B, ...] of a batch as [micro-batches, rows, ...]."""

  def shape(x: Any) -> jax.ShapeDtypeStruct:
    parts = x.shape[0] // rows
    return jax.ShapeDtypeStruct((parts, rows, *x.shape[1:]), x.dtype)

  return jax.tree.map(shape, batch)


class Learner:
  """Compiled updates of one policy on one mesh.

  With adapters, only these are trained: all parameters passed in or out, of the
  state or of a reference, are the adapters'. The policy's own parameters, the
  base, are loaded once, are not part of the state, and never change.

  Attributes:
    mesh: the mesh.
    rows: rows of a micro-batch over the whole mesh.
    skips_rows: whether empty rows of a non-empty micro-batch are skipped: where
      rows are not split over devices.
    chunk: response positions per row whose logits exist at once, or None.
    traces: how often each function was traced; more than once per batch shape
      means recompilation.
  """

  def __init__(
    self,
    policy: networks.Policy,
    axes: sharding.Axes,
    mesh: jax.sharding.Mesh,
    *,
    optimizer: optimizers.OptimizerConfig,
    objective: objectives.Objective,
    rows: int,
    max_kl: float = 0.0,
    chunk: int | None = 128,
    critic: networks.Critic | None = None,
    critic_optimizer: optimizers.OptimizerConfig | None = None,
    adapters: networks.Adapters | None = None,
  ) -> None:
    """Plans the layout, without compiling or allocating anything yet.

    Args:
      policy: the network.
      axes: tuples of logical axis names in the structure of the parameters.
      mesh: from `sharding.create_mesh`.
      optimizer: of the update.
      objective: to be minimised.
      rows: rows of a micro-batch over the whole mesh.
      max_kl: the policy stays where it is in a step whose batch shows a larger
        `kl_old` than this; 0 for no limit.
      chunk: see `scoring.target_logprobs`.
      critic: trained in the same steps as the policy; None for none.
      critic_optimizer: of the critic's parameters; default: the policy's.
      adapters: trained instead of the policy's parameters; None for none.

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
    # Devices that share a micro-batch would wait for those with content.
    self.skips_rows = shards == 1
    # Trained parts by name, each with its own optimizer and gradient norm.
    self._optimizers = {"policy": optimizer}
    if critic is not None:
      self._optimizers["critic"] = critic_optimizer or optimizer
    self.traces = collections.Counter()
    self._nets = networks.Networks(policy, mesh, chunk, critic, adapters)
    self._base = None
    self._objective = objective
    self.rows, self.chunk, self._max_kl = rows, chunk, max_kl
    self._learning_rate = optimizers.learning_rate(optimizer)
    self._batch_sharding = sharding.row_sharding(mesh, dimension=1)
    self._abstract_base, self._state = layout.plan(
      self._nets, axes, self._optimizers
    )
    self._state_sharding = jax.tree.map(lambda x: x.sharding, self._state)
    self._base_sharding = jax.tree.map(
      lambda x: x.sharding, self._abstract_base
    )
    self._prepare_programs()
    if adapters is not None:
      self._merge_adapters = jax.jit(
        adapters.merge, out_shardings=self._base_sharding
      )

  def _prepare_programs(self) -> None:
    """Sets up the jitted functions, with layouts and donations."""
    whole, by_row = sharding.replicated(self.mesh), self._batch_sharding
    base = self._base_sharding

    def jit_fills(
      function: Callable[..., Any], **options: Any
    ) -> dict[str, Any]:
      """One program for every way in which a batch may be filled."""
      return {
        fill: jax.jit(functools.partial(function, fill=fill), **options)
        for fill in gradients.FILLS
      }

    self._steps = jit_fills(
      self._optimizer_step,
      in_shardings=(self._state_sharding, base, by_row, whole),
      out_shardings=(self._state_sharding, whole),
      donate_argnums=0,
    )
    self._agreement = jax.jit(
      self._batch_agreement,
      in_shardings=(self._state_sharding, base, by_row),
      out_shardings=whole,
    )
    self._scores = jit_fills(
      self._batch_logprobs,
      in_shardings=(self._state_sharding.params, base, by_row),
      out_shardings=by_row,
    )
    self._values = jit_fills(
      self._batch_values,
      in_shardings=(
        self._state_sharding.params,
        self._state_sharding.critic,
        base,
        by_row,
      ),
      out_shardings=by_row,
    )
    self._copy = jax.jit(
      lambda params: jax.tree.map(jnp.copy, params),
      out_shardings=self._state_sharding.params,
    )
    self._merge = jax.jit(_merge_metrics, out_shardings=whole)

  def abstract_state(self) -> types.TrainState:
    """Shapes, dtypes and shardings of the state, for restoring."""
    return self._state

  def abstract_base(self) -> types.Params | None:
    """The same for the frozen base; None without adapters."""
    return self._abstract_base

  def temporary_bytes(self, batch: types.Batch) -> int | None:
    """Temporary memory of one optimizer step, as reported by XLA.

    Args:
      batch: the shapes of a batch, as `jax.ShapeDtypeStruct`.

    Returns:
      Bytes per device; None if the compiler does not report it.
    """

    lowered = self.lower_update(micro_batches(batch, self.rows))
    analysis = lowered.compile().memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes

  def place_params(self, params: types.Params) -> types.Params:
    """Copies parameters to the devices, with the layout of the state's."""
    return sharding.put(params, self._state_sharding.params, alias=False)

  def place_reference(self, params: types.Params) -> types.Params:
    """The reference policy, in the form that `update` and `logprobs` take.

    Args:
      params: the policy's. With adapters these are already loaded as the base,
        and the result is adapters that change nothing.

    Returns:
      Parameters on the devices.
    """
    if self._nets.adapters is not None:
      params = self._nets.adapters.init()
    return self.place_params(params)

  def load_base(self, params: types.Params) -> None:
    """Loads the base under the adapters; no effect without adapters."""
    if self._nets.adapters is None:
      return
    frozen = jax.eval_shape(self._nets.adapters.freeze, params)
    params = jax.tree.map(lambda x, like: x.astype(like.dtype), params, frozen)
    self._base = sharding.put(params, self._base_sharding, alias=False)

  def snapshot(self, state: types.TrainState) -> types.Params:
    """A copy of the trained parameters, unaffected by the next update."""
    return self._copy(state.params)

  def policy_params(self, trained: types.Params) -> types.Params:
    """The policy's parameters, for sampling.

    Args:
      trained: `params` of a state; adapters are merged into the base.
    """
    if self._nets.adapters is None:
      return trained
    return self._merge_adapters(self._base, trained)

  def init_state(self, params: types.Params) -> types.TrainState:
    """A state before its first step.

    Args:
      params: of the policy, on the host or on devices, any float dtype;
        copied, because the state is donated by the first update.

    Returns:
      The state: float32 master weights of the trained parameters, laid out over
      the mesh.
    """
    if self._nets.adapters is not None:
      self.load_base(params)
      params = self._nets.adapters.init()
    master = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    master = self.place_params(master)
    places = self._state_sharding
    critic = None
    if self._nets.critic is not None:
      critic = sharding.put(
        self._nets.critic.init(master), places.critic, alias=False
      )
    return types.TrainState(
      step=sharding.put(np.int32(0), places.step),
      params=master,
      opt_state=self._fresh_optimizers(master, critic),
      critic=critic,
    )

  def renew_optimizer(self, state: types.TrainState) -> types.TrainState:
    """The state with a freshly initialised optimizer.

    Its schedule restarts too; `step` keeps counting.
    """
    fresh = self._fresh_optimizers(state.params, state.critic)
    return state.replace(opt_state=fresh)

  def update(
    self,
    state: types.TrainState,
    batches: Sequence[types.Batch],
    *,
    epochs: int = 1,
    ref_params: types.Params | None = None,
    lr_scale: float = 1.0,
    agreement: bool = False,
  ) -> tuple[types.TrainState, dict[str, types.Array]]:
    """One optimizer step per batch and epoch.

    A step with a non-finite gradient is skipped and counted, and so is, apart
    from the critic's part, one before which the policy has moved by more than
    `max_kl` from the one that sampled.

    Args:
      state: donated: not usable afterwards.
      batches: from `batching.pack`, numpy arrays of equal shapes.
      epochs: passes over the batches, >= 1.
      ref_params: of the reference policy, from `place_reference`; only if the
        objective needs them and the batches lack them.
      lr_scale: multiplies the learning rate, above 0.
      agreement: whether to measure, before the first step, how much the
        micro-batches of the first batch agree, as `grad_agreement`.

    Returns:
      The new state, and metrics as scalars on the device: means over the steps;
      `tokens`, `skipped`, `halted` (with a `max_kl`) and `steps` are sums,
      `*_max` maxima, and `mismatch_*` is from the first step, when the policy
      still equals the sampler's. Empty without batches.
    """
    with jax.set_mesh(self.mesh):
      placed = [self._place(batch) for batch in batches]
      fills = [self._fill(batch) for batch in batches]

      def score(params: types.Params) -> list[types.Array]:
        return [
          self._scores[fill](params, self._base, batch)
          for fill, batch in zip(fills, placed, strict=True)
        ]

      if self._objective.recomputes_old:
        placed = [
          batch.replace(old_logprobs=logprobs)
          for batch, logprobs in zip(placed, score(state.params), strict=True)
        ]
      if self._objective.needs_reference and ref_params is not None:
        placed = [
          batch.replace(ref_logprobs=logprobs)
          for batch, logprobs in zip(placed, score(ref_params), strict=True)
        ]
      lr_scale = sharding.put(
        np.float32(lr_scale), sharding.replicated(self.mesh)
      )
      steps, noise = [], {}
      if agreement and placed:
        noise["grad_agreement"] = self._agreement(state, self._base, placed[0])
      for _ in range(epochs):
        for fill, batch in zip(fills, placed, strict=True):
          step = self._steps[fill]
          state, metrics = step(state, self._base, batch, lr_scale)
          steps.append(metrics)
      return state, (self._merge(steps) if steps else {}) | noise

  def lower_update(self, batch: types.Batch) -> jax.stages.Lowered:
    """Lowers one optimizer step, to inspect it instead of running it.

    Args:
      batch: shapes [micro-batches, rows, ...] as `jax.ShapeDtypeStruct`.

    Returns:
      The lowered step; its `compile()` gives text, memory and cost.
    """
    with jax.set_mesh(self.mesh):
      return self.trace("update", batch).lower()

  def trace(self, name: str, batch: types.Batch) -> jax.stages.Traced:
    """Traces a function inside the mesh, for compilation ahead of time.

    Args:
      name: `update`, one optimizer step, or `logprobs`.
      batch: as in `lower_update`.
    """
    if name == "logprobs":
      return self._scores["whole"].trace(
        self._state.params, self._abstract_base, batch
      )
    whole = sharding.replicated(self.mesh)
    lr_scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    return self._steps["whole"].trace(
      self._state, self._abstract_base, batch, lr_scale
    )

  def logprobs(self, params: types.Params, batch: types.Batch) -> types.Array:
    """Log-probs of a batch's targets under any parameters of this policy.

    Args:
      params: from `place_params` or `place_reference`, or a state's.
      batch: from `batching.pack`, numpy arrays.

    Returns:
      [B, R] float32 on the devices, at the temperature of the objective.
    """
    with jax.set_mesh(self.mesh):
      score = self._scores[self._fill(batch)]
      logprobs = score(params, self._base, self._place(batch))
      return logprobs.reshape(batch.targets.shape)

  def values(self, state: types.TrainState, batch: types.Batch) -> types.Array:
    """The critic's values before each response token.

    Args:
      state: the learner's state.
      batch: from `batching.pack`, numpy arrays.

    Returns:
      [B, R] float32 on the devices.
    """
    with jax.set_mesh(self.mesh):
      value = self._values[self._fill(batch)]
      values = value(state.params, state.critic, self._base, self._place(batch))
      return values.reshape(batch.targets.shape)

  def _fresh_optimizers(
    self, params: types.Params, critic: types.Params | None
  ) -> dict[str, Any]:
    start = jax.jit(
      functools.partial(layout.init_optimizers, self._optimizers),
      out_shardings=self._state_sharding.opt_state,
    )
    return start(layout.join(params, critic))

  def _place(self, batch: types.Batch) -> types.Batch:
    """[B, ...] on the host -> [micro-batches, rows, ...] on the devices."""
    height = batch.tokens.shape[0]
    if height % self.rows:
      raise ValueError(
        f"batch of {height} rows does not divide into micro-batches of "
        f"{self.rows} rows"
      )

    def cut(x: types.Array) -> types.Array:
      return x.reshape(-1, self.rows, *x.shape[1:])

    return sharding.put(jax.tree.map(cut, batch), self._batch_sharding)

  def _fill(self, batch: types.Batch) -> str:
    """Which of `gradients.FILLS` a batch is."""
    if not self.skips_rows or self.rows == 1:
      return "whole"
    if len(batch.segments) > self.rows:
      return "rows"  # Full ones as well: one program for all.
    used = np.any(np.asarray(batch.segments) > 0, axis=1)
    count = int(np.max(np.where(used, np.arange(len(used)) + 1, 0), initial=0))
    return {1: "one row", self.rows: "whole"}.get(count, "rows")

  def _optimizer_step(
    self,
    state: types.TrainState,
    base: types.Params,
    batch: types.Batch,
    lr_scale: types.Array,
    *,
    fill: str,
  ) -> tuple[types.TrainState, dict[str, types.Array]]:
    """One step; see `update`."""
    self.traces["update"] += 1
    trained = layout.join(state.params, state.critic)
    grads, metrics = gradients.batch_gradient(
      self._nets, self._objective, trained, base, batch, fill=fill
    )
    finite = jnp.isfinite(optax.tree.norm(grads))
    taken = {name: finite for name in self._optimizers}
    if self._max_kl:
      near = metrics["kl_old"] <= self._max_kl
      metrics["halted"] = 1.0 - near
      taken["policy"] &= near
    stepped = {
      name: optimizers.update(
        config,
        grads[name],
        state.opt_state[name],
        trained[name],
        taken=taken[name],
      )
      for name, config in self._optimizers.items()
    }
    updates = {
      name: jax.tree.map(lambda x: lr_scale * x, pair[0])
      for name, pair in stepped.items()
    }
    moved: Any = optax.apply_updates(trained, updates)
    new = types.TrainState(
      step=state.step + taken["policy"],
      params=moved["policy"],
      opt_state={name: pair[1] for name, pair in stepped.items()},
      critic=moved.get("critic"),
    )
    metrics |= {
      "grad_norm": optax.tree.norm(grads["policy"]),
      "update_norm": optax.tree.norm(updates["policy"]),
      "learning_rate": lr_scale * self._learning_rate(state.step),
      "skipped": 1.0 - finite,
      "tokens": jnp.sum(batch.mask),
      "steps": jnp.ones(()),
    }
    return new, metrics

  def _batch_agreement(
    self, state: types.TrainState, base: types.Params, batch: types.Batch
  ) -> types.Array:
    """See `gradients.agreement`."""
    trained = layout.join(state.params, state.critic)
    return gradients.agreement(
      self._nets, self._objective, trained, base, batch
    )

  def _batch_logprobs(
    self,
    params: types.Params,
    base: types.Params,
    batch: types.Batch,
    *,
    fill: str,
  ) -> types.Array:
    """[micro-batches, rows, R] log-probs; 0 for empty micro-batches."""
    self.traces["logprobs"] += 1
    params = self._nets.complete(base, params)

    def score(part: types.Batch) -> types.Array:
      hidden = self._nets.hidden(params, part)
      return self._nets.logprobs(
        params,
        hidden,
        part,
        temperature=self._objective.temperature,
        entropy_gradient=self._objective.entropy_coefficient != 0,
      )[0]

    return gradients.map_parts(score, batch, fill=fill)

  def _batch_values(
    self,
    params: types.Params,
    critic: types.Params,
    base: types.Params,
    batch: types.Batch,
    *,
    fill: str,
  ) -> types.Array:
    """[micro-batches, rows, R] values; 0 for empty micro-batches."""
    self.traces["values"] += 1
    params = self._nets.complete(base, params)

    def score(part: types.Batch) -> types.Array:
      return self._nets.values(critic, self._nets.hidden(params, part), part)

    return gradients.map_parts(score, batch, fill=fill)


def _merge_metrics(steps: list[dict[str, Any]]) -> dict[str, types.Array]:
  """Combines the metrics of several steps; see `Learner.update`."""

  def merge(name: str) -> jax.Array:
    values = jnp.stack([metrics[name] for metrics in steps])
    if name.startswith("mismatch_"):
      return values[0]
    if name in ("tokens", "skipped", "halted", "steps"):
      return jnp.sum(values)
    return jnp.max(values) if name.endswith("_max") else jnp.mean(values)

  return {name: merge(name) for name in steps[0]}
