"""Critic-free estimators with one advantage per episode or per turn.

A trajectory counts once in its group's statistics by default; `per="turn"`
lets every turn count, as the reference code of arXiv 2605.02178 does.
"""

import dataclasses

import numpy as np

from t2po_jax import keys, masked
from t2po_jax.learning.estimators import episodes

PER = ("trajectory", "turn")


NORMS = ("mean_std_norm", "mean_norm")


@dataclasses.dataclass(frozen=True)
class Normed:
  """Options of estimators that normalise returns."""

  norm: str = keys.key(
    "mean_std_norm",
    "Subtract the group's mean from returns, or divide by its standard "
    "deviation as well; in `gigpo` and `hgpo` likewise for their clusters.",
    choices=NORMS,
  )


@dataclasses.dataclass(frozen=True)
class GroupOptions(Normed, episodes.Penalized):
  """Options of `grpo`."""

  per: str = keys.key(
    "trajectory",
    "What counts once in a group's statistics.",
    choices=PER,
  )


@dataclasses.dataclass(frozen=True)
class EmpgOptions(Normed):
  """Options of `empg`."""

  entropy_scale: float = keys.key(
    1.0, "k, how much more confident turns learn."
  )
  clarity_scale: float = keys.key(
    1.0, "k', how fast the bonus for a confident next turn decays."
  )
  clarity_weight: float = keys.key(0.05, "zeta, of that bonus.")


def grpo(
  data: episodes.Episodes,
  *,
  norm: str = "mean_std_norm",
  per: str = "trajectory",
  penalty: str = "reward",
) -> episodes.Advantages:
  """Group-relative advantage (GRPO, arXiv 2402.03300).

  A = (R - mean) / (std + 1e-6) of the episode return R in its group.

  Args:
    data: the episodes.
    norm: `mean_std_norm`, or `mean_norm` not to divide by the deviation: Dr.
      GRPO (arXiv 2503.20783).
    per: `trajectory` counts each trajectory once, `turn` once per turn.
    penalty: see `episodes.Penalized`; with `return`, a trajectory that counts
      once is represented by its first turn, as in the reference code.

  Returns:
    One value per turn; the same at all turns of a trajectory unless penalties
    are charged to `return`.

  Raises:
    ValueError: for an unknown `norm` or `per`, or missing penalties.
  """
  check_norm(norm)
  if per not in PER:
    raise ValueError(f"per: found {per!r}, expected one of {PER}")
  scores = data.turn_returns(penalty)
  turns = [np.zeros(len(r)) for r in data.rewards]
  for members in episodes.groups(data):
    rows = np.concatenate(
      [scores[e] if per == "turn" else scores[e][:1] for e in members]
    )
    mean, spread = np.mean(rows), 1.0
    if norm == "mean_std_norm":
      spread = np.std(rows, ddof=1) + masked.SPREAD_EPSILON
    for e in members:
      turns[e] = (scores[e] - mean) / spread
  return episodes.Advantages(tuple(turns), episodes.group_metrics(data))


def check_norm(norm: str) -> None:
  """Refuses an unknown norm."""
  if norm not in NORMS:
    raise ValueError(f"norm: found {norm!r}, expected one of {NORMS}")


def maxrl(data: episodes.Episodes) -> episodes.Advantages:
  """Advantages of maximum likelihood RL (MaxRL, arXiv 2602.02710).

  A = (R - mean) / (mean + 1e-6) of the episode return R in its group: the rarer
  success is, the larger its advantage. Meant for non-negative returns; groups
  whose mean is not positive get 0.
  """
  returns = data.returns
  values = np.zeros(len(data.rewards))
  for members in episodes.groups(data):
    mean = np.mean(returns[members])
    if mean > 0:
      values[members] = (returns[members] - mean) / (
        mean + masked.SPREAD_EPSILON
      )
  return episodes.Advantages(
    episodes.broadcast(values, data), episodes.group_metrics(data)
  )


def opo(data: episodes.Episodes) -> episodes.Advantages:
  """Optimal baseline on policy (OPO, arXiv 2505.23585).

  A_i = R_i - sum_j l_j R_j / sum_j l_j over the group, l the number of sampled
  tokens of a trajectory (of turns if `sampled` is missing): the
  minimum-variance baseline if a trajectory's squared gradient norm is
  proportional to its length.
  """
  returns = data.returns
  values = np.zeros(len(data.rewards))
  for members in episodes.groups(data):
    lengths = np.array([_length(data, e) for e in members], float)
    if np.sum(lengths) > 0:
      baseline = np.sum(lengths * returns[members]) / np.sum(lengths)
      values[members] = returns[members] - baseline
  return episodes.Advantages(
    episodes.broadcast(values, data), episodes.group_metrics(data)
  )


def rloo(data: episodes.Episodes) -> episodes.Advantages:
  """Leave-one-out baseline (RLOO, arXiv 2402.14740).

  A_i = R_i - mean of R_j over the other trajectories j of the group.
  """
  returns = data.returns
  values = np.zeros(len(data.rewards))
  for members in episodes.groups(data):
    of_group = returns[members]
    others = (np.sum(of_group) - of_group) / (len(of_group) - 1)
    values[members] = of_group - others
  return episodes.Advantages(
    episodes.broadcast(values, data), episodes.group_metrics(data)
  )


