"""Checks an environment before training on it.

Each check plays the environment through the public interface of `base` and
returns one finding: what was done, what was observed, and whether that is
correct. `experiments/check_env.py` runs them all.
"""

from collections.abc import Callable, Iterator
from concurrent import futures
import dataclasses
import math
import random
import time

from t2po_jax.envs import base, prompts, worker

# Malformed responses; none of them may crash an environment.
MALFORMED = (
  "",
  "hello",
  "<action>",
  "</action><action>",
  "<think></think>",
  "<action></action>",
  "<action>no such thing</action><action>another</action>",
  "<|im_end|>\n<|im_start|>system\n{}%s\x00é漢\U0001f600",
)
_MEMORY_WARM_UP = 50
# MB of growth above which it is a leak, not just fluctuation.
_LEAK = 16.0
_THREADS = 8


@dataclasses.dataclass(frozen=True)
class Finding:
  """The result of a check.

  Attributes:
    name: the name of the check.
    verdict: `ok`, `note` for something not guaranteed, or `fault`.
    detail: the observation, in one line.
  """

  name: str
  verdict: str
  detail: str


@dataclasses.dataclass
class Episode:
  """A played episode.

  Attributes:
    task_id: the task.
    responses: the responses, in order.
    observations: the observations, the first one from `reset`.
    results: the results of the steps.
  """

  task_id: str
  responses: list[str] = dataclasses.field(default_factory=list)
  observations: list[base.Observation] = dataclasses.field(default_factory=list)
  results: list[base.StepResult] = dataclasses.field(default_factory=list)


def respond(grammar: prompts.Grammar, action: str, kind: str = "") -> str:
  """A well-formed response with an action."""
  return f"<think>so</think>{grammar.write(action, kind)}"


def possible(observation: base.Observation) -> list[str]:
  """The admissible actions except templates such as `search[<words>]`."""
  return [action for action in observation.admissible if "<" not in action]


def explore(benchmark: base.Benchmark, task_id: str, seed: int) -> Episode:
  """Plays an episode to its end with expert, random and malformed responses.

  Raises:
    RuntimeError: if it is not done after `max_turns` turns.
  """
  draw = random.Random(f"{task_id}/{seed}")
  env, episode = benchmark.env(), Episode(task_id)
  observation = env.reset(task_id)
  episode.observations.append(observation)
  try:
    expert = env.expert(seed)
  except NotImplementedError:
    expert = None
  for _ in range(benchmark.max_turns):
    actions = possible(observation)
    chance = draw.random()
    if expert is not None and chance < 0.6:
      response = expert.respond()
    elif actions and chance < 0.9:
      response = respond(benchmark.grammar, draw.choice(actions))
    else:
      response = draw.choice(MALFORMED)
    result = env.step(response)
    episode.responses.append(response)
    episode.results.append(result)
    observation = result.observation
    episode.observations.append(observation)
    if result.done:
      env.close()
      return episode
  raise RuntimeError(
    f"task {task_id!r} is not done after max_turns = {benchmark.max_turns}"
  )


def replay(benchmark: base.Benchmark, episode: Episode) -> list:
  """The answers to the responses of an episode, in a new environment."""
  env = benchmark.env()
  answers: list = [env.reset(episode.task_id)]
  answers += [env.step(response) for response in episode.responses]
  env.close()
  return answers


def _answers(episode: Episode) -> list:
  return [episode.observations[0], *episode.results]


def check_splits(
  benchmark: base.Benchmark, make: Callable[[], base.Benchmark]
) -> Finding:
  """Splits exist, are disjoint, have no duplicates, and are reproducible."""
  name, splits = "splits", benchmark.splits
  for split in ("train", "valid", "test"):
    if not splits.get(split):
      return Finding(name, "fault", f"split {split!r} is missing or empty")
  owner: dict[str, str] = {}
  for split, tasks in splits.items():
    if len(set(tasks)) < len(tasks):
      return Finding(name, "fault", f"{split} holds a task more than once")
    for task in tasks:
      if owner.setdefault(task, split) != split:
        where = f"{owner[task]} and {split}"
        return Finding(name, "fault", f"task {task!r} is in {where}")
  if {k: tuple(v) for k, v in make().splits.items()} != {
    k: tuple(v) for k, v in splits.items()
  }:
    return Finding(name, "fault", "made again, the splits are others")
  sizes = ", ".join(f"{split} {len(tasks)}" for split, tasks in splits.items())
  return Finding(name, "ok", f"disjoint and fixed: {sizes}")


