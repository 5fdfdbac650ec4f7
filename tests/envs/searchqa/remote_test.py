"""Search server and client over localhost, with failures put in between."""

import concurrent.futures
import email.utils
import http.server
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time
from unittest import mock
import urllib.error
import urllib.request

from absl.testing import absltest, parameterized

from t2po_jax import envs
from t2po_jax.envs import base
from t2po_jax.envs.searchqa import remote, retrieval, server

_PASSAGES = [
  retrieval.Passage("a", "River", "A river bends."),
  retrieval.Passage("b", "Bank", "A bank by the river."),
  retrieval.Passage("c", "", "Rivers have no title."),
  retrieval.Passage("d", "Delta", "Where the river ends."),
]


class _Faulty(http.server.BaseHTTPRequestHandler):
  """Plays the answers that the test has queued, then good ones."""

  protocol_version = "HTTP/1.1"

  def do_POST(self):
    size = int(self.headers["Content-Length"])
    self.server.bodies.append(json.loads(self.rfile.read(size)))
    fault = (
      self.server.faults.pop(0) if self.server.faults else self.server.good
    )
    if fault == "drop":
      self.close_connection = True
      return
    if fault == "cut":
      self.send_response(200)
      self.send_header("Content-Length", "1000")
      self.end_headers()
      self.wfile.write(b'{"result"')
      self.close_connection = True
      return
    if fault == "hang":
      self.server.released.wait(5)
      self.close_connection = True
      return
    self.server.clients.add(self.client_address)
    status, text, *pause = fault if isinstance(fault, tuple) else (fault, "{}")
    self.send_response(status)
    if pause:
      self.send_header("Retry-After", pause[0])
    self.send_header("Content-Length", str(len(text)))
    self.end_headers()
    self.wfile.write(text.encode())

  def log_message(self, *_):
    pass


class _ServerCase(parameterized.TestCase):
  def _serve(self, running):
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()

    def stop():
      running.shutdown()
      thread.join()
      running.server_close()

    self.addCleanup(stop)
    host, port = running.server_address[:2]
    return f"http://{host}:{port}/retrieve"


class ProtocolTest(_ServerCase):
  def setUp(self):
    super().setUp()
    self.index = retrieval.BM25(_PASSAGES)
    self.url = self._serve(server.SearchServer(("127.0.0.1", 0), self.index))

  def _post(self, body, url=None):
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
      with urllib.request.urlopen(
        urllib.request.Request(url or self.url, data=payload), timeout=5
      ) as answer:
        return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
      with error:
        return error.code, json.loads(error.read())

  @parameterized.parameters(*remote.DIALECTS)
  def test_client_equals_the_index(self, dialect):
    client = remote.Remote(self.url, dialect=dialect)
    queries = ["river", "bank", "nothing like it"]
    self.assertEqual(client.search(queries, 2), self.index.search(queries, 2))
    self.assertEqual(client.search([], 2), [])

  def test_search_r1_rows_by_hand(self):
    status, body = self._post(
      {"queries": ["bank", "delta"], "topk": 1, "return_scores": True}
    )
    self.assertEqual(status, 200)
    first, second = body["result"]
    self.assertEqual(
      first[0]["document"],
      {"id": "b", "contents": '"Bank"\nA bank by the river.'},
    )
    self.assertIsInstance(first[0]["score"], float)
    self.assertEqual(second[0]["document"]["id"], "d")

  def test_bare_documents_without_scores(self):
    _, body = self._post({"queries": ["bank"], "topk": 1})
    self.assertEqual(
      body["result"],
      [[{"id": "b", "contents": '"Bank"\nA bank by the river.'}]],
    )

  @parameterized.parameters(None, 0, "absent")
  def test_topk_falls_back_to_three(self, topk):
    body = (
      {"query": "river"}
      if topk == "absent"
      else {
        "query": "river",
        "topk": topk,
      }
    )
    _, answer = self._post(body)
    self.assertLen(answer["result"], 1)
    self.assertLen(answer["result"][0], 3)

  @parameterized.parameters(
    ([], 400, "object"),
    ({}, 400, "'queries'"),
    ({"queries": [1]}, 400, "'queries'"),
    ({"query": "x", "topk": -1}, 400, "'topk' is -1"),
    ({"query": "x", "topk": "3"}, 400, "'topk' is '3'"),
    (b"{", 400, ""),
    (b"\xff", 400, ""),
  )
  def test_bad_requests(self, body, status, message):
    found, answer = self._post(body)
    self.assertEqual(found, status)
    self.assertIn(message, answer["error"])

  def test_other_path(self):
    status, _ = self._post({"query": "x"}, self.url + "/more")
    self.assertEqual(status, 404)

  def test_broken_retriever_is_a_busy_server(self):
    with mock.patch.object(
      self.index, "search", side_effect=base.EnvError("gone")
    ):
      self.assertEqual(self._post({"query": "x"}), (503, {"error": "gone"}))

  def test_many_clients(self):
    client = remote.Remote(self.url)
    queries = ["river", "bank", "delta", "title"] * 10
    expected = self.index.search(queries, 3)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      found = pool.map(lambda query: client.search([query], 3)[0], queries)
    self.assertEqual(list(found), expected)


