"""Trajectories per second of multi-turn rollouts, against a lock-step loop.

  python experiments/benchmarks/rollout.py --json=rollout.json
  python experiments/benchmarks/rollout.py --mode=loop --json=loop.json

With `--mode=loop` whole updates are timed instead, with and without overlap of
rollouts and updates; see `whole_loop.py`.

Episodes are synthetic, with the long tails of real ones: numbers of turns are
geometric, response lengths and the environment's answering times log-normal.
Both loops play the same episodes with the same responses on the same slots of
one sampler, prefixes reused alike. Ours refills a slot as soon as its response
has ended, while other environments are answering. The lock-step loop plays as
many episodes at once as there are slots, samples one turn of all, waits until
the longest response has ended, and then until the slowest environment has
answered; episodes that have ended leave their slots idle. The two alternate,
so that only their ratio depends on a quiet machine.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import hashlib
import json
import pathlib
import statistics
import sys
import time
from typing import Any

from absl import flags
import jax
import numpy as np

from t2po_jax import types
from t2po_jax.envs import base, prompts
from t2po_jax.experiments import command_line
from t2po_jax.experiments.benchmarks import lock_step, whole_loop
from t2po_jax.models import config as model_config
from t2po_jax.models import decoder
from t2po_jax.rollout import (
  collect,
  draw,
  environments,
  handover,
  sampler,
  scheduler,
  slots,
)


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
  """All flags of this program."""
  own: dict[str, Any] = {"flag_values": given}
  flags.DEFINE_string("size", "tiny", "Named model size.", **own)
  flags.DEFINE_integer("episodes", 128, "Episodes per rollout.", **own)
  flags.DEFINE_integer("slots", 32, "Responses decoded at once.", **own)
  flags.DEFINE_integer("chunk", 16, "Tokens per device call.", **own)
  flags.DEFINE_float("turns", 5.0, "Mean turns per episode.", **own)
  flags.DEFINE_integer("max_turns", 20, "Most turns.", **own)
  flags.DEFINE_float("response", 14.0, "Median response tokens.", **own)
  flags.DEFINE_integer("max_response", 96, "Most of them.", **own)
  flags.DEFINE_float("latency", 0.05, "Median seconds of a step.", **own)
  flags.DEFINE_float("spread", 0.8, "Deviation of their logarithms.", **own)
  flags.DEFINE_integer("rounds", 3, "Rounds after a first, untimed.", **own)
  flags.DEFINE_enum(
    "mode", "rollout", ["rollout", "loop"], "What is timed.", **own
  )
  flags.DEFINE_list(
    "latencies", ["0", "0.05", "0.5"], "loop: median seconds of a step.", **own
  )
  flags.DEFINE_list(
    "variants",
    list(whole_loop.USUAL),
    "loop: what is compared; whole_loop.py describes them.",
    **own,
  )
  flags.DEFINE_integer(
    "updates", 6, "loop: updates per run.", lower_bound=5, **own
  )
  flags.DEFINE_integer(
    "epochs",
    1,
    "loop: passes of an update over its rollout.",
    lower_bound=1,
    **own,
  )
  flags.DEFINE_integer(
    "tasks", 4, "loop: groups of 4 episodes.", lower_bound=1, **own
  )
  flags.DEFINE_integer(
    "tokens", 16, "loop: most tokens of a response.", lower_bound=2, **own
  )
  flags.DEFINE_float(
    "hang",
    0.0,
    "loop: share of steps that never answer.",
    lower_bound=0.0,
    upper_bound=1.0,
    **own,
  )
  flags.DEFINE_float(
    "timeout",
    10.0,
    "loop: with --hang, median latencies until a step is given up, and at "
    "least a second.",
    lower_bound=1.0,
    **own,
  )
  flags.DEFINE_string(
    "tunix_python", sys.executable, "loop: an interpreter with Tunix.", **own
  )
  flags.DEFINE_string("json", "", "File to write the numbers to.", **own)


OBSERVATION = 24  # Tokens.
MEMORY = 2
MAX_PROMPT = OBSERVATION + MEMORY * (OBSERVATION + 1) + 8


def dice(*name: Any) -> np.random.Generator:
  """A generator that belongs to a name."""
  digest = hashlib.sha256(repr(name).encode()).digest()
  return np.random.default_rng(int.from_bytes(digest[:8], "little"))


class Env:
  """One environment; everything follows from the task's name."""

  def __init__(self, benchmark: "Benchmark") -> None:
    self._benchmark = benchmark

  def reset(self, task_id: str) -> base.Observation:
    self._task, self._turn = task_id, 0
    return self._observe()

  def step(self, response: str) -> base.StepResult:
    del response
    self._turn += 1
    time.sleep(self._benchmark.latency(self._task, self._turn))
    return base.StepResult(
      observation=self._observe(),
      action="7",
      reward=0.0,
      done=self._turn >= self._benchmark.turns(self._task),
      format_valid=True,
      action_valid=True,
    )

  def close(self) -> None:
    pass

  def _observe(self) -> base.Observation:
    words = dice(self._task, self._turn).integers(1, 1000, OBSERVATION)
    return base.Observation("5 " * 8, " ".join(map(str, words)))


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """Episodes with long tails; implements `base.Benchmark`.

  Attributes:
    mean_turns: mean of the geometric number of turns.
    max_turns: where it is cut.
    median_latency: seconds.
    spread: standard deviation of the logarithm of the seconds.
  """

  mean_turns: float
  max_turns: int
  median_latency: float
  spread: float
  grammar: prompts.Grammar = prompts.Grammar()

  def env(self) -> Env:
    return Env(self)

  def turns(self, task_id: str) -> int:
    drawn = dice("turns", task_id).geometric(1 / self.mean_turns)
    return min(int(drawn), self.max_turns)

  def latency(self, task_id: str, turn: int) -> float:
    drawn = dice("latency", task_id, turn).lognormal(0, self.spread)
    return self.median_latency * drawn

  def render(self, view: prompts.View) -> list[prompts.Message]:
    told = [part for pair in view.memory for part in pair]
    text = " ".join([view.task, *told, view.observation])
    return [{"role": "user", "content": text}]

  def category(self, task_id: str) -> str:
    return "all"