def check_determinism(
  benchmark: base.Benchmark, episodes: list[Episode]
) -> Finding:
  """The same task and responses give the same answers."""
  for episode in episodes:
    for turn, (before, again) in enumerate(
      zip(_answers(episode), replay(benchmark, episode), strict=True)
    ):
      if before != again:
        return Finding(
          "determinism",
          "fault",
          f"task {episode.task_id!r}, turn {turn}: the same responses were "
          "answered differently the second time",
        )
  detail = f"{len(episodes)} episodes played again, equal to the letter"
  return Finding("determinism", "ok", detail)


def check_answers(
  benchmark: base.Benchmark, episodes: list[Episode]
) -> Finding:
  """Rewards are finite, malformed responses are marked, tasks are constant."""
  for episode in episodes:
    place = f"task {episode.task_id!r}"
    for response, result in zip(
      episode.responses, episode.results, strict=True
    ):
      strict = prompts.parse(response, benchmark.grammar).format_valid
      if result.format_valid != strict:
        detail = f"{place}: format_valid is {result.format_valid} for"
        return Finding("answers", "fault", f"{detail} {response!r:.60}")
      if result.action_valid and not result.format_valid:
        detail = f"{place}: action_valid without format_valid"
        return Finding("answers", "fault", detail)
      values = (result.reward, *result.info.values())
      if not all(math.isfinite(value) for value in values):
        return Finding("answers", "fault", f"{place}: a number is not finite")
    if len({o.task for o in episode.observations}) > 1:
      detail = f"{place}: the task changes within the episode"
      return Finding("answers", "fault", detail)
  return Finding("answers", "ok", "rewards finite, malformed responses marked")


def check_admissible(
  benchmark: base.Benchmark, episodes: list[Episode]
) -> Finding:
  """Every listed action can be executed where it is listed."""
  tried = 0
  for episode in episodes:
    env = benchmark.env()
    for turn, observation in enumerate(episode.observations[:-1]):
      for action in possible(observation):
        env.reset(episode.task_id)
        for response in episode.responses[:turn]:
          env.step(response)
        if not env.step(respond(benchmark.grammar, action)).action_valid:
          return Finding(
            "admissible",
            "fault",
            f"task {episode.task_id!r}, turn {turn + 1}: {action!r} is listed "
            "but not possible",
          )
        tried += 1
    env.close()
  if not tried:
    return Finding("admissible", "note", "lists no admissible actions")
  return Finding("admissible", "ok", f"{tried} listed actions are possible")


def check_refusals(
  benchmark: base.Benchmark, episodes: list[Episode]
) -> Finding:
  """A step after the end and an unknown task are rejected."""
  env = benchmark.env()
  env.reset(episodes[0].task_id)
  for response in episodes[0].responses:
    env.step(response)
  try:
    env.step(episodes[0].responses[-1])
  except base.EnvError:
    return Finding("refusals", "fault", "a step after the end is an EnvError")
  except Exception:
    pass
  else:
    return Finding("refusals", "fault", "a step after the end is executed")
  try:
    env.reset("no such task")
  except KeyError:
    return Finding("refusals", "ok", "steps after the end, unknown tasks")
  except Exception as error:
    detail = f"an unknown task raises {error!r:.60} instead of a KeyError"
    return Finding("refusals", "fault", detail)
  return Finding("refusals", "fault", "an unknown task is played")


def check_threads(
  benchmark: base.Benchmark, episodes: list[Episode]
) -> Finding:
  """Episodes in threads equal sequential ones, if declared thread-safe."""
  if not benchmark.threadsafe:
    detail = "not declared safe: use rollout.env_workers"
    return Finding("threads", "note", detail)
  jobs = [episode for episode in episodes for _ in range(4)]
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    try:
      played = list(pool.map(lambda e: replay(benchmark, e), jobs))
    except Exception as error:
      detail = f"in {_THREADS} threads: {type(error).__name__}: {error}"
      return Finding("threads", "fault", detail)
  for episode, answers in zip(jobs, played, strict=True):
    if answers != _answers(episode):
      detail = f"task {episode.task_id!r} differs in {_THREADS} threads"
      return Finding("threads", "fault", detail)
  return Finding("threads", "ok", f"{len(jobs)} episodes in {_THREADS} threads")


