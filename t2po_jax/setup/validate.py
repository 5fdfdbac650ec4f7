"""Rejects configurations whose settings do not fit together.

The allowed values of a single key are defined with the key (`configs/base.py`)
and checked when a configuration is read; the rules between keys are here. A
setting without effect is also rejected if it differs from its default, because
it was set in the expectation of an effect. All this happens before anything is
compiled or a long job starts.
"""

from collections.abc import Iterable

import jax

from t2po_jax import keys
from t2po_jax.configs import base as settings
from t2po_jax.control import uncertainty
from t2po_jax.distributed import processes
from t2po_jax.learning import collapse_guard, estimators, lora, policy_losses
from t2po_jax.learning.estimators import modulation
from t2po_jax.rollout import horizon
from t2po_jax.setup import build

_GUARD_LIMITS = (*collapse_guard.LIMITS, *collapse_guard.FALLS)
# Keys of the guard that are only used by a rollback.
_ROLLBACK = ("rate_factor", "reuse_factor", "kl_coefficient", "rollbacks")

# Whether keys have no effect, the reason, and the keys.
_Idle = tuple[bool, str, list[str]]


def read(config: settings.ConfigDict) -> settings.Config:
  """Reads and checks a configuration.

  Raises:
    ValueError: naming the key, what was found and what would be right.
  """
  checked = settings.read(config)
  check(checked)
  return checked


def check(config: settings.Config) -> None:
  """Refuses settings that do not fit together or have no effect.

  Raises:
    ValueError: naming the key, what was found and what would be right.
  """
  _check_loss(config)
  _check_rollout(config)
  _check_control(config)
  _check_kl(config)
  _check_drops(config)
  _check_lora(config)
  _check_unused(config)


def _refuse(config: settings.Config, key: str, expected: str) -> None:
  value = settings.flatten(settings.to_dict(config))[key]
  raise ValueError(f"{key}: found {value!r}, expected {expected}")


def _check_loss(config: settings.Config) -> None:
  """The clip range, and the aggregation of the loss."""
  loss = config.loss
  source = policy_losses.POLICY_LOSSES[loss.kind]
  if "dual_clip" in source.keys and 0 < getattr(loss, "dual_clip") <= 1:  # noqa: B009
    _refuse(config, "loss.dual_clip", "above 1, or 0 for none")
  if source.aggregation and source.aggregation != loss.aggregation:
    expected = f"{source.aggregation!r}, which defines loss.kind {loss.kind!r}"
    _refuse(config, "loss.aggregation", expected)


def _check_rollout(config: settings.Config) -> None:
  """Lengths, temperature and group size."""
  rollout = config.rollout
  room = rollout.max_prompt + rollout.max_response
  if config.train.row_tokens < room or config.train.row_tokens % 16:
    expected = (
      "a multiple of 16 and at least rollout.max_prompt + "
      f"rollout.max_response = {room}"
    )
    _refuse(config, "train.row_tokens", expected)
  if rollout.temperature <= 0:
    expected = "above 0: greedy samples cannot be learned from"
    _refuse(config, "rollout.temperature", expected)
  if rollout.env_threads and rollout.env_workers:
    expected = f"0 with rollout.env_workers {rollout.env_workers}"
    _refuse(config, "rollout.env_threads", expected)
  local = jax.local_device_count()
  if rollout.ahead and local > 1 and not config.mesh.rollout_devices:
    expected = (
      f"0 with {local} devices of a process that do both, where two threads "
      "could wait for each other for ever, or mesh.rollout_devices above 0"
    )
    _refuse(config, "rollout.ahead", expected)
  if config.mesh.rollout_devices and processes.count() > 1:
    expected = f"0 with {processes.count()} processes"
    _refuse(config, "mesh.rollout_devices", expected)
  _check_oversample(config)
  estimator = config.advantage.estimator
  alone = rollout.group_size == 1
  needing = (
    ("rollout.filter_groups", rollout.filter_groups),
    ("rollout.variance_kept", rollout.variance_kept < 1),
    (estimator, build.estimator(config).grouped),
  )
  why = next((name for name, needs in needing if needs), "")
  if alone and why:
    expected = f"at least 2: {why} compares the episodes of a task"
    _refuse(config, "rollout.group_size", expected)


