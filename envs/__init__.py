"""Environments: strings in, strings out."""

from collections.abc import Callable
import difflib
import importlib

from t2po_jax.envs import base

# Name -> module and constructor. The module is imported on demand, so that a
# missing extra of one benchmark never breaks another.
_BENCHMARKS = {
  "toy": ("t2po_jax.envs.toy", "ToyBenchmark"),
  "searchqa": ("t2po_jax.envs.searchqa", "SearchQA"),
  "webshop": ("t2po_jax.envs.webshop", "WebShop"),
  "alfworld": ("t2po_jax.envs.alfworld", "ALFWorld"),
}


def make(name: str, **kwargs) -> base.Benchmark:
  """Builds a benchmark by name.

  Args:
    name: one of `toy`, `searchqa`, `webshop`, `alfworld`.
    **kwargs: the constructor's own arguments (`config.env` without `name`).

  Raises:
    ValueError: if the name is unknown.
  """
  if name not in _BENCHMARKS:
    near = difflib.get_close_matches(name, _BENCHMARKS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
      f"env.name: unknown environment {name!r}{hint} "
      f"(known: {', '.join(sorted(_BENCHMARKS))})"
    )
  module, attribute = _BENCHMARKS[name]
  constructor: Callable[..., base.Benchmark] = getattr(
    importlib.import_module(module), attribute
  )
  return constructor(**kwargs)
