"""Speed of ALFWorld on one core, and whether it leaks.

  python experiments/benchmarks/alfworld_steps.py
  python experiments/benchmarks/alfworld_steps.py --data_dir='$ALFWORLD_DATA'
  python experiments/benchmarks/alfworld_steps.py --workers=2 --engine=cached

Episodes with random admissible actions are played through the environment that
training uses, including parsing: `steps_per_second` counts only the steps,
`rollout_steps_per_second` includes the resets, as in a rollout. Then the soak
test resets many times and compares the memory of the process. With `--workers`,
worker processes do both, with many concurrent episodes, and the memory is
theirs. The last line is JSON.
"""

import functools
import json
import random
import time
from typing import Any

from absl import flags

from t2po_jax import envs
from t2po_jax.envs import base, worker
from t2po_jax.envs.alfworld import benchmark as benchmark_lib
from t2po_jax.envs.alfworld import settings as settings_lib
from t2po_jax.experiments import command_line
from t2po_jax.rollout import workers


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
  """All flags of this program."""
  own: dict[str, Any] = {"flag_values": given}
  flags.DEFINE_enum(
    "engine", "twin", settings_lib.ENGINES, "The engine.", **own
  )
  flags.DEFINE_string(
    "data_dir",
    "",
    "Folder or archive of game files; empty: embedded scenes.",
    **own,
  )
  flags.DEFINE_string("size", "full", "Size of embedded scenes.", **own)
  flags.DEFINE_integer("steps", 20_000, "Steps to time.", lower_bound=1, **own)
  flags.DEFINE_integer("resets", 10_000, "Resets of the soak test.", **own)
  flags.DEFINE_integer("games", 0, "Different games; 0: all.", **own)
  flags.DEFINE_integer(
    "workers",
    0,
    "Worker processes; 0 plays in this process.",
    lower_bound=0,
    **own,
  )
  flags.DEFINE_integer(
    "episodes", 16, "Concurrent episodes in workers.", lower_bound=1, **own
  )
  flags.DEFINE_integer("turns", 50, "Turns per episode.", lower_bound=1, **own)


# Resets before memory is first read: until then caches fill up.
_WARM_UP = 500


def time_steps(
  benchmark: benchmark_lib.ALFWorld, ids: tuple[str, ...], steps: int
) -> dict:
  """Plays random episodes; times are CPU seconds of this process.

  Args:
    benchmark: the benchmark.
    ids: the tasks, played in rotation.
    steps: number of steps to play.

  Returns:
    Steps and resets per CPU second, and the mean number of actions.
  """
  draw = random.Random(0)
  env = benchmark.env()
  stepping = resetting = 0.0
  resets = actions = taken = 0
  while taken < steps:
    start = time.process_time()
    observation = env.reset(ids[resets % len(ids)])
    resetting += time.process_time() - start
    resets, done = resets + 1, False
    while not done and taken < steps:
      actions += len(observation.admissible)
      command = draw.choice(observation.admissible)
      response = f"<think> go on</think><action> {command}</action>"
      start = time.process_time()
      result = env.step(response)
      stepping += time.process_time() - start
      observation, done = result.observation, result.done
      taken += 1
  env.close()
  return {
    "steps_per_second": round(taken / stepping),
    "resets_per_second": round(resets / resetting, 1),
    "rollout_steps_per_second": round(taken / (stepping + resetting)),
    "admissible_mean": round(actions / taken, 1),
  }


def soak(
  benchmark: benchmark_lib.ALFWorld, ids: tuple[str, ...], resets: int
) -> dict:
  """Resets many times, with a few steps in between.

  Args:
    benchmark: the benchmark.
    ids: the tasks, played in rotation.
    resets: number of resets after a warm-up.

  Returns:
    Memory before and after in MB, and its growth.
  """
  draw = random.Random(0)
  env = benchmark.env()
  before = worker.read_memory()
  for count in range(resets + _WARM_UP):
    if count == _WARM_UP:
      before = worker.read_memory()
    observation = env.reset(ids[count % len(ids)])
    for _ in range(3):
      command = draw.choice(observation.admissible)
      observation = env.step(f"<action>{command}</action>").observation
  env.close()
  after = worker.read_memory()
  return {
    "soak_resets": resets,
    "memory_before_mb": round(before, 1),
    "memory_after_mb": round(after, 1),
    "memory_growth_mb": round(after - before, 1),
  }


