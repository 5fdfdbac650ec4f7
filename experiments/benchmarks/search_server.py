"""How many queries a second a search server answers, with many clients.

  python experiments/benchmarks/search_server.py
  python experiments/benchmarks/search_server.py --clients=64 --passages=20000
  python experiments/benchmarks/search_server.py --url=http://host:8000/retrieve

Starts the search server over passages of random words in a process of its own,
and asks it as environments do: so many threads, one query at a time each,
through the client that episodes use (one pool of connections). `--url` asks a
server that is there already. The line at the end is JSON.
"""

import concurrent.futures
import contextlib
import json
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time

from absl import app, flags
import numpy as np

from t2po_jax.envs.searchqa import remote

_CLIENTS = flags.DEFINE_integer(
  "clients", 64, "Threads that ask at the same time.", lower_bound=1
)
_QUERIES = flags.DEFINE_integer(
  "queries", 4000, "Queries of all of them together.", lower_bound=1
)
_PASSAGES = flags.DEFINE_integer(
  "passages", 20_000, "Passages of the server that is started.", lower_bound=1
)
_TOPK = flags.DEFINE_integer("topk", 3, "Passages per answer.", lower_bound=1)
_URL = flags.DEFINE_string(
  "url", "", "Of a server that is there; empty: start one."
)

# Words of a passage and of a query, and how many there are.
_PASSAGE_WORDS, _QUERY_WORDS, _VOCABULARY = 60, 6, 20_000


def draw_text(draw: random.Random, words: int) -> str:
  """Words of which low numbers are frequent, as words of a language are."""
  numbers = (int(_VOCABULARY ** draw.random()) for _ in range(words))
  return " ".join(f"word{number}" for number in numbers)


@contextlib.contextmanager
def start_server(passages: int):
  """A search server in a process of its own; gives its address."""
  draw = random.Random(0)
  with tempfile.TemporaryDirectory() as folder:
    corpus = pathlib.Path(folder) / "corpus.jsonl"
    with corpus.open("w") as file:
      for number in range(passages):
        text = f'"Title {number}"\n{draw_text(draw, _PASSAGE_WORDS)}'
        file.write(json.dumps({"id": str(number), "contents": text}) + "\n")
    process = subprocess.Popen(
      [
        *(sys.executable, "-m", "t2po_jax.envs.searchqa.server"),
        *(f"--corpus={corpus}", f"--cache_dir={folder}", "--port=0"),
      ],
      stderr=subprocess.PIPE,
      text=True,
    )
    try:
      told = ""
      for told in process.stderr or ():
        if found := re.search(r"at (http://\S+)", told):
          yield found[1]
          return
      raise RuntimeError(f"the server did not start: {told.strip()}")
    finally:
      process.terminate()
      process.wait()


def measure(url: str, clients: int, queries: int, topk: int) -> dict:
  """Asks a server from many threads.

  Args:
    url: of the server.
    clients: threads.
    queries: of all threads together.
    topk: passages per answer.

  Returns:
    Queries per second, and the time of an answer in milliseconds: the median
    and what 99 of 100 stay below.
  """
  client = remote.Remote(url, tries=1)
  draw = random.Random(1)
  texts = [draw_text(draw, _QUERY_WORDS) for _ in range(queries)]

  def ask(text: str) -> float:
    start = time.perf_counter()
    client.search([text], topk)
    return 1e3 * (time.perf_counter() - start)

  with concurrent.futures.ThreadPoolExecutor(clients) as pool:
    list(pool.map(ask, texts[:clients]))  # Opens the connections.
    start = time.perf_counter()
    took = list(pool.map(ask, texts))
    seconds = time.perf_counter() - start
  return {
    "queries_per_second": round(queries / seconds, 1),
    "median_ms": round(float(np.median(took)), 1),
    "p99_ms": round(float(np.quantile(took, 0.99)), 1),
  }


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  with contextlib.ExitStack() as stack:
    url = _URL.value or stack.enter_context(start_server(_PASSAGES.value))
    numbers = {
      "clients": _CLIENTS.value,
      **measure(url, _CLIENTS.value, _QUERIES.value, _TOPK.value),
    }
  for name, value in numbers.items():
    print(f"{name:28} {value}")
  print(json.dumps(numbers))


if __name__ == "__main__":
  app.run(main)