def _check_oversample(config: settings.Config) -> None:
  """Checks groups that are started before their update."""
  rollout = config.rollout
  if horizon.parse(rollout.horizon) and rollout.oversample:
    expected = "0 with rollout.horizon, which depends on the update"
    _refuse(config, "rollout.oversample", expected)
  if not rollout.oversample:
    return
  if rollout.filter_groups:
    expected = "0 with rollout.filter_groups True, which begins groups itself"
    _refuse(config, "rollout.oversample", expected)
  if processes.count() > 1:
    expected = f"0 with {processes.count()} processes"
    _refuse(config, "rollout.oversample", expected)
  aside = rollout.env_threads or rollout.env_workers
  if rollout.refresh and aside and not rollout.env_calls:
    expected = (
      "False, or rollout.env_calls of at least 1: else the clock decides "
      "which turns new weights speak"
    )
    _refuse(config, "rollout.refresh", expected)


def _check_control(config: settings.Config) -> None:
  """The text that the thinking intervention forces."""
  closing = config.control.thinking.closing
  if closing and not closing.startswith("</think>"):
    expected = "text that begins with '</think>', or '' for the environment's"
    _refuse(config, "control.thinking.closing", expected)


def _check_kl(config: settings.Config) -> None:
  """A kind of KL without a coefficient, or a coefficient without a kind."""
  for name, section in (("loss", config.loss), ("reward", config.reward)):
    kind, key = section.kl, f"{name}.kl_coefficient"
    if kind == "off" and section.kl_coefficient:
      _refuse(config, key, f"0 with {name}.kl 'off', or a kind of KL there")
    if kind != "off" and not section.kl_coefficient:
      _refuse(config, key, f"a positive number with {name}.kl {kind!r}")
  if config.reward.kl.endswith("+"):
    expected = "a kind without '+', which only changes the gradient of a loss"
    _refuse(config, "reward.kl", expected)


def _check_drops(config: settings.Config) -> None:
  """What is dropped from the update has neither values nor a KL."""
  reward, estimator = config.reward, config.advantage.estimator
  drops = {"drop_void": reward.drop_void, "drop_overlong": reward.drop_overlong}
  for name in (name for name, drop in drops.items() if drop):
    if "values" in build.estimator(config).needs:
      expected = f"False with advantage.estimator {estimator!r}"
      _refuse(config, f"reward.{name}", expected)
    if reward.kl != "off":
      _refuse(config, f"reward.{name}", f"False with reward.kl {reward.kl!r}")
  # A critic has no value for what was not done.
  negative = config.control.resampling.negative
  if negative and "values" in build.estimator(config).needs:
    expected = f"0 with advantage.estimator {estimator!r}"
    _refuse(config, "control.resampling.negative", expected)


def _check_lora(config: settings.Config) -> None:
  """Adapted modules, and settings that are incompatible with adapters."""
  lora.parse_targets(config.lora.targets)
  if not config.lora.rank:
    return
  if config.critic.kind != "trunk":
    expected = "'trunk' with lora.rank above 0: a second network is no adapter"
    _refuse(config, "critic.kind", expected)
  if config.lora.cold_start and config.model.source == "scratch":
    expected = "False with model.source 'scratch': it has nothing to adapt yet"
    _refuse(config, "lora.cold_start", expected)


def _unused_options(config: settings.Config) -> dict[str, str]:
  """Options of estimators, losses and signals that are not selected."""
  advantage, loss = config.advantage, config.loss
  estimator = build.estimator(config)
  used = {f"advantage.{key}" for key in estimator.keys}
  if advantage.modulation != "off":
    factor = modulation.MODULATIONS[advantage.modulation]
    used |= {f"advantage.{key}" for key in keys.keys_of(factor.options)}
  signal = uncertainty.SIGNALS[config.control.signal]
  used |= {f"control.{name}" for name in keys.keys_of(signal.options)}
  used |= {
    f"loss.{name}" for name in policy_losses.POLICY_LOSSES[loss.kind].keys
  }
  of_estimator = f"advantage.estimator {advantage.estimator!r}"
  of_loss = f"loss.kind {loss.kind!r}"
  reasons = {
    f"advantage.{key}": of_estimator for key in estimators.option_keys()
  }
  reasons |= {
    f"control.{key}": f"control.signal {config.control.signal!r}"
    for key in uncertainty.option_keys()
  }
  reasons |= {f"loss.{key}": of_loss for key in policy_losses.option_keys()}
  return {key: why for key, why in reasons.items() if key not in used}


