"""Policy losses by name.

Every loss is a formula on [B, R] arrays with a record of its options beside it;
see `record`. A module of this folder lists its losses in a table `LOSSES`; the
tables are discovered and merged here. Outside this package a loss is added with
`register`.
"""

import importlib
import pkgutil

from t2po_jax import keys
from t2po_jax.learning.policy_losses import record

POLICY_LOSSES: dict[str, record.PolicyLoss] = {}


def register(name: str, loss: record.PolicyLoss) -> None:
  """Registers a loss; its options become configuration keys.

  Args:
    name: for `loss.kind`.
    loss: its record.

  Raises:
    ValueError: see `keys.add`.
  """
  keys.add(POLICY_LOSSES, name, loss, kind="policy loss")


def option_keys() -> dict[str, keys.Key]:
  """The options of all losses: keys of the section `loss`."""
  return keys.union(known.options for known in POLICY_LOSSES.values())


for _module in pkgutil.iter_modules(__path__):
  _tables = importlib.import_module(f"{__name__}.{_module.name}")
  for _name, _loss in getattr(_tables, "LOSSES", {}).items():
    register(_name, _loss)