class Crowd:
  """Concurrent random episodes in worker processes."""

  def __init__(self, pool: workers.WorkerPool, ids: tuple[str, ...]) -> None:
    self._pool = pool
    self._ids = ids
    self._draw = random.Random(0)
    self.resets = 0

  def play(self, episodes: int, side_by_side: int, turns: int) -> int:
    """Plays episodes, `side_by_side` at a time; returns the number of steps."""
    steps = 0
    for _ in range(0, episodes, side_by_side):
      tasks = [
        self._ids[(self.resets + i) % len(self._ids)]
        for i in range(side_by_side)
      ]
      self.resets += side_by_side
      playing = []
      for seat, future in [self._pool.start(task) for task in tasks]:
        playing.append((seat, future.result()))
      seats = [seat for seat, _ in playing]
      for _ in range(turns):
        under_way = [
          (seat, self._pool.step(seat, self._respond(observation)))
          for seat, observation in playing
        ]
        results = [(seat, future.result()) for seat, future in under_way]
        steps += len(results)
        playing = [(s, r.observation) for s, r in results if not r.done]
      for seat in seats:
        self._pool.give_back(seat)
    return steps

  def _respond(self, observation: base.Observation) -> str:
    command = self._draw.choice(observation.admissible)
    return f"<think> go on</think><action> {command}</action>"


def measure_workers(
  given: flags.FlagValues, settings: dict, ids: tuple[str, ...]
) -> dict:
  """Speed and growth of worker processes.

  Args:
    given: the flags.
    settings: settings of the environment.
    ids: the tasks.

  Returns:
    Steps per second of wall time of all workers together, including resets; the
    total growth of the processes during the soak test, in MB.
  """
  pool = workers.WorkerPool(
    functools.partial(envs.make, "alfworld", **settings),
    workers=given.workers,
  )
  crowd, beside = Crowd(pool, ids), given.episodes
  crowd.play(beside, beside, 1)  # Starts the processes.
  start = time.perf_counter()
  episodes = max(given.steps // given.turns, 1)
  steps = crowd.play(episodes, beside, given.turns)
  seconds = time.perf_counter() - start
  measured: dict[str, float] = {
    "rollout_steps_per_second": round(steps / seconds)
  }
  if given.resets:
    crowd.play(_WARM_UP, beside, 3)
    before = pool.grown
    crowd.play(given.resets, beside, 3)
    growth = sum(pool.grown) - sum(before)
    measured["soak_resets"] = given.resets
    measured["memory_growth_mb"] = round(growth, 1)
  measured["restarts"] = pool.restarts
  pool.close()
  return measured


def measure(given: flags.FlagValues) -> None:
  """Measures, and prints the results."""
  settings = {
    "engine": given.engine,
    "data_dir": given.data_dir,
    "size": given.size,
    "max_turns": given.turns,
  }
  benchmark: Any = envs.make("alfworld", **settings)
  ids = benchmark.splits["train"][: given.games or None]
  numbers = {
    "engine": given.engine,
    "games": "files" if given.data_dir else f"{given.size} scenes",
    "workers": given.workers,
  }
  if given.workers:
    numbers |= measure_workers(given, settings, ids)
  else:
    numbers |= time_steps(benchmark, ids, given.steps)
    if given.resets:
      numbers |= soak(benchmark, ids, given.resets)
  for name, value in numbers.items():
    print(f"{name:28} {value}")
  print(json.dumps(numbers))


def run() -> None:
  """Runs this program."""
  command_line.run(measure, define_flags)


if __name__ == "__main__":
  run()