def _idle_learning(config: settings.Config) -> Iterable[_Idle]:
  """Keys without effect under the settings of learning."""
  advantage, loss = config.advantage, config.loss
  return (
    (
      "values" not in build.estimator(config).needs,
      f"advantage.estimator {advantage.estimator!r}",
      [f"critic.{key}" for key in settings.to_dict(config.critic)],
    ),
    (
      config.critic.kind != "trunk",
      f"critic.kind {config.critic.kind!r}",
      ["critic.coefficient"],
    ),
    (
      loss.old_logprobs != "recompute",
      f"loss.old_logprobs {loss.old_logprobs!r}",
      ["loss.importance", "loss.rejection"],
    ),
    (
      loss.old_logprobs != "recompute" or loss.importance == "off",
      f"loss.old_logprobs {loss.old_logprobs!r} and loss.importance "
      f"{loss.importance!r}",
      ["loss.importance_cap"],
    ),
    (
      loss.importance != "mask",
      f"loss.importance {loss.importance!r}",
      ["loss.importance_low"],
    ),
    (
      loss.rejection == "off",
      "loss.rejection 'off'",
      ["loss.rejection_low", "loss.rejection_high"],
    ),
    (loss.kl == "off", "loss.kl 'off'", ["guard.max_reference_kl"]),
  )


def _idle_elsewhere(config: settings.Config) -> Iterable[_Idle]:
  """Keys without effect under all other settings."""
  return (
    (
      config.reward.kl == "off",
      "reward.kl 'off'",
      ["reward.kl_target"],
    ),
    (
      not config.reward.kl_target,
      "reward.kl_target 0",
      ["reward.kl_horizon", "reward.kl_mean"],
    ),
    (
      not config.reward.overlong_penalty,
      "reward.overlong_penalty 0",
      ["reward.overlong_buffer"],
    ),
    (
      not config.control.thinking.enabled,
      "control.thinking.enabled False",
      ["control.thinking.closing"],
    ),
    (
      not config.control.resampling.max_tries,
      "control.resampling.max_tries 0",
      ["control.resampling.negative"],
    ),
    (
      not config.rollout.filter_groups,
      "rollout.filter_groups False",
      ["rollout.filter_tries"],
    ),
    (
      not config.rollout.oversample,
      "rollout.oversample 0",
      ["rollout.refresh"],
    ),
    (
      not config.rollout.env_workers,
      "rollout.env_workers 0",
      ["rollout.env_memory"],
    ),
    (
      config.guard.action == "off",
      "guard.action 'off'",
      [f"guard.{key}" for key in (*_GUARD_LIMITS, "patience", "window")],
    ),
    (
      config.guard.action != "rollback",
      f"guard.action {config.guard.action!r}",
      [f"guard.{key}" for key in _ROLLBACK],
    ),
    (not config.memory.check, "memory.check False", ["memory.limit"]),
    (
      not config.lora.rank,
      "lora.rank 0",
      ["lora.alpha", "lora.targets", "lora.cold_start"],
    ),
    (
      config.cold_start.kind == "none",
      "cold_start.kind 'none'",
      ["lora.cold_start"],
    ),
    (
      "rft" not in config.cold_start.kind,
      f"cold_start.kind {config.cold_start.kind!r}",
      [f"cold_start.rft_{key}" for key in ("rounds", "tasks", "epochs")],
    ),
  )


def _check_unused(config: settings.Config) -> None:
  """Refuses settings that differ from their default but have no effect."""
  reasons = _unused_options(config)
  for idle, why, names in (*_idle_learning(config), *_idle_elsewhere(config)):
    if idle:
      reasons |= dict.fromkeys(names, why)
  defaults = settings.flatten(settings.to_dict(settings.Config()))
  values = settings.flatten(settings.to_dict(config))
  for key, why in reasons.items():
    if values[key] != defaults[key]:
      _refuse(config, key, f"{defaults[key]!r}: {why} does not use it")
