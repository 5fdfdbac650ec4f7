"""The training loop: collect, estimate, update, log, evaluate, save.

The order of things, also after a restart:
  1. benchmark, policy and tokenizer as the configuration says;
  2. the cold start, from the cache if it has been done before;
  3. the newest checkpoint of the workdir, if there is one: parameters,
     optimizer state, and the loop's position (thresholds, tasks taken, what
     the guard has seen and done);
  4. update after update. Random keys are derived from the seed and the update's
  number, and everything else that an update depends on is in the checkpoint, so
  a killed run that is restarted continues exactly as if it had never stopped.

Several processes go through these steps together (see `processes`); they share
the checkpoints, and process 0 writes everything else.
"""

import collections
from collections.abc import Callable, Mapping
import dataclasses
import json
import pathlib
from typing import Any

from absl import logging

from t2po_jax import files, records, types
from t2po_jax.configs import base as settings
from t2po_jax.distributed import processes
from t2po_jax.envs import base
from t2po_jax.learning import collapse_guard
from t2po_jax.learning.estimators import episodes
from t2po_jax.models import agent as agents
from t2po_jax.rollout import collect, handover, statistics
from t2po_jax.setup import build, memory_plan, validate
from t2po_jax.training import (
  ahead,
  checkpoint,
  cold_start,
  evaluate,
  experience,
  machine,
  metrics,
  players,
  policy_update,
)

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


class CollapseError(RuntimeError):
  """The collapse guard stopped a run."""


