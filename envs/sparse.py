"""The `bm25s` library, imported without waking an accelerator.

When JAX is installed, importing bm25s runs a JAX function to see whether it
works. That starts every backend: a worker process of an environment would
claim memory of the accelerator, and a multi-host run could not be set up any
more. Here the library is imported with JAX hidden, so that it uses numpy,
which is all we call. Import it from here: `sparse.bm25s`.
"""

import importlib
import logging
import sys
import types
from typing import TYPE_CHECKING, cast


def _import_hidden(name: str, hidden: str) -> types.ModuleType:
  """Imports a module that must not find another one."""
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
