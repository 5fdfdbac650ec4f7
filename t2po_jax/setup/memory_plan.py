"""The memory that a run needs on every device, computed before it starts.

Arrays that live as long as the run are counted exactly, from their shapes and
layouts. Temporaries are first estimated: those of an update from the residuals
that the forward pass keeps for the backward pass, which JAX reports without
computing anything, and the gradients. On accelerators, and on CPUs if the sum
comes close to the limit, the largest programs are compiled in advance and the
compiler's own figures used; a run that cannot fit ends with one line. On CPUs
the limit is the host's memory, shared by its devices.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from t2po_jax import types
from t2po_jax.configs import base as settings
from t2po_jax.distributed import sharding
from t2po_jax.learning import learner as learners
from t2po_jax.learning import networks
from t2po_jax.models import attention, decoder
from t2po_jax.setup import build

# On CPUs XLA's figures replace the estimates above this fraction of the limit.
NEAR = 0.5
GB = 1e9

# Permanent and temporary parts. An update, loading its weights and sampling
# take turns, unless rollouts run ahead.
LASTING = (
  "parameters",
  "base parameters",
  "optimizer state",
  "reference policy",
  "policy to return to",
  "policies of rollouts",
  "weights on their way",
  "sampler's parameters",
  "key/value cache",
)
UPDATE = ("gradients", "activations", "update (XLA)")
SAMPLING = ("sampling", "sampling (XLA)")
LOADING = ("loading weights",)
GATHERING = ("gathering an array",)


@dataclasses.dataclass(frozen=True)
class Plan:
  """The memory of the fullest device.

  Attributes:
    parts: bytes by name: of `LASTING`, `UPDATE`, `SAMPLING`, `LOADING` and
      `GATHERING`.
    limit: bytes the device has; 0 if unknown.
    devices: a description of the devices.
    overlap: whether sampling and an update happen at the same time.
    beside: of the devices that only roll out, if there are any.
  """

  parts: Mapping[str, int]
  limit: int
  devices: str
  overlap: bool = False
  beside: "Plan | None" = None

  @property
  def total(self) -> int:
    """Peak bytes."""

    def add(names: Iterable[str]) -> int:
      return sum(self.parts.get(name, 0) for name in names)

    update = add(UPDATE)
    rollout = max(add(SAMPLING), add(LOADING), add(GATHERING))
    passing = update + rollout if self.overlap else max(update, rollout)
    return add(LASTING) + passing

  def compiled(
    self, *, update: int | None = None, sampling: int | None = None
  ) -> "Plan":
    """The plan with the compiler's figures instead of estimates.

    Args:
      update: bytes of an update's temporaries; None keeps the estimate.
      sampling: bytes that sampling needs for a moment; None likewise.
    """
    parts, beside = dict(self.parts), self.beside
    if update is not None:
      parts = {k: v for k, v in parts.items() if k not in UPDATE}
      parts["update (XLA)"] = update
    if sampling is not None and beside is not None:
      beside = beside.compiled(sampling=sampling)
    elif sampling is not None:
      parts.pop("sampling")
      parts["sampling (XLA)"] = sampling
    return dataclasses.replace(self, parts=parts, beside=beside)

  def table(self) -> str:
    """A readable table, one line per part."""
    rows = [
      (name, f"{size / GB:.3f}") for name, size in self.parts.items() if size
    ]
    limit = f" of {self.limit / GB:.3f}" if self.limit else ""
    rows.append(("at the same time", f"{self.total / GB:.3f}{limit}"))
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(
      [f"memory per device, GB ({self.devices})"]
      + [f"  {name.ljust(width)}{size}" for name, size in rows]
      + ([self.beside.table()] if self.beside else [])
    )

  def require(self) -> None:
    """Raises an error if the plan does not fit.

    Raises:
      ValueError: one line with the largest parts and how to reduce them.
    """
    if self.beside is not None:
      self.beside.require()
    if not self.limit or self.total <= self.limit:
      return
    largest = sorted(self.parts, key=lambda name: -self.parts[name])[:3]
    shown = ", ".join(f"{n} {self.parts[n] / GB:.2f}" for n in largest)
    raise ValueError(
      f"memory: {self.total / GB:.2f} GB needed on every device, found "
      f"{self.limit / GB:.2f} ({shown}); {_REMEDIES[largest[0]]}, or set "
      "memory.check to False to start anyway"
    )


_SMALLER = "use more devices, lora.rank above 0 or a smaller model"
_UPDATE_SMALLER = "lower train.micro_rows, set model.remat to 'full'"
_SAMPLING_SMALLER = "lower rollout.prefill_rows or rollout.slots"
_REMEDIES = {
  "parameters": _SMALLER,
  "base parameters": "use more devices, or model.dtype 'bfloat16'",
  "optimizer state": _SMALLER,
  "reference policy": "set lora.rank above 0, which makes it free",
  "policy to return to": "set guard.kl_coefficient to 0 or guard.action 'warn'",
  "policies of rollouts": (
    "lower rollout.ahead, set rollout.refresh, or lora.rank above 0"
  ),
  "weights on their way": _SMALLER,
  "sampler's parameters": "use model.dtype 'bfloat16' or a smaller model",
  "key/value cache": "lower rollout.slots or rollout.max_prompt",
  "gradients": _SMALLER,
  "activations": _UPDATE_SMALLER,
  "update (XLA)": _UPDATE_SMALLER,
  "sampling": _SAMPLING_SMALLER,
  "sampling (XLA)": _SAMPLING_SMALLER,
  "loading weights": _SMALLER,
  "gathering an array": _SMALLER,
}


def plan(
  config: settings.Config,
  policy: decoder.Policy,
  learner: learners.Learner,
  *,
  sampling: jax.sharding.Mesh | None = None,
  limit: int = 0,
  exact: bool = True,
) -> Plan:
  """Adds up the memory of a run; allocates nothing.

  Args:
    config: the run's configuration.
    policy: the network.
    learner: the update's.
    sampling: the sampler's mesh; by default of this process's devices.
    limit: bytes of a device; 0: ask the device.
    exact: whether to compile the largest programs and use XLA's figures, on a
      CPU only if the estimate exceeds `NEAR` of the limit.

  Returns:
    The plan.
  """
  state, rollout = learner.abstract_state(), config.rollout
  params = device_bytes(state.params)
  mesh = sampling or build.sampling_mesh(config)
  decode = jax.eval_shape(policy.decode_params, decoder.shapes(policy.config))
  decode_bytes = _shard_bytes(mesh, decode, decoder.logical_axes(decode))
  length = rollout.max_prompt + rollout.max_response
  with jax.set_mesh(mesh):
    cache = jax.eval_shape(lambda: policy.init_cache(rollout.slots, length))
  # The sampler's new parameters briefly coexist with the old ones, and merged
  # adapters with both.
  loading = decode_bytes + device_bytes(learner.abstract_base())
  with jax.set_mesh(learner.mesh):  # It determines the attention kernel.
    activations = activation_bytes(
      policy,
      build.adapters(config, policy),
      rows=learner.rows // sharding.row_shards(learner.mesh),
      length=config.train.row_tokens,
      chunk=learner.chunk,
    )
  policies, loaded = _copies(config)
  parts = {
    "parameters": params + device_bytes(state.critic),
    "base parameters": device_bytes(learner.abstract_base()),
    "optimizer state": device_bytes(state.opt_state),
    "reference policy": params if _compares(config) else 0,
    "policy to return to": params if _returns(config) else 0,
    "policies of rollouts": policies * params,
    "sampler's parameters": loaded * decode_bytes,
    "key/value cache": _shard_bytes(mesh, cache, decoder.cache_axes(cache)),
    # Accumulated gradients, and those of one micro-batch.
    "gradients": 2 * (params + device_bytes(state.critic)),
    "activations": activations,
    "sampling": _sampling_bytes(config, policy, mesh),
    **_moving(policy, learner, loading),
  }
  if config.critic.kind == "separate" and state.critic is not None:
    parts["activations"] *= 2
  # Devices that are only described are not local.
  device = (learner.mesh.local_devices or list(learner.mesh.devices.flat))[0]
  shape = " x ".join(f"{n} {size}" for n, size in learner.mesh.shape.items())
  plan = Plan(
    parts=parts,
    limit=limit or int(config.memory.limit * GB) or limit_bytes(device),
    devices=f"{device.device_kind}, mesh {shape}",
    overlap=rollout.ahead > 0,
  )
  if config.mesh.rollout_devices:
    moving = _shard_bytes(learner.mesh, decode, decoder.logical_axes(decode))
    plan = _split(plan, mesh, moving)
  near = plan.limit and plan.total >= NEAR * plan.limit
  if not exact or (device.platform == "cpu" and not near):
    return plan
  return plan.compiled(
    update=learner.temporary_bytes(batch_shape(config, learner.rows)),
    sampling=_compiled_sampling(config, policy, mesh),
  )


def _compiled_sampling(
  config: settings.Config, policy: decoder.Policy, mesh: jax.sharding.Mesh
) -> int | None:
  """The temporaries of prefill and decoding as XLA reports them, or None."""
  sampler = build.abstract_sampler(config, policy, mesh)
  # The last of a kind is the largest.
  programs = {p.kind: p for p in sampler.programs(build.samplings(config)[:1])}
  needed = []
  for kind in ("prefill", "decode"):
    program = programs[kind]
    with jax.set_mesh(mesh):
      traced = program.function.trace(*program.arguments, **program.settings)
    memory = traced.lower().compile().memory_analysis()
    if memory is None:
      return None
    needed.append(memory.temp_size_in_bytes)
  return max(needed)


def _moving(
  policy: decoder.Policy, learner: learners.Learner, loading: int
) -> dict[str, int]:
  """Bytes needed while weights are on their way to the sampler.

  Args:
    policy: the network.
    learner: the update's.
    loading: of the new weights.

  Returns:
    By part. Across processes an array at a time is gathered: XLA holds the
    whole array and two temporaries of its size.
  """
  parts = {"loading weights": loading}
  if len({device.process_index for device in learner.mesh.devices.flat}) > 1:
    size = jnp.dtype(policy.dtype).itemsize
    parts["gathering an array"] = 3 * largest(moved(learner)).size * size
  return parts


def moved(learner: learners.Learner) -> types.Params:
  """The shapes of the weights that are transferred to the sampler."""
  return learner.abstract_base() or learner.abstract_state().params


def largest(tree: types.Params) -> Any:
  """The largest array of a tree."""
  return max(jax.tree.leaves(tree), key=lambda leaf: leaf.size)


def _compares(config: settings.Config) -> bool:
  """Whether there is a reference policy."""
  return config.loss.kl != "off" or config.reward.kl != "off"


def _returns(config: settings.Config) -> bool:
  """Whether a run stays close to a good policy after a rollback."""
  guard = config.guard
  rolls_back = guard.action == "rollback" and guard.rollbacks > 0
  return rolls_back and guard.kl_coefficient > 0


def _copies(config: settings.Config) -> tuple[int, int]:
  """Copies of what is trained, and of the sampler's parameters."""
  rollout = config.rollout
  # Episodes that are carried over keep the policy that began them.
  lasting = 0 if rollout.refresh else rollout.updates_early
  if not rollout.ahead + lasting:
    return 0, 1
  # Those for pending rollouts, and one that is being published.
  policies = rollout.ahead + lasting + 2
  if rollout.ahead and config.mesh.rollout_devices:
    return policies, policies  # They wait where they will be used.
  return policies, 1 + lasting


