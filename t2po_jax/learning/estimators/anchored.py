"""Estimators that compare turns which start from the same observation."""

from collections.abc import Hashable, Sequence
import dataclasses
import difflib

import numpy as np

from t2po_jax import keys, masked
from t2po_jax.learning.estimators import episodes, groups

NORMS = ("mean_norm", "mean_std_norm")


@dataclasses.dataclass(frozen=True)
class GigpoOptions(groups.GroupOptions, episodes.Discounted):
  """Options of `gigpo`."""

  step_weight: float = keys.key(1.0, "Weight of the step advantage.")
  step_norm: str = keys.key(
    "mean_norm",
    "The step advantage is the distance to its cluster's mean, or that over "
    "the cluster's standard deviation.",
    choices=NORMS,
  )
  similarity: float = keys.key(
    1.0,
    "Observations with at least this difflib ratio share a cluster; 1 = only "
    "equal ones.",
    least=0,
    most=1,
  )


def gigpo(
  data: episodes.Episodes,
  *,
  discount: float = 0.95,
  step_weight: float = 1.0,
  step_norm: str = "mean_norm",
  similarity: float = 1.0,
  norm_std: bool = True,
  per: str = "trajectory",
) -> episodes.Advantages:
  """Group-in-group advantage (GiGPO, arXiv 2505.10978).

  A = A_episode + w A_step. A_episode is `grpo`. For A_step the turns of a task
  group that start from the same observation form a cluster, and a turn's
  return-to-go is compared with its cluster's mean.

  Args:
    data: the episodes, with anchors.
    discount: beta of the return-to-go.
    step_weight: w.
    step_norm: `mean_norm`, or `mean_std_norm` to divide by the cluster's
      deviation + 1e-6 as well.
    similarity: 1 clusters equal anchors; below, see `cluster_anchors`.
    norm_std: of A_episode, see `grpo`.
    per: of A_episode, see `grpo`; a cluster always counts turns.

  Returns:
    One value per turn; 0 for the step part of a turn alone in its cluster.

  Raises:
    ValueError: for an unknown norm or missing anchors.
  """
  if step_norm not in NORMS:
    raise ValueError(f"step_norm: found {step_norm!r}, expected one of {NORMS}")
  anchors = episodes.required(data.anchors, "anchors", "gigpo")
  episode = groups.grpo(data, norm_std=norm_std, per=per)
  to_go = [episodes.returns_to_go(r, discount=discount) for r in data.rewards]
  step = [np.zeros(len(r)) for r in data.rewards]
  sizes = []
  for members in episodes.groups(data):
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
      if step_norm == "mean_std_norm":
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
  return episodes.Advantages(turns, metrics)


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
    text = str(anchor)
    alike = (i for i, m in enumerate(leaders) if _alike(m, text, similarity))
    seen[anchor] = next(alike, clusters)
    if seen[anchor] == clusters:
      clusters += 1
      if similarity < 1.0:
        leaders.append(difflib.SequenceMatcher(None, "", text, autojunk=False))
  return np.array([seen[anchor] for anchor in anchors], int)


ESTIMATORS = {
  "gigpo": episodes.Estimator(
    gigpo, GigpoOptions, frozenset({"anchors"}), grouped=True
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
