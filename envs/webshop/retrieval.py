"""Search in the shop: BM25 over all texts of a product's pages.

The original uses Lucene in Java; this is BM25 with the same constants (k1 =
0.9, b = 0.4) from `bm25s`, over title, description, bullets, attributes and
options, with English stemming. An index is saved to a directory and
memory-mapped from there, so that many workers share one copy. Ties are ordered
by position in the catalogue, so that results are the same on every machine.
"""

import array
from collections.abc import Iterable, Iterator
import functools
import os
import pathlib
import re
import shutil
import threading
from typing import Any

import numpy as np
import Stemmer

from t2po_jax.envs import sparse
from t2po_jax.envs.webshop import data

K1 = 0.9
B = 0.4
FORMAT = 1  # Version of the index; a change makes saved indexes stale.

_STOP_WORDS = frozenset(sparse.bm25s.stopwords.STOPWORDS_EN)


class _Local(threading.local):
  """Every thread's own stemmer: stemmers are not thread-safe."""

  def __init__(self) -> None:
    self.stemmer = Stemmer.Stemmer("english")


_local = _Local()


@functools.lru_cache(1 << 17)
def _stem(word: str) -> str:
  return _local.stemmer.stemWord(word)


def analyse(text: str) -> list[str]:
  """Stems of the words of a text, without stop words and single characters."""
  return [
    _stem(word)
    for word in re.findall(r"\w\w+", text.lower())
    if word not in _STOP_WORDS
  ]


def document(product: data.Product) -> str:
  """The searchable text of a product."""
  options = [
    word for name, values in product.options.items() for word in (name, *values)
  ]
  return " ".join(
    (
      product.title,
      product.description,
      *product.bullets,
      *product.attributes,
      *options,
    )
  )


class Index:
  """A searchable index; safe to use from many threads."""

  def __init__(self, scores: Any) -> None:
    self._scores = scores

  @classmethod
  def build(cls, products: Iterable[data.Product]) -> "Index":
    """Indexes products in their order."""
    vocabulary: dict[str, int] = {}

    def encode() -> Iterator[array.array]:
      # Arrays: a full catalogue has hundreds of millions of words.
      for product in products:
        yield array.array(
          "i",
          (
            vocabulary.setdefault(word, len(vocabulary))
            for word in analyse(document(product))
          ),
        )

    documents = list(encode())
    scores = sparse.bm25s.BM25(k1=K1, b=B)
    scores.index((documents, vocabulary), show_progress=False)
    return cls(scores)

  @classmethod
  def load(cls, directory: pathlib.Path) -> "Index":
    """Opens a saved index; the arrays stay on disk until they are read."""
    return cls(sparse.bm25s.BM25.load(directory, mmap=True))

  def save(self, directory: pathlib.Path) -> None:
    """Saves the index; a reader never sees half of one.

    Raises:
      OSError: if it cannot be written.
    """
    partial = directory.with_name(f"{directory.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
      self._scores.save(partial, show_progress=False)
      os.rename(partial, directory)
    except OSError as error:
      # Another worker was faster; its index is the same.
      if not directory.is_dir():
        raise OSError(f"{directory} could not be written: {error}") from error
    finally:
      shutil.rmtree(partial, ignore_errors=True)

  def search(self, query: str, most: int) -> list[int]:
    """The best products for a query.

    Args:
      query: words.
      most: the most results to return.

    Returns:
      Positions in the catalogue, best first; only products that share a word
      with the query.
    """
    tokens = self._scores.get_tokens_ids(analyse(query))
    if not tokens:
      return []
    scores = self._scores.get_scores_from_ids(tokens)
    if len(scores) > most:
      # All that tie for the last place, so that ties are broken by position.
      least = np.partition(scores, -most)[-most]
      best = np.flatnonzero(scores >= max(least, np.finfo(np.float32).tiny))
    else:
      best = np.flatnonzero(scores > 0)
    order = np.argsort(-scores[best], kind="stable")[:most]
    return best[order].tolist()
