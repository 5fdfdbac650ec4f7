"""Passages, and BM25 search over them inside the process.

BM25 (k1 = 0.9, b = 0.4, the values of the Search-R1 setting's sparse
baseline) through `bm25s`, with English stemming where PyStemmer is
installed. Equal scores are ordered by position in the corpus, so that a
search gives the same passages on every machine.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Protocol

import bm25s
import numpy as np

K1 = 0.9
B = 0.4


@dataclasses.dataclass(frozen=True)
class Passage:
  """One passage of a corpus.

  Attributes:
    id: name of the passage in its corpus.
    title: its title, without quotation marks; may be empty.
    text: its text.
  """

  id: str
  title: str
  text: str

  @property
  def contents(self) -> str:
    """Title and text in one string, the form of Search-R1's corpora."""
    return f'"{self.title}"\n{self.text}'


class Retriever(Protocol):
  """Finds passages; safe to call from many threads at once."""

  def search(
    self, queries: Sequence[str], topk: int
  ) -> list[list[tuple[Passage, float]]]:
    """The best passages and their scores, best first, per query.

    Raises:
      EnvError: if the infrastructure failed.
    """


@functools.cache
def _stemmer():
  """The English stemmer, or None without PyStemmer."""
  try:
    import Stemmer
  except ImportError:
    return None
  return Stemmer.Stemmer("english")


def _tokenize(texts: Sequence[str]) -> list[list[str]]:
  """Lower-case word stems without stop words."""
  return bm25s.tokenize(
    list(texts),
    stopwords="english",
    stemmer=_stemmer(),
    return_ids=False,
    show_progress=False,
  )


class BM25:
  """An index in memory."""

  def __init__(self, passages: Sequence[Passage]):
    """Indexes the passages.

    Raises:
      ValueError: if there are none.
    """
    if not passages:
      raise ValueError("env: the corpus is empty; at least one passage needed")
    self._passages = tuple(passages)
    self._index = bm25s.BM25(k1=K1, b=B)
    self._index.index(
      _tokenize([passage.contents for passage in passages]),
      show_progress=False,
    )

  def search(
    self, queries: Sequence[str], topk: int
  ) -> list[list[tuple[Passage, float]]]:
    """See `Retriever.search`; passages that share no word are left out."""
    found = []
    for tokens in _tokenize(queries):
      known = self._index.get_tokens_ids(tokens)
      if not known:
        found.append([])
        continue
      scores = self._index.get_scores_from_ids(known)
      best = np.argsort(-scores, kind="stable")[:topk]
      found.append(
        [
          (self._passages[index], float(scores[index]))
          for index in best
          if scores[index] > 0
        ]
      )
    return found
