"""The `bm25s` library, imported without initialising JAX's backends.

If JAX is installed, importing bm25s runs a JAX function to test it. That
initialises every backend: a worker process of an environment would claim
accelerator memory, and a multi-host run could no longer be set up. Here the
library is imported with JAX hidden, so that it uses NumPy, which is all we
need. Import it from here: `sparse.bm25s`.
"""

import importlib
import logging
import sys
import types
from typing import TYPE_CHECKING, cast


def _import_hidden(name: str, hidden: str) -> types.ModuleType:
  """Imports a module while another one is hidden from it."""
  # None makes every import of the name fail, as if it were not installed.
  modules = cast("dict[str, types.ModuleType | None]", sys.modules)
  present = hidden in modules
  kept = modules.get(hidden)
  modules[hidden] = None
  try:
    return importlib.import_module(name)
  finally:
    if present:
      modules[hidden] = kept
    else:
      del modules[hidden]


if TYPE_CHECKING:
  import bm25s
else:
  bm25s = _import_hidden("bm25s", "jax")
# It sets its own logger to the debug level.
logging.getLogger("bm25s").setLevel(logging.WARNING)
