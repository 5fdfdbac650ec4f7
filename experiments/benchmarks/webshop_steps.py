"""Speed of WebShop on one core: steps, searches, resets, and stored bytes.

  python experiments/benchmarks/webshop_steps.py
  python experiments/benchmarks/webshop_steps.py \\
    --catalogue=$T2PO_DATA/webshop/items_shuffle_1000.json --copies=20

Episodes of the scripted expert are recorded first and then replayed, so that
the expert costs nothing; the time of the search is excluded from the steps and
reported separately. `--copies` repeats the products of a catalogue under new
ids in a temporary folder, to see how a larger one behaves. From 20,000 products
on, the last lines extrapolate to the full catalogue; with fewer, most of a
search is a fixed cost, and an extrapolation would be wrong by a factor of ten.
Copies share their words, so that every posting list grows with the catalogue:
the estimate is pessimistic for searches and optimistic for the vocabulary.
`--workers` opens the stored shop in that many processes at once and reports the
memory that each does not share with the others (Linux only).
"""

from collections.abc import Callable, Sequence
import json
import multiprocessing
import pathlib
import random
import re
import resource
import tempfile
import time
from typing import Any

from absl import flags

from t2po_jax import envs
from t2po_jax.envs import base
from t2po_jax.envs.webshop import data
from t2po_jax.experiments import command_line


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
  """All flags of this program."""
  own: dict[str, Any] = {"flag_values": given}
  flags.DEFINE_string(
    "catalogue",
    "embedded",
    "`embedded`, or the path of items_shuffle*.json.",
    **own,
  )
  flags.DEFINE_integer("copies", 1, "Repetitions of a real catalogue.", **own)
  flags.DEFINE_string("storage", "auto", "`memory`, `disk`, `auto`.", **own)
  flags.DEFINE_string("wording", "full", "`full` or `compact`.", **own)
  flags.DEFINE_integer("round_episodes", 200, "Episodes per round.", **own)
  flags.DEFINE_integer("rounds", 5, "Rounds; the median is reported.", **own)
  flags.DEFINE_integer("workers", 0, "Processes that share a shop.", **own)


FULL_CATALOGUE = 1_181_436  # Products in items_shuffle.json.
LEAST_PRODUCTS = 20_000  # From here on, the cost of a search is proportional.


def copy_catalogue(
  items: pathlib.Path, copies: int, folder: pathlib.Path
) -> pathlib.Path:
  """Writes a catalogue that repeats another one under new ids.

  Returns:
    The path of the new product file.
  """
  ending = items.stem.removeprefix("items_shuffle")
  notes = json.loads(
    items.with_name(f"items_ins_v2{ending}.json").read_text(encoding="utf-8")
  )
  copied = {}
  path = folder / "items_shuffle_copied.json"
  draw = random.Random(0)
  with open(path, "w", encoding="utf-8") as file:
    separator = "["
    for number in range(copies):
      for raw in data.stream_objects(items):
        asin = raw["asin"]
        if number:
          asin = f"C{draw.getrandbits(44):09X}"[:10]
        if raw["asin"] in notes:
          copied[asin] = notes[raw["asin"]]
        file.write(separator + json.dumps(raw | {"asin": asin}))
        separator = ","
    file.write("]")
  with open(folder / "items_ins_v2_copied.json", "w") as file:
    json.dump(copied, file)
  return path


def record(
  benchmark: base.Benchmark, task_ids: Sequence[str]
) -> list[tuple[str, list[str]]]:
  """(task id, responses) of the expert's episodes."""
  episodes = []
  for task_id in task_ids:
    env = benchmark.env()
    env.reset(task_id)
    expert = env.expert(0)
    responses, done = [], False
    while not done:
      responses.append(expert.respond())
      done = env.step(responses[-1]).done
    episodes.append((task_id, responses))
  return episodes


class Clock:
  """Counts the calls of a function and their seconds."""

  def __init__(self, function: Callable[..., Any]) -> None:
    self._function = function
    self.calls, self.seconds = 0, 0.0

  def __call__(self, *arguments: Any) -> Any:
    start = time.thread_time()
    answer = self._function(*arguments)
    self.seconds += time.thread_time() - start
    self.calls += 1
    return answer


def replay(
  benchmark: base.Benchmark,
  episodes: Sequence[tuple[str, list[str]]],
  search: Clock,
) -> dict[str, float]:
  """Replays the recorded episodes once; returns rates and latencies."""
  search.calls, search.seconds = 0, 0.0
  env = benchmark.env()
  steps, resetting, stepping = 0, 0.0, 0.0
  for task_id, responses in episodes:
    start = time.thread_time()
    env.reset(task_id)
    middle = time.thread_time()
    for response in responses:
      env.step(response)
    stepping += time.thread_time() - middle
    resetting += middle - start
    steps += len(responses)
  return {
    "steps_per_second": steps / max(stepping - search.seconds, 1e-9),
    "steps_per_second_with_search": steps / max(stepping, 1e-9),
    "search_ms": 1e3 * search.seconds / max(search.calls, 1),
    # Of a task played before, as for all but the first episode of a group.
    "reset_ms": 1e3 * resetting / len(episodes),
  }


