"""Passages, and in-process BM25 search over them.

BM25 (k1 = 0.9, b = 0.4, the usual values in sparse passage retrieval) uses
`bm25s`, with English stemming if PyStemmer is installed. Ties are ordered by
position in the corpus, so that a search returns the same passages on every
machine. The index of a large corpus is kept in a cache directory, under a name
that depends on everything that went into it.
"""

from collections.abc import Sequence
import dataclasses
import hashlib
import logging
import pathlib
import shutil
import tempfile
import threading
import time
from typing import Any, Protocol

import numpy as np

from t2po_jax.envs import sparse

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
    return f'"{self.title}"\n{self.text}' if self.title else self.text


def split_contents(passage_id: str, contents: str) -> Passage:
  """The passage in a `contents` string; a first line is its title."""
  title, newline, text = contents.partition("\n")
  if not newline:
    return Passage(passage_id, "", contents.strip())
  title = title.strip()
  if len(title) > 1 and title[0] == title[-1] == '"':
    title = title[1:-1]
  return Passage(passage_id, title, text.strip())


class Retriever(Protocol):
  """Finds passages; safe to call from many threads at once."""

  def search(
    self, queries: Sequence[str], topk: int
  ) -> list[list[tuple[Passage, float]]]:
    """The best passages and their scores, best first, per query.

    Args:
      queries: the queries.
      topk: most passages per query, at least 1.

    Raises:
      EnvError: if the infrastructure failed.
    """
    ...


# A stemmer keeps state while it works, so every thread has its own.
_local = threading.local()


def _stemmer() -> Any:
  """This thread's English stemmer, or None without PyStemmer."""
  if not hasattr(_local, "stemmer"):
    try:
      import Stemmer

      _local.stemmer = Stemmer.Stemmer("english")
    except ImportError:
      logging.info("searchqa: PyStemmer is missing; BM25 works without stems")
      _local.stemmer = None
  return _local.stemmer


def tokenize(texts: Sequence[str]) -> list[list[str]]:
  """Lower-case word stems without English stop words, per text."""
  words: Any = sparse.bm25s.tokenize(
    list(texts),
    stopwords="english",
    stemmer=_stemmer(),
    return_ids=False,
    show_progress=False,
  )
  return words


def _name_index(contents: Sequence[str]) -> str:
  """A directory name that depends on the corpus and the method."""
  method = (
    sparse.bm25s.__version__,
    K1,
    B,
    _stemmer() is not None,
    len(contents),
  )
  digest = hashlib.sha256(repr(method).encode())
  for text in contents:
    digest.update(text.encode())
    digest.update(b"\0")
  return f"bm25-{digest.hexdigest()[:20]}"


def _build_index(contents: Sequence[str]) -> Any:
  start = time.perf_counter()
  index = sparse.bm25s.BM25(k1=K1, b=B)
  index.index(tokenize(contents), show_progress=False)
  logging.info(
    "searchqa: indexed %d passages in %.1f s",
    len(contents),
    time.perf_counter() - start,
  )
  return index


def _load_index(folder: pathlib.Path) -> Any:
  """The index in a cache directory, or None if there is no usable one."""
  if not folder.is_dir():
    return None
  try:
    return sparse.bm25s.BM25.load(folder, show_progress=False)
  except Exception as error:  # Anything that a damaged file may raise.
    logging.warning("searchqa: %s is unusable (%s); built anew", folder, error)
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _save_index(index: Any, folder: pathlib.Path) -> None:
  """Saves atomically, so that another process never sees half an index."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  draft = tempfile.mkdtemp(dir=folder.parent)
  try:
    index.save(draft, show_progress=False)
    pathlib.Path(draft).rename(folder)
  except OSError as error:
    # Another process was first; its index is the same.
    if not folder.is_dir():
      raise OSError(f"{folder} could not be written: {error}") from error
  finally:
    shutil.rmtree(draft, ignore_errors=True)


class BM25:
  """An index in memory; implements `Retriever`."""

  def __init__(
    self,
    passages: Sequence[Passage],
    *,
    cache_dir: str | pathlib.Path | None = None,
  ) -> None:
    """Builds the index, or loads it.

    Args:
      passages: the corpus.
      cache_dir: where indexes are kept; None rebuilds them each time.

    Raises:
      ValueError: if there are no passages.
    """
    if not passages:
      raise ValueError("env: the corpus is empty; it needs a passage at least")
    self._passages = tuple(passages)
    contents = [passage.contents for passage in passages]
    if cache_dir is None:
      self._index = _build_index(contents)
      return
    folder = pathlib.Path(cache_dir) / _name_index(contents)
    index = _load_index(folder)
    if index is None:
      index = _build_index(contents)
      _save_index(index, folder)
    self._index = index

  def search(
    self, queries: Sequence[str], topk: int
  ) -> list[list[tuple[Passage, float]]]:
    """See `Retriever.search`; finds only passages that share a word."""
    return [self._search(tokens, topk) for tokens in tokenize(queries)]

  def _search(
    self, tokens: list[str], topk: int
  ) -> list[tuple[Passage, float]]:
    known = self._index.get_tokens_ids(tokens)
    if not known:
      return []
    scores = self._index.get_scores_from_ids(known)
    least = 0.0
    if topk < len(scores):
      least = np.partition(scores, -topk)[-topk]
    near = np.flatnonzero((scores >= least) & (scores > 0.0))
    best = near[np.argsort(-scores[near], kind="stable")][:topk]
    return [(self._passages[index], float(scores[index])) for index in best]
