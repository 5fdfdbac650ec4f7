"""Estimators that compare turns starting from the same observation."""

from collections.abc import Hashable, Sequence
import dataclasses
import difflib

import numpy as np

from t2po_jax import keys, masked
from t2po_jax.learning.estimators import episodes, groups


@dataclasses.dataclass(frozen=True)
class GigpoOptions(groups.GroupOptions, episodes.Discounted):
  """Options of `gigpo`."""

  step_weight: float = keys.key(1.0, "Weight of the step advantage.")
  similarity: float = keys.key(
    1.0,
    "Observations with at least this difflib ratio share a cluster; 1 = only "
    "equal ones.",
    least=0,
    most=1,
  )
  autojunk: bool = keys.key(
    False,
    "Whether difflib may ignore frequent characters of texts from 200 on, as "
    "the reference code lets it: a coarse, asymmetric ratio.",
  )


@dataclasses.dataclass(frozen=True)
class HgpoOptions(groups.Normed, episodes.Discounted, episodes.Penalized):
  """Options of `hgpo`."""

  context_turns: int = keys.key(
    2, "h, most observations before the current one that are compared.", least=0
  )
  context_exponent: float = keys.key(
    1.0, "alpha, how much more a longer shared context weighs.", least=0
  )
  context_base: bool = keys.key(
    False, "Whether the episode advantage is the level below all."
  )


def gigpo(
  data: episodes.Episodes,
  *,
  discount: float = 0.95,
  step_weight: float = 1.0,
  similarity: float = 1.0,
  autojunk: bool = False,
  norm: str = "mean_std_norm",
  per: str = "trajectory",
  penalty: str = "reward",
) -> episodes.Advantages:
  """Group-in-group advantage (GiGPO, arXiv 2505.10978).

  A = A_episode + w A_step. A_episode is `grpo`. For A_step the turns of a task
  group that start from the same observation form a cluster, and a turn's
  return-to-go is compared with the mean of its cluster; like A_episode it may
  be divided by the standard deviation + 1e-6.

  Args:
    data: the episodes, with anchors.
    discount: beta of the return-to-go.
    step_weight: w.
    similarity: 1 clusters equal anchors; below, see `cluster_anchors`.
    autojunk: see `cluster_anchors`.
    norm: of both parts, see `groups.grpo`.
    per: of A_episode, see `groups.grpo`; a cluster always counts turns.
    penalty: of both parts, see `episodes.Penalized`.

  Returns:
    One value per turn; the step part of a turn alone in its cluster is 0.

  Raises:
    ValueError: for an unknown norm, or missing anchors.
  """
  anchors = episodes.required(data.anchors, "anchors", "gigpo")
  episode = groups.grpo(data, norm=norm, per=per, penalty=penalty)
  to_go = data.turn_returns_to_go(discount, penalty)
  step = [np.zeros(len(r)) for r in data.rewards]
  sizes = []
  for members in episodes.groups(data):
    places = [(e, k) for e in members for k in range(len(step[e]))]
    labels = cluster_anchors(
      [anchors[e][k] for e, k in places],
      similarity=similarity,
      autojunk=autojunk,
    )
    returns = np.array([to_go[e][k] for e, k in places])
    for label in range(max(labels) + 1):
      inside = np.flatnonzero(labels == label)
      sizes.append(len(inside))
      if len(inside) < 2:
        continue
      centred = returns[inside] - np.mean(returns[inside])
      if norm == "mean_std_norm":
        deviation = np.std(returns[inside], ddof=1)
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
  return episodes.Advantages(turns, metrics)