class CommandLineTest(absltest.TestCase):
  """The server as it is started in a terminal."""

  def start(self, *arguments):
    running = subprocess.Popen(
      [sys.executable, "-m", "t2po_jax.envs.searchqa.server", *arguments],
      stderr=subprocess.PIPE,
      text=True,
    )
    self.addCleanup(running.stderr.close)
    self.addCleanup(running.wait)
    self.addCleanup(running.kill)
    return running

  def test_it_serves_a_corpus(self):
    folder = self.enter_context(tempfile.TemporaryDirectory())
    corpus = pathlib.Path(folder) / "corpus.jsonl"
    corpus.write_text(
      "\n".join(
        json.dumps({"id": p.id, "contents": p.contents}) for p in _PASSAGES
      )
    )
    running = self.start(f"--corpus={corpus}", "--port=0")
    for line in running.stderr:
      if found := re.search(r"(\d+) passages at (http\S+)", line):
        break
    self.assertEqual(found[1], "4")
    index = retrieval.BM25(_PASSAGES)
    client = remote.Remote(found[2])
    self.assertEqual(client.search(["bank"], 2), index.search(["bank"], 2))

  def test_a_missing_corpus_is_one_line(self):
    running = self.start("--corpus=nothing.jsonl")
    lines = running.stderr.read().splitlines()
    self.assertRegex(lines[-1], "--corpus: 'nothing.jsonl' is no file")
    self.assertEqual(running.wait(), 2)


