"""AdamW with gradient clipping and a learning-rate schedule, from optax."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from t2po_jax import types

SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW and its schedule.

  Attributes:
    learning_rate: the peak.
    schedule: after warm-up: `constant`, or `linear` or `cosine` to the end.
    warmup_steps: optimizer steps from 0 to the peak.
    total_steps: optimizer steps until the end, for `linear` and `cosine`.
    final_fraction: of the peak, at the end, from 0 to 1.
    b1: decay of the first moment, from 0 to 1.
    b2: decay of the second moment, from 0 to 1.
    eps: added to the root of the second moment.
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

  def __post_init__(self) -> None:
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
  # The first step is not zero: 1/n, 2/n, ... of the peak.
  first = peak / config.warmup_steps
  warmup = optax.linear_schedule(first, peak, config.warmup_steps - 1)
  return optax.join_schedules([warmup, after], [config.warmup_steps])


def create(config: OptimizerConfig) -> optax.GradientTransformation:
  """AdamW with global-norm clipping."""
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


def update(
  config: OptimizerConfig,
  grads: types.Params,
  opt_state: optax.OptState,
  params: types.Params,
  *,
  taken: types.Array,
) -> tuple[types.Params, optax.OptState]:
  """One step of the optimizer of `create`, or none.

  For a skipped step the moments decay by a factor of 1 and the gradient counts
  as 0. Selecting between old and new moments afterwards would need both at
  once: XLA would first copy the whole optimizer state.

  Args:
    config: the settings.
    grads: the gradient.
    opt_state: from `create(config).init(params)`.
    params: the trained parameters.
    taken: [] bool, whether to step; otherwise updates are 0 and the state is
      unchanged, bit for bit.

  Returns:
    The updates to add to the parameters, and the new state.
  """
  keep = functools.partial(jnp.where, taken)
  decays = {"b1": keep(config.b1, 1.0), "b2": keep(config.b2, 1.0)}
  optimizer = create(dataclasses.replace(config, **decays))
  grads = jax.tree.map(lambda x: keep(x, 0.0), grads)
  updates, moved = optimizer.update(grads, opt_state, params)
  updates = jax.tree.map(lambda x: keep(x, 0.0), updates)
  # Apart from the moments there are only step counters.
  moved = jax.tree.map(
    lambda new, old: keep(new, old) if new.ndim == 0 else new, moved, opt_state
  )
  return updates, moved
