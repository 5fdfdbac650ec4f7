"""The cold start: supervised fine-tuning before reinforcement learning.

`expert` imitates the environment's scripted expert; `rft` samples episodes from
the policy and imitates its own successes (rejection fine-tuning, the paper's
cold start). The two can be combined. The result is a Hugging Face directory in
the cache, named by everything it depends on, so that runs that differ only in
later settings share it. Several processes make it together; afterwards each
finds it in its own cache or in a shared one.
"""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from t2po_jax import files, types
from t2po_jax.configs import base as settings
from t2po_jax.distributed import processes, sharding
from t2po_jax.learning import (
  batching,
  finetune,
  learner,
  objectives,
  optimizers,
)
from t2po_jax.models import agent as agents
from t2po_jax.models import decoder, weights
from t2po_jax.rollout import actor as actors
from t2po_jax.rollout import demonstrate, statistics
from t2po_jax.setup import build
from t2po_jax.training import metrics

# Rollouts of training are identified by their update, from 1; those of the cold
# start by 0 and this.
_ROUNDS = 2


def name(config: settings.Config, kind: str) -> str:
  """A name derived from everything that a stage depends on.

  Args:
    config: the run's configuration.
    kind: `expert`, or `rft`, which may build on it.
  """
  cold = settings.to_dict(config.cold_start)
  rollout = config.rollout
  if "rft" not in kind:
    cold = {k: v for k, v in cold.items() if not k.startswith("rft")}
  parts = [config.seed, config.env, config.model, cold | {"kind": kind}]
  parts += [config.train.split, rollout.memory, rollout.prefix]
  parts += [rollout.max_prompt, rollout.max_response]
  if config.lora.cold_start:
    parts.append(config.lora)
  if rollout.context != "window":
    parts += [rollout.context]
  if "rft" in kind:
    parts += [rollout, config.control]
  return build.fingerprint(*parts)


def cold_start(
  config: settings.Config, actor: actors.Actor, agent: agents.Agent
) -> agents.Agent:
  """Runs the cold start, taking each stage from the cache if possible.

  Args:
    config: the run's configuration.
    actor: plays episodes; its sampler gets the parameters of the `rft` rounds.
    agent: before any training here.

  Returns:
    The agent with new parameters.
  """
  kind = config.cold_start.kind
  if kind == "none":
    return agent
  place = _place(config, kind)
  if not _all_have(place):
    report = {}
    if "expert" in kind:
      agent = _expert_stage(config, actor, agent, report)
    if "rft" in kind:
      agent = _imitate_successes(config, actor, agent, report)
      _store_for_all(place, agent, report)
  else:
    metrics.print_line(f"cold start from {place}")
  _, params = weights.load(place)
  return dataclasses.replace(agent, params=params)


def _place(config: settings.Config, kind: str) -> pathlib.Path:
  return build.cache_dir(config) / "cold_start" / name(config, kind)


def _is_done(place: pathlib.Path) -> bool:
  return (place / "cold_start.json").is_file()


def _all_have(place: pathlib.Path) -> bool:
  """Whether every process finds a stage in its cache."""
  return all(processes.gather(_is_done(place)))


def _store_for_all(
  place: pathlib.Path, agent: agents.Agent, report: dict[str, Any]
) -> None:
  """Stores a stage in every cache that lacks it."""

  def store_if_missing() -> None:
    if not _is_done(place):
      store(place, agent, report)

  processes.first_alone(store_if_missing)


def _expert_stage(
  config: settings.Config,
  actor: actors.Actor,
  agent: agents.Agent,
  report: dict[str, Any],
) -> agents.Agent:
  """The agent after imitating the expert, from the cache if possible."""
  place = _place(config, "expert")
  if _all_have(place):
    metrics.print_line(f"imitation of the expert from {place}")
  else:
    agent = _imitate_expert(config, actor, agent, report)
    _store_for_all(place, agent, report)
  _, params = weights.load(place)
  return dataclasses.replace(agent, params=params)


def store(place: pathlib.Path, agent: agents.Agent, report: dict) -> None:
  """Writes an agent as a Hugging Face directory, atomically.

  Args:
    place: the directory; a complete existing one is kept.
    agent: its parameters and tokenizer are written.
    report: contents of `cold_start.json`.

  Raises:
    OSError: if it cannot be written; nothing is left of it then.
  """
  text = json.dumps(report, indent=2) + "\n"
  with files.draft(place) as draft:
    write(draft, agent)
    (draft / "cold_start.json").write_text(text)
    if not _is_done(place):
      shutil.rmtree(place, ignore_errors=True)
    try:
      draft.rename(place)
    except OSError:
      # Another run was faster; its directory is equivalent and may be in use.
      if not _is_done(place):
        raise


def write(place: pathlib.Path, agent: agents.Agent) -> None:
  """Writes an agent's parameters, shape and tokenizer for `weights.load`."""
  params = jax.tree.map(np.asarray, agent.params)
  weights.save(params, agent.policy.config, place)
  agent.tokenizer.save(place)


