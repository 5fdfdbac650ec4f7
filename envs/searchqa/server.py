"""A search server: `t2po-search-server --corpus corpus.jsonl.gz`.

The same as `python -m t2po_jax.envs.searchqa.server`. Answers `POST /retrieve`
in both dialects of `remote.py`, on the standard library's threaded HTTP server,
so that many training processes can share one index. An ASGI server in its place
answered half as many queries: the search dominates the cost, and an event loop
competes with it (docs/environments.md). It has no authentication: bind it to a
private address.
"""

import argparse
from collections.abc import Sequence
import http.server
import json
import logging
import pathlib
import sys
from typing import Any

from t2po_jax.envs import base
from t2po_jax.envs.searchqa import data, dense, retrieval

DEFAULT_TOPK = 3
PORT = 8000
# A request is a few queries; anything larger is a mistake.
_MAX_BYTES = 1 << 24


def answer(body: Any, retriever: retrieval.Retriever) -> dict[str, Any]:
  """The answer to one request body.

  Args:
    body: `{"queries": [...]}` or `{"query": ...}`, with `topk` (missing,
      null or 0: 3) and `return_scores` (default false).
    retriever: searches the passages.

  Raises:
    ValueError: if the body violates the protocol.
  """
  if not isinstance(body, dict):
    raise ValueError("the body must be a JSON object")
  queries = body.get("queries", body.get("query"))
  if isinstance(queries, str):
    queries = [queries]
  if not isinstance(queries, list) or not all(
    isinstance(query, str) for query in queries
  ):
    raise ValueError("'queries' must be a list of strings, 'query' a string")
  topk = body.get("topk") or DEFAULT_TOPK
  if not isinstance(topk, int) or topk < 1:
    raise ValueError(f"'topk' is {topk!r}; it must be a positive integer")
  results = retriever.search(queries, topk)
  scored = bool(body.get("return_scores"))
  return {
    "result": [[_item(*hit, scored=scored) for hit in hits] for hits in results]
  }


def _item(
  passage: retrieval.Passage, score: float, *, scored: bool
) -> dict[str, Any]:
  document = {"id": passage.id, "contents": passage.contents}
  return {"document": document, "score": score} if scored else document


class _Handler(http.server.BaseHTTPRequestHandler):
  """Serves `POST /retrieve`."""

  server: "SearchServer"
  protocol_version = "HTTP/1.1"

  def do_POST(self) -> None:
    length = self.headers.get("Content-Length") or "0"
    size = int(length) if length.isdecimal() else _MAX_BYTES + 1
    if size > _MAX_BYTES:
      self.close_connection = True
      return self._send(413, {"error": f"more than {_MAX_BYTES} bytes"})
    payload = self.rfile.read(size)
    if self.path.rstrip("/") != "/retrieve":
      return self._send(404, {"error": "only POST /retrieve is served"})
    try:
      self._send(200, answer(json.loads(payload), self.server.retriever))
    except ValueError as error:
      self._send(400, {"error": str(error)})
    except base.EnvError as error:
      self._send(503, {"error": str(error)})

  def _send(self, status: int, body: dict[str, Any]) -> None:
    payload = json.dumps(body).encode()
    self.send_response(status)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(payload)))
    self.end_headers()
    self.wfile.write(payload)

  def log_message(self, format: str, *args: Any) -> None:
    logging.debug(format, *args)


class SearchServer(http.server.ThreadingHTTPServer):
  """An HTTP server around a retriever."""

  daemon_threads = True
  # Many environments connect at the same time.
  request_queue_size = 128

  def __init__(
    self, address: tuple[str, int], retriever: retrieval.Retriever
  ) -> None:
    """Binds the address; port 0 picks a free one."""
    super().__init__(address, _Handler)
    self.retriever: retrieval.Retriever = retriever

  def handle_error(self, request: Any, client_address: Any) -> None:
    """Logs one line for a client that disconnected, instead of a traceback."""
    logging.warning("%s: %r", client_address, sys.exception())


def main(arguments: Sequence[str] | None = None) -> None:
  """Loads the corpus, builds the index, serves until interrupted."""
  parser = argparse.ArgumentParser(description="Search server")
  parser.add_argument("--corpus", required=True, type=pathlib.Path)
  parser.add_argument("--host", default="127.0.0.1")
  parser.add_argument("--port", default=PORT, type=int)
  parser.add_argument("--cache_dir", default=None, type=pathlib.Path)
  parser.add_argument("--retriever", default="bm25", choices=("bm25", "dense"))
  parser.add_argument("--encoder", default=dense.ENCODER)
  options = parser.parse_args(arguments)
  logging.basicConfig(level=logging.INFO, format="%(message)s")
  if not options.corpus.is_file():
    parser.error(f"--corpus: {str(options.corpus)!r} is no file")
  try:
    passages = data.load_corpus(options.corpus)
    if options.retriever == "dense":
      retriever = dense.Dense(
        passages, encoder=options.encoder, cache_dir=options.cache_dir
      )
    else:
      retriever = retrieval.BM25(passages, cache_dir=options.cache_dir)
  except ValueError as error:
    parser.error(str(error))
  with SearchServer((options.host, options.port), retriever) as server:
    logging.info(
      "%d passages at http://%s:%d/retrieve",
      len(passages),
      *server.server_address[:2],
    )
    try:
      server.serve_forever()
    except KeyboardInterrupt:
      logging.info("stopped")


if __name__ == "__main__":
  main()