def reinforce_pp(
  data: episodes.Episodes, *, discount: float = 1.0
) -> episodes.Advantages:
  """Return-to-go whitened over the batch (REINFORCE++, arXiv 2501.03262).

  Args:
    data: the episodes.
    discount: per turn, from 0 to 1.

  Returns:
    One value per turn, whitened over all sampled tokens, or over all turns if
    `sampled` is missing.
  """
  to_go = tuple(
    episodes.returns_to_go(r, discount=discount) for r in data.rewards
  )
  turns = episodes.whiten_turns(to_go, data, data.counted)
  return episodes.Advantages(turns, episodes.group_metrics(data))


def reinforce_pp_baseline(data: episodes.Episodes) -> episodes.Advantages:
  """Group mean as baseline, then whitened (REINFORCE++ with baseline).

  As `reinforce_pp`, with the episode return minus the mean of its group.
  """
  returns = data.returns
  values = np.zeros(len(data.rewards))
  for members in episodes.groups(data):
    values[members] = returns[members] - np.mean(returns[members])
  turns = episodes.whiten_turns(
    episodes.broadcast(values, data), data, episodes.paired(data)
  )
  return episodes.Advantages(turns, episodes.group_metrics(data))


def remax(
  data: episodes.Episodes, *, discount: float = 1.0
) -> episodes.Advantages:
  """Return-to-go minus the return of a greedy rollout (arXiv 2310.10505).

  Args:
    data: the episodes, with baselines.
    discount: per turn, from 0 to 1.

  Returns:
    One value per turn.

  Raises:
    ValueError: if the baselines are missing.
  """
  baselines = episodes.required(data.baselines, "baselines", "remax")
  turns = tuple(
    episodes.returns_to_go(r, discount=discount) - b
    if keep
    else np.zeros(len(r))
    for r, b, keep in zip(data.rewards, baselines, data.counted, strict=True)
  )
  return episodes.Advantages(turns, episodes.group_metrics(data))


def empg(
  data: episodes.Episodes,
  *,
  entropy_scale: float = 1.0,
  clarity_scale: float = 1.0,
  clarity_weight: float = 0.05,
  norm: str = "mean_std_norm",
) -> episodes.Advantages:
  """Entropy-modulated group advantage (EMPG, arXiv 2509.09265).

  A^k = A_grpo g(H^k) + zeta f(H^{k+1}), minus its mean over the batch, with
  g(H) = exp(-k h) / mean(exp(-k h)), f(H) = exp(-k' h), and h the turn's
  entropy scaled to [0, 1] over the batch: confident turns learn more, and turns
  leading to a confident next turn earn a bonus. The last turn has no bonus.

  Args:
    data: the episodes, with entropies.
    entropy_scale: k.
    clarity_scale: k'.
    clarity_weight: zeta.
    norm: of the group advantage, see `grpo`.

  Returns:
    One value per turn.

  Raises:
    ValueError: if the entropies are missing.
  """
  entropies = episodes.required(data.entropies, "entropies", "empg")
  base = grpo(data, norm=norm)
  kept = np.flatnonzero(episodes.paired(data))
  turns = [np.zeros(len(r)) for r in data.rewards]
  if len(kept) == 0:
    return episodes.Advantages(tuple(turns), base.metrics)
  flat = np.concatenate([entropies[e] for e in kept])
  low, width = np.min(flat), np.ptp(flat)
  level = [(h - low) / width if width > 0 else 0.0 * h for h in entropies]
  weight = [np.exp(-entropy_scale * h) for h in level]
  mean_weight = np.mean(np.concatenate([weight[e] for e in kept]))
  for e in kept:
    turns[e] = base.turns[e] * weight[e] / mean_weight
    turns[e][:-1] += clarity_weight * np.exp(-clarity_scale * level[e][1:])
  centre = np.mean(np.concatenate([turns[e] for e in kept]))
  for e in kept:
    turns[e] = turns[e] - centre
  return episodes.Advantages(tuple(turns), base.metrics)


ESTIMATORS = {
  "grpo": episodes.Estimator(grpo, GroupOptions, grouped=True),
  "maxrl": episodes.Estimator(maxrl, episodes.NoOptions, grouped=True),
  "opo": episodes.Estimator(opo, episodes.NoOptions, grouped=True),
  "rloo": episodes.Estimator(rloo, episodes.NoOptions, grouped=True),
  "reinforce_pp": episodes.Estimator(reinforce_pp, episodes.Discounted),
  "reinforce_pp_baseline": episodes.Estimator(
    reinforce_pp_baseline, episodes.NoOptions, grouped=True
  ),
  "remax": episodes.Estimator(
    remax, episodes.Discounted, frozenset({"baselines"})
  ),
  "empg": episodes.Estimator(
    empg, EmpgOptions, frozenset({"entropies"}), grouped=True
  ),
}


def _length(data: episodes.Episodes, e: int) -> int:
  """The number of sampled tokens of a trajectory, or of its turns."""
  if data.sampled is None:
    return len(data.rewards[e])
  return int(sum(np.sum(turn) for turn in data.sampled[e]))