class FailureTest(_ServerCase):
  def setUp(self):
    super().setUp()
    self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Faulty)
    self.server.handle_error = lambda *_: None
    self.server.daemon_threads = True
    self.server.bodies, self.server.faults = [], []
    self.server.clients = set()
    self.server.released = threading.Event()
    self.server.good = (
      200,
      json.dumps({"result": [[{"title": "T", "text": "x"}]]}),
    )
    self.url = self._serve(self.server)
    self.addCleanup(self.server.released.set)
    self.sleep = self.enter_context(mock.patch.object(remote.time, "sleep"))
    self.good = [[(retrieval.Passage("", "T", "x"), 0.0)]]

  @parameterized.parameters(429, 500, 502, 503, 504, "drop", "cut")
  def test_trouble_is_tried_again_with_growing_pauses(self, fault):
    self.server.faults = [fault] * 3
    client = remote.Remote(self.url, backoff=0.5)
    self.assertEqual(client.search(["q"], 2), self.good)
    pauses = [call.args[0] for call in self.sleep.call_args_list]
    self.assertLen(pauses, 3)
    for pause, nominal in zip(pauses, (0.5, 1.0, 1.5), strict=True):
      self.assertBetween(pause, 0.5 * nominal, 1.5 * nominal)
    self.assertEqual(
      self.server.bodies,
      [{"queries": ["q"], "topk": 2, "return_scores": True}] * 4,
    )

  def test_ten_tries_and_no_more(self):
    self.server.good = 503
    with self.assertRaisesRegex(base.EnvError, "status 503 after 10 tries"):
      remote.Remote(self.url).search(["q"], 2)
    self.assertLen(self.server.bodies, 10)
    self.assertEqual(self.sleep.call_count, 9)

  def test_the_server_says_when(self):
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    self.server.faults = [(429, "{}", "7"), (503, "{}", soon), (503, "{}", "?")]
    client = remote.Remote(self.url, backoff=0.5)
    self.assertEqual(client.search(["q"], 2), self.good)
    pauses = [call.args[0] for call in self.sleep.call_args_list]
    self.assertEqual(pauses[0], 7.0)
    self.assertBetween(pauses[1], 25.0, 31.0)
    self.assertBetween(pauses[2], 0.75, 2.25)

  def test_one_deadline_for_all_tries(self):
    self.server.faults = [(503, "{}", "60")]
    client = remote.Remote(self.url, deadline=50.0)
    with self.assertRaisesRegex(
      base.EnvError, "status 503, and 50 s are over after 1 tries"
    ):
      client.search(["q"], 2)
    self.sleep.assert_not_called()

  def test_connections_are_kept(self):
    client = remote.Remote(self.url)
    for _ in range(5):
      client.search(["q"], 2)
    self.assertLen(self.server.clients, 1)

  def test_slow_server_times_out(self):
    self.server.faults = ["hang"]
    client = remote.Remote(self.url, timeout=0.2)
    self.assertEqual(client.search(["q"], 2), self.good)
    self.assertLen(self.server.bodies, 2)

  @parameterized.parameters(
    (400, "{}"),
    (404, "{}"),
    (200, "no json"),
    (200, '{"answer": []}'),
    (200, '{"result": []}'),
    (200, '{"result": [[{"id": "x"}]]}'),
    (200, '{"result": [[3]]}'),
    (200, "[1]"),
  )
  def test_hopeless_answers_are_final(self, status, text):
    self.server.good = (status, text)
    with self.assertRaises(base.EnvError):
      remote.Remote(self.url).search(["q"], 2)
    self.assertLen(self.server.bodies, 1)

  def test_single_queries_in_the_other_dialect(self):
    client = remote.Remote(self.url, dialect="verl-agent")
    self.assertEqual(client.search(["p", "q"], 1), self.good * 2)
    self.assertEqual([body["query"] for body in self.server.bodies], ["p", "q"])

  def test_nobody_listens(self):
    spare = http.server.HTTPServer(("127.0.0.1", 0), _Faulty)
    url = f"http://127.0.0.1:{spare.server_address[1]}/retrieve"
    spare.server_close()
    with self.assertRaisesRegex(base.EnvError, "refused after 2 tries"):
      remote.Remote(url, tries=2).search(["q"], 2)

  def test_episode_ends_with_the_error(self):
    self.server.good = 500
    benchmark = envs.make("searchqa", retriever="http", url=self.url, tries=1)
    env = benchmark.env()
    env.reset(benchmark.splits["train"][0])
    with self.assertRaises(base.EnvError):
      env.step("<think> x</think><search> y</search>")
    with self.assertRaisesRegex(RuntimeError, "call reset"):
      env.step("")

  @parameterized.parameters(
    ({"url": "localhost:8000"}, "env.url: 'localhost:8000'"),
    ({"dialect": "verl"}, "env.dialect: unknown 'verl'"),
    ({"tries": 0}, "env.tries: 0"),
  )
  def test_bad_arguments(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      remote.Remote(**{"url": self.url, **arguments})


if __name__ == "__main__":
  absltest.main()
