"""Random episodes and plain statistics for the estimators' tests."""

import math

import numpy as np

from t2po_jax.learning.estimators import episodes

EPS = 1e-6
BASELINES = (
  "grpo",
  "gigpo",
  "opo",
  "rloo",
  "reinforce_pp_baseline",
  "empg",
)


def mean(values):
  return sum(values) / len(values)


def std(values):
  centre = mean(values)
  return math.sqrt(sum((v - centre) ** 2 for v in values) / (len(values) - 1))


def random(seed, *, groups=3, size=4, aborted=True):
  """Episodes with everything any estimator may ask for."""
  rng = np.random.default_rng(seed)
  count = groups * size
  turns = rng.integers(1, 5, count)
  lengths = [rng.integers(1, 6, k) for k in turns]
  return episodes.Episodes(
    groups=np.repeat(np.arange(groups), size)[rng.permutation(count)],
    rewards=tuple(rng.normal(size=k).round(1) for k in turns),
    aborted=(rng.uniform(size=count) < 0.2) & aborted,
    anchors=tuple(tuple(rng.choice(list("abc"), size=k)) for k in turns),
    values=tuple(tuple(rng.normal(size=n) for n in ns) for ns in lengths),
    sampled=tuple(
      tuple(rng.uniform(size=n) < 0.7 for n in ns) for ns in lengths
    ),
    entropies=tuple(rng.uniform(size=k) for k in turns),
    baselines=rng.normal(size=count),
    penalties=tuple(0.1 * (rng.uniform(size=k) < 0.5) for k in turns),
  )


def reorder(data, order):
  """The same trajectories in another order."""

  def pick(field):
    return None if field is None else tuple(field[e] for e in order)

  return episodes.Episodes(
    groups=data.groups[order],
    rewards=pick(data.rewards),
    aborted=data.aborted[order],
    anchors=pick(data.anchors),
    values=pick(data.values),
    sampled=pick(data.sampled),
    entropies=pick(data.entropies),
    baselines=data.baselines[order],
    penalties=pick(data.penalties),
  )


def replace(data, **fields):
  names = episodes.Episodes.__dataclass_fields__
  return episodes.Episodes(
    **{name: getattr(data, name) for name in names} | fields
  )
