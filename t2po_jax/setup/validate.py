"""Refuses configurations that cannot work or do not mean what they say.

Everything is checked by key before anything is compiled or a long job starts.
A setting that nothing reads is refused as well when it differs from its
default: whoever set it expected an effect.
"""

from t2po_jax.configs import base
from t2po_jax.control import uncertainty
from t2po_jax.learning import (
  advantages,
  collapse_guard,
  lora,
  losses,
  objectives,
  optimizers,
)
from t2po_jax.models import critic, decoder
from t2po_jax.rollout import collect
from t2po_jax.setup import build

ConfigDict = base.ConfigDict

_KL = ("off", *losses.KL_KINDS)

CHOICES = {
  "cold_start.kind": ("expert", "rft", "expert+rft", "none"),
  "model.remat": decoder.REMATS,
  "optimizer.schedule": optimizers.SCHEDULES,
  "model.dtype": tuple(build.DTYPES),
  "advantage.estimator": tuple(build.ESTIMATOR_KEYS),
  "advantage.step_norm": advantages.STEP_MODES,
  "advantage.per": advantages.PER,
  "control.signal": uncertainty.SIGNALS,
  "control.normalizer": uncertainty.NORMALIZERS,
  "critic.kind": critic.KINDS,
  "guard.action": collapse_guard.ACTIONS,
  "loss.kind": tuple(losses.POLICY_LOSSES),
  "loss.aggregation": losses.AGGREGATIONS,
  "loss.kl": _KL,
  "loss.old_logprobs": objectives.OLD_LOGPROBS,
  "loss.importance": ("off", *losses.IMPORTANCE),
  "reward.kl": _KL,
  "rollout.context": collect.CONTEXTS,
}

# Key -> the least and the largest value; None for no bound.
RANGES = {
  "rollout.tasks": (1, None),
  "rollout.group_size": (1, None),
  "rollout.filter_tries": (1, None),
  "rollout.slots": (1, None),
  "rollout.chunk": (1, None),
  "rollout.tensor": (1, None),
  "rollout.prefill_tokens": (1, None),
  "rollout.prefill_rows": (1, None),
  "rollout.live_tokens": (1, None),
  "rollout.max_prompt": (2, None),
  "rollout.max_response": (1, None),
  "rollout.env_threads": (0, None),
  "rollout.env_workers": (0, None),
  "rollout.env_memory": (0, None),
  "rollout.env_timeout": (0, None),
  "reward.format_penalty": (0, None),
  "reward.invalid_penalty": (0, None),
  "reward.kl_target": (0, None),
  "reward.kl_coefficient": (0, None),
  "reward.kl_horizon": (1, None),
  "advantage.discount": (0, 1),
  "advantage.trace": (0, 1),
  "advantage.token_discount": (0, 1),
  "advantage.token_trace": (0, 1),
  "advantage.similarity": (0, 1),
  "critic.clip": (0, None),
  "loss.clip_low": (0, 1),
  "loss.clip_high": (0, None),
  "loss.kl_coefficient": (0, None),
  "loss.entropy_coefficient": (0, None),
  "lora.rank": (0, None),
  "memory.limit": (0, None),
  "train.updates": (0, None),
  "train.mini_batches": (1, None),
  "train.epochs": (1, None),
  "cold_start.episodes": (1, None),
  "cold_start.epochs": (1, None),
  "cold_start.batch_size": (1, None),
  "cold_start.rft_rounds": (1, None),
  "cold_start.rft_tasks": (1, None),
  "cold_start.rft_epochs": (1, None),
  "eval.tasks": (1, None),
  "guard.patience": (1, None),
  "guard.rollbacks": (0, None),
} | {f"guard.{name}": (0, None) for name in collapse_guard.LIMITS}

