"""Presets of algorithms, for every task: `--config=configs/searchqa.py:grpo`.

The base configuration is already T2PO: GiGPO advantages with the thinking
intervention and turn resampling. Each preset starts from there, regardless of
earlier presets, and changes only what defines the algorithm; lengths, numbers
of episodes and the optimizer remain those of the task.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from ml_collections import config_dict

from t2po_jax.learning import estimators, policy_losses

if TYPE_CHECKING:
  # Its attributes are known when it runs, not before.
  ConfigDict: TypeAlias = Any
else:
  ConfigDict = config_dict.ConfigDict


# Thresholds of the presets `hard_budget` and `brief`; `t2po` resets only these,
# so that one of the task's own stays.
_AT_THE_LIMIT, _EARLY = "0", "auto(0.5)"


def _estimate(c: ConfigDict, name: str) -> None:
  """Selects an estimator; resets the options of others to their defaults."""
  c.advantage.estimator = name
  c.advantage.modulation = "off"
  for key, option in estimators.option_keys().items():
    if key not in estimators.ESTIMATORS[name].keys:
      c.advantage[key] = option.default


def _minimise(c: ConfigDict, kind: str) -> None:
  """Selects a policy loss; resets all options of losses to their defaults."""
  loss = policy_losses.POLICY_LOSSES[kind]
  c.loss.kind = kind
  c.loss.aggregation = loss.aggregation or "token_mean"
  for key, option in policy_losses.option_keys().items():
    c.loss[key] = option.default


def _gigpo_norm(c: ConfigDict) -> str:
  """How the published scripts scale GiGPO's returns on a task."""
  return "mean_norm" if c.env.name == "webshop" else "mean_std_norm"


def t2po(c: ConfigDict) -> None:
  """T2PO (arXiv 2605.02178), as in the base configuration."""
  if c.control.signal == "released":  # Its threshold was set by that preset.
    c.control.resampling.eta = "auto(0.1)"
  c.control.signal = "calibrated"
  c.control.thinking.enabled = True
  if c.control.thinking.epsilon in (_AT_THE_LIMIT, _EARLY):  # Of a preset.
    c.control.thinking.epsilon = "auto(0.2)"
  c.control.resampling.max_tries = 2
  c.control.resampling.sign = "phi"
  c.control.resampling.negative = 0.0
  c.reward.drop_void = False
  c.control.thinking.closing = ""
  c.reward.overlong_penalty = 0.0
  c.reward.overlong_buffer = 0
  c.rollout.filter_groups = False
  c.rollout.variance_kept = 1.0
  c.optimizer.target_kl = c.optimizer.max_kl = 0.0
  _estimate(c, "gigpo")
  c.advantage.discount = 0.95
  c.advantage.norm = _gigpo_norm(c)
  _minimise(c, "ppo")


def repeat_negatives(c: ConfigDict) -> None:
  """Ours: T2PO that resamples repeated actions, and learns from them.

  A turn that repeats the last action from the same observation is sampled
  again, and the discarded response is a negative example. See docs/study.md.
  """
  t2po(c)
  c.control.resampling.sign = "action"
  c.control.resampling.negative = 1.0


def off(c: ConfigDict) -> None:
  """Exploration control off: plain multi-turn reinforcement learning."""
  t2po(c)
  c.control.thinking.enabled = False
  c.control.resampling.max_tries = 0


def t2po_no_tti(c: ConfigDict) -> None:
  """T2PO without the token-level thinking intervention."""
  t2po(c)
  c.control.thinking.enabled = False


def t2po_no_tds(c: ConfigDict) -> None:
  """T2PO without turn-level resampling."""
  t2po(c)
  c.control.resampling.max_tries = 0


def t2po_no_rft(c: ConfigDict) -> None:
  """T2PO without rejection fine-tuning in its cold start.

  Raises:
    ValueError: if the cold start has none.
  """
  parts = c.cold_start.kind.split("+")
  if "rft" not in parts:
    raise ValueError(
      f"config preset 't2po_no_rft': cold_start.kind is {c.cold_start.kind!r}, "
      "expected one with rft to leave out; put the preset `rft` before it"
    )
  t2po(c)
  c.cold_start.kind = "+".join(p for p in parts if p != "rft") or "none"


def rft(c: ConfigDict) -> None:
  """A round of rejection fine-tuning at the end of the cold start."""
  parts = [p for p in c.cold_start.kind.split("+") if p not in ("none", "rft")]
  c.cold_start.kind = "+".join([*parts, "rft"])


def hard_budget(c: ConfigDict) -> None:
  """T2PO with a hard thinking budget instead of the intervention.

  Thinking ends after `control.thinking.max_tokens` and never before.
  """
  t2po(c)
  c.control.thinking.epsilon = _AT_THE_LIMIT


