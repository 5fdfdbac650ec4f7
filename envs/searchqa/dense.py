"""Dense search: passages and queries as vectors of a text encoder.

The encoder is an E5 model (arXiv 2212.03533) run with transformers and torch,
with its prefixes "query: " and "passage: ", mean pooling and unit length; the
index is an exact inner-product index of faiss. Both are heavy and imported only
when the retriever is created (extra `dense`). The encoded corpus is kept in the
cache directory. The tests use a stand-in encoder only: no run with the real E5
weights has been made.
"""

from collections.abc import Callable, Sequence
import hashlib
import logging
import os
import pathlib
import tempfile
import threading

import numpy as np

from t2po_jax.envs.searchqa import retrieval

ENCODER = "intfloat/e5-base-v2"
_MAX_TOKENS = 256
_BATCH = 64


def load_encoder(name: str) -> Callable[[Sequence[str]], np.ndarray]:
  """An encoder: texts -> [texts, width] float32 vectors of length 1.

  Raises:
    ValueError: if the extra is not installed.
  """
  try:
    import torch
    import transformers
  except ImportError:
    raise ValueError(
      "env.retriever: 'dense' needs torch and transformers; "
      "install the extra 'dense'"
    ) from None
  tokenizer = transformers.AutoTokenizer.from_pretrained(name)
  device = "cuda" if torch.cuda.is_available() else "cpu"
  model = transformers.AutoModel.from_pretrained(name).to(device).eval()

  def encode(texts: Sequence[str]) -> np.ndarray:
    vectors = []
    for start in range(0, len(texts), _BATCH):
      batch = tokenizer(
        list(texts[start : start + _BATCH]),
        max_length=_MAX_TOKENS,
        truncation=True,
        padding=True,
        return_tensors="pt",
      ).to(device)
      with torch.inference_mode():
        states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].to(states.dtype)
        mean = (states * mask).sum(1) / mask.sum(1)
        unit = torch.nn.functional.normalize(mean.float(), dim=-1)
      vectors.append(unit.cpu().numpy())
    return np.concatenate(vectors)

  return encode


class Dense:
  """An exact vector index; implements `Retriever`."""

  def __init__(
    self,
    passages: Sequence[retrieval.Passage],
    *,
    encoder: str | Callable[[Sequence[str]], np.ndarray] = ENCODER,
    cache_dir: str | pathlib.Path | None = None,
  ) -> None:
    """Encodes the corpus, or loads its encoding.

    Args:
      passages: the corpus.
      encoder: name of a model, or a function of texts (see `load_encoder`).
      cache_dir: where encodings by named models are kept; None keeps none.

    Raises:
      ValueError: if the corpus is empty or a package is missing.
    """
    if not passages:
      raise ValueError("env: the corpus is empty; it needs a passage at least")
    try:
      import faiss
    except ImportError:
      raise ValueError(
        "env.retriever: 'dense' needs faiss; install the extra 'dense'"
      ) from None
    self._passages = tuple(passages)
    named = isinstance(encoder, str)
    self._encode = load_encoder(encoder) if named else encoder
    # All threads share one encoder, one at a time.
    self._lock = threading.Lock()
    texts = [f"passage: {passage.contents}" for passage in passages]
    file = None
    if named and cache_dir is not None:
      file = pathlib.Path(cache_dir) / _name_encoding(encoder, texts)
    vectors = self._load_or_encode(texts, file)
    self._index = faiss.IndexFlatIP(vectors.shape[1])
    self._index.add(vectors)

  def _load_or_encode(
    self, texts: Sequence[str], file: pathlib.Path | None
  ) -> np.ndarray:
    """The vectors of the corpus, from the cache file if there is one."""
    if file is not None and file.is_file():
      return np.load(file)
    logging.info("searchqa: encoding %d passages", len(texts))
    vectors = np.ascontiguousarray(self._encode(texts), np.float32)
    if file is not None:
      file.parent.mkdir(parents=True, exist_ok=True)
      handle, draft = tempfile.mkstemp(dir=file.parent, suffix=".npy")
      try:
        with os.fdopen(handle, "wb") as target:
          np.save(target, vectors)
        os.replace(draft, file)
      except OSError as error:
        pathlib.Path(draft).unlink(missing_ok=True)
        raise OSError(f"{file} could not be written: {error}") from error
    return vectors

  def search(
    self, queries: Sequence[str], topk: int
  ) -> list[list[tuple[retrieval.Passage, float]]]:
    """See `Retriever.search`; scores are cosines."""
    if not queries:
      return []
    texts = [f"query: {query}" for query in queries]
    with self._lock:
      vectors = np.ascontiguousarray(self._encode(texts), np.float32)
      scores, indices = self._index.search(
        vectors, min(topk, len(self._passages))
      )
    return [
      [
        (self._passages[index], float(score))
        for index, score in zip(row, values, strict=True)
      ]
      for row, values in zip(indices, scores, strict=True)
    ]


def _name_encoding(encoder: str, texts: Sequence[str]) -> str:
  """A file name that depends on the encoder and the corpus."""
  digest = hashlib.sha256(f"{encoder} {_MAX_TOKENS} {len(texts)}".encode())
  for text in texts:
    digest.update(text.encode())
    digest.update(b"\0")
  return f"dense-{digest.hexdigest()[:20]}.npy"
