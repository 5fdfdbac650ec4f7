"""The trace viewer's local web server, and its export to a single file.

It listens on 127.0.0.1 and only answers requests for that host name, so that no
other web site can read it. The page builds everything from text nodes: the
output of a model or an environment is never interpreted as HTML.
"""

from collections.abc import Sequence
import gzip
from http import server
import importlib.resources
import pathlib
from typing import Any
from urllib import parse

from t2po_jax.viewing import runs as runs_lib

ADDRESS = "127.0.0.1"
# The most rows of a list.
PAGE = 200
_FILES = {
  "/": ("page.html", "text/html"),
  "/style.css": ("style.css", "text/css"),
  "/view.js": ("view.js", "text/javascript"),
}
_POLICY = (
  "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
  "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
)


def asset(name: str) -> str:
  """A file of the page."""
  place = importlib.resources.files("t2po_jax.viewing") / "page" / name
  return place.read_text(encoding="utf-8")


class Site:
  """Answers the page's requests about some runs."""

  def __init__(self, runs: Sequence[runs_lib.Run]) -> None:
    self.runs = list(runs)

  def answer(self, path: str, query: dict[str, str]) -> Any:
    """The response to one request.

    Args:
      path: of the request, e.g. `/api/runs`.
      query: its parameters.

    Raises:
      KeyError: for an unknown path.
      ValueError: for invalid parameters.
    """
    if path == "/api/runs":
      return [run.summary() for run in self.runs]
    if path == "/api/same":
      return runs_lib.same_task(self.runs, query.get("task_id", ""))
    run = self._run(query.get("run", "0"))
    if path == "/api/episodes":
      matching = runs_lib.select(run.entries(), query)
      offset = _whole(query.get("offset", "0"))
      # Newest first.
      rows = matching[::-1][offset : offset + PAGE]
      return {"total": len(matching), "rows": rows}
    if path == "/api/episode":
      return run.episode(query.get("id", ""))
    if path == "/api/metrics":
      return run.metrics()
    raise KeyError(path)

  def _run(self, text: str) -> runs_lib.Run:
    number = _whole(text)
    if number >= len(self.runs):
      raise ValueError(f"run: found {number}, there are {len(self.runs)}")
    return self.runs[number]


def _whole(text: str) -> int:
  if not text.isdecimal():
    raise ValueError(f"found {text!r}, expected a number")
  return int(text)


def make_server(site: Site, port: int) -> server.ThreadingHTTPServer:
  """A listening server; call `serve_forever` to run it.

  Args:
    site: what it shows.
    port: 0 takes a free one.

  Raises:
    ValueError: if the port is taken.
  """

  class Handler(server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
      try:
        status, kind, body = self._find()
      except KeyError:
        status, kind, body = 404, "text/plain", b"not found"
      except ValueError as error:
        status, kind, body = 400, "text/plain", str(error).encode()
      packed = "gzip" in self.headers.get("Accept-Encoding", "")
      packed = packed and len(body) > 1024
      if packed:
        body = gzip.compress(body, compresslevel=1)
      self.send_response(status)
      self.send_header("Content-Type", f"{kind}; charset=utf-8")
      self.send_header("Content-Length", str(len(body)))
      if packed:
        self.send_header("Content-Encoding", "gzip")
      for name, value in (
        ("Content-Security-Policy", _POLICY),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
        ("Cache-Control", "no-store"),
      ):
        self.send_header(name, value)
      self.end_headers()
      self.wfile.write(body)

    def _find(self) -> tuple[int, str, bytes]:
      name = self.headers.get("Host", "").rsplit(":", 1)[0]
      if name not in (ADDRESS, "localhost"):
        return 403, "text/plain", b"asked under another name"
      url = parse.urlsplit(self.path)
      if url.path in _FILES:
        file, kind = _FILES[url.path]
        return 200, kind, asset(file).encode()
      query = dict(parse.parse_qsl(url.query))
      content = runs_lib.to_json(site.answer(url.path, query))
      return 200, "application/json", content

    def log_message(self, format: str, *args: Any) -> None:
      del format, args

  try:
    return server.ThreadingHTTPServer((ADDRESS, port), Handler)
  except OSError as error:
    raise ValueError(
      f"--port: {ADDRESS}:{port} cannot be used ({error.strerror})"
    ) from None


def export(
  site: Site, path: pathlib.Path, wanted: dict[str, str], limit: int
) -> int:
  """Writes the page with some episodes as a single self-contained file.

  Args:
    site: what it shows.
    path: the file.
    wanted: filters, see `runs.select`.
    limit: the most episodes per run; the newest are taken.

  Returns:
    The number of exported episodes.

  Raises:
    ValueError: if a filter is invalid or an episode cannot be read.
  """
  data: list[dict[str, Any]] = []
  for run in site.runs:
    chosen = runs_lib.select(run.entries(), wanted)[-limit:]
    data.append(
      {
        "summary": run.summary() | {"episodes": len(chosen)},
        "rows": chosen,
        "episodes": {e["id"]: run.episode(e["id"]) for e in chosen},
        "metrics": run.metrics(),
      }
    )
  html = asset("page.html")
  parts = {
    '<link rel="stylesheet" href="style.css">': (
      f"<style>\n{asset('style.css')}</style>"
    ),
    '<script src="view.js" defer></script>': "",
    "</body>": (
      '<script type="application/json" id="data">'
      f"{runs_lib.to_json(data).decode()}</script>\n"
      f"<script>\n{asset('view.js')}</script>\n</body>"
    ),
  }
  for mark, replacement in parts.items():
    if html.count(mark) != 1:
      raise ValueError(f"page.html: expected {mark!r} once")
    html = html.replace(mark, replacement)
  path.write_text(html, encoding="utf-8")
  return sum(len(run["rows"]) for run in data)
