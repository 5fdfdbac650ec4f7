"""Seconds per update of the whole training loop, with and without overlap.

Run by `rollout.py --mode=loop`. The policy starts from scratch and plays the
string bandit behind a slow line (`slow_toy`). What is compared, on the same
tasks:

  on the spot     environments are called one after another: reproducible
  lock step       all episodes turn by turn: each turn waits for the longest
                  response, then for the slowest environment
  threads         environments answer in threads, their answers are taken as
                  they come: rounding depends on the order
  logical         the same threads, answers taken in logical time: reproducible
  one size        the same threads, programs of one size: reproducible
  ahead           one size, and the next rollout is played beside the update
  oversample      one size, and the whole next update's groups start with
                  this one's: reproducible
  oversample 2    the same with those of the next two updates
  oversample ahead       oversample, played beside the update: reproducible
  oversample any size    oversample with threads alone
  refresh         logical, and what started early continues with new weights
  tunix           Tunix's agentic GRPO learner, in a process of its own

All but the first have more threads for environments than slots: a slot is lent
to another response while an environment thinks. The variants alternate, so that
only ratios depend on a quiet machine.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from t2po_jax.configs import base as settings
from t2po_jax.configs import environment, smoke
from t2po_jax.envs import toy
from t2po_jax.experiments.benchmarks import lock_step, slow_toy
from t2po_jax.models import config as model_config
from t2po_jax.rollout import collect
from t2po_jax.setup import build
from t2po_jax.training import experience, loop, metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
TUNIX = "tunix"

# Name -> keys that differ from the others; `rollout.oversample` in updates.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
  "on the spot": {"rollout.env_threads": 0},
  "lock step": {},
  "threads": {},
  "logical": {"rollout.env_calls": 1},
  "one size": {"rollout.one_size": True},
  "ahead": {"rollout.one_size": True, "rollout.ahead": 1},
  "oversample": {"rollout.oversample": 1, "rollout.one_size": True},
  "oversample 2": {"rollout.oversample": 2, "rollout.one_size": True},
  "oversample ahead": {
    "rollout.oversample": 1,
    "rollout.one_size": True,
    "rollout.ahead": 1,
  },
  "oversample any size": {"rollout.oversample": 1},
  "refresh": {
    "rollout.oversample": 1,
    "rollout.refresh": True,
    "rollout.env_calls": 1,
  },
}
# Other libraries.
PEERS = (TUNIX,)
# Compared unless said otherwise.
USUAL = (
  *("on the spot", "lock step", "threads", "logical", "one size", "ahead"),
  *("oversample", "oversample 2", "oversample ahead", "oversample any size"),
  "refresh",
)


@dataclasses.dataclass(frozen=True)
class Work:
  """What every variant does.

  Attributes:
    size: named model size.
    updates: per run, at least 5.
    slots: responses decoded at once.
    epochs: passes of an update over its rollout: how heavy it is.
    tasks: task groups of four episodes per update.
    tokens: of a response.
    spread: deviation of the logarithm of a step's seconds.
    hang: share of steps that never answer.
    timeout: median latencies after which a step is given up, but never before
      one second; only where steps hang.
    tunix_python: an interpreter that has Tunix.
  """

  size: str
  updates: int
  slots: int
  epochs: int
  tasks: int
  tokens: int
  spread: float
  hang: float
  timeout: float
  tunix_python: str = sys.executable

  def limit(self, latency: float) -> float:
    """Seconds after which a step is given up; 0 = never."""
    return max(self.timeout * latency, 1.0) if self.hang else 0.0


@dataclasses.dataclass(frozen=True)
class Timed:
  """One run.

  Attributes:
    seconds: per update, without the first two, the last, which evaluates and
      starts nothing early, and those that compile.
    described: means over the same updates, by name.
  """

  seconds: list[float]
  described: dict[str, float]


def config_of(variant: str, work: Work, *, latency: float) -> settings.Config:
  """The configuration of one run."""
  config = smoke.get_config()
  config.env = environment.section(
    f"{slow_toy.__name__}:SlowToy",
    latency=latency,
    spread=work.spread,
    hang=work.hang,
  )
  config.update_from_flattened_dict(
    {
      "model.size": work.size,
      "cold_start.kind": "none",
      "guard.action": "off",
      "control.thinking.max_tokens": max(work.tokens // 2, 2),
      "rollout.tasks": work.tasks,
      "rollout.slots": work.slots,
      "rollout.max_response": work.tokens,
      "rollout.env_timeout": work.limit(latency),
      "train.updates": work.updates,
      "train.epochs": work.epochs,
      "train.row_tokens": -(-(config.rollout.max_prompt + work.tokens) // 64)
      * 64,
      "train.eval_every": 0,
      "train.save_every": 0,
      "eval.tasks": 1,
      "log.tensorboard": False,
      "log.trajectories": 0,
    }
  )
  # This update's episodes and those of the next two.
  config.rollout.env_threads = 3 * work.tasks * config.rollout.group_size
  config.update_from_flattened_dict(dict(VARIANTS[variant]))
  config.rollout.oversample *= work.tasks
  return settings.read(config)


def time_updates(
  config: settings.Config, plays: type[collect.Loop] = collect.Loop
) -> Timed:
  """Runs a configuration."""
  with tempfile.TemporaryDirectory() as folder:
    loop.train(config, folder, plays=plays)
    lines = metrics.read(pathlib.Path(folder) / metrics.FILE)
  elapsed = [float(line["elapsed"]) for line in lines]
  lines = lines[3:-1]
  # Nothing is counted where all episodes had ended in earlier rollouts.
  used, ran = (
    sum(float(line.get(f"sampler/{name}", 0.0)) for line in lines)
    for name in ("slot_steps_used", "slot_steps")
  )
  described = {
    "slots_used": used / ran,
    "aborted": statistics.mean(float(line["train/aborted"]) for line in lines),
    "updates_behind": statistics.mean(
      float(line.get("train/staleness_mean", 0.0)) for line in lines
    ),
  }
  steps = list(zip(lines, elapsed[2:-2], elapsed[3:-1], strict=True))
  # Sizes that come up late are compiled late.
  plain = [step for step in steps if not float(step[0]["compiles"])]
  seconds = [after - before for _, before, after in plain or steps]
  return Timed(seconds, described)


def time_tunix(work: Work, *, latency: float) -> Timed:
  """Runs Tunix's agentic loop on the same tasks.

  Raises:
    ValueError: if it fails, for instance because Tunix is not installed, or is
      asked for more passes than one: it would count them as updates.
  """
  if work.epochs > 1:
    raise ValueError(f"--epochs: found {work.epochs}, expected 1 with tunix")
  config = config_of("threads", work, latency=latency)
  benchmark = build.benchmark(config)
  shape = dataclasses.replace(
    model_config.named(work.size),
    vocab_size=build.tokenizer_of(config, benchmark).vocab_size,
  )
  told = {
    "model": dataclasses.asdict(shape),
    "batches": [
      experience.tasks_of(
        benchmark.splits[config.train.split],
        update * work.tasks,
        work.tasks,
        seed=config.seed,
      )
      for update in range(work.updates)
    ],
    "env": {"latency": latency, "spread": work.spread, "hang": work.hang},
    "turns": toy.TURNS,
    "tokens": work.tokens,
    "group_size": config.rollout.group_size,
    "epochs": work.epochs,
    "limit": work.limit(latency),
    "learning_rate": config.optimizer.learning_rate,
    "clip_norm": config.optimizer.clip_norm,
  }
  worker = pathlib.Path(__file__).with_name("whole_loop_tunix.py")
  # It never ends by itself where a step hangs.
  with subprocess.Popen(
    [work.tunix_python, str(worker), json.dumps(told)],
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout is not None
    line = process.stdout.readline()
    process.kill()
  if not line:
    raise ValueError(
      f"--variants: tunix did not run in {work.tunix_python}; name an "
      "interpreter that has it with --tunix_python"
    )
  answer = json.loads(line)
  # As ours: neither the first two updates nor the last.
  return Timed(answer["seconds"][2:-1], {"aborted": answer["aborted"]})


def time_variant(variant: str, work: Work, *, latency: float) -> Timed:
  """One run of one variant."""
  if variant == TUNIX:
    return time_tunix(work, latency=latency)
  plays = lock_step.LockStep if variant == "lock step" else collect.Loop
  return time_updates(config_of(variant, work, latency=latency), plays)


def measure(
  work: Work,
  *,
  latencies: Sequence[float],
  variants: Sequence[str],
  rounds: int,
) -> dict[str, dict[str, dict[str, float]]]:
  """The numbers by latency and variant.

  Args:
    work: what every variant does.
    latencies: median seconds of a step.
    variants: names of `VARIANTS` or `PEERS`.
    rounds: runs of every variant, alternating.

  Returns:
    Latency -> variant -> `seconds_per_update`, the mean over a run and of
    several runs the median; the `fastest` and `slowest` update;
    `updates_per_hour`, `trajectories_per_s`; and of ours `slots_used`, the
    share of slot steps that made a token, `aborted`, episodes per update, and
    `updates_behind`, how many updates older than the newest the policy was.
  """
  measured = {}
  for latency in latencies:
    runs: dict[str, list[Timed]] = {variant: [] for variant in variants}
    for _ in range(rounds):
      for variant in variants:
        run = time_variant(variant, work, latency=latency)
        runs[variant].append(run)
        metrics.print_line(
          f"{latency:g} s, {variant}: {statistics.mean(run.seconds):.3g} s"
        )
    episodes = work.tasks * smoke.get_config().rollout.group_size
    measured[f"{latency:g}"] = {
      variant: summarise(timed, episodes) for variant, timed in runs.items()
    }
  return measured


def summarise(runs: Sequence[Timed], episodes: int) -> dict[str, float]:
  """The numbers of one variant; see `measure`."""
  # Of a run the mean: with groups started early, long and short updates may
  # alternate.
  seconds = statistics.median(statistics.mean(run.seconds) for run in runs)
  return {
    "seconds_per_update": seconds,
    "fastest": min(min(run.seconds) for run in runs),
    "slowest": max(max(run.seconds) for run in runs),
    "updates_per_hour": 3600 / seconds,
    "trajectories_per_s": episodes / seconds,
    **{
      name: statistics.mean(run.described[name] for run in runs)
      for name in runs[0].described
    },
  }


def table(measured: dict[str, dict[str, dict[str, float]]]) -> str:
  """The numbers for people, as Markdown; speeds beside the first variant's."""
  lines = [
    "| latency | variant | s per update | min-max | faster by | slots used "
    "| aborted per update | updates behind |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for latency, variants in measured.items():
    first = next(iter(variants.values()))["seconds_per_update"]
    for variant, numbers in variants.items():
      seconds = numbers["seconds_per_update"]
      used, behind = numbers.get("slots_used"), numbers.get("updates_behind")
      lines.append(
        f"| {latency} s | {variant} | {seconds:.3g} "
        f"| {numbers['fastest']:.3g}-{numbers['slowest']:.3g} "
        f"| {first / seconds:.2f}x "
        f"| {'' if used is None else f'{used:.0%}'} "
        f"| {numbers['aborted']:.2g} "
        f"| {'' if behind is None else f'{behind:.2g}'} |"
      )
  return "\n".join(lines)
