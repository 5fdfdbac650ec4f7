"""The training loop: collect, estimate, update, log, evaluate, save.

The order of things, also after a restart:
  1. benchmark, policy and tokenizer as the configuration says;
  2. the cold start, from the cache if it has been done before;
  3. the newest checkpoint of the workdir, if there is one: parameters,
     optimizer state, and the loop's position (thresholds, best score);
  4. update after update. Tasks and randomness of an update follow from the
     seed and the update's number, so a killed run that is started again goes
     on exactly as if it had never stopped.
"""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

from absl import logging
import jax
from ml_collections import config_dict
import numpy as np

from t2po_jax import build, checkpoint, cold_start, evaluate, metrics, types
from t2po_jax.learning import batching
from t2po_jax.rollout import collect, statistics

CONSOLE = (
  "eval/success",
  "eval/tokens",
  "train/success",
  "train/return",
  "train/tokens",
  "train/turns",
  "train/intervention_rate",
  "train/resample_rate",
  "train/format_valid",
  "learn/entropy",
  "learn/grad_norm",
  "learn/mismatch_mean",
  "seconds/collect",
  "seconds/update",
)


class CompileCounter:
  """Counts programs that XLA builds; after the warm-up there are none."""

  def __init__(self):
    self.count = 0
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event: str, *_: Any, **__: Any) -> None:
    self.count += event == "/jax/core/compile/backend_compile_duration"


def tasks_of(
  split: tuple[str, ...], count: int, *, update: int, seed: int
) -> list[str]:
  """The tasks of one update: epochs of fresh permutations, cut in pieces.

  Args:
    split: all task ids.
    count: tasks per update.
    update: number of the update, from 1.
    seed: of the order.

  Returns:
    Task ids; every task is played once before one is played again.
  """
  tasks = []
  for place in range((update - 1) * count, update * count):
    epoch, index = divmod(place, len(split))
    order = np.random.default_rng((seed, epoch)).permutation(len(split))
    tasks.append(split[order[index]])
  return tasks


