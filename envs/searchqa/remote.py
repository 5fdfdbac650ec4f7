"""Search through a server: the client side of `POST /retrieve`.

Two dialects of one protocol are spoken. `search-r1` sends all queries at once
(`{"queries": [...], "topk", "return_scores"}`), `verl-agent` one at a time
(`{"query": ...}`); both answer `{"result": [[item, ...] per query]}`, an item
being `{"document": {...}, "score"}` or a bare document. A busy or restarting
server is asked again with growing pauses; when it stays silent the trajectory
is given up as an infrastructure failure.
"""

from collections.abc import Sequence
import http.client
import json
import time
from typing import Any
import urllib.error
import urllib.parse
import urllib.request

from t2po_jax.envs import base
from t2po_jax.envs.searchqa import retrieval

DIALECTS = ("search-r1", "verl-agent")
_RETRIED = (500, 502, 503, 504)


class Remote:
  """A client of a search server; implements `Retriever`."""

  def __init__(
    self,
    url: str,
    *,
    dialect: str = "search-r1",
    timeout: float = 60.0,
    tries: int = 10,
    backoff: float = 1.0,
  ):
    """Remembers where the server is; nothing is sent yet.

    Args:
      url: e.g. `http://127.0.0.1:8000/retrieve`.
      dialect: `search-r1` or `verl-agent`.
      timeout: seconds to wait for one answer.
      tries: how often a request is sent at most, >= 1.
      backoff: seconds of the first pause; the n-th pause is n times as long.

    Raises:
      ValueError: if an argument is out of range.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
      raise ValueError(
        f"env.url: {url!r} is no address; e.g. http://127.0.0.1:8000/retrieve"
      )
    if dialect not in DIALECTS:
      raise ValueError(
        f"env.dialect: unknown {dialect!r}; use one of {', '.join(DIALECTS)}"
      )
    if tries < 1:
      raise ValueError(f"env.tries: {tries} tries; at least 1 is needed")
    self._url = url
    self._dialect = dialect
    self._timeout = timeout
    self._tries = tries
    self._backoff = backoff

  def search(
    self, queries: Sequence[str], topk: int
  ) -> list[list[tuple[retrieval.Passage, float]]]:
    """See `Retriever.search`; a document without a score counts as 0."""
    options = {"topk": topk, "return_scores": True}
    if self._dialect == "search-r1":
      return self._ask({"queries": list(queries), **options}, len(queries))
    return [
      found
      for query in queries
      for found in self._ask({"query": query, **options}, 1)
    ]

  def _ask(
    self, body: dict[str, Any], count: int
  ) -> list[list[tuple[retrieval.Passage, float]]]:
    """One request, tried again while the server is in trouble."""
    request = urllib.request.Request(
      self._url,
      data=json.dumps(body).encode(),
      headers={"Content-Type": "application/json"},
    )
    trouble = ""
    for attempt in range(1, self._tries + 1):
      try:
        with urllib.request.urlopen(request, timeout=self._timeout) as answer:
          return _read_answer(answer.read(), count)
      except urllib.error.HTTPError as error:
        error.close()
        trouble = f"status {error.code}"
        if error.code not in _RETRIED:
          break
      except (OSError, http.client.HTTPException) as error:
        # Refused, reset, timed out, or cut off in the middle.
        reason = (
          error.reason if isinstance(error, urllib.error.URLError) else error
        )
        trouble = str(reason) or type(reason).__name__
      except (AttributeError, KeyError, TypeError, ValueError) as error:
        trouble = f"an answer that is not of the protocol ({error!r:.80})"
        break
      if attempt < self._tries:
        time.sleep(self._backoff * attempt)
    raise base.EnvError(
      f"search server {self._url}: {trouble} after {attempt} tries"
    )


def _read_answer(
  payload: bytes, count: int
) -> list[list[tuple[retrieval.Passage, float]]]:
  """The passages of an answer; ValueError and the like if malformed."""
  result = json.loads(payload)["result"]
  if len(result) != count:
    raise ValueError(f"{len(result)} results for {count} queries")
  return [[_read_item(item) for item in items] for items in result]


def _read_item(item: dict[str, Any]) -> tuple[retrieval.Passage, float]:
  """A scored or bare document; `contents`, or `title` and `text`."""
  document = item.get("document", item)
  score = float(item.get("score", 0.0))
  name = str(document.get("id", ""))
  if "contents" in document:
    return retrieval.split_contents(name, document["contents"]), score
  title = document.get("title", "").strip('"')
  return retrieval.Passage(name, title, document["text"]), score