def cluster_anchors(
  anchors: Sequence[Hashable], *, similarity: float, autojunk: bool = False
) -> np.ndarray:
  """Labels anchors with their cluster.

  Greedy, in the given order: an anchor joins the first cluster whose first
  member has a `difflib` ratio of at least `similarity` to it, or else starts a
  new cluster.

  Args:
    anchors: observations; strings if similarity is below 1.
    similarity: from 0 to 1; 1 means equality.
    autojunk: difflib's heuristic that ignores frequent characters in texts of
      200 characters or more: the ratio of two observations that differ in a
      single word may fall below 0.5. The reference code uses it.

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
    # Equal anchors always join the same cluster, their first match.
    if anchor in seen:
      continue
    text = str(anchor)
    alike = (i for i, m in enumerate(leaders) if _alike(m, text, similarity))
    seen[anchor] = next(alike, clusters)
    if seen[anchor] == clusters:
      clusters += 1
      if similarity < 1.0:
        leaders.append(
          difflib.SequenceMatcher(None, "", text, autojunk=autojunk)
        )
  return np.array([seen[anchor] for anchor in anchors], int)


def hgpo(
  data: episodes.Episodes,
  *,
  discount: float = 0.95,
  context_turns: int = 2,
  context_exponent: float = 1.0,
  context_base: bool = False,
  norm: str = "mean_std_norm",
  penalty: str = "reward",
) -> episodes.Advantages:
  """Hierarchy-of-groups advantage (HGPO, arXiv 2602.22817).

  Level l, from 1 to h + 1, clusters the turns of a task group whose last l
  observations are equal. In every cluster of two or more A_l = (R^k - mean) /
  (std + 1e-6), with the population's deviation; A = sum_l w_l A_l with w_l = (l
  + 1)^alpha over the sum of these of all levels whose A_l is not 0. There is no
  separate episode part.

  Args:
    data: the episodes, with anchors.
    discount: beta of the return-to-go R^k.
    context_turns: h, the number of past observations in a prompt.
    context_exponent: alpha.
    context_base: whether to add the episode advantage (ddof 1, over turns) as
      level 0, with weight 1.
    norm: `mean_norm` omits the division.
    penalty: see `episodes.Penalized`; the reference charges the return.

  Returns:
    One value per turn.

  Raises:
    ValueError: for an unknown norm, or missing anchors.
  """
  groups.check_norm(norm)
  anchors = episodes.required(data.anchors, "anchors", "hgpo")
  to_go = data.turn_returns_to_go(discount, penalty)
  base = groups.grpo(data, norm=norm, per="turn", penalty=penalty)
  total = [np.zeros(len(r)) for r in data.rewards]
  weights = [np.zeros(len(r)) for r in data.rewards]

  def add(e: int, k: int, level: int, value: float) -> None:
    if value != 0.0:
      weight = (level + 1.0) ** context_exponent
      total[e][k] += weight * value
      weights[e][k] += weight

  for members in episodes.groups(data):
    if context_base:
      for e in members:
        for k, value in enumerate(base.turns[e]):
          add(e, k, 0, value)
    for level in range(1, context_turns + 2):
      clusters: dict[tuple[str, ...], list[tuple[int, int]]] = {}
      for e in members:
        for k in range(level - 1, len(anchors[e])):
          context = tuple(anchors[e][k - level + 1 : k + 1])
          clusters.setdefault(context, []).append((e, k))
      for places in clusters.values():
        returns = np.array([to_go[e][k] for e, k in places])
        if len(returns) < 2:
          continue
        spread = 1.0
        if norm == "mean_std_norm":
          spread = np.std(returns) + masked.SPREAD_EPSILON
        centred = (returns - np.mean(returns)) / spread
        for (e, k), value in zip(places, centred, strict=True):
          add(e, k, level, value)
  turns = tuple(
    t / (w + masked.SPREAD_EPSILON) for t, w in zip(total, weights, strict=True)
  )
  alone = sum(
    int(np.sum(weights[e] == 0.0)) for e in np.flatnonzero(data.counted)
  )
  return episodes.Advantages(
    turns, base.metrics | {"advantage/lone_turns": float(alone)}
  )


ESTIMATORS = {
  "gigpo": episodes.Estimator(
    gigpo, GigpoOptions, frozenset({"anchors"}), grouped=True
  ),
  "hgpo": episodes.Estimator(
    hgpo, HgpoOptions, frozenset({"anchors"}), grouped=True
  ),
}


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