class Run:
  """One training run in one workdir."""

  def __init__(self, config: config_dict.ConfigDict, workdir: pathlib.Path):
    """Builds everything up to the first update; see the module docstring.

    Raises:
      ValueError: if the configuration or something it names is wrong.
    """
    build.check(config)
    self.config, self.workdir = config, workdir
    self.compiles = CompileCounter()
    self.timer = metrics.Timer()
    benchmark = build.benchmark(config)
    agent = build.agent(config, benchmark)
    self.learner = build.policy_learner(config, agent)
    self.actor = build.actor(config, benchmark, agent)
    self._check_first_prompt()
    self.thresholds = build.calibrators(config)
    self.checkpoints = checkpoint.Checkpoints(
      workdir / "checkpoints", keep=config.train.keep
    )
    self._check_workdir()
    with self.timer.stage("cold_start"):
      agent = cold_start.cold_start(config, self.actor, agent)
    self.reference = None
    if config.loss.kl != "off":
      self.reference = self.learner.place_params(agent.params)
    self.start = self.checkpoints.latest() or 0
    if self.start:
      self.state, position = self.checkpoints.restore(
        self.learner.abstract_state()
      )
      for name, threshold in self.thresholds.items():
        threshold.load(position["thresholds"][name])
      metrics.say(f"resuming after update {self.start}")
    else:
      self.state = self.learner.init_state(agent.params)

  def _check_first_prompt(self) -> None:
    """Refuses a prompt length that the split's first task does not fit."""
    benchmark = self.actor.benchmark
    env = benchmark.env()
    observation = env.reset(benchmark.splits[self.config.train.split][0])
    env.close()
    view = collect.first_view(benchmark, observation)
    rules = build.rules(self.config, build.train_sampling(self.config))
    try:
      collect.fit_prompt(benchmark, self.actor.tokenizer, view, rules)
    except ValueError as error:
      raise ValueError(
        f"rollout.max_prompt: found {rules.max_prompt} tokens; {error}"
      ) from None

  def _check_workdir(self) -> None:
    """Notes the configuration; says what differs from an earlier start."""
    path = self.workdir / "config.json"
    settings = flatten(self.config.to_dict())
    if path.is_file():
      earlier = json.loads(path.read_text())
      for key in sorted(settings.keys() | earlier.keys()):
        if settings.get(key) != earlier.get(key):
          logging.warning(
            "%s was %r when this workdir was started and is %r now",
            key,
            earlier.get(key),
            settings.get(key),
          )
    path.write_text(json.dumps(settings, indent=2) + "\n")

  def warm_up(self) -> None:
    """Compiles all sampling programs."""
    self.actor.sampler.load(self.state.params)
    samplings = [
      build.train_sampling(self.config),
      build.eval_sampling(self.config),
    ]
    with metrics.progress("compiling") as advance:
      self.actor.sampler.warm_up(samplings, lambda done, total: advance(done))

  def train(self) -> dict[str, float]:
    """Runs all updates that are left; returns the last evaluation."""
    config = self.config
    with metrics.Writer(
      self.workdir,
      resume_step=self.start + 1 if self.start else 0,
      console=CONSOLE,
      tensorboard=config.log.tensorboard,
      wandb_project=config.log.wandb,
      mlflow_experiment=config.log.mlflow,
      settings=flatten(config.to_dict()),
    ) as writer:
      with self.timer.stage("warm_up"):
        self.warm_up()
      last = {}
      if not self.start:
        last = self._evaluate(0)
        writer.write(0, last | self.timer.take())
      for update in range(self.start + 1, config.train.updates + 1):
        compiled = self.compiles.count
        numbers = self._update(update)
        score = None
        if _due(update, config.train.eval_every, config.train.updates):
          last = self._evaluate(update)
          numbers |= last
          score = last["eval/success"]
        numbers["compiles"] = self.compiles.count - compiled
        if score is not None or _due(
          update, config.train.save_every, config.train.updates
        ):
          with self.timer.stage("save"):
            self._save(update, score)
        seconds = self.timer.take()
        writer.write(update, numbers | seconds | self._speed(numbers, seconds))
    self.checkpoints.close()
    self.actor.pool.close()
    return last

  def _update(self, update: int) -> dict[str, float]:
    """Collects one rollout and learns from it."""
    config = self.config
    with self.timer.stage("collect"):
      rollout, numbers = self._collect(update)
    with self.timer.stage("advantages"):
      found = build.estimate(config, rollout.trajectories)
      segments = batching.trajectory_segments(
        rollout.trajectories,
        found.tokens if found.tokens is not None else found.turns,
        max_length=config.train.row_tokens,
        drop_void=config.reward.drop_void,
      )
      packed = batching.pack(
        segments,
        lengths=[config.train.row_tokens],
        rows=config.train.micro_rows,
        minibatches=config.train.mini_batches,
        seed=update,
      )
    with self.timer.stage("update"):
      self.state, learned = self.learner.update(
        self.state,
        packed.batches,
        epochs=config.train.epochs,
        ref_params=self.reference,
      )
      learned = metrics.to_floats(learned)
    for name, threshold in self.thresholds.items():
      threshold.advance()
      numbers[f"control/{name}"] = threshold.value
    numbers |= {f"learn/{name}": value for name, value in learned.items()}
    numbers |= {f"pack/{name}": value for name, value in packed.stats.items()}
    return numbers | found.metrics

  def _collect(self, update: int) -> tuple[collect.Rollout, dict[str, float]]:
    """Plays the update's tasks with the current parameters."""
    config, actor = self.config, self.actor
    tasks = tasks_of(
      actor.benchmark.splits[config.train.split],
      config.rollout.tasks,
      update=update,
      seed=config.seed,
    )
    before = actor.scheduler.counters.copy()
    actor.sampler.load(self.state.params)
    total = len(tasks) * config.rollout.group_size
    with metrics.progress(f"update {update}", total) as advance:
      rollout = collect.collect(
        tasks,
        group_size=config.rollout.group_size,
        benchmark=actor.benchmark,
        pool=actor.pool,
        tokenizer=actor.tokenizer,
        scheduler=actor.scheduler,
        rules=build.rules(
          config, build.train_sampling(config), **self._thresholds()
        ),
        seed=(config.seed, update),
        progress=advance,
      )
    self.thresholds["epsilon"].add(rollout.deltas)
    self.thresholds["eta"].add(rollout.gammas)
    self._dump(f"train-{update:05d}", rollout.trajectories)
    described = statistics.describe(rollout.trajectories)
    numbers = {f"train/{name}": value for name, value in described.items()}
    numbers["train/mixed_groups"] = statistics.mixed_groups(
      rollout.trajectories
    )
    work = actor.scheduler.counters - before
    numbers |= {f"sampler/{name}": value for name, value in work.items()}
    return rollout, numbers

  def _speed(
    self, numbers: Mapping[str, float], seconds: Mapping[str, float]
  ) -> dict[str, float]:
    """Tokens per second of sampling and of learning."""
    trained = numbers.get("pack/tokens", 0.0) * self.config.train.epochs
    sampled = numbers["sampler/slot_steps_used"]
    return {
      "speed/sampled_tokens": sampled / seconds["seconds/collect"],
      "speed/trained_tokens": trained / seconds["seconds/update"],
    }

  def _evaluate(self, update: int) -> dict[str, float]:
    with self.timer.stage("evaluate"):
      self.actor.sampler.load(self.state.params)
      numbers, trajectories = evaluate.evaluate(
        self.config, self.actor, **self._thresholds()
      )
      self._dump(f"eval-{update:05d}", trajectories)
    return numbers

  def _thresholds(self) -> dict[str, float]:
    return {name: t.value for name, t in self.thresholds.items()}

  def _dump(self, name: str, trajectories: list[types.Trajectory]) -> None:
    """Writes the first episodes, for reading."""
    count = self.config.log.trajectories
    if count <= 0:
      return
    folder = self.workdir / "trajectories"
    folder.mkdir(parents=True, exist_ok=True)
    decode = self.actor.tokenizer.decode
    lines = [
      json.dumps(statistics.to_record(trajectory, decode))
      for trajectory in trajectories[:count]
    ]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

  def _save(self, update: int, score: float | None) -> None:
    position = {
      "update": update,
      "thresholds": {
        name: threshold.state_dict()
        for name, threshold in self.thresholds.items()
      },
    }
    self.checkpoints.save(update, self.state, position, score=score)


def _due(update: int, every: int, last: int) -> bool:
  """Whether something that happens every so often happens now."""
  return update == last or (every > 0 and update % every == 0)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested settings as one dict of dotted keys."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


def train(
  config: config_dict.ConfigDict, workdir: str | pathlib.Path
) -> dict[str, float]:
  """Trains as configured; goes on where an earlier run in workdir stopped.

  Args:
    config: see `configs/base.py`.
    workdir: where metrics, checkpoints and trajectories are written.

  Returns:
    The last evaluation.

  Raises:
    ValueError: if the configuration or something it names is wrong.
  """
  workdir = pathlib.Path(workdir).absolute()
  workdir.mkdir(parents=True, exist_ok=True)
  return Run(config, workdir).train()
