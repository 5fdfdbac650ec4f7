"""Presets of algorithms, for every task: `--config=configs/searchqa.py:grpo`.

A base configuration is T2PO already: GiGPO advantages with the thinking
intervention and turn resampling. Each preset begins from there, whatever came
before it, and changes only what makes the algorithm; lengths, numbers of
episodes and the optimizer stay the task's.
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

from ml_collections import config_dict

ConfigDict: TypeAlias = config_dict.ConfigDict


def t2po(c: ConfigDict) -> None:
  """T2PO (arXiv 2605.02178), as the base configuration has it."""
  c.control.signal = "calibrated"
  c.control.thinking.enabled = True
  if c.control.thinking.epsilon == "0":  # A hard budget came before.
    c.control.thinking.epsilon = "auto(0.2)"
  c.control.resampling.max_tries = 2
  c.reward.drop_void = False
  c.rollout.filter_groups = False
  c.advantage.estimator = "gigpo"
  c.advantage.discount = 0.95
  c.loss.kind = "ppo"
  c.loss.clip_low = c.loss.clip_high = 0.2
  c.loss.aggregation = "token_mean"


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
  """T2PO with a hard thinking budget in the intervention's place.

  Thinking ends after `control.thinking.max_tokens` and never before.
  """
  t2po(c)
  c.control.thinking.epsilon = "0"


def void_filter(c: ConfigDict) -> None:
  """T2PO with void turn filtering in resampling's place.

  Episodes with a turn without a valid action are not learned from.
  """
  t2po_no_tds(c)
  c.reward.drop_void = True


def entropy(c: ConfigDict) -> None:
  """T2PO on the entropy alone."""
  t2po(c)
  c.control.signal = "entropy"


def confidence(c: ConfigDict) -> None:
  """T2PO on the confidence alone."""
  t2po(c)
  c.control.signal = "confidence"


def released(c: ConfigDict) -> None:
  """T2PO on the signal and the rule of the paper's released code."""
  t2po(c)
  c.control.signal = "released"


def ppo(c: ConfigDict) -> None:
  """PPO (arXiv 1707.06347): a critic, advantages across tokens and turns."""
  off(c)
  c.advantage.estimator = "gae"


def ppo_turn(c: ConfigDict) -> None:
  """PPO with a turn as one action."""
  off(c)
  c.advantage.estimator = "gae_turn"


def grpo(c: ConfigDict) -> None:
  """GRPO (arXiv 2402.03300)."""
  off(c)
  c.advantage.estimator = "grpo"


def dr_grpo(c: ConfigDict) -> None:
  """Dr. GRPO (arXiv 2503.20783): no deviation, no length in the divisor."""
  grpo(c)
  c.advantage.norm = "mean_norm"
  c.loss.aggregation = "seq_mean_token_sum_norm"


def gspo(c: ConfigDict) -> None:
  """GSPO (arXiv 2507.18071): the ratio of whole responses."""
  grpo(c)
  c.loss.kind = "gspo"
  c.loss.clip_low = 3e-4
  c.loss.clip_high = 4e-4
  c.loss.aggregation = "seq_mean_token_mean"


def cispo(c: ConfigDict) -> None:
  """CISPO (arXiv 2506.13585): clipped weights, every token keeps a gradient."""
  grpo(c)
  c.loss.kind = "cispo"
  c.loss.clip_low = 1.0
  c.loss.clip_high = 4.0


def sapo(c: ConfigDict) -> None:
  """SAPO (arXiv 2511.20347): a soft gate in place of the clip."""
  grpo(c)
  c.loss.kind = "sapo"
  c.loss.aggregation = "seq_mean_token_mean"


def gigpo(c: ConfigDict) -> None:
  """GiGPO (arXiv 2505.10978)."""
  off(c)
  c.advantage.estimator = "gigpo"


def gigpo_dapo(c: ConfigDict) -> None:
  """GiGPO with DAPO's dynamic sampling and clip-higher (arXiv 2503.14476)."""
  gigpo(c)
  c.rollout.filter_groups = True
  c.loss.clip_high = 0.28


def rloo(c: ConfigDict) -> None:
  """RLOO (arXiv 2402.14740)."""
  off(c)
  c.advantage.estimator = "rloo"


def reinforce_pp(c: ConfigDict) -> None:
  """REINFORCE++ (arXiv 2501.03262)."""
  off(c)
  c.advantage.discount = 1.0
  c.advantage.estimator = "reinforce_pp"


def reinforce_pp_baseline(c: ConfigDict) -> None:
  """REINFORCE++ with the group's mean as baseline."""
  off(c)
  c.advantage.estimator = "reinforce_pp_baseline"


def remax(c: ConfigDict) -> None:
  """ReMax (arXiv 2310.10505): a greedy episode as baseline."""
  off(c)
  c.advantage.discount = 1.0
  c.advantage.estimator = "remax"


def empg(c: ConfigDict) -> None:
  """EMPG (arXiv 2509.09265): entropy-modulated group advantages."""
  off(c)
  c.advantage.estimator = "empg"


def lora(c: ConfigDict) -> None:
  """Low-rank adapters alone are trained, in ten times larger steps."""
  c.lora.rank = 16
  c.optimizer.learning_rate *= 10


PRESETS: Mapping[str, Callable[[ConfigDict], None]] = {
  preset.__name__: preset
  for preset in (
    off,
    t2po,
    t2po_no_tti,
    t2po_no_tds,
    t2po_no_rft,
    rft,
    hard_budget,
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
    lora,
  )
}
