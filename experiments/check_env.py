"""Checks an environment: `experiments/check_env.py --config=FILE`.

Is it deterministic, are its splits disjoint, do its prompts fit, can its listed
actions be executed, does it reject invalid ones, is it as thread-safe as it
claims, does it work in worker processes, is it fast, does it leak? Prints one
line per finding; the exit code is 1 if any of them is a fault.
"""

from collections.abc import Callable, Iterator
import sys
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from t2po_jax.configs import base as settings
from t2po_jax.envs import base, checks
from t2po_jax.experiments import command_line
from t2po_jax.rollout import workers
from t2po_jax.setup import build, validate


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
  """All flags of this program."""
  own: dict[str, Any] = {"flag_values": given}
  config_flags.DEFINE_config_file("config", lock_config=True, **own)
  flags.DEFINE_integer(
    "tasks", 8, "Tasks of each split to play.", lower_bound=1, **own
  )
  flags.DEFINE_integer(
    "resets",
    1000,
    "Resets over which memory is measured.",
    lower_bound=100,
    **own,
  )
  flags.mark_flag_as_required("config", given)


def check_workers(
  recipe: Callable[[], base.Benchmark], episode: checks.Episode
) -> checks.Finding:
  """Checks that an episode in a worker process equals one in this process."""
  try:
    pool = workers.WorkerPool(recipe, workers=1)
  except Exception as error:
    detail = f"the settings cannot be pickled: {error}"
    return checks.Finding("workers", "fault", detail)
  try:
    seat, future = pool.start(episode.task_id)
    answers = [future.result()]
    for response in episode.responses:
      answers.append(pool.step(seat, response).result())
  except (RuntimeError, base.EnvError) as error:
    return checks.Finding("workers", "fault", str(error).splitlines()[0])
  finally:
    pool.close()
  if answers != [episode.observations[0], *episode.results]:
    detail = f"task {episode.task_id!r} differs in a worker process"
    return checks.Finding("workers", "fault", detail)
  return checks.Finding("workers", "ok", "an episode in a process is the same")


def run_checks(
  config: settings.Config, *, tasks: int, resets: int
) -> Iterator[checks.Finding]:
  """Runs every check; stops if the benchmark cannot be played.

  Args:
    config: a configuration.
    tasks: the number of tasks to play per split.
    resets: the number of resets over which memory is measured.

  Raises:
    ValueError: if the benchmark cannot be built from the configuration.
  """
  benchmark = build.benchmark(config)
  recipe = build.recipe(config)
  finding = checks.check_splits(benchmark, recipe)
  yield finding
  if finding.verdict == "fault":
    return
  played = [
    task
    for split in ("train", "valid", "test")
    for task in benchmark.splits[split][:tasks]
  ]
  try:
    episodes = [
      checks.explore(benchmark, task, seed) for seed, task in enumerate(played)
    ]
  except Exception as error:
    yield checks.Finding(
      "episodes", "fault", f"{type(error).__name__}: {error}"
    )
    return
  yield checks.check_determinism(benchmark, episodes)
  yield checks.check_answers(benchmark, episodes)
  yield checks.check_admissible(
    benchmark, episodes[: max(len(episodes) // 3, 1)]
  )
  yield checks.check_refusals(benchmark, episodes)
  yield checks.check_expert(benchmark, played)
  tokenizer = build.agent(config, benchmark).tokenizer
  prefix = len(tokenizer.encode(config.rollout.prefix))
  yield checks.check_prompts(
    benchmark,
    episodes,
    memory=config.rollout.memory,
    count_tokens=lambda messages: len(tokenizer.render_chat(messages)) + prefix,
    max_prompt=config.rollout.max_prompt,
  )
  yield checks.check_threads(benchmark, episodes)
  yield check_workers(recipe, episodes[0])
  yield checks.check_speed(benchmark, episodes)
  yield checks.check_memory(benchmark, played, resets)


def check(given: flags.FlagValues) -> None:
  """Prints all findings; exits with code 1 if one is a fault.

  Raises:
    ValueError: if the benchmark cannot be built from the configuration.
  """
  faults = 0
  config = validate.read(given.config)
  print(f"{config.env.name}:", flush=True)
  for finding in run_checks(config, tasks=given.tasks, resets=given.resets):
    faults += finding.verdict == "fault"
    line = f"{finding.verdict:6}{finding.name:12} {finding.detail}"
    print(line, flush=True)
  print(f"{faults} faults")
  sys.exit(1 if faults else 0)


def run() -> None:
  """The command `t2po-check-env`."""
  command_line.run(check, define_flags, verbosity=logging.ERROR)


if __name__ == "__main__":
  run()
