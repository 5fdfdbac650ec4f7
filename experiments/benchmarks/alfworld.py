"""How fast ALFWorld plays on one core, and whether it leaks.

  python experiments/benchmarks/alfworld.py
  python experiments/benchmarks/alfworld.py --data_dir='$ALFWORLD_DATA'

Episodes with random possible actions are played through the environment that
training uses, parsing and all, then the soak resets many times and compares
the memory of the process. The line at the end is JSON.
"""

import json
import os
import pathlib
import random
import resource
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
# In place of this folder, where this very file hides the package `alfworld`.
sys.path[0] = str(ROOT)

from absl import app, flags  # noqa: E402

import envs  # noqa: E402
from envs.alfworld import benchmark as benchmark_lib  # noqa: E402

_ENGINE = flags.DEFINE_enum(
  "engine", "twin", benchmark_lib.ENGINES, "Which engine plays."
)
_DATA_DIR = flags.DEFINE_string(
  "data_dir", "", "Folder or archive of game files; empty: embedded scenes."
)
_SIZE = flags.DEFINE_string("size", "full", "Size of embedded scenes.")
_STEPS = flags.DEFINE_integer("steps", 20_000, "Steps to time.", lower_bound=1)
_RESETS = flags.DEFINE_integer("resets", 10_000, "Resets of the soak.")
_TURNS = flags.DEFINE_integer("turns", 50, "Turns per episode.", lower_bound=1)

# Resets before memory is first read: caches fill, the allocator settles.
_WARM_UP = 500


def read_memory() -> float:
  """Resident memory of this process in MB (its peak outside Linux)."""
  try:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
  except OSError:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def time_steps(benchmark: benchmark_lib.ALFWorld, steps: int) -> dict:
  """Plays random episodes; seconds are CPU seconds of this process.

  Args:
    benchmark: what is played.
    steps: how many steps to play.

  Returns:
    Steps and resets per CPU second, and the mean number of actions.
  """
  draw = random.Random(0)
  ids = benchmark.splits["train"]
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


def soak(benchmark: benchmark_lib.ALFWorld, resets: int) -> dict:
  """Resets again and again, a few steps in between.

  Args:
    benchmark: what is played.
    resets: how often, after a warm-up.

  Returns:
    Memory before and after in MB, and its growth.
  """
  ids = benchmark.splits["train"]
  draw = random.Random(0)
  env = benchmark.env()
  before = read_memory()
  for count in range(resets + _WARM_UP):
    if count == _WARM_UP:
      before = read_memory()
    observation = env.reset(ids[count % len(ids)])
    for _ in range(3):
      command = draw.choice(observation.admissible)
      observation = env.step(f"<action>{command}</action>").observation
  env.close()
  after = read_memory()
  return {
    "soak_resets": resets,
    "memory_before_mb": round(before, 1),
    "memory_after_mb": round(after, 1),
    "memory_growth_mb": round(after - before, 1),
  }


def main(_) -> None:
  """Measures and prints."""
  benchmark = envs.make(
    "alfworld",
    engine=_ENGINE.value,
    data_dir=_DATA_DIR.value,
    size=_SIZE.value,
    max_turns=_TURNS.value,
  )
  numbers = {
    "engine": _ENGINE.value,
    "games": "files" if _DATA_DIR.value else f"{_SIZE.value} scenes",
  }
  numbers |= time_steps(benchmark, _STEPS.value)
  if _RESETS.value:
    numbers |= soak(benchmark, _RESETS.value)
  for name, value in numbers.items():
    print(f"{name:28} {value}")
  print(json.dumps(numbers))


if __name__ == "__main__":
  app.run(main)