class Numbers:
  """A tokenizer whose text is a list of ids."""

  def encode(self, text: str) -> list[int]:
    return [int(word) for word in text.split()]

  def decode(self, ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))

  def render_chat(
    self, messages: Sequence[prompts.Message], prefix: str = ""
  ) -> list[int]:
    del prefix
    return [i for message in messages for i in self.encode(message["content"])]


class Scheduler(scheduler.Scheduler):
  """Ends each response at a length that belongs to the request's key."""

  def __init__(
    self, device: sampler.Sampler, median: float, spread: float
  ) -> None:
    super().__init__(device)
    self.slots = device.slots
    self._median, self._spread = median, spread

  def submit(self, request: sampler.Request) -> None:
    drawn = dice(request.key.tolist()).lognormal(0, self._spread)
    limit = int(np.clip(self._median * drawn, 1, request.limit))
    super().submit(dataclasses.replace(request, limit=limit))


class LockStep(lock_step.LockStep):
  """Plays as many episodes as there are slots, turn by turn."""

  scheduler: Scheduler

  def episodes(
    self,
    tasks: Sequence[tuple[str, int, int]],
    *,
    early: Sequence[handover.Early] = (),
    handed: Sequence[handover.Handed] = (),
  ) -> Iterator[types.Trajectory]:
    slots = self.scheduler.slots
    for first in range(0, len(tasks), slots):
      yield from super().episodes(
        tasks[first : first + slots], early=early, handed=handed
      )


LOOPS = {"ours": collect.Loop, "lock_step": LockStep}


def play(
  given: flags.FlagValues,
  loop: Callable[..., collect.Loop],
  benchmark: Any,
  pool: environments.EnvironmentPool,
  under: Scheduler,
) -> dict[str, float]:
  """One rollout: trajectories per second, and what it took."""
  rules = collect.Rules(
    memory=MEMORY,
    max_prompt=MAX_PROMPT,
    max_response=given.max_response,
    sampling=draw.Sampling(),
  )
  under.forget()
  before = under.counters.copy()
  start = time.perf_counter()
  running = loop(benchmark, pool, Numbers(), under, rules, (0,))
  plan = [(f"task {i}", i, 0) for i in range(given.episodes)]
  trajectories = running.run(plan).trajectories
  seconds = time.perf_counter() - start
  work = under.counters - before
  return {
    "trajectories": float(len(trajectories)),
    "turns": float(sum(len(t.turns) for t in trajectories)),
    "tokens": float(work["slot_steps_used"]),
    "trajectories_per_s": len(trajectories) / seconds,
    "tokens_per_s": work["slot_steps_used"] / seconds,
    "decode_steps": float(work["decode_steps"]),
    "slots_used": work["slot_steps_used"] / max(work["slot_steps"], 1),
    "prompt_tokens_reused": work["prompt_tokens_reused"]
    / max(work["prompt_tokens"], 1),
  }