def private_mib() -> float:
  """Memory of this process that is not shared with others."""
  text = pathlib.Path("/proc/self/smaps_rollup").read_text()
  kib = re.findall(r"^Private_(?:Clean|Dirty): +(\d+) kB", text, re.MULTILINE)
  return sum(map(int, kib)) / 2**10


def work(settings: dict, episodes: int, together: Any) -> tuple[float, float]:
  """One worker: (seconds to open the shop, its private memory in MiB)."""
  before, start = private_mib(), time.monotonic()
  benchmark = envs.make("webshop", **settings)
  opened = time.monotonic() - start
  record(benchmark, benchmark.splits["train"][:episodes])
  together.wait()  # No process exits before all have measured.
  cost = private_mib() - before
  together.wait()
  return opened, cost


def share(settings: dict, workers: int, episodes: int) -> dict[str, float]:
  """Opens a stored shop in several processes at once; means per worker."""
  context = multiprocessing.get_context("spawn")
  with context.Manager() as manager, context.Pool(workers) as pool:
    together = manager.Barrier(workers)
    measured = pool.starmap(
      work, [(settings, episodes, together)] * workers, chunksize=1
    )
  return {
    "worker_open_seconds": sum(opened for opened, _ in measured) / workers,
    "worker_private_mib": sum(cost for _, cost in measured) / workers,
  }


def measure(settings: dict, *, episodes: int, rounds: int) -> dict[str, float]:
  """Opens a shop and measures it; medians over rounds."""
  start = time.thread_time()
  benchmark: Any = envs.make("webshop", **settings)
  built = time.thread_time() - start
  search = Clock(benchmark.shop.search)
  object.__setattr__(benchmark.shop, "search", search)
  tasks = benchmark.splits["train"][: 2 * episodes]
  fresh, tasks = tasks[: len(tasks) // 2], tasks[len(tasks) // 2 :]
  recorded = record(benchmark, tasks)
  first = replay(benchmark, [(task_id, []) for task_id in fresh], search)
  played = [replay(benchmark, recorded, search) for _ in range(rounds)]
  measured = {
    key: sorted(r[key] for r in played)[rounds // 2] for key in played[0]
  }
  stored = {"index_mib": 0.0, "products_mib": 0.0}
  for path in pathlib.Path(settings["cache_dir"]).rglob("*.*"):
    key = "products_mib" if path.suffix == ".sqlite" else "index_mib"
    stored[key] += path.stat().st_size / 2**20
  return {
    "products": len(benchmark.shop.catalogue),
    "open_seconds": built,
    **measured,
    "first_reset_ms": first["reset_ms"],
    **stored,
    "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    / 2**10,
  }


def project(measured: dict[str, float]) -> list[str]:
  """Lines that extrapolate the measurements to the full catalogue."""
  products = measured["products"]
  if products < LEAST_PRODUCTS:
    return [
      f"not projected to the full catalogue: found {products:g} products, "
      f"expected at least {LEAST_PRODUCTS}; see --copies"
    ]
  factor = FULL_CATALOGUE / products
  return [f"projected to {FULL_CATALOGUE} products, in proportion:"] + [
    f"{key:32} {factor * measured[key]:12.4g}"
    for key in (
      "open_seconds",
      "search_ms",
      "index_mib",
      "products_mib",
      "peak_memory_mib",
    )
  ]


def report(given: flags.FlagValues) -> None:
  """Measures a shop and prints the results."""
  with tempfile.TemporaryDirectory() as folder:
    catalogue = given.catalogue
    if catalogue != "embedded" and given.copies > 1:
      catalogue = str(
        copy_catalogue(
          pathlib.Path(catalogue), given.copies, pathlib.Path(folder)
        )
      )
    settings = {
      "catalogue": catalogue,
      "storage": given.storage,
      "wording": given.wording,
      "cache_dir": str(pathlib.Path(folder) / "cache"),
      "expert_hesitation": 0.0,
    }
    measured = measure(
      settings, episodes=given.round_episodes, rounds=given.rounds
    )
    if given.workers:
      measured |= share(settings, given.workers, given.round_episodes)
  for key, value in measured.items():
    print(f"{key:32} {value:12.4g}")
  if catalogue != "embedded":
    print("\n" + "\n".join(project(measured)))


def run() -> None:
  """Runs this program."""
  command_line.run(report, define_flags)


if __name__ == "__main__":
  run()
