"""Episodes as the estimators see them, and the statistics they share.

Group statistics are over the trajectories of one task, standard deviations are
unbiased (ddof 1). Aborted trajectories and those without turns are excluded
from all statistics and get advantage 0.

Deliberate differences from the paper's reference code (arXiv 2605.02178):
penalties are part of the reward of their turn, before discounting, unless an
estimator is told to subtract them from the return as the reference does; a
group of one gets advantage 0 and is counted, not treated as mean 0 and
deviation 1.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
from typing import Any, TypeVar

import numpy as np

from t2po_jax import keys, masked, types

T = TypeVar("T")
Ragged = tuple[np.ndarray, ...]  # One [K] array per trajectory.
Tokens = tuple[tuple[np.ndarray, ...], ...]  # One [T] array per turn of each.


@dataclasses.dataclass(frozen=True)
class Episodes:
  """What the estimators need to know about E trajectories.

  Attributes:
    groups: [E] int, the task group of each.
    rewards: per trajectory [K] float, reward less penalties of each turn.
    aborted: [E] bool, excluded from everything.
    anchors: per trajectory K strings, the observation before each turn; for
      `gigpo`.
    values: per turn [T] float, the critic's value before each response token;
      for `gae` and `gae_turn`.
    sampled: per turn [T] bool, response tokens that the policy sampled; None
      means all. Only used for whitening.
    entropies: per trajectory [K] float nats, mean token entropy of each turn;
      for `empg`.
    baselines: [E] float, return of a greedy rollout of the task; for `remax`.
    penalties: per trajectory [K] float, already subtracted in `rewards`; needed
      to charge them to returns instead.
  """

  groups: np.ndarray
  rewards: Ragged
  aborted: np.ndarray
  anchors: tuple[tuple[str, ...], ...] | None = None
  values: Tokens | None = None
  sampled: Tokens | None = None
  entropies: Ragged | None = None
  baselines: np.ndarray | None = None
  penalties: Ragged | None = None

  def __post_init__(self) -> None:
    count = len(self.rewards)
    for name in ("groups", "aborted", "anchors", "values", "sampled"):
      _check_length(name, getattr(self, name), count)
    for name in ("entropies", "baselines", "penalties"):
      _check_length(name, getattr(self, name), count)
    if any(len(turn) == 0 for turns in self.values or () for turn in turns):
      raise ValueError("values: found a turn of 0 tokens, expected 1 or more")
    for name in ("anchors", "values", "sampled", "entropies", "penalties"):
      for e, field in enumerate(getattr(self, name) or ()):
        if len(field) != len(self.rewards[e]):
          raise ValueError(
            f"{name}: found {len(field)} turns in trajectory {e}, expected "
            f"{len(self.rewards[e])} as in its rewards"
          )

  @property
  def counted(self) -> np.ndarray:
    """[E] bool, the trajectories included in the statistics."""
    lengths = np.array([len(r) for r in self.rewards], int)
    return ~np.asarray(self.aborted, bool) & (lengths > 0)

  def turn_returns(self, penalty: str) -> Ragged:
    """Per trajectory [K] undiscounted returns; see `Penalized`."""
    if penalty == "reward":
      return broadcast(self.returns, self)
    gross, penalties = self._uncharged()
    return tuple(np.sum(r) - p for r, p in zip(gross, penalties, strict=True))

  def turn_returns_to_go(self, discount: float, penalty: str) -> Ragged:
    """Per trajectory [K] discounted returns-to-go; see `Penalized`."""
    if penalty == "reward":
      return tuple(returns_to_go(r, discount=discount) for r in self.rewards)
    gross, penalties = self._uncharged()
    return tuple(
      returns_to_go(r, discount=discount) - p
      for r, p in zip(gross, penalties, strict=True)
    )

  def _uncharged(self) -> tuple[Ragged, Ragged]:
    """Rewards without penalties, and the penalties."""
    penalties = required(self.penalties, "penalties", "penalty='return'")
    gross = tuple(r + p for r, p in zip(self.rewards, penalties, strict=True))
    return gross, penalties

  @property
  def returns(self) -> np.ndarray:
    """[E] float, undiscounted episode returns."""
    return np.array([np.sum(r) for r in self.rewards], float)


@dataclasses.dataclass(frozen=True)
class Advantages:
  """The output of an estimator.

  Attributes:
    turns: per trajectory [K] float64; for token-level estimators the mean over
      the turn's tokens.
    metrics: values to log.
    tokens: per turn [T] float64, for token-level estimators.
    targets: per turn [T] float64, the critic's targets; turn-level estimators
      with a critic only fill the first token, the rest is NaN.
  """

  turns: Ragged
  metrics: dict[str, float]
  tokens: Tokens | None = None
  targets: Tokens | None = None


@dataclasses.dataclass(frozen=True)
class Estimator:
  """An advantage estimator: its function and everything that goes with it.

  Attributes:
    function: maps `Episodes` to `Advantages`; the options are keyword arguments
      of the same names.
    options: a dataclass of `keys.key` fields, the keys of the configuration's
      section `advantage` that it reads.
    needs: fields of `Episodes` required beyond rewards: `anchors` and
      `entropies` are always available, `values` require a critic and
      `baselines` a greedy episode per task.
    grouped: whether it compares the episodes of a task with each other.
  """

  function: Callable[..., Advantages]
  options: type
  needs: frozenset[str] = frozenset()
  grouped: bool = False

  def __post_init__(self) -> None:
    fields = {field.name for field in dataclasses.fields(Episodes)}
    if unknown := self.needs - fields:
      raise ValueError(
        f"needs: found {sorted(unknown)}, expected some of {sorted(fields)}"
      )

  @property
  def keys(self) -> tuple[str, ...]:
    """Names of its options."""
    return tuple(keys.keys_of(self.options))

  def estimate(self, data: Episodes, settings: Any) -> Advantages:
    """Advantages of a rollout.

    Args:
      data: the episodes, with every field that the estimator needs.
      settings: anything with the options as attributes.

    Raises:
      ValueError: if a field is missing from the episodes.
    """
    for name in sorted(self.needs):
      required(getattr(data, name), name, self.function.__name__)
    options = {name: getattr(settings, name) for name in self.keys}
    return self.function(data, **options)


@dataclasses.dataclass(frozen=True)
class NoOptions:
  """An estimator without options."""


@dataclasses.dataclass(frozen=True)
class Discounted:
  """Options of estimators that discount rewards."""

  discount: float = keys.key(
    0.95, "Of the next turn's reward, per turn.", least=0, most=1
  )


PENALTIES = ("reward", "return")


@dataclasses.dataclass(frozen=True)
class Penalized:
  """Options of estimators that can charge penalties to returns."""

  penalty: str = keys.key(
    "reward",
    "Whether penalties are subtracted from their turn's `reward`, so that "
    "earlier turns share them, or from its `return`, so that they do not.",
    choices=PENALTIES,
  )


def episodes(trajectories: Sequence[types.Trajectory]) -> Episodes:
  """Extracts what the critic-free estimators need from trajectories."""
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
    penalties=tuple(
      np.array([turn.penalty for turn in t.turns], float) for t in trajectories
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
  """The number of groups without signal, see `teaches`; empty ones included."""
  counted, returns = data.counted, data.returns
  return {
    int(group)
    for group in np.unique(data.groups)
    if not teaches(returns[counted & (data.groups == group)])
  }


def mixed_groups(trajectories: Sequence[types.Trajectory]) -> float:
  """The fraction of groups with a signal; NaN without groups.

  Args:
    trajectories: of any number of groups; aborted ones are left out, as are
      groups with no others.
  """
  returns: dict[int, list[float]] = {}
  for trajectory in trajectories:
    if not trajectory.aborted:
      of_group = returns.setdefault(trajectory.group, [])
      of_group.append(trajectory.episode_return)
  if not returns:
    return float("nan")
  return float(np.mean([teaches(of_group) for of_group in returns.values()]))


def teaches(returns: Sequence[float] | np.ndarray) -> bool:
  """Whether a group gives a signal: its returns differ, to six decimals.

  Dynamic sampling (DAPO, arXiv 2503.14476) replaces groups without a signal by
  new ones. A group of one has none.
  """
  return len(np.unique(np.round(returns, 6))) > 1


def most_varied(returns: Sequence[Sequence[float]], share: float) -> list[int]:
  """The groups with the strongest signal, as RAGEN-2 chooses them.

  Groups are taken by decreasing variance of their returns until together they
  hold a share of the sum of all variances (arXiv 2604.06268: filtering by the
  signal-to-noise ratio, "top p").

  Args:
    returns: of the members of each group; may be empty.
    share: of the sum of variances, from 0 to 1.

  Returns:
    Indices in order. At least one group is taken, and every group if no
    returns differ.
  """
  variances = np.array([np.var(one) if len(one) else 0.0 for one in returns])
  total = variances.sum()
  if not total > 0:
    return list(range(len(variances)))
  order = np.argsort(-variances, kind="stable")
  held = np.cumsum(variances[order]) / total
  # Rounding must not take a group for the last bit of the share.
  count = int(np.searchsorted(held, share - 1e-9)) + 1
  return sorted(order[:count].tolist())


def groups(data: Episodes, *, least: int = 2) -> Iterable[np.ndarray]:
  """The counted members of every group with at least `least` of them."""
  counted = data.counted
  for group in np.unique(data.groups):
    members = np.flatnonzero(counted & (data.groups == group))
    if len(members) >= least:
      yield members


def paired(data: Episodes) -> np.ndarray:
  """[E] bool, trajectories with at least one other in their group."""
  result = np.zeros(len(data.rewards), bool)
  for members in groups(data):
    result[members] = True
  return result


def group_metrics(data: Episodes) -> dict[str, float]:
  """Counts of groups without signal."""
  sizes = [len(members) for members in groups(data, least=1)]
  return {
    "advantage/lone_groups": float(sum(size == 1 for size in sizes)),
    "advantage/equal_groups": float(len(equal_groups(data))),
  }


def broadcast(values: np.ndarray, data: Episodes) -> Ragged:
  """Repeats one value per trajectory at each of its turns."""
  return tuple(
    np.full(len(r), value)
    for r, value in zip(data.rewards, values, strict=True)
  )


def whiten_tokens(tokens: Tokens, data: Episodes) -> Tokens:
  """Whitens by the statistics of all counted, sampled tokens."""
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


def whiten_turns(turns: Ragged, data: Episodes, counted: np.ndarray) -> Ragged:
  """As `whiten_tokens`, with turns weighted by their sampled tokens."""
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


def required(field: T | None, name: str, estimator: str) -> T:
  """Returns a field of the episodes; raises if it is missing."""
  if field is None:
    raise ValueError(f"{name}: found None, expected what {estimator} needs")
  return field


def _check_length(name: str, field: Any, count: int) -> None:
  """Raises an error unless a field has one entry per trajectory."""
  if field is not None and len(field) != count:
    raise ValueError(
      f"{name}: found {len(field)} trajectories, expected {count} as in rewards"
    )


def _sampled_entropy(response: types.Attempt) -> float:
  """Mean entropy of a response's sampled tokens; 0 without any."""
  kept = response.entropy[~response.forced]
  return float(np.mean(kept)) if len(kept) else 0.0


def _moments(values: np.ndarray) -> tuple[float, float]:
  """Mean and unbiased deviation + 1e-6; (0, 1) without values."""
  if len(values) == 0:
    return 0.0, 1.0
  spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
  return float(np.mean(values)), float(spread) + masked.SPREAD_EPSILON