def build(given: flags.FlagValues) -> Scheduler:
  """Slots of a random model whose responses never end by themselves."""
  config = model_config.named(given.size)
  policy = decoder.Policy(config)
  device = sampler.Sampler(
    policy,
    sampler.Vocabulary(
      token_bytes=[b"x"] * config.vocab_size,
      eos=(),
      closing=(1, 2),
      stops=("</action>",),
    ),
    slots.Control(),
    slots=given.slots,
    max_prompt=MAX_PROMPT,
    max_response=given.max_response,
    chunk=given.chunk,
  )
  device.load(jax.jit(policy.init)(jax.random.key(0)))
  device.warm_up([draw.Sampling()])
  return Scheduler(device, given.response, given.spread)


def measure(given: flags.FlagValues) -> dict[str, dict[str, float]]:
  """Medians of both loops, and the ratio of their speeds."""
  benchmark: Any = Benchmark(
    given.turns, given.max_turns, given.latency, given.spread
  )
  pool = environments.EnvironmentPool(benchmark.env, threads=given.slots)
  under = build(given)
  rounds = {name: [] for name in LOOPS}
  for number in range(given.rounds + 1):
    for name, loop in LOOPS.items():
      played = play(given, loop, benchmark, pool, under)
      if number:
        rounds[name].append(played)
  pool.close()
  measured = {
    name: {key: statistics.median(one[key] for one in runs) for key in runs[0]}
    for name, runs in rounds.items()
  }
  measured["ratio"] = {
    key: measured["ours"][key] / measured["lock_step"][key]
    for key in ("trajectories_per_s", "tokens_per_s", "decode_steps")
  }
  return measured


def measure_loop(
  given: flags.FlagValues,
) -> dict[str, dict[str, dict[str, float]]]:
  """Whole updates by latency and variant; prints them."""
  known = [*whole_loop.VARIANTS, *whole_loop.PEERS]
  unknown = sorted(set(given.variants) - set(known))
  if unknown:
    raise ValueError(
      f"--variants: found {unknown[0]!r}, expected some of {', '.join(known)}"
    )
  work = whole_loop.Work(
    size=given.size,
    updates=given.updates,
    slots=given.slots,
    epochs=given.epochs,
    tasks=given.tasks,
    tokens=given.tokens,
    spread=given.spread,
    hang=given.hang,
    timeout=given.timeout,
    tunix_python=given.tunix_python,
  )
  measured = whole_loop.measure(
    work,
    latencies=[float(latency) for latency in given.latencies],
    variants=given.variants,
    rounds=given.rounds,
  )
  print(whole_loop.table(measured))
  return measured


def write(path: str, measured: dict) -> None:
  """Writes the numbers if a file was named."""
  if path:
    text = json.dumps(measured, indent=2)
    pathlib.Path(path).write_text(text + "\n")


def compare(given: flags.FlagValues) -> None:
  """Measures both loops, or whole updates, and prints the numbers.

  Raises:
    ValueError: if a variant is unknown.
  """
  if given.mode == "loop":
    write(given.json, measure_loop(given))
    return
  measured = measure(given)
  print(f"{'':24}{'ours':>12}{'lock step':>12}{'ratio':>9}")
  for key, value in measured["ours"].items():
    other = measured["lock_step"][key]
    ratio = f"{value / other:9.2f}" if other else ""
    print(f"{key:24}{value:12.4g}{other:12.4g}{ratio}")
  write(given.json, measured)


def run() -> None:
  """Runs this program."""
  command_line.run(compare, define_flags)


if __name__ == "__main__":
  run()
