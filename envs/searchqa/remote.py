"""Search through a server: the client side of `POST /retrieve`.

There are two dialects of one protocol. `search-r1` sends all queries at once
(`{"queries": [...], "topk", "return_scores"}`), `verl-agent` one at a time
(`{"query": ...}`); the answer to both is `{"result": [[item, ...] per query]}`,
where an item is `{"document": {...}, "score"}` or a bare document. All threads
share one pool of connections. If the server is busy or restarting, a request is
retried after growing pauses with jitter, so that clients do not all return at
once, or when `Retry-After` says; if there is no answer before the deadline, the
trajectory is aborted as an infrastructure failure.
"""

from collections.abc import Sequence
import email.utils
import random
import time
from typing import Any
import urllib.parse

import httpx

from t2po_jax.envs import base
from t2po_jax.envs.searchqa import retrieval

DIALECTS = ("search-r1", "verl-agent")
_RETRIED = (429, 500, 502, 503, 504)
_CONNECTIONS = 256
# A pause is its nominal length times a random number between these.
_JITTER = (0.5, 1.5)


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
    deadline: float = 300.0,
  ) -> None:
    """Stores the address of the server; nothing is sent yet.

    Args:
      url: e.g. `http://127.0.0.1:8000/retrieve`.
      dialect: `search-r1` or `verl-agent`.
      timeout: seconds to wait for one answer.
      tries: how often a request is sent at most, at least 1.
      backoff: seconds of the first pause on average; the n-th is n times as
        long.
      deadline: seconds that a search may take with all its tries.

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
    self._deadline = deadline
    self._client = httpx.Client(
      limits=httpx.Limits(
        max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS
      ),
      trust_env=False,  # A proxy for the outside does not know this server.
    )
    # A generator of its own, which no other random draw depends on.
    self._random = random.Random()
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
      hits
      for query in queries
      for hits in self._ask({"query": query, **options}, 1)
    ]

  def _ask(
    self, body: dict[str, Any], count: int
  ) -> list[list[tuple[retrieval.Passage, float]]]:
    """One request, retried while the server is in trouble."""
    end = time.monotonic() + self._deadline
    trouble, tries = "", 0
    while tries < self._tries:
      tries += 1
      wait = self._backoff * tries * self._random.uniform(*_JITTER)
      try:
        answer = self._client.post(
          self._url,
          json=body,
          timeout=max(min(self._timeout, end - time.monotonic()), 1e-3),
        )
        if answer.status_code == 200:
          return _read_answer(answer, count)
        trouble = f"status {answer.status_code}"
        if answer.status_code not in _RETRIED:
          break
        wait = _read_pause(answer, wait)
      except httpx.HTTPError as error:
        # Refused, reset, timed out, or cut off in the middle.
        trouble = str(error) or type(error).__name__
      except (AttributeError, KeyError, TypeError, ValueError) as error:
        trouble = f"an answer that is not of the protocol ({error!r:.80})"
        break
      if time.monotonic() + wait >= end:
        trouble += f", and {self._deadline:g} s are over"
        break
      if tries < self._tries:
        time.sleep(wait)
    raise base.EnvError(
      f"search server {self._url}: {trouble} after {tries} tries"
    )


def _read_pause(answer: httpx.Response, otherwise: float) -> float:
  """Seconds for which the server asks to wait, as a number or a date."""
  header = answer.headers.get("Retry-After", "")
  try:
    if header.isdecimal():
      return float(header)
    date = email.utils.parsedate_to_datetime(header)
    return max(date.timestamp() - time.time(), 0.0)
  except ValueError:
    return otherwise


def _read_answer(
  answer: httpx.Response, count: int
) -> list[list[tuple[retrieval.Passage, float]]]:
  """The passages of an answer; raises ValueError or the like if malformed."""
  result = answer.json()["result"]
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