def brief(c: ConfigDict) -> None:
  """Ours: closes thoughts earlier than T2PO, and resamples nothing.

  Saves tokens where thoughts are long. See docs/study.md.
  """
  t2po_no_tds(c)
  c.control.thinking.epsilon = _EARLY


def void_filter(c: ConfigDict) -> None:
  """T2PO with void turn filtering instead of resampling.

  Episodes with a turn without a valid action are not trained on.
  """
  t2po_no_tds(c)
  c.reward.drop_void = True


def entropy(c: ConfigDict) -> None:
  """T2PO with the entropy alone as signal."""
  t2po(c)
  c.control.signal = "entropy"


def confidence(c: ConfigDict) -> None:
  """T2PO with the confidence alone as signal."""
  t2po(c)
  c.control.signal = "confidence"


def released(c: ConfigDict) -> None:
  """T2PO with the signal, rule and thresholds of the paper's released code.

  Its turn score is an arithmetic mean and it forces `</think>` alone.
  """
  t2po(c)
  c.control.signal = "released"
  c.control.thinking.closing = "</think>"
  c.control.resampling.eta = "0.3"


def ppo(c: ConfigDict) -> None:
  """PPO (arXiv 1707.06347): a critic, advantages across tokens and turns."""
  off(c)
  _estimate(c, "gae")


def ppo_turn(c: ConfigDict) -> None:
  """PPO with a turn as one action."""
  off(c)
  _estimate(c, "gae_turn")


def grpo(c: ConfigDict) -> None:
  """GRPO (arXiv 2402.03300)."""
  off(c)
  _estimate(c, "grpo")
  c.advantage.norm = "mean_std_norm"


def dr_grpo(c: ConfigDict) -> None:
  """Dr. GRPO (arXiv 2503.20783): divides by neither deviation nor length."""
  grpo(c)
  c.advantage.norm = "mean_norm"
  c.loss.aggregation = "seq_mean_token_sum_norm"


def gspo(c: ConfigDict) -> None:
  """GSPO (arXiv 2507.18071): the ratio of whole responses."""
  grpo(c)
  _minimise(c, "gspo")
  c.loss.clip_low = 3e-4
  c.loss.clip_high = 4e-4


def cispo(c: ConfigDict) -> None:
  """CISPO (arXiv 2506.13585): clipped weights, every token keeps a gradient."""
  grpo(c)
  _minimise(c, "cispo")
  c.loss.clip_low = 1.0
  c.loss.clip_high = 4.0


def sapo(c: ConfigDict) -> None:
  """SAPO (arXiv 2511.20347): a soft gate instead of the clip."""
  grpo(c)
  _minimise(c, "sapo")


def gigpo(c: ConfigDict) -> None:
  """GiGPO (arXiv 2505.10978)."""
  off(c)
  _estimate(c, "gigpo")


def gigpo_dapo(c: ConfigDict) -> None:
  """GiGPO with DAPO's dynamic sampling and clip-higher (arXiv 2503.14476)."""
  gigpo(c)
  c.rollout.filter_groups = True
  c.loss.clip_high = 0.28


def rloo(c: ConfigDict) -> None:
  """RLOO (arXiv 2402.14740)."""
  off(c)
  _estimate(c, "rloo")


def reinforce_pp(c: ConfigDict) -> None:
  """REINFORCE++ (arXiv 2501.03262)."""
  off(c)
  _estimate(c, "reinforce_pp")
  c.advantage.discount = 1.0


def reinforce_pp_baseline(c: ConfigDict) -> None:
  """REINFORCE++ with the group's mean as baseline."""
  off(c)
  _estimate(c, "reinforce_pp_baseline")


def remax(c: ConfigDict) -> None:
  """ReMax (arXiv 2310.10505): a greedy episode as baseline."""
  off(c)
  _estimate(c, "remax")
  c.advantage.discount = 1.0


def empg(c: ConfigDict) -> None:
  """EMPG (arXiv 2509.09265): entropy-modulated group advantages."""
  off(c)
  _estimate(c, "empg")
  c.advantage.norm = "mean_std_norm"


def maxrl(c: ConfigDict) -> None:
  """MaxRL (arXiv 2602.02710); returns must not be negative: no penalties."""
  off(c)
  _estimate(c, "maxrl")
  c.reward.format_penalty = c.reward.invalid_penalty = 0.0


def opo(c: ConfigDict) -> None:
  """OPO (arXiv 2505.23585): the length-weighted mean return as baseline."""
  off(c)
  _estimate(c, "opo")


def hgpo(c: ConfigDict) -> None:
  """HGPO (arXiv 2602.22817): compares turns with the same context."""
  off(c)
  _estimate(c, "hgpo")
  c.advantage.norm = "mean_std_norm"
  c.advantage.context_turns = c.rollout.memory
  c.advantage.penalty = "return"


def aem(c: ConfigDict) -> None:
  """AEM (arXiv 2605.00425) on top of earlier presets: `grpo,aem`."""
  c.advantage.modulation = "aem"


