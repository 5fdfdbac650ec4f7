"""Returns and advantage estimators: how good was each turn.

Every estimator is one pure function on the host, from `Episodes` to
`Advantages`, listed by name in `ESTIMATORS`. Most give one number per turn
that all its tokens share; `gae` gives one per token.

Group statistics are over the trajectories of one task, standard deviations
are unbiased (ddof 1). Aborted trajectories, and those without a turn, take
part in no statistic and get advantage 0.

Deliberate differences from the paper's reference code (arXiv 2605.02178):
penalties are part of the reward of their turn, before discounting, where the
reference subtracts them from the return; a trajectory counts once in its
group's statistics (`per="turn"` lets every turn count, as the reference does);
a group of one gets advantage 0 and is counted, not treated as mean 0 and
deviation 1.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
import dataclasses
import difflib

import numpy as np

from t2po_jax import masked, types

PER = ("trajectory", "turn")
STEP_MODES = ("mean_norm", "mean_std_norm")

Ragged = tuple[np.ndarray, ...]  # One [K] array per trajectory.
Tokens = tuple[tuple[np.ndarray, ...], ...]  # One [T] array per turn of each.


@dataclasses.dataclass(frozen=True)
class Episodes:
  """What the estimators need to know of E trajectories.

  Attributes:
    groups: [E] int, the task group of each.
    rewards: per trajectory [K] float, reward less penalties of each turn.
    aborted: [E] bool, left out of everything.
    anchors: per trajectory K strings, the observation before each turn; for
      `gigpo`.
    values: per turn [T] float, the critic's value before each response token;
      for `gae` and `gae_turn`.
    sampled: per turn [T] bool, response tokens that the policy chose; None
      means all. Only whitening looks at it.
    entropies: per trajectory [K] float nats, mean token entropy of each turn;
      for `empg`.
    baselines: [E] float, return of a greedy rollout of the task; for `remax`.
  """

  groups: np.ndarray
  rewards: Ragged
  aborted: np.ndarray
  anchors: tuple[tuple[str, ...], ...] | None = None
  values: Tokens | None = None
  sampled: Tokens | None = None
  entropies: Ragged | None = None
  baselines: np.ndarray | None = None

  def __post_init__(self):
    count = len(self.rewards)
    for name in ("groups", "aborted", "anchors", "values", "sampled"):
      _check_length(name, getattr(self, name), count)
    for name in ("entropies", "baselines"):
      _check_length(name, getattr(self, name), count)
    if any(len(turn) == 0 for turns in self.values or () for turn in turns):
      raise ValueError("values: found a turn of 0 tokens, expected 1 or more")
    for name in ("anchors", "values", "sampled", "entropies"):
      for e, field in enumerate(getattr(self, name) or ()):
        if len(field) != len(self.rewards[e]):
          raise ValueError(
            f"{name}: found {len(field)} turns in trajectory {e}, expected "
            f"{len(self.rewards[e])} as in its rewards"
          )

  @property
  def counted(self) -> np.ndarray:
    """[E] bool, the trajectories that take part in the statistics."""
    lengths = np.array([len(r) for r in self.rewards], int)
    return ~np.asarray(self.aborted, bool) & (lengths > 0)

  @property
  def returns(self) -> np.ndarray:
    """[E] float, undiscounted episode returns."""
    return np.array([np.sum(r) for r in self.rewards], float)


@dataclasses.dataclass(frozen=True)
class Advantages:
  """What an estimator found.

  Attributes:
    turns: per trajectory [K] float64; the mean over its tokens for an
      estimator that works on tokens.
    metrics: numbers to log.
    tokens: per turn [T] float64, for estimators that work on tokens.
    targets: per turn [T] float64, what the critic should have said; turn-level
      estimators with a critic fill the first token only, the rest is NaN.
  """

  turns: Ragged
  metrics: dict[str, float]
  tokens: Tokens | None = None
  targets: Tokens | None = None


def episodes(trajectories: Sequence[types.Trajectory]) -> Episodes:
  """Reads what the critic-free estimators need from trajectories."""
  return Episodes(
    groups=np.array([t.group for t in trajectories], int),
    rewards=tuple(
      np.array([turn.net_reward for turn in t.turns], float)
      for t in trajectories
    ),
    aborted=np.array([t.aborted for t in trajectories], bool),
    anchors=tuple(tuple(turn.anchor for turn in t.turns) for t in trajectories),
    sampled=tuple(
      tuple(~turn.response.forced for turn in t.turns) for t in trajectories
    ),
    entropies=tuple(
      np.array([_sampled_entropy(turn.response) for turn in t.turns], float)
      for t in trajectories
    ),
  )


def returns_to_go(rewards: np.ndarray, *, discount: float) -> np.ndarray:
  """R^k = sum_{j >= k} discount^{j-k} r^j.

  Args:
    rewards: [K].
    discount: beta, from 0 to 1.

  Returns:
    [K] float64.
  """
  result = np.zeros(len(rewards))
  future = 0.0
  for k in reversed(range(len(rewards))):
    future = float(rewards[k]) + discount * future
    result[k] = future
  return result


def equal_groups(data: Episodes) -> set[int]:
  """Groups that teach nothing: all counted returns are equal.

  Dynamic sampling (DAPO, arXiv 2503.14476) replaces them with fresh groups. A
  group of one, or with none left, is among them.
  """
  counted, returns = data.counted, data.returns
  result = set()
  for group in np.unique(data.groups):
    found = returns[counted & (data.groups == group)]
    if len(found) < 2 or np.all(found == found[0]):
      result.add(int(group))
  return result


def grpo(
  data: Episodes, *, norm_std: bool = True, per: str = "trajectory"
) -> Advantages:
  """Group-relative advantage (GRPO, arXiv 2402.03300).

  A = (R - mean) / (std + 1e-6) of the episode return R in its group.

  Args:
    data: the episodes.
    norm_std: whether to divide by the deviation; off is Dr. GRPO (arXiv
      2503.20783).
    per: `trajectory` counts each trajectory once, `turn` once per turn.

  Returns:
    One value per trajectory, at each of its turns.

  Raises:
    ValueError: for an unknown `per`.
  """
  if per not in PER:
    raise ValueError(f"per: found {per!r}, expected one of {PER}")
  lengths = np.array([len(r) for r in data.rewards], int)
  weights = lengths if per == "turn" else np.ones_like(lengths)
  returns = data.returns
  values = np.zeros(len(lengths))
  for members in _groups(data):
    rows = np.repeat(returns[members], weights[members])
    centred = returns[members] - np.mean(rows)
    spread = np.std(rows, ddof=1) + masked.SPREAD_EPSILON if norm_std else 1.0
    values[members] = centred / spread
  return Advantages(_broadcast(values, data), _group_metrics(data))


def gigpo(
  data: Episodes,
  *,
  discount: float = 0.95,
  step_weight: float = 1.0,
  step_mode: str = "mean_norm",
  similarity: float = 1.0,
  norm_std: bool = True,
  per: str = "trajectory",
) -> Advantages:
  """Group-in-group advantage (GiGPO, arXiv 2505.10978).

  A = A_episode + w A_step. A_episode is `grpo`. For A_step the turns of a task
  group that start from the same observation form a cluster, and a turn's
  return-to-go is compared with its cluster's mean.

  Args:
    data: the episodes, with anchors.
    discount: beta of the return-to-go.
    step_weight: w.
    step_mode: `mean_norm`, or `mean_std_norm` to divide by the cluster's
      deviation + 1e-6 as well.
    similarity: 1 clusters equal anchors; below, see `cluster_anchors`.
    norm_std: of A_episode, see `grpo`.
    per: of A_episode, see `grpo`; a cluster always counts turns.

  Returns:
    One value per turn; 0 for the step part of a turn alone in its cluster.

  Raises:
    ValueError: for an unknown mode or missing anchors.
  """
  if step_mode not in STEP_MODES:
    raise ValueError(
      f"step_mode: found {step_mode!r}, expected one of {STEP_MODES}"
    )
  anchors = _required(data.anchors, "anchors", "gigpo")
  episode = grpo(data, norm_std=norm_std, per=per)
  to_go = [returns_to_go(r, discount=discount) for r in data.rewards]
  step = [np.zeros(len(r)) for r in data.rewards]
  sizes = []
  for members in _groups(data):
    places = [(e, k) for e in members for k in range(len(step[e]))]
    labels = cluster_anchors(
      [anchors[e][k] for e, k in places], similarity=similarity
    )
    found = np.array([to_go[e][k] for e, k in places])
    for label in range(max(labels) + 1):
      inside = np.flatnonzero(labels == label)
      sizes.append(len(inside))
      if len(inside) < 2:
        continue
      centred = found[inside] - np.mean(found[inside])
      if step_mode == "mean_std_norm":
        deviation = np.std(found[inside], ddof=1)
        centred = centred / (deviation + masked.SPREAD_EPSILON)
      for place, value in zip(inside, centred, strict=True):
        e, k = places[place]
        step[e][k] = value
  turns = tuple(
    a + step_weight * b for a, b in zip(episode.turns, step, strict=True)
  )
  sizes = np.array(sizes)
  metrics = episode.metrics | {
    "advantage/clusters": float(len(sizes)),
    "advantage/cluster_size": float(np.mean(sizes)) if len(sizes) else 0.0,
    "advantage/lone_turns": float(np.sum(sizes == 1)),
  }
  return Advantages(turns, metrics)


def cluster_anchors(
  anchors: Sequence[Hashable], *, similarity: float
) -> np.ndarray:
  """Labels anchors with their cluster.

  Greedy in the given order: an anchor joins the first cluster whose first
  member it resembles, with a `difflib` ratio of at least `similarity` (without
  difflib's shortcut for long texts), else it begins a new cluster.

  Args:
    anchors: observations; strings if similarity is below 1.
    similarity: from 0 to 1; 1 means equality.

  Returns:
    [len(anchors)] int labels, 0, 1, ... in order of first appearance.

  Raises:
    ValueError: if the similarity is out of range.
  """
  if not 0.0 <= similarity <= 1.0:
    raise ValueError(f"similarity: found {similarity}, expected 0 to 1")
  seen: dict[Hashable, int] = {}
  leaders: list[difflib.SequenceMatcher] = []
  clusters = 0
  for anchor in anchors:
    # Equal anchors always join the same cluster: it stays the first match.
    if anchor in seen:
      continue
    alike = (i for i, m in enumerate(leaders) if _alike(m, anchor, similarity))
    seen[anchor] = next(alike, clusters)
    if seen[anchor] == clusters:
      clusters += 1
      if similarity < 1.0:
        leaders.append(
          difflib.SequenceMatcher(None, "", anchor, autojunk=False)
        )
  return np.array([seen[anchor] for anchor in anchors], int)


def rloo(data: Episodes) -> Advantages:
  """Leave-one-out baseline (RLOO, arXiv 2402.14740).

  A_i = R_i - mean of R_j over the other trajectories j of the group.
  """
  returns = data.returns
  values = np.zeros(len(data.rewards))
  for members in _groups(data):
    found = returns[members]
    others = (np.sum(found) - found) / (len(found) - 1)
    values[members] = found - others
  return Advantages(_broadcast(values, data), _group_metrics(data))


def reinforce_pp(data: Episodes, *, discount: float = 1.0) -> Advantages:
  """Return-to-go whitened over the batch (REINFORCE++, arXiv 2501.03262).

  Args:
    data: the episodes.
    discount: per turn, from 0 to 1.

  Returns:
    One value per turn, mean 0 and deviation 1 over all tokens that `sampled`
    keeps, or over all turns without it.
  """
  to_go = tuple(returns_to_go(r, discount=discount) for r in data.rewards)
  turns = _whiten_turns(to_go, data, data.counted)
  return Advantages(turns, _group_metrics(data))


def reinforce_pp_baseline(data: Episodes) -> Advantages:
  """Group mean as baseline, then whitened (REINFORCE++ with baseline).

  As `reinforce_pp`, of the episode return less the mean of its group.
  """
  returns = data.returns
  values = np.zeros(len(data.rewards))
  for members in _groups(data):
    values[members] = returns[members] - np.mean(returns[members])
  turns = _whiten_turns(_broadcast(values, data), data, _paired(data))
  return Advantages(turns, _group_metrics(data))


def remax(data: Episodes, *, discount: float = 1.0) -> Advantages:
  """Return-to-go less the return of a greedy rollout (arXiv 2310.10505).

  Args:
    data: the episodes, with baselines.
    discount: per turn, from 0 to 1.

  Returns:
    One value per turn.

  Raises:
    ValueError: if the baselines are missing.
  """
  baselines = _required(data.baselines, "baselines", "remax")
  turns = tuple(
    returns_to_go(r, discount=discount) - b if keep else np.zeros(len(r))
    for r, b, keep in zip(data.rewards, baselines, data.counted, strict=True)
  )
  return Advantages(turns, _group_metrics(data))


def gae(
  data: Episodes,
  *,
  discount: float = 1.0,
  trace: float = 0.95,
  turn_discount: float = 1.0,
  turn_trace: float = 0.95,
  whiten: bool = True,
) -> Advantages:
  """Generalised advantage of every token, across turns (arXiv 1506.02438).

  A_t = delta_t + gamma lambda A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t
  over the response tokens of the whole episode in order. A turn's reward
  arrives at its last token; gamma and lambda have values of their own for the
  step from there to the next turn. The value after the last turn is 0.

  Args:
    data: the episodes, with values.
    discount: gamma inside a turn.
    trace: lambda inside a turn.
    turn_discount: gamma from a turn to the next.
    turn_trace: lambda from a turn to the next.
    whiten: whether to bring the advantages of all sampled tokens to mean 0
      and deviation 1; the targets are not changed by it.

  Returns:
    One value per token, and the critic's targets A + V.

  Raises:
    ValueError: if the values are missing.
  """
  values = _required(data.values, "values", "gae")
  tokens, targets = [], []
  for e, kept in enumerate(data.counted):
    lengths = [len(v) for v in values[e]]
    border = np.cumsum(lengths, dtype=int)
    flat = np.concatenate([np.zeros(0), *values[e]])
    rewards = np.zeros(len(flat))
    gamma = np.full(len(flat), discount, float)
    decay = np.full(len(flat), trace, float)
    rewards[border - 1] = data.rewards[e]
    gamma[border - 1] = turn_discount
    decay[border - 1] = turn_trace
    found = _trace_back(rewards, flat, gamma, decay)
    tokens.append(_split(found if kept else np.zeros(len(flat)), border))
    targets.append(_split(found + flat, border))
  tokens = tuple(tokens)
  if whiten:
    tokens = _whiten_tokens(tokens, data)
  turns = tuple(
    np.array([np.mean(turn) for turn in of_turns]) for of_turns in tokens
  )
  return Advantages(turns, _group_metrics(data), tokens, tuple(targets))


def gae_turn(
  data: Episodes,
  *,
  discount: float = 0.95,
  trace: float = 0.95,
  whiten: bool = True,
) -> Advantages:
  """Generalised advantage with a turn as one action.

  The value of a turn is the critic's at its first response token, before
  anything was said; discount and trace are per turn.

  Args:
    data: the episodes, with values.
    discount: gamma, per turn.
    trace: lambda, per turn.
    whiten: whether to bring the advantages to mean 0 and deviation 1.

  Returns:
    One value per turn, and a target at the first token of each turn.

  Raises:
    ValueError: if the values are missing.
  """
  values = _required(data.values, "values", "gae_turn")
  turns, targets = [], []
  for e, kept in enumerate(data.counted):
    first = np.array([turn[0] for turn in values[e]], float)
    same = np.ones(len(first))
    found = _trace_back(data.rewards[e], first, discount * same, trace * same)
    turns.append(found if kept else np.zeros(len(first)))
    of_turns = [np.full(len(turn), np.nan) for turn in values[e]]
    for k, target in enumerate(found + first):
      of_turns[k][0] = target
    targets.append(tuple(of_turns))
  turns = tuple(turns)
  if whiten:
    turns = _whiten_turns(turns, data, data.counted)
  return Advantages(turns, _group_metrics(data), targets=tuple(targets))


def empg(
  data: Episodes,
  *,
  scale: float = 1.0,
  clarity_scale: float = 1.0,
  clarity_weight: float = 0.05,
  norm_std: bool = True,
) -> Advantages:
  """Entropy-modulated group advantage (EMPG, arXiv 2509.09265).

  A^k = A_grpo g(H^k) + zeta f(H^{k+1}), minus its mean over the batch, with
  g(H) = exp(-k h) / mean(exp(-k h)), f(H) = exp(-k' h), and h the turn's
  entropy brought to [0, 1] over the batch: sure turns learn more, and turns
  that lead to a sure next turn earn a bonus. The last turn has no bonus.

  Args:
    data: the episodes, with entropies.
    scale: k.
    clarity_scale: k'.
    clarity_weight: zeta.
    norm_std: of the group advantage, see `grpo`.

  Returns:
    One value per turn.

  Raises:
    ValueError: if the entropies are missing.
  """
  entropies = _required(data.entropies, "entropies", "empg")
  base = grpo(data, norm_std=norm_std)
  kept = np.flatnonzero(_paired(data))
  turns = [np.zeros(len(r)) for r in data.rewards]
  if len(kept) == 0:
    return Advantages(tuple(turns), base.metrics)
  flat = np.concatenate([entropies[e] for e in kept])
  low, width = np.min(flat), np.ptp(flat)
  level = [(h - low) / width if width > 0 else 0.0 * h for h in entropies]
  weight = [np.exp(-scale * h) for h in level]
  mean_weight = np.mean(np.concatenate([weight[e] for e in kept]))
  for e in kept:
    turns[e] = base.turns[e] * weight[e] / mean_weight
    turns[e][:-1] += clarity_weight * np.exp(-clarity_scale * level[e][1:])
  centre = np.mean(np.concatenate([turns[e] for e in kept]))
  for e in kept:
    turns[e] = turns[e] - centre
  return Advantages(tuple(turns), base.metrics)


ESTIMATORS: dict[str, Callable[..., Advantages]] = {
  "grpo": grpo,
  "gigpo": gigpo,
  "rloo": rloo,
  "reinforce_pp": reinforce_pp,
  "reinforce_pp_baseline": reinforce_pp_baseline,
  "remax": remax,
  "gae": gae,
  "gae_turn": gae_turn,
  "empg": empg,
}


def _check_length(name: str, field, count: int) -> None:
  """Refuses a field that does not have one entry per trajectory."""
  if field is not None and len(field) != count:
    raise ValueError(
      f"{name}: found {len(field)} trajectories, expected {count} as in rewards"
    )


def _required(field, name: str, estimator: str):
  """The field, if the episodes have it."""
  if field is None:
    raise ValueError(f"{name}: found None, expected what {estimator} needs")
  return field


def _sampled_entropy(response: types.Attempt) -> float:
  """Mean entropy of a response's sampled tokens, 0 if there are none."""
  kept = response.entropy[~response.forced]
  return float(np.mean(kept)) if len(kept) else 0.0


def _groups(data: Episodes, *, least: int = 2) -> Iterable[np.ndarray]:
  """The counted members of every group that has at least `least`."""
  counted = data.counted
  for group in np.unique(data.groups):
    members = np.flatnonzero(counted & (data.groups == group))
    if len(members) >= least:
      yield members


def _paired(data: Episodes) -> np.ndarray:
  """[E] bool, trajectories that can be compared with another of their group."""
  result = np.zeros(len(data.rewards), bool)
  for members in _groups(data):
    result[members] = True
  return result


def _group_metrics(data: Episodes) -> dict[str, float]:
  """Counts of groups that give no signal."""
  sizes = [len(members) for members in _groups(data, least=1)]
  return {
    "advantage/lone_groups": float(sum(size == 1 for size in sizes)),
    "advantage/equal_groups": float(len(equal_groups(data))),
  }


def _broadcast(values: np.ndarray, data: Episodes) -> Ragged:
  """One value per trajectory -> that value at each of its turns."""
  return tuple(
    np.full(len(r), value)
    for r, value in zip(data.rewards, values, strict=True)
  )


def _alike(
  matcher: difflib.SequenceMatcher, anchor: str, similarity: float
) -> bool:
  """Whether the ratio reaches the similarity; cheap upper bounds first."""
  matcher.set_seq1(anchor)
  return (
    matcher.real_quick_ratio() >= similarity
    and matcher.quick_ratio() >= similarity
    and matcher.ratio() >= similarity
  )


def _trace_back(
  rewards: np.ndarray, values: np.ndarray, gamma: np.ndarray, decay: np.ndarray
) -> np.ndarray:
  """A_t = r_t + g_t V_{t+1} - V_t + g_t l_t A_{t+1}, with V, A 0 at the end."""
  result = np.zeros(len(values))
  next_value = future = 0.0
  for t in reversed(range(len(values))):
    delta = rewards[t] + gamma[t] * next_value - values[t]
    future = delta + gamma[t] * decay[t] * future
    result[t], next_value = future, values[t]
  return result


def _split(flat: np.ndarray, border: np.ndarray) -> tuple[np.ndarray, ...]:
  """Cuts the tokens of an episode into its turns."""
  return tuple(np.split(flat, border[:-1])) if len(border) else ()


def _whiten_tokens(tokens: Tokens, data: Episodes) -> Tokens:
  """Shifts and scales by the statistics of all counted, sampled tokens."""
  kept = [
    turn[np.asarray(data.sampled[e][k], bool)] if data.sampled else turn
    for e in np.flatnonzero(data.counted)
    for k, turn in enumerate(tokens[e])
  ]
  mean, deviation = _moments(np.concatenate([np.zeros(0), *kept]))
  return tuple(
    tuple(
      (turn - mean) / deviation if keep else np.zeros(len(turn))
      for turn in of_turns
    )
    for of_turns, keep in zip(tokens, data.counted, strict=True)
  )


def _whiten_turns(turns: Ragged, data: Episodes, counted: np.ndarray) -> Ragged:
  """As `_whiten_tokens`, a turn counting as often as it has sampled tokens."""
  kept = [
    np.repeat(
      turns[e],
      [np.sum(turn) for turn in data.sampled[e]] if data.sampled else 1,
    )
    for e in np.flatnonzero(counted)
  ]
  mean, deviation = _moments(np.concatenate([np.zeros(0), *kept]))
  return tuple(
    (turn - mean) / deviation if keep else np.zeros(len(turn))
    for turn, keep in zip(turns, counted, strict=True)
  )


def _moments(values: np.ndarray) -> tuple[float, float]:
  """Mean and unbiased deviation + 1e-6; (0, 1) without any value."""
  if len(values) == 0:
    return 0.0, 1.0
  spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
  return float(np.mean(values)), float(spread) + masked.SPREAD_EPSILON
