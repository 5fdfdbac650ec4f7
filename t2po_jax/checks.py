"""Refuses configurations that cannot work or do not mean what they say.

Everything is checked by key before anything is compiled or a long job starts.
A setting that nothing reads is refused as well when it differs from its
default: whoever set it expected an effect.
"""

from configs import base
from t2po_jax import build, guard
from t2po_jax.control import uncertainty
from t2po_jax.learning import advantages, losses, objectives
from t2po_jax.models import critic

ConfigDict = base.ConfigDict

_KL = ("off", *losses.KL_KINDS)

CHOICES = {
  "model.dtype": tuple(build.DTYPES),
  "advantage.estimator": tuple(build.ESTIMATOR_KEYS),
  "advantage.step_norm": advantages.STEP_MODES,
  "advantage.per": advantages.PER,
  "control.signal": uncertainty.SIGNALS,
  "control.normalizer": uncertainty.NORMALIZERS,
  "critic.kind": critic.KINDS,
  "guard.action": guard.ACTIONS,
  "loss.kind": tuple(losses.POLICY_LOSSES),
  "loss.aggregation": losses.AGGREGATIONS,
  "loss.kl": _KL,
  "loss.old_logprobs": objectives.OLD_LOGPROBS,
  "loss.importance": ("off", *losses.IMPORTANCE),
  "reward.kl": _KL,
}

LEAST = {
  "rollout.tasks": 1,
  "rollout.group_size": 1,
  "rollout.filter_tries": 1,
  "rollout.slots": 1,
  "rollout.chunk": 1,
  "rollout.prefill_tokens": 1,
  "rollout.prefill_rows": 1,
  "rollout.live_tokens": 1,
  "rollout.max_prompt": 2,
  "rollout.max_response": 1,
  "train.updates": 0,
  "train.mini_batches": 1,
  "train.epochs": 1,
  "eval.tasks": 1,
  "guard.patience": 1,
  "guard.rollbacks": 0,
  "critic.coefficient": 0,
  "reward.kl_target": 0,
  "reward.kl_coefficient": 0,
  "loss.kl_coefficient": 0,
}

# Estimators that compare the episodes of a task with each other.
_GROUPED = ("grpo", "gigpo", "rloo", "reinforce_pp_baseline", "empg")


def _get(config: ConfigDict, key: str):
  section, name = key.split(".")
  return config[section][name]


def _refuse(config: ConfigDict, key: str, expected: str) -> None:
  raise ValueError(f"{key}: found {_get(config, key)!r}, expected {expected}")


def check(config: ConfigDict) -> None:
  """Refuses what is wrong by itself, in combination, or without effect.

  Raises:
    ValueError: naming the key, what was found and what would be right.
  """
  for key, known in CHOICES.items():
    if _get(config, key) not in known:
      _refuse(config, key, f"one of {', '.join(sorted(known))}")
  for part in config.cold_start.kind.split("+"):
    if part not in ("expert", "rft", "none"):
      _refuse(config, "cold_start.kind", "expert, rft, expert+rft or none")
  for key, least in LEAST.items():
    if _get(config, key) < least:
      _refuse(config, key, f"at least {least}")
  _check_rollout(config)
  _check_kl(config)
  _check_unused(config)


def _check_rollout(config: ConfigDict) -> None:
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
  estimator = config.advantage.estimator
  alone = rollout.group_size == 1
  if alone and (estimator in _GROUPED or rollout.filter_groups):
    why = "rollout.filter_groups" if rollout.filter_groups else estimator
    expected = f"at least 2: {why} compares the episodes of a task"
    _refuse(config, "rollout.group_size", expected)


def _check_kl(config: ConfigDict) -> None:
  """A kind of KL without a coefficient, or the other way round."""
  for section in ("loss", "reward"):
    kind, key = config[section].kl, f"{section}.kl_coefficient"
    if kind == "off" and config[section].kl_coefficient:
      _refuse(config, key, f"0 with {section}.kl 'off', or a kind of KL there")
    if kind != "off" and not config[section].kl_coefficient:
      _refuse(config, key, f"a positive number with {section}.kl {kind!r}")
  if config.reward.kl.endswith("+"):
    expected = "a kind without '+', which only changes the gradient of a loss"
    _refuse(config, "reward.kl", expected)


def _check_unused(config: ConfigDict) -> None:
  """Settings that differ from their default and that nothing reads."""
  advantage, loss = config.advantage, config.loss
  used = {f"advantage.{k}" for k in build.ESTIMATOR_KEYS[advantage.estimator]}
  used |= {f"loss.{name}" for name in objectives.OPTIONS[loss.kind]}
  of_estimator = f"advantage.estimator {advantage.estimator!r}"
  of_loss = f"loss.kind {loss.kind!r}"
  reasons = {
    f"advantage.{key}": of_estimator
    for keys in build.ESTIMATOR_KEYS.values()
    for key in keys
  }
  reasons |= {
    f"loss.{key}": of_loss
    for keys in objectives.OPTIONS.values()
    for key in keys
  }
  if advantage.estimator not in build.CRITIC_ESTIMATORS:
    reasons |= {f"critic.{key}": of_estimator for key in config.critic}
  if loss.old_logprobs != "recompute":
    why = f"loss.old_logprobs {loss.old_logprobs!r}"
    reasons |= {"loss.importance": why, "loss.importance_cap": why}
  if config.reward.kl == "off":
    why = "reward.kl 'off'"
    reasons |= {"reward.kl_target": why, "reward.kl_horizon": why}
  if not config.rollout.filter_groups:
    reasons["rollout.filter_tries"] = "rollout.filter_groups False"
  if config.guard.action != "rollback":
    why = f"guard.action {config.guard.action!r}"
    reasons |= {"guard.rate_factor": why, "guard.rollbacks": why}
  defaults = base.get_config()
  for key, why in reasons.items():
    default = _get(defaults, key)
    if key not in used and _get(config, key) != default:
      _refuse(config, key, f"{default!r}: {why} does not use it")