def initial_parameters(
  config: settings.Config, agent: agents.Agent
) -> tuple[str, types.Params]:
  """The model that reinforcement learning of this configuration started from.

  Args:
    config: the run's configuration.
    agent: before any training here.

  Returns:
    Its location (a directory or hub id), and its parameters.

  Raises:
    ValueError: if there was a cold start that is no longer in the cache.
  """
  kind = config.cold_start.kind
  if kind == "none":
    return config.model.source, agent.params
  place = _place(config, kind)
  if not _is_done(place):
    raise ValueError(
      f"cache_dir: found no cold start of this run in {place.parent}, expected "
      f"{place.name}; give the cache that the run had, or start it again"
    )
  return str(place), weights.load(place)[1]


def _imitate_expert(
  config: settings.Config,
  actor: actors.Actor,
  agent: agents.Agent,
  report: dict[str, Any],
) -> agents.Agent:
  """Fine-tunes on demonstrations of the scripted expert."""
  cold, split = config.cold_start, actor.benchmark.splits[config.train.split]
  order = np.random.default_rng(config.seed).permutation(len(split))
  tasks = [split[order[i % len(split)]] for i in range(cold.episodes)]
  rules = build.rules(config, build.train_sampling(config))
  with metrics.progress("demonstrations", len(tasks)) as advance:
    pairs, success = demonstrate.demonstrate(
      actor.benchmark,
      actor.tokenizer,
      rules,
      tasks,
      seed=config.seed,
      only_successes=cold.only_successes,
      progress=advance,
    )
  report |= {"expert_success": success, "expert_turns": len(pairs)}
  metrics.print_line(f"expert: {len(pairs)} turns, success {success:.3f}")
  if not pairs:
    raise ValueError(
      f"cold_start.episodes: found no success among {len(tasks)} "
      "demonstrations, expected some; raise it, or set "
      "cold_start.only_successes to False"
    )
  segments = batching.pair_segments(pairs)
  return imitate(config, agent, segments, cold.epochs, report)


def _imitate_successes(
  config: settings.Config,
  actor: actors.Actor,
  agent: agents.Agent,
  report: dict[str, Any],
) -> agents.Agent:
  """Rounds of sampling and fine-tuning on successful episodes."""
  cold, split = config.cold_start, actor.benchmark.splits[config.train.split]
  rules = build.rules(config, build.train_sampling(config))
  rules = dataclasses.replace(rules, max_tries=0)
  for number in range(cold.rft_rounds):
    chosen = np.random.default_rng((config.seed, number)).choice(
      len(split), min(cold.rft_tasks, len(split)), replace=False
    )
    chosen = chosen.tolist()
    total = len(processes.share(chosen)) * config.rollout.group_size
    actor.sampler.load(agent.params)
    with metrics.progress(f"rft round {number + 1}", total) as advance:
      rollout = actor.play(
        [split[i] for i in chosen],
        group_size=config.rollout.group_size,
        rules=rules,
        seed=(config.seed, 0, _ROUNDS, number),
        progress=advance,
      )
    segments = finetune.successful_segments(
      rollout.trajectories, max_length=config.train.row_tokens
    )
    success = statistics.describe(rollout.trajectories)["success"]
    report[f"rft_success_{number + 1}"] = success
    metrics.print_line(
      f"rft round {number + 1}: success {success:.3f}, {len(segments)} segments"
    )
    if not segments:
      raise ValueError(
        f"cold_start.rft: round {number + 1} found no success among {total} "
        "episodes; start from a stronger model or raise cold_start.rft_tasks"
      )
    agent = imitate(config, agent, segments, cold.rft_epochs, report)
  return agent


def imitate(
  config: settings.Config,
  agent: agents.Agent,
  segments: list[batching.Segment],
  epochs: int,
  report: dict,
) -> agents.Agent:
  """Supervised fine-tuning with the settings of `config.cold_start`.

  Args:
    config: the run's configuration.
    agent: to be trained.
    segments: the training examples, see `batching.pair_segments`.
    epochs: passes over them.
    report: receives the last loss.

  Returns:
    The agent with new parameters.
  """
  cold = config.cold_start
  adapters = None
  if config.lora.cold_start:
    adapters = build.adapters(config, agent.policy)
  steps = finetune.count_steps(
    len(segments), batch_size=cold.batch_size, epochs=epochs
  )
  trainer = learner.Learner(
    agent.policy,
    decoder.logical_axes(agent.params),
    build.mesh(config),
    optimizer=optimizers.OptimizerConfig(
      learning_rate=cold.learning_rate,
      schedule="cosine",
      warmup_steps=min(20, steps // 10),
      total_steps=steps,
      b1=config.optimizer.b1,
      b2=config.optimizer.b2,
    ),
    objective=objectives.LikelihoodObjective(),
    rows=cold.micro_rows,
    adapters=adapters,
  )
  with metrics.progress("fine-tuning", steps) as advance:
    state, history = finetune.finetune(
      trainer,
      trainer.init_state(agent.params),
      segments,
      lengths=[config.train.row_tokens],
      batch_size=cold.batch_size,
      epochs=epochs,
      seed=config.seed,
      progress=lambda step, *_: advance(step),
    )
  loss = float(history[-1]["loss"])
  report["finetune_loss"] = loss
  metrics.print_line(f"fine-tuning: {steps} steps, last loss {loss:.4f}")
  params = sharding.gather(state.params)
  if adapters is not None:
    # On the host, where the base is in full precision.
    base = jax.tree.map(np.asarray, agent.params)
    params = adapters.merge(base, params)
  return dataclasses.replace(agent, params=params)
