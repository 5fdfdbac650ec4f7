"""Shapes and shardings of the learner's state, before it is allocated."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t2po_jax import types
from t2po_jax.distributed import sharding
from t2po_jax.learning import networks, optimizers


def plan(
  nets: networks.Networks,
  axes: sharding.Axes,
  settings: Mapping[str, optimizers.OptimizerConfig],
) -> tuple[types.Params | None, types.TrainState]:
  """Shapes and shardings of the base (if there are adapters) and the state.

  Args:
    nets: the networks.
    axes: tuples of logical axis names in the structure of the policy's
      parameters.
    settings: the optimizers by name, see `join`.

  Returns:
    Pytrees of `jax.ShapeDtypeStruct` with shardings.
  """
  mesh = nets.mesh
  params = jax.eval_shape(nets.policy.init, jax.random.key(0))
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params
  )
  layout = sharding.params_sharding(mesh, params, axes)
  base = None
  if nets.adapters is not None:
    frozen = jax.eval_shape(nets.adapters.freeze, params)
    base = sharding.describe(frozen, layout)
    params = jax.eval_shape(nets.adapters.init)
    layout = sharding.params_sharding(
      mesh, params, nets.adapters.logical_axes()
    )
  critic = critic_layout = None
  if nets.critic is not None:
    critic = jax.eval_shape(nets.critic.init, params)
    critic_layout = sharding.params_sharding(
      mesh, critic, nets.critic.logical_axes(params)
    )
  opt_state = jax.eval_shape(
    lambda trained: init_optimizers(settings, trained), join(params, critic)
  )
  whole = sharding.replicated(mesh)
  layouts = join(layout, critic_layout)
  opt_layout = {
    name: optax.tree.map_params(
      optimizers.create(config),
      lambda _, place: place,
      opt_state[name],
      layouts[name],
      transform_non_params=lambda _: whole,
    )
    for name, config in settings.items()
  }
  step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
  return base, types.TrainState(
    step=step,
    params=sharding.describe(params, layout),
    opt_state=sharding.describe(opt_state, opt_layout),
    critic=sharding.describe(critic, critic_layout),
  )


def init_optimizers(
  settings: Mapping[str, optimizers.OptimizerConfig],
  trained: Mapping[str, types.Params],
) -> dict[str, optax.OptState]:
  """The optimizer states of all trained parameters, by name."""
  return {
    name: optimizers.create(config).init(trained[name])
    for name, config in settings.items()
  }


def join(
  params: types.Params, critic: types.Params | None
) -> dict[str, types.Params]:
  """The trained parameters by name: `policy`, and `critic` if there is one."""
  parts = {"policy": params, "critic": critic}
  return {name: part for name, part in parts.items() if part is not None}
