"""Modulations: factors applied to the advantages of any estimator."""

from collections.abc import Callable
import dataclasses
from typing import Any

import numpy as np

from t2po_jax import keys
from t2po_jax.learning.estimators import episodes

# Groups whose turns differ less in entropy are not modulated, nats.
_LEAST_RANGE = 0.1


@dataclasses.dataclass(frozen=True)
class AemOptions:
  """Options of `aem`."""

  modulation_strength: float = keys.key(
    1.0, "aem: lambda, how much more confident turns learn.", least=0
  )


def aem(
  data: episodes.Episodes, *, modulation_strength: float = 1.0
) -> episodes.Ragged:
  """Adaptive entropy modulation (AEM, arXiv 2605.00425).

  Over all turns of a task group, with H the mean token entropy of a turn and h
  its position between the group's minimum (0) and maximum (1): alpha =
  exp(-lambda h) / mean exp(-lambda h), and 1 where these differ by less than
  0.1 nats. The advantage of a turn is multiplied by its alpha. Unlike `empg`,
  which compares turns over the batch, it neither adds a bonus nor subtracts a
  mean.

  Args:
    data: the episodes, with entropies.
    modulation_strength: lambda, at least 0.

  Returns:
    Per trajectory [K] factors of mean 1 in every group; 1 for excluded
    trajectories.

  Raises:
    ValueError: if the entropies are missing.
  """
  entropies = episodes.required(data.entropies, "entropies", "aem")
  alpha = [np.ones(len(r)) for r in data.rewards]
  for members in episodes.groups(data, least=1):
    flat = np.concatenate([entropies[e] for e in members])
    low, width = np.min(flat), np.ptp(flat)
    if width < _LEAST_RANGE:
      continue
    mean = np.mean(np.exp(-modulation_strength * (flat - low) / width))
    for e in members:
      level = (entropies[e] - low) / width
      alpha[e] = np.exp(-modulation_strength * level) / mean
  return tuple(alpha)


@dataclasses.dataclass(frozen=True)
class Modulation:
  """A modulation: its function and its options.

  Attributes:
    function: maps `Episodes` to one factor per turn; the options are keyword
      arguments of the same names.
    options: a dataclass of `keys.key` fields, keys of the configuration's
      section `advantage`.
  """

  function: Callable[..., episodes.Ragged]
  options: type


MODULATIONS: dict[str, Modulation] = {"aem": Modulation(aem, AemOptions)}


def apply(
  name: str,
  data: episodes.Episodes,
  estimate: episodes.Advantages,
  settings: Any,
) -> episodes.Advantages:
  """Multiplies advantages by a modulation's factors.

  Args:
    name: one of `MODULATIONS`, or `off`.
    data: the episodes.
    estimate: the output of an estimator; the critic's targets are unchanged.
    settings: anything with the modulation's options as attributes.
  """
  if name == "off":
    return estimate
  modulation = MODULATIONS[name]
  options = keys.select(modulation.options, settings)
  factors = modulation.function(data, **dataclasses.asdict(options))
  tokens = estimate.tokens
  if tokens is not None:
    tokens = tuple(
      tuple(f * turn for f, turn in zip(of_turns, turns, strict=True))
      for of_turns, turns in zip(factors, tokens, strict=True)
    )
  flat = np.concatenate([np.ones(1), *factors])
  return dataclasses.replace(
    estimate,
    turns=tuple(
      f * turn for f, turn in zip(factors, estimate.turns, strict=True)
    ),
    tokens=tokens,
    metrics=estimate.metrics
    | {
      "advantage/modulation_min": float(np.min(flat)),
      "advantage/modulation_max": float(np.max(flat)),
    },
  )
