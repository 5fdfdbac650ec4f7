"""Queries per second that a search server answers, with many clients.

  python experiments/benchmarks/search_server.py
  python experiments/benchmarks/search_server.py --clients=64 --passages=20000
  python experiments/benchmarks/search_server.py --url=http://host:8000/retrieve

Starts the search server on passages of random words in a separate process, and
queries it as environments do: from many threads, each with one query at a time,
through the client that episodes use (one pool of connections). `--url` queries
a running server. The last line is JSON.
"""

from collections.abc import Iterator
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
from typing import Any

from absl import flags
import numpy as np

from t2po_jax.envs.searchqa import remote
from t2po_jax.experiments import command_line


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
  """All flags of this program."""
  own: dict[str, Any] = {"flag_values": given}
  flags.DEFINE_integer(
    "clients", 64, "Concurrent client threads.", lower_bound=1, **own
  )
  flags.DEFINE_integer(
    "queries", 4000, "Queries of all threads together.", lower_bound=1, **own
  )
  flags.DEFINE_integer(
    "passages",
    20_000,
    "Passages of the started server.",
    lower_bound=1,
    **own,
  )
  flags.DEFINE_integer("topk", 3, "Passages per answer.", lower_bound=1, **own)
  flags.DEFINE_string(
    "url", "", "Address of a running server; empty: start one.", **own
  )


# Words of a passage and of a query, and the size of the vocabulary.
_PASSAGE_WORDS, _QUERY_WORDS, _VOCABULARY = 60, 6, 20_000


def draw_text(draw: random.Random, words: int) -> str:
  """Words of which a few are frequent, as in a natural language."""
  numbers = (int(_VOCABULARY ** draw.random()) for _ in range(words))
  return " ".join(f"word{number}" for number in numbers)


@contextlib.contextmanager
def start_server(passages: int) -> Iterator[str]:
  """A search server in a separate process; yields its address."""
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
      line = ""
      for line in process.stderr or ():
        if match := re.search(r"at (http://\S+)", line):
          yield match[1]
          return
      raise OSError(f"the server did not start: {line.strip()}")
    finally:
      process.terminate()
      process.wait()


def measure(
  url: str, clients: int, queries: int, topk: int
) -> dict[str, float]:
  """Queries a server from many threads.

  Args:
    url: address of the server.
    clients: number of threads.
    queries: number of queries of all threads together.
    topk: passages per answer.

  Returns:
    Queries per second, and the latency in milliseconds: the median and the 99th
    percentile.
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


def measure_server(given: flags.FlagValues) -> None:
  """Measures, and prints the results.

  Raises:
    OSError: if the server does not start.
  """
  with contextlib.ExitStack() as stack:
    url = given.url or stack.enter_context(start_server(given.passages))
    numbers = {
      "clients": given.clients,
      **measure(url, given.clients, given.queries, given.topk),
    }
  for name, value in numbers.items():
    print(f"{name:28} {value}")
  print(json.dumps(numbers))


def run() -> None:
  """Runs the program."""
  command_line.run(measure_server, define_flags)


if __name__ == "__main__":
  run()