# Key -> what its value must be greater than.
ABOVE = {
  "critic.rate": 0,
  "critic.coefficient": 0,
  "guard.rate_factor": 0,
  "lora.alpha": 0,
  "loss.importance_cap": 1,
  "loss.temperature_positive": 0,
  "loss.temperature_negative": 0,
  "optimizer.learning_rate": 0,
  "cold_start.learning_rate": 0,
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
  for key, (least, most) in RANGES.items():
    if _get(config, key) < least:
      _refuse(config, key, f"at least {least}")
    if most is not None and _get(config, key) > most:
      _refuse(config, key, f"at most {most}")
  for key, bound in ABOVE.items():
    if _get(config, key) <= bound:
      _refuse(config, key, f"above {bound}")
  if config.loss.dual_clip and config.loss.dual_clip <= 1:
    _refuse(config, "loss.dual_clip", "above 1, or 0 for none")
  _check_rollout(config)
  _check_kl(config)
  _check_drops(config)
  _check_lora(config)
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
  if rollout.env_threads and rollout.env_workers:
    expected = f"0 with rollout.env_workers {rollout.env_workers}"
    _refuse(config, "rollout.env_threads", expected)
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


def _check_drops(config: ConfigDict) -> None:
  """What is left out of the update has no values and no KL either."""
  reward, estimator = config.reward, config.advantage.estimator
  for name in ("drop_void", "drop_overlong"):
    if reward[name] and estimator in build.CRITIC_ESTIMATORS:
      expected = f"False with advantage.estimator {estimator!r}"
      _refuse(config, f"reward.{name}", expected)
    if reward[name] and reward.kl != "off":
      _refuse(config, f"reward.{name}", f"False with reward.kl {reward.kl!r}")


def _check_lora(config: ConfigDict) -> None:
  """What is adapted, and what adapters do not go together with."""
  lora.parse_targets(config.lora.targets)
  if not config.lora.rank:
    return
  if config.critic.kind != "trunk":
    expected = "'trunk' with lora.rank above 0: a second network is no adapter"
    _refuse(config, "critic.kind", expected)
  if config.lora.cold_start and config.model.source == "scratch":
    expected = "False with model.source 'scratch': it has nothing to adapt yet"
    _refuse(config, "lora.cold_start", expected)


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
  sections = (
    (
      advantage.estimator not in build.CRITIC_ESTIMATORS,
      of_estimator,
      [f"critic.{key}" for key in config.critic],
    ),
    (
      config.critic.kind != "trunk",
      f"critic.kind {config.critic.kind!r}",
      ["critic.coefficient"],
    ),
    (
      loss.old_logprobs != "recompute",
      f"loss.old_logprobs {loss.old_logprobs!r}",
      ["loss.importance"],
    ),
    (
      loss.old_logprobs != "recompute" or loss.importance == "off",
      f"loss.old_logprobs {loss.old_logprobs!r} and loss.importance "
      f"{loss.importance!r}",
      ["loss.importance_cap"],
    ),
    (
      config.reward.kl == "off",
      "reward.kl 'off'",
      ["reward.kl_target"],
    ),
    (
      not config.reward.kl_target,
      "reward.kl_target 0",
      ["reward.kl_horizon"],
    ),
    (
      not config.rollout.filter_groups,
      "rollout.filter_groups False",
      ["rollout.filter_tries"],
    ),
    (
      not config.rollout.env_workers,
      "rollout.env_workers 0",
      ["rollout.env_memory"],
    ),
    (
      config.guard.action == "off",
      "guard.action 'off'",
      [f"guard.{key}" for key in (*collapse_guard.LIMITS, "patience")],
    ),
    (
      config.guard.action != "rollback",
      f"guard.action {config.guard.action!r}",
      ["guard.rate_factor", "guard.rollbacks"],
    ),
    (loss.kl == "off", "loss.kl 'off'", ["guard.max_reference_kl"]),
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
  for without_effect, why, keys in sections:
    if without_effect:
      reasons |= dict.fromkeys(keys, why)
  defaults = base.get_config()
  for key, why in reasons.items():
    default = _get(defaults, key)
    if key not in used and _get(config, key) != default:
      _refuse(config, key, f"{default!r}: {why} does not use it")