def snr_filter(c: ConfigDict) -> None:
  """RAGEN-2's filter (arXiv 2604.06268) on top of earlier presets.

  Leaves out the groups with the smallest variance of returns.
  """
  c.rollout.variance_kept = 0.9


def kl_rate(c: ConfigDict) -> None:
  """A learning rate that follows the KL of updates, on top of earlier presets.

  What keeps training alive at a learning rate that is too large; docs/study.md.
  """
  c.optimizer.target_kl = 0.001


def kl_stop(c: ConfigDict) -> None:
  """Stops an update that has moved the policy far, on top of earlier presets.

  As PPO is often run; the limit is ours. A first step can still go too far, and
  the next update starts at the same rate: combine it with `kl_rate`.
  """
  c.optimizer.max_kl = 0.01


def dapo(c: ConfigDict) -> None:
  """DAPO (arXiv 2503.14476): four changes to GRPO.

  Clip-higher, dynamic sampling, the mean over all tokens, and soft overlong
  punishment over the last fifth of a response.
  """
  grpo(c)
  c.rollout.filter_groups = True
  c.loss.clip_high = 0.28
  c.reward.overlong_penalty = 1.0
  c.reward.overlong_buffer = c.rollout.max_response // 5


def dppo_tv(c: ConfigDict) -> None:
  """DPPO (arXiv 2602.04879) with the total variation."""
  grpo(c)
  _minimise(c, "dppo_tv")


def dppo_kl(c: ConfigDict) -> None:
  """DPPO (arXiv 2602.04879) with the KL divergence."""
  grpo(c)
  _minimise(c, "dppo_kl")
  c.loss.divergence_low = c.loss.divergence_high = 0.05


def ce_gppo(c: ConfigDict) -> None:
  """CE-GPPO (arXiv 2509.20712): clipped tokens keep a bounded gradient."""
  grpo(c)
  _minimise(c, "ce_gppo")


def gmpo(c: ConfigDict) -> None:
  """GMPO (arXiv 2507.20673): the geometric mean of a turn's ratios."""
  grpo(c)
  _minimise(c, "gmpo")
  c.loss.clip_low = c.loss.clip_high = 0.4


def gpg(c: ConfigDict) -> None:
  """GPG (arXiv 2504.02546): the plain policy gradient of group advantages."""
  grpo(c)
  _minimise(c, "gpg")


def clip_cov(c: ConfigDict) -> None:
  """Clip-Cov (arXiv 2505.22617): leaves out some tokens that reduce entropy."""
  grpo(c)
  _minimise(c, "clip_cov")


def kl_cov(c: ConfigDict) -> None:
  """KL-Cov (arXiv 2505.22617): a KL penalty on tokens that reduce entropy."""
  grpo(c)
  _minimise(c, "kl_cov")


def icepop(c: ConfigDict) -> None:
  """IcePop (arXiv 2510.18855) on top of earlier presets.

  Tokens whose ratio of trainer to sampler lies outside 0.5 to 5 are left out.
  """
  c.loss.old_logprobs = "recompute"
  c.loss.importance = "mask"
  c.loss.importance_low = 0.5
  c.loss.importance_cap = 5.0


def turn_is(c: ConfigDict) -> None:
  """Truncated importance weights of whole turns, on top of earlier presets."""
  c.loss.old_logprobs = "recompute"
  c.loss.importance = "turn_truncate"
  c.loss.importance_low = 0.0
  c.loss.importance_cap = 5.0


def turn_rejection(c: ConfigDict) -> None:
  """Leaves out turns on which trainer and sampler disagree, likewise.

  The geometric mean of their ratios must lie from 0.99 to 1.01.
  """
  c.loss.old_logprobs = "recompute"
  c.loss.rejection = "geometric"


def lora(c: ConfigDict) -> None:
  """Trains only low-rank adapters, with a ten times larger learning rate."""
  c.lora.rank = 16
  c.optimizer.learning_rate *= 10


PRESETS: Mapping[str, Callable[[ConfigDict], None]] = {
  preset.__name__: preset
  for preset in (
    off,
    t2po,
    repeat_negatives,
    t2po_no_tti,
    t2po_no_tds,
    t2po_no_rft,
    rft,
    hard_budget,
    brief,
    void_filter,
    entropy,
    confidence,
    released,
    ppo,
    ppo_turn,
    grpo,
    dr_grpo,
    gspo,
    cispo,
    sapo,
    gigpo,
    gigpo_dapo,
    rloo,
    reinforce_pp,
    reinforce_pp_baseline,
    remax,
    empg,
    maxrl,
    opo,
    hgpo,
    aem,
    snr_filter,
    kl_rate,
    kl_stop,
    dapo,
    dppo_tv,
    dppo_kl,
    ce_gppo,
    gmpo,
    gpg,
    clip_cov,
    kl_cov,
    icepop,
    turn_is,
    turn_rejection,
    lora,
  )
}
