"""bm25s, imported so that it leaves JAX alone.

If JAX is installed, importing bm25s runs a JAX operation: it starts the
backend, takes accelerator memory in every worker that searches, and is too
early for `jax.distributed`. Our searches select with numpy, so bm25s is told
that there is no JAX. Its log is kept to warnings.
"""

import logging
import sys

_KEY = "jax.lax"
_absent = object()
_found = sys.modules.get(_KEY, _absent)
sys.modules[_KEY] = None  # Makes `import jax.lax` fail.
try:
  import bm25s
finally:
  if _found is _absent:
    del sys.modules[_KEY]
  else:
    sys.modules[_KEY] = _found
logging.getLogger("bm25s").setLevel(logging.WARNING)

BM25 = bm25s.BM25
STOP_WORDS = frozenset(bm25s.stopwords.STOPWORDS_EN)