def _split(whole: Plan, sampling: jax.sharding.Mesh, moving: int) -> Plan:
  """The plan of devices that update, beside that of those that roll out.

  Args:
    whole: as if they were the same.
    sampling: the mesh of the latter.
    moving: bytes of the weights in the sampler's layout, where they come from.
  """
  parts = dict(whole.parts)
  rollout = {
    name: parts.pop(name)
    for name in (
      "sampler's parameters",
      "key/value cache",
      "sampling",
      "loading weights",
    )
  }
  shape = " x ".join(f"{n} {size}" for n, size in sampling.shape.items())
  beside = Plan(rollout, whole.limit, f"those that roll out, mesh {shape}")
  parts["weights on their way"] = moving
  return dataclasses.replace(whole, parts=parts, overlap=False, beside=beside)


def device_bytes(tree: Any) -> int:
  """Bytes of a tree of shapes with shardings, on one device."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def activation_bytes(
  policy: decoder.Policy,
  adapters: networks.Adapters | None,
  *,
  rows: int,
  length: int,
  chunk: int | None,
) -> int:
  """Estimates the temporaries of one micro-batch's backward pass.

  Args:
    policy: the network.
    adapters: the adapters that are trained; None to train all weights.
    rows: rows of the micro-batch on a device.
    length: tokens of a row, T.
    chunk: response positions per row whose logits exist at once; None: T.

  Returns:
    Bytes: the residuals of all layers, the activations of one layer (recomputed
      with remat) or its gradients, and three times the logits of a chunk.
  """
  kept = _kept_bytes(policy, adapters, rows, length)
  alone = dataclasses.replace(
    policy,
    remat="none",
    config=dataclasses.replace(policy.config, layers=1),
  )
  spec: Any = adapters
  if spec is not None:
    spec = dataclasses.replace(spec, policy=alone)
  layer = _kept_bytes(alone, spec, rows, length)
  positions = length if chunk is None else min(chunk, length)
  logits = rows * positions * policy.config.vocab_size * 4
  return kept + layer + 3 * logits


def _kept_bytes(
  policy: decoder.Policy,
  adapters: networks.Adapters | None,
  rows: int,
  length: int,
) -> int:
  """Bytes that `hidden` keeps from its forward for its backward pass."""
  base = decoder.shapes(policy.config)
  trained = base
  if adapters is not None:
    base = jax.eval_shape(adapters.freeze, base)
    trained = jax.eval_shape(adapters.init)
  tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)

  def pull_back(
    trained: types.Params, base: types.Params, tokens: types.Array
  ) -> Callable[[types.Array], Any]:
    def hidden(trained: types.Params) -> types.Array:
      params = trained
      if adapters is not None:
        params = adapters.attach(base, trained)
      return policy.hidden(params, tokens, tokens, tokens)

    return jax.vjp(hidden, trained)[1]

  kept = jax.tree.leaves(jax.eval_shape(pull_back, trained, base, tokens))
  # Parameters are residuals too, but they exist anyway.
  there = [(x.shape, x.dtype) for x in jax.tree.leaves((trained, base))]
  total = 0
  for leaf in kept:
    if (leaf.shape, leaf.dtype) in there:
      there.remove((leaf.shape, leaf.dtype))
    else:
      total += _bytes(leaf)
  return total


def _sampling_bytes(
  config: settings.Config, policy: decoder.Policy, mesh: jax.sharding.Mesh
) -> int:
  """Estimates the temporaries of prefill and of a decode step."""
  rollout, shape = config.rollout, policy.config
  slots = rollout.slots // sharding.row_shards(mesh)
  length = rollout.max_prompt + rollout.max_response
  rows = min(rollout.prefill_rows, slots)
  tensor = mesh.shape["tensor"]
  with jax.set_mesh(mesh):
    part = jax.eval_shape(lambda: policy.init_cache(rows, length))
    queries = attention.queries_at_once(rollout.max_prompt)
  taken = _bytes(part) // (1 if shape.kv_heads % tensor else tensor)
  scores = rows * shape.heads * queries * length * 4 // tensor
  wide = rows * rollout.max_prompt * shape.mlp_width * 4 // tensor
  logits = slots * shape.vocab_size * 4
  return max(2 * taken + 3 * scores + 3 * wide, 4 * logits)


def _bytes(tree: Any) -> int:
  """Bytes of a tree of shapes, unsplit."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _shard_bytes(
  mesh: jax.sharding.Mesh, tree: Any, axes: sharding.Axes
) -> int:
  """Bytes of a tree of shapes on one device, laid out by logical axes."""
  layout = sharding.params_sharding(mesh, tree, axes)
  return device_bytes(sharding.describe(tree, layout))


def batch_shape(config: settings.Config, rows: int) -> types.Batch:
  """Shapes of two micro-batches in which every position is a response."""
  height, length = 2 * rows, config.train.row_tokens

  def shape(dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((height, length), dtype)

  whole, real = shape(jnp.int32), shape(jnp.float32)
  ints = ("tokens", "positions", "segments", "index", "targets", "turn")
  kinds: dict[str, Any] = {name: whole for name in ints}
  names = [field.name for field in dataclasses.fields(types.Batch)]
  return types.Batch(**{name: kinds.get(name, real) for name in names})


def limit_bytes(device: types.Device) -> int:
  """The memory of a device; for a CPU device, its share of the host's.

  Args:
    device: one of this process.

  Returns:
    Bytes, 0 if unknown.
  """
  stats = device.memory_stats()
  if stats and stats.get("bytes_limit"):
    return int(stats["bytes_limit"])
  if device.platform != "cpu":
    return 0
  host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  for name in ("memory.max", "memory/memory.limit_in_bytes"):
    group = pathlib.Path("/sys/fs/cgroup") / name
    if group.is_file() and (text := group.read_text().strip()).isdigit():
      host = min(host, int(text))
  return host // len(jax.local_devices())
