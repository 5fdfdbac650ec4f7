"""Advantage estimators by name.

Every estimator is a pure function on the host, from `episodes.Episodes` to
`episodes.Advantages`, with a record of its options and needs beside it. Most
compute one advantage per turn, shared by all its tokens; `gae` computes one per
token.

A module of this folder lists its estimators in a table `ESTIMATORS`; the tables
are discovered and merged here. Outside this package an estimator is added with
`register`, or named in a configuration as `package.module:NAME` if it only has
options of existing estimators.
"""

import importlib
import pkgutil

from t2po_jax import keys
from t2po_jax.learning.estimators import episodes, modulation

ESTIMATORS: dict[str, episodes.Estimator] = {}


def register(name: str, estimator: episodes.Estimator) -> None:
  """Registers an estimator; its options become configuration keys.

  Args:
    name: for `advantage.estimator`.
    estimator: its record.

  Raises:
    ValueError: see `keys.add`.
  """
  keys.add(ESTIMATORS, name, estimator, kind="estimator")


def option_keys() -> dict[str, keys.Key]:
  """The options of all estimators and modulations: keys of `advantage`."""
  return keys.union(
    known.options
    for known in (*ESTIMATORS.values(), *modulation.MODULATIONS.values())
  )


def find(name: str) -> episodes.Estimator:
  """Finds an estimator by name.

  Args:
    name: of a registered one, or `package.module:NAME` of a record.

  Raises:
    ValueError: if there is no such estimator.
  """
  if name in ESTIMATORS:
    return ESTIMATORS[name]
  module, colon, attribute = name.partition(":")
  if not colon:
    hint = keys.nearest(name, ESTIMATORS)
    raise ValueError(f"advantage.estimator: {name!r} is unknown{hint}")
  try:
    estimator = getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError) as error:
    raise ValueError(
      f"advantage.estimator: {name!r} cannot be imported: {error}"
    ) from None
  if not isinstance(estimator, episodes.Estimator):
    raise ValueError(
      f"advantage.estimator: {name!r} is a {type(estimator).__name__}, "
      "expected an Estimator"
    )
  if missing := sorted(set(estimator.keys) - option_keys().keys()):
    raise ValueError(
      f"advantage.estimator: {name!r} has options that are no keys, "
      f"{', '.join(missing)}; call estimators.register in the config file"
    )
  return estimator


for _module in pkgutil.iter_modules(__path__):
  _tables = importlib.import_module(f"{__name__}.{_module.name}")
  for _name, _estimator in getattr(_tables, "ESTIMATORS", {}).items():
    register(_name, _estimator)