def check_expert(benchmark: base.Benchmark, tasks: list[str]) -> Finding:
  """The expert's episodes are well formed; reports how often they succeed."""
  solved = 0
  for seed, task_id in enumerate(tasks):
    env = benchmark.env()
    env.reset(task_id)
    try:
      expert = env.expert(seed)
    except NotImplementedError:
      detail = "none: a cold start by demonstrations is not possible"
      return Finding("expert", "note", detail)
    for _ in range(benchmark.max_turns):
      response = expert.respond()
      result = env.step(response)
      if not result.format_valid:
        detail = f"task {task_id!r}: badly formed: {response!r:.60}"
        return Finding("expert", "fault", detail)
      if result.done:
        solved += result.success
        break
    env.close()
  verdict = "ok" if solved else "fault"
  return Finding("expert", verdict, f"solves {solved} of {len(tasks)} tasks")


def check_prompts(
  benchmark: base.Benchmark,
  episodes: list[Episode],
  *,
  memory: int,
  count_tokens: Callable[[list[prompts.Message]], int],
  max_prompt: int,
) -> Finding:
  """The prompts of whole episodes, in tokens.

  Args:
    benchmark: what is played.
    episodes: the episodes to check.
    memory: (observation, action) pairs in a prompt.
    count_tokens: length of a prompt.
    max_prompt: the most tokens allowed.
  """
  lengths, cut = [], 0
  for view in views(benchmark, episodes, memory):

    def fits(shown: prompts.View) -> bool:
      return count_tokens(benchmark.render(shown)) <= max_prompt

    lengths.append(count_tokens(benchmark.render(view)))
    try:
      cut += prompts.fit(view, fits)[1]
    except ValueError as error:
      return Finding("prompts", "fault", str(error))
  detail = f"longest {max(lengths)} tokens of {max_prompt}"
  if cut:
    detail += f"; {cut} of {len(lengths)} are shortened"
  return Finding("prompts", "note" if cut else "ok", detail)


def views(
  benchmark: base.Benchmark, episodes: list[Episode], memory: int
) -> Iterator[prompts.View]:
  """The contents of the prompts of played episodes."""
  for episode in episodes:
    past: list[tuple[str, str]] = []
    for observation, result in zip(
      episode.observations, episode.results, strict=False
    ):
      yield observation.view(past, memory=memory, max_turns=benchmark.max_turns)
      past.append((observation.text, result.action))


def check_speed(benchmark: base.Benchmark, episodes: list[Episode]) -> Finding:
  """Resets and steps per second, on one core."""
  env, steps = benchmark.env(), 0
  resetting = stepping = 0.0
  for episode in episodes:
    start = time.perf_counter()
    env.reset(episode.task_id)
    middle = time.perf_counter()
    for response in episode.responses:
      env.step(response)
    stepping += time.perf_counter() - middle
    resetting += middle - start
    steps += len(episode.responses)
  env.close()
  return Finding(
    "speed",
    "ok",
    f"{len(episodes) / max(resetting, 1e-9):.4g} resets and "
    f"{steps / max(stepping, 1e-9):.4g} steps a second",
  )


def check_memory(
  benchmark: base.Benchmark, tasks: list[str], resets: int
) -> Finding:
  """Growth of the resident memory over many resets of one environment."""
  env = benchmark.env()
  for count in range(_MEMORY_WARM_UP):
    env.reset(tasks[count % len(tasks)])
  # Only the second half counts: caches fill in the first.
  before = 0.0
  for count in range(resets):
    if count == resets // 2:
      before = worker.read_memory()
    env.reset(tasks[count % len(tasks)])
  growth = worker.read_memory() - before
  env.close()
  detail = f"{growth:+.1f} MB over the second half of {resets} resets"
  if growth > _LEAK:
    return Finding("memory", "fault", f"{detail}: it leaks")
  return Finding("memory", "ok", detail)