class Run:
  """One training run in one workdir."""

  def __init__(
    self,
    config: settings.Config,
    workdir: pathlib.Path,
    plays: Callable[..., collect.Loop] = collect.Loop,
  ) -> None:
    """Builds everything up to the first update; see the module docstring.

    Args:
      config: as of `train`.
      workdir: likewise.
      plays: likewise.

    Raises:
      ValueError: if the configuration is invalid."""
    validate.check(config)
    self.config, self.workdir = config, workdir
    self.compiles = machine.CompileCounter()
    self.timer = metrics.Timer()
    processes.require_equal(settings.flatten(settings.to_dict(config)))
    benchmark, agent = processes.first_alone(self._make_agent)
    self.learner = build.policy_learner(config, agent)
    if config.memory.check:
      needs = memory_plan.plan(config, agent.policy, self.learner)
      metrics.print_line(needs.table())
      needs.require()
    self.actor = dataclasses.replace(
      build.actor(config, benchmark, agent), loop=plays
    )
    self._check_first_prompt()
    # Nothing has been written yet: a refused start leaves no folder.
    metrics.print_line(f"workdir: {workdir}")
    workdir.mkdir(parents=True, exist_ok=True)
    self.thresholds = build.calibrators(config)
    self.checkpoints = checkpoint.Checkpoints(
      config.train.checkpoints or workdir / "checkpoints",
      keep=config.train.keep,
    )
    if processes.index() == 0:
      self._check_workdir()
    with self.timer.stage("cold_start"):
      agent = cold_start.cold_start(config, self.actor, agent)
    reference = None
    if config.loss.kl != "off" or config.reward.kl != "off":
      reference = self.learner.place_reference(agent.params)
    self.improver = policy_update.Improver(config, self.learner, reference)
    self.guard = build.watch(config)
    # The position after the rollout of the last update that was started.
    self.reached = experience.Position()
    self.players = players.Players(config, self.learner, self.actor)
    self.rollbacks = 0
    self.token_bytes = self.actor.tokenizer.token_bytes()
    self.episodes: records.Writer | None = None
    self.rows: list[dict[str, Any]] = []  # Tables of episodes, for dashboards.
    self.collapse = ""  # Why the guard stopped the run.
    self.scores: dict[str, float] = {}  # The last evaluation.
    self.rollouts = ahead.Rollouts(
      self.players.play,
      ahead=config.rollout.ahead,
      last=config.train.updates,
      carry=self.players.carry,
    )
    newest = self.checkpoints.latest()
    self.start = newest or 0
    if newest is None:
      self.state = self.learner.init_state(agent.params)
    else:
      self.learner.load_base(agent.params)
      self.state = self._restore(newest)
      metrics.print_line(f"resuming after update {newest}")

  def _make_agent(self) -> tuple[base.Benchmark, agents.Agent]:
    benchmark = build.benchmark(self.config)
    return benchmark, build.agent(self.config, benchmark)

  def _restore(self, step: int | None) -> types.TrainState:
    """Restores state and loop position from a checkpoint."""
    state, position = self.checkpoints.restore(
      self.learner.abstract_state(), step=step
    )
    for name, threshold in self.thresholds.items():
      threshold.load(position["thresholds"][name])
    self.guard.load(position["guard"])
    self.improver.kl.load(position["kl"])
    self.improver.rate.load(position.get("rate", {}))
    self.reached = experience.Position(
      position["cursor"], handover.from_json(position.get("suspended", []))
    )
    self.position = position
    self._be_cautious(position["rollbacks"])
    return state

  def _be_cautious(self, rollbacks: int) -> None:
    """Continues as cautiously as the number of rollbacks demands."""
    self.rollbacks = rollbacks
    self.improver.caution = build.caution(self.config, rollbacks)
    self._stay_near_best()

  def _stay_near_best(self) -> None:
    """Sets the policy that a cautious run stays close to: the best one."""
    if not self.improver.caution.kl:
      return
    self.improver.good = self.checkpoints.restore_params(
      self.learner.abstract_state().params, step=self._best_step()
    )

  def _best_step(self) -> int | None:
    """The checkpoint with the best score; the newest if none has one."""
    best = self.checkpoints.best()
    return self.checkpoints.latest() if best is None else best

  def _check_first_prompt(self) -> None:
    """Raises an error if the first task's prompt does not fit."""
    benchmark = self.actor.benchmark
    env = benchmark.env()
    observation = env.reset(benchmark.splits[self.config.train.split][0])
    env.close()
    view = observation.view((), memory=0, max_turns=benchmark.max_turns)
    rules = build.rules(self.config, build.train_sampling(self.config))
    try:
      collect.fit_prompt(benchmark, self.actor.tokenizer, view, rules)
    except ValueError as error:
      raise ValueError(
        f"rollout.max_prompt: found {rules.max_prompt} tokens; {error}"
      ) from None

  def _check_workdir(self) -> None:
    """Records the configuration; warns of differences from earlier starts."""
    path = self.workdir / "config.json"
    values = settings.flatten(settings.to_dict(self.config))
    if path.is_file():
      earlier = json.loads(path.read_text())
      for key in sorted(values.keys() | earlier.keys()):
        if values.get(key) != earlier.get(key):
          logging.warning(
            "%s was %r when this workdir was started and is %r now",
            key,
            earlier.get(key),
            values.get(key),
          )
    with files.writing(path):
      path.write_text(json.dumps(values, indent=2) + "\n")
      machine.note(self.workdir)

  def _version(self, update: int) -> ahead.Version:
    """The policy that an update left, to play with."""
    return self.players.version(update, self.state, self._thresholds())

  def _earlier_versions(self) -> list[ahead.Version]:
    """Those before the checkpoint's own that its next rollouts need."""
    if not (self.start and self.players.lasting):
      return []
    recorded = self.position.get("versions", [])
    params = self.checkpoints.restore_versions(
      self.learner.abstract_state().params,
      [record["update"] for record in recorded],
      step=self.start,
    )
    return self.players.restore(recorded, params)

  def warm_up(self) -> None:
    """Compiles all sampling programs."""
    self.players.load(self.state.params)
    with metrics.progress("compiling") as advance:
      self.actor.sampler.warm_up(
        build.samplings(self.config),
        lambda done, total: advance(done),
        mixed=self.players.carry > 0,
      )

  def train(
    self, report: Callable[[pathlib.Path], pathlib.Path] | None = None
  ) -> dict[str, float]:
    """Runs all remaining updates; returns the last evaluation.

    Args:
      report: writes a report of the workdir, for the dashboards.
    """
    config = self.config
    with metrics.Writer(
      self.workdir,
      resume_step=self.start + 1 if self.start else 0,
      console=CONSOLE,
      tensorboard=config.log.tensorboard,
      wandb_project=config.log.wandb,
      mlflow_experiment=config.log.mlflow,
      settings=settings.flatten(settings.to_dict(config)),
    ) as writer:
      with self.timer.stage("warm_up"):
        self.warm_up()
      self.rollouts.begin(
        self.start,
        self.reached,
        [*self._earlier_versions(), self._version(self.start)],
      )
      if not self.start:
        scalars = self._evaluate(0)
        self.guard.check(scalars)  # The reference for later scores.
        writer.write(0, scalars | self.timer.take())
        writer.write_episodes(0, self._take_rows())
        if config.guard.action == "rollback" and self.checkpoints.latest() != 0:
          self._save(0, self.scores["eval/success"])
      for update in range(self.start + 1, config.train.updates + 1):
        writer.write(update, self._round(update))
        writer.write_episodes(update, self._take_rows())
        if self.collapse:
          break
      if report is not None and processes.index() == 0:
        self._report(writer, report)
    best = self._best_step()
    self.rollouts.close()
    self.players.drop()
    self.checkpoints.close()
    self.actor.pool.close()
    self._print_scores()
    if self.collapse:
      raise CollapseError(f"{self.collapse}; best checkpoint: {best}")
    return self.scores

  def _report(
    self,
    writer: metrics.Writer,
    report: Callable[[pathlib.Path], pathlib.Path],
  ) -> None:
    """Writes the report; a failure does not affect the finished run."""
    try:
      writer.write_report(report(self.workdir))
    except (OSError, ValueError) as error:
      logging.warning("no report: %s", error)

  def _print_scores(self) -> None:
    """Prints the first and the last evaluation by category."""
    if processes.index():
      return
    lines = metrics.read(self.workdir / metrics.FILE)
    evaluations = [line for line in lines if "eval/success" in line]
    if evaluations:
      metrics.print_line(
        statistics.score_table(*evaluations[:1], *evaluations[1:][-1:])
      )

  def _round(self, update: int) -> dict[str, float]:
    """One update, and everything due after it."""
    config, compiled = self.config, self.compiles.count
    scalars = self._update(update)
    last, rollbacks = config.train.updates, self.rollbacks
    due = _due(update, config.train.eval_every, last)
    if due:
      scalars |= self._evaluate(update)
    verdict = self.guard.check(scalars)
    good = self._handle_alarms(update, verdict)
    if self.rollbacks > rollbacks and due:
      # The score belongs to the policy with which the run continues.
      scalars["guard/lost_success"] = scalars["eval/success"]
      scalars |= self._evaluate(update, record=False)
    elif self.collapse and not due:
      scalars |= self._evaluate(update)
    scalars |= {
      "guard/violations": float(len(verdict.violations)),
      "guard/alarms": float(len(verdict.alarms)),
      "guard/rollbacks": float(self.rollbacks),
      "guard/stopped": float(bool(self.collapse)),
    }
    if self.rollbacks > rollbacks:
      self.rollouts.begin(update, self.reached, [self._version(update)])
    else:
      self.rollouts.publish(self._version(update))
    scalars["compiles"] = self.compiles.count - compiled
    score = scalars.get("eval/success")
    save = score is not None or _due(update, config.train.save_every, last)
    # A score shows later whether the state was good; without one, the limits
    # decide.
    if save and (good or score is not None) and not self.collapse:
      with self.timer.stage("save"):
        self._save(update, score)
    seconds = self.timer.take()
    return scalars | seconds | self._speed(scalars, seconds)

  def _handle_alarms(
    self, update: int, verdict: collapse_guard.Verdict
  ) -> bool:
    """Reacts to alarms as configured; returns whether the state looks good."""
    action = self.config.guard.action
    if action == "off":
      return True
    for line in verdict.alarms:
      metrics.print_line(f"alarm at update {update}: {line}")
    if action == "warn":
      return True
    if verdict.alarms:
      left = self.rollbacks < self.config.guard.rollbacks
      if action == "rollback" and left:
        self._roll_back()
        return True
      self.collapse = f"update {update}: {'; '.join(verdict.alarms)}"
    return not verdict.violations

  def _roll_back(self) -> None:
    """Returns to the best checkpoint, to continue more cautiously.

    The optimizer's moments led astray and are dropped; its schedule, including
    the warm-up, restarts.
    """
    rollbacks, step = self.rollbacks, self._best_step()
    # Episodes in progress would continue with the policy that went astray.
    reached = experience.Position(self.reached.cursor)
    guard = self.guard.state_dict()
    rate = self.improver.rate.state_dict()
    self.state = self.learner.renew_optimizer(self._restore(step))
    self.reached = reached
    self._be_cautious(rollbacks + 1)
    self.guard.load(guard)
    self.guard.forget()
    self.improver.rate.load(rate)
    caution = self.improver.caution
    metrics.print_line(
      f"rolled back to update {step}; learning rate {caution.lr_scale:g} and "
      f"optimizer steps {caution.reuse:g} of the configured ones, KL to that "
      f"policy {caution.kl:g}"
    )

  def _update(self, update: int) -> dict[str, float]:
    """Collects the episodes of an update and learns from them."""
    with self.timer.stage("collect"):
      gathered, scalars = self._collect(update)
    if not self.config.rollout.ahead:
      self.actor.pool.prepare(self._upcoming(update))
    with self.timer.stage("update"):
      self.state, learned = self.improver.improve(
        self.state, gathered, update=update
      )
    self._dump("train", update, gathered.trajectories, self.improver.estimate)
    for name, threshold in self.thresholds.items():
      threshold.advance()
      scalars[f"control/{name}"] = threshold.value
    return scalars | learned

  def _upcoming(self, update: int) -> list[str]:
    """The tasks of this process in the rollout after an update's."""
    config, benchmark = self.config, self.actor.benchmark
    if _due(update, config.train.eval_every, config.train.updates):
      return processes.share(evaluate.panel(config, benchmark))
    tasks = experience.tasks_of(
      benchmark.splits[config.train.split],
      self.reached.cursor + len(self.reached.groups),
      config.rollout.tasks,
      seed=config.seed,
    )
    tasks = processes.share(tasks)
    return [t for t in tasks for _ in range(config.rollout.group_size)]

  def _collect(
    self, update: int
  ) -> tuple[experience.Experience, dict[str, float]]:
    """The update's episodes and their metrics."""
    played = self.rollouts.take(update)
    gathered, work = played.result
    self.reached = experience.Position(gathered.cursor, gathered.suspended)
    self.thresholds["epsilon"].add(gathered.deltas)
    self.thresholds["eta"].add(gathered.phi_changes)
    described = statistics.describe(gathered.played)
    scalars = {f"train/{name}": value for name, value in described.items()}
    scalars["train/mixed_groups"] = episodes.mixed_groups(gathered.played)
    work = sum(processes.gather(work), collections.Counter())
    scalars |= {f"sampler/{name}": value for name, value in work.items()}
    if self.config.rollout.ahead or self.config.rollout.oversample:
      lags = statistics.staleness(gathered.trajectories, update - 1)
      scalars |= {f"train/{name}": value for name, value in lags.items()}
    scalars["seconds/rollout"] = played.seconds
    return gathered, scalars | gathered.scalars

  def _speed(
    self, scalars: Mapping[str, float], seconds: Mapping[str, float]
  ) -> dict[str, float]:
    """Tokens per second of sampling and of learning."""
    epochs = self.improver.caution.steps(self.config.train.epochs)
    trained = scalars.get("pack/tokens", 0.0) * epochs
    # Nothing is counted where all episodes had ended in earlier rollouts.
    sampled = scalars.get("sampler/slot_steps_used", 0.0)
    return {
      "speed/sampled_tokens": sampled / scalars["seconds/rollout"],
      "speed/trained_tokens": trained / seconds["seconds/update"],
    }

  def _evaluate(self, update: int, *, record: bool = True) -> dict[str, float]:
    with self.timer.stage("evaluate"):
      scalars, trajectories = self.rollouts.between(self._play_panel)
      if record:
        self._dump("eval", update, trajectories)
    self.scores = scalars
    return scalars

  def _play_panel(self) -> tuple[dict[str, float], list[types.Trajectory]]:
    """Plays the held-out panel with the current policy."""
    self.players.load(self.state.params)
    panel = evaluate.panel(self.config, self.actor.benchmark)
    with metrics.progress("evaluation", len(processes.share(panel))) as advance:
      return evaluate.evaluate(
        self.config, self.actor, progress=advance, **self._thresholds()
      )

  def _thresholds(self) -> dict[str, float]:
    return {name: t.value for name, t in self.thresholds.items()}

  def _dump(
    self,
    kind: str,
    update: int,
    trajectories: list[types.Trajectory],
    estimate: episodes.Advantages | None = None,
  ) -> None:
    """Writes the first episodes of a rollout, or all of an evaluation."""
    count = self.config.log.trajectories
    if count <= 0 or processes.index():
      return
    if kind == "train":
      trajectories = trajectories[:count]
    tokenizer = self.actor.tokenizer
    if self.episodes is None:
      self.episodes = records.Writer(
        self.workdir / records.FOLDER,
        resume_update=self.start + 1 if self.start else 0,
      )
    advantages = [None] * len(trajectories)
    if estimate is not None:
      advantages = policy_update.turn_advantages(estimate)
    written = [
      records.to_record(
        trajectory, tokenizer.decode, self.token_bytes, advantages=advantage
      )
      for trajectory, advantage in zip(trajectories, advantages, strict=False)
    ]
    self.episodes.write(kind, update, written)
    self.rows += [{"kind": kind, **records.summarise(one)} for one in written]

  def _take_rows(self) -> list[dict[str, Any]]:
    """The table rows of episodes since the last call."""
    rows, self.rows = self.rows, []
    return rows

  def _save(self, update: int, score: float | None) -> None:
    position = {
      "update": update,
      "thresholds": {
        name: threshold.state_dict()
        for name, threshold in self.thresholds.items()
      },
      "guard": self.guard.state_dict(),
      "kl": self.improver.kl.state_dict(),
      "rate": self.improver.rate.state_dict(),
      "cursor": self.reached.cursor,
      "suspended": handover.to_json(self.reached.suspended),
      "rollbacks": self.rollbacks,
    }
    # The versions that play pending rollouts; the last is the state's own.
    earlier = self.rollouts.versions[:-1] if self.players.lasting else []
    position["versions"] = [players.record(version) for version in earlier]
    self.checkpoints.save(
      update,
      self.state,
      position,
      score=score,
      versions={v.update: v.params for v in earlier},
    )
    if self.checkpoints.best() == update:
      self._stay_near_best()


def _due(update: int, every: int, last: int) -> bool:
  """Whether a periodic action is due."""
  return update == last or (every > 0 and update % every == 0)


def train(
  config: settings.Config,
  workdir: str | pathlib.Path,
  *,
  report: Callable[[pathlib.Path], pathlib.Path] | None = None,
  plays: Callable[..., collect.Loop] = collect.Loop,
) -> dict[str, float]:
  """Trains as configured; resumes an earlier run in workdir.

  Args:
    config: see `configs/base.py`.
    workdir: where metrics, checkpoints and trajectories are written.
    report: writes a report of the workdir and returns its file.
    plays: makes the loop of every rollout; takes the arguments of
      `collect.Loop`, to compare it with others.

  Returns:
    The last evaluation.

  Raises:
    ValueError: if the configuration is invalid.
    CollapseError: if the collapse guard stopped the run.
  """
  return Run(config, pathlib.Path(workdir).absolute(), plays).train(report)
