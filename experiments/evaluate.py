"""Evaluates a policy on the tasks of training: `experiments/evaluate.py`.

  python experiments/evaluate.py --workdir=runs/mine --step=all
  python experiments/evaluate.py --config=configs/searchqa.py --policy=expert
  python experiments/evaluate.py --config=configs/searchqa.py:smollm2 \
    --config.model.source=models/mine --decoding=greedy --control=on,off
  python experiments/evaluate.py --config=configs/webshop.py \
    --endpoint=https://host/v1 --model=NAME --concurrency=8 --out=results/name

`--workdir` uses the settings of a run, `--config` those of a configuration.
Prints a table, and writes to the folder `--out` the scores, one line per
episode, and traces for `experiments/view.py`. An interrupted evaluation of an
endpoint resumes. The endpoint's key is read from the environment
(`--key_variable`).
"""

import dataclasses
import pathlib
import time
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from t2po_jax.configs import base as settings
from t2po_jax.envs import base
from t2po_jax.experiments import command_line
from t2po_jax.judging import (
  dialogues,
  endpoint,
  policies,
  results,
  scores,
  scripted,
)
from t2po_jax.setup import build, validate
from t2po_jax.training import export, metrics

PLAYERS = ("expert", "random")


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
  """All flags of this program."""
  own: dict[str, Any] = {"flag_values": given}
  config_flags.DEFINE_config_file("config", lock_config=True, **own)
  flags.DEFINE_string("workdir", None, "Folder of a run to evaluate.", **own)
  flags.DEFINE_string(
    "step",
    None,
    "Of a run: best (default), latest, all, or an update; of any "
    "configuration: start (after its cold start) or base (before it).",
    **own,
  )
  flags.DEFINE_enum("policy", None, PLAYERS, "Policy without weights.", **own)
  flags.DEFINE_string(
    "endpoint", None, "URL of an OpenAI-compatible API.", **own
  )
  flags.DEFINE_string(
    "model", None, "Name of the model at the endpoint.", **own
  )
  flags.DEFINE_string(
    "key_variable",
    "OPENAI_API_KEY",
    "Environment variable with the endpoint's key.",
    **own,
  )
  flags.DEFINE_integer(
    "concurrency", 4, "Concurrent episodes at an endpoint.", 1, **own
  )
  flags.DEFINE_float(
    "per_minute", 0.0, "Most calls per minute; 0: no limit.", 0.0, **own
  )
  flags.DEFINE_integer("retries", 6, "Most retries of a call.", 0, **own)
  flags.DEFINE_float("timeout", 120.0, "Seconds per call.", 0.1, **own)
  flags.DEFINE_list(
    "splits", None, "Splits to evaluate on; default: eval.split.", **own
  )
  flags.DEFINE_integer(
    "tasks", None, "Tasks per split; default: eval.tasks.", 1, **own
  )
  flags.DEFINE_integer("repeats", 1, "Episodes per task, for pass@k.", 1, **own)
  flags.DEFINE_list("decoding", ["sampled"], "sampled, greedy or both.", **own)
  flags.DEFINE_list(
    "control", ["on"], "Exploration control: on, off or both.", **own
  )
  flags.DEFINE_string("out", None, "Folder of the results.", **own)


@dataclasses.dataclass(frozen=True)
class Panel:
  """The evaluated tasks and their settings.

  Attributes:
    config: the settings.
    benchmark: the benchmark.
    tasks: (split, task ids) of every split.
    repeats: episodes per task.
  """

  config: settings.Config
  benchmark: base.Benchmark
  tasks: tuple[tuple[str, tuple[str, ...]], ...]
  repeats: int

  def places(self) -> list[dialogues.Place]:
    """Every episode."""
    return [
      dialogues.Place(split, task, number, repeat)
      for split, tasks in self.tasks
      for number, task in enumerate(tasks)
      for repeat in range(self.repeats)
    ]


def read_config(given: flags.FlagValues) -> settings.Config:
  """The settings of a run or a configuration.

  Raises:
    ValueError: if flags contradict each other, or none names the settings.
  """
  if (given.workdir is None) == (given.config is None):
    raise ValueError("give either --workdir or --config")
  if given.endpoint and not given.model:
    raise ValueError("--endpoint: needs --model, the name of the model there")
  if given.endpoint and (given.policy or given.step):
    raise ValueError("--endpoint: goes with neither --policy nor --step")
  if given.policy and given.step:
    raise ValueError("--policy: has no weights, so --step means nothing")
  for name, known in (
    ("decoding", policies.DECODINGS),
    ("control", policies.CONTROLS),
  ):
    values = getattr(given, name)
    if not values or set(values) - set(known):
      raise ValueError(
        f"--{name}: found {','.join(values)!r}, expected some of "
        f"{', '.join(known)}"
      )
  if given.workdir is not None:
    return export.load_config(pathlib.Path(given.workdir))
  return validate.read(given.config)


def make_panel(config: settings.Config, given: flags.FlagValues) -> Panel:
  """The tasks to play.

  Raises:
    ValueError: if a split does not exist.
  """
  benchmark = build.benchmark(config)
  tasks = []
  for split in given.splits or [config.eval.split]:
    if not benchmark.splits.get(split):
      known = ", ".join(s for s, ids in benchmark.splits.items() if ids)
      raise ValueError(f"--splits: found {split!r}, expected one of {known}")
    count = given.tasks or config.eval.tasks
    tasks.append((split, tuple(benchmark.splits[split][:count])))
  return Panel(config, benchmark, tuple(tasks), given.repeats)


def play_weights(
  panel: Panel, given: flags.FlagValues, store: results.Results
) -> None:
  """Evaluates checkpoints or a model, with every decoding and control."""
  agent = build.agent(panel.config, panel.benchmark)
  workdir = pathlib.Path(given.workdir) if given.workdir else None
  step = given.step or ("best" if workdir else "base")
  token_bytes = agent.tokenizer.token_bytes()
  done = {entry[:2] for entry in store.done()}
  for control in given.control:
    player = policies.Sampled(
      policies.with_control(panel.config, control), panel.benchmark, agent
    )
    for weights in policies.weights_of(panel.config, agent, workdir, step):
      for decoding in given.decoding:
        variant = f"{weights.label}, {decoding}, control {control}"
        for split, tasks in panel.tasks:
          if (variant, split) in done:
            continue
          trajectories = player.play(
            weights,
            tasks,
            decoding=decoding,
            repeats=panel.repeats,
            label=variant,
          )
          store.add_all(
            [
              scores.episode(t, variant=variant, split=split)
              for t in trajectories
            ],
            trajectories,
            decode=agent.tokenizer.decode,
            token_bytes=token_bytes,
            kind=f"{split}-{decoding}-{control}",
            step=weights.step,
          )
    player.close()


def make_endpoint(
  panel: Panel, given: flags.FlagValues, decoding: str, control: str
) -> endpoint.Endpoint:
  """An endpoint with the evaluation's sampling, or greedy decoding."""
  config = panel.config
  greedy = decoding == "greedy"
  return endpoint.Endpoint(
    endpoint.Settings(
      given.endpoint,
      given.model,
      key_variable=given.key_variable,
      max_tokens=config.rollout.max_response,
      temperature=0.0 if greedy else config.eval.temperature,
      top_p=1.0 if greedy else config.eval.top_p,
      top_k=0 if greedy else config.eval.top_k,
      control=control == "on",
      seed=config.seed,
      retries=given.retries,
      timeout=given.timeout,
      per_minute=given.per_minute,
    ),
    panel.benchmark.grammar,
  )


def play_text(
  panel: Panel, given: flags.FlagValues, store: results.Results
) -> dict[str, dict[str, int]]:
  """Evaluates policies that return text; returns an endpoint's call counts."""
  config = panel.config
  counts: dict[str, dict[str, int]] = {}
  tokenizer = build.tokenizer_of(config, panel.benchmark)
  rules = build.rules(config, build.eval_sampling(config))
  token_bytes = tokenizer.token_bytes()
  variants = [(given.policy, "", "")]
  if given.endpoint:
    variants = [
      (f"{given.model}, {d}, control {c}", d, c)
      for c in given.control
      for d in given.decoding
    ]
  store.forget_aborted()
  done = store.done()
  for variant, decoding, control in variants:
    concurrency = 1
    if given.endpoint:
      player = make_endpoint(panel, given, decoding, control)
      concurrency = given.concurrency
      if not player.controlled and control == "on":
        metrics.print_line(
          "the endpoint has no exploration control: counted as off"
        )
        variant = variant.replace("control on", "control off")
    elif given.policy == "expert":
      player = scripted.Expert(config.seed)
    else:
      player = scripted.Random(panel.benchmark.grammar, config.seed)
    places = [
      p
      for p in panel.places()
      if (variant, p.split, p.task_id, p.repeat) not in done
    ]
    table = dialogues.Table(panel.benchmark, tokenizer, rules, player)
    with metrics.progress(variant, len(places)) as advance:
      outcomes = table.play(places, concurrency=concurrency)
      for number, played in enumerate(outcomes, 1):
        store.add(
          scores.episode(
            played.trajectory,
            variant=variant,
            split=played.place.split,
            usage=played.usage,
          ),
          played.trajectory,
          decode=tokenizer.decode,
          token_bytes=token_bytes,
          kind="-".join(filter(None, (played.place.split, decoding, control))),
          step=0,
        )
        advance(number)
    if isinstance(player, endpoint.Endpoint):
      counts[variant] = dict(player.counts)
      player.close()
  return counts


def evaluate(given: flags.FlagValues) -> None:
  """Runs the evaluation that the flags ask for.

  Raises:
    ValueError: if the flags are invalid.
  """
  began = time.monotonic()
  config = read_config(given)
  build.keep_programs(config)
  panel = make_panel(config, given)
  name = given.policy or ("endpoint" if given.endpoint else "policy")
  out = pathlib.Path(
    given.out
    or pathlib.Path(given.workdir or "runs")
    / f"evaluation-{name}-{time.strftime('%Y%m%d-%H%M%S')}"
  )
  request = {
    key: getattr(given, key)
    for key in ("workdir", "step", "policy", "endpoint", "model", "splits")
  }
  request |= {key: getattr(given, key) for key in ("tasks", "repeats")}
  request |= {"config": settings.flatten(settings.to_dict(config))}
  store = results.Results(out, request)
  counts: dict[str, dict[str, int]] = {}
  if given.policy or given.endpoint:
    counts = play_text(panel, given, store)
  else:
    play_weights(panel, given, store)
  seconds = round(time.monotonic() - began, 1)
  made = store.finish(config.env.name, {"calls": counts, "seconds": seconds})
  metrics.print_line("\n\n".join(table.text() for table in made))
  for variant, usage in counts.items():
    counted = ", ".join(f"{n} {key}" for key, n in usage.items())
    metrics.print_line(f"{variant}: {counted}")
  metrics.print_line(f"{seconds} s; written to {out}")


def run() -> None:
  """The command `t2po-evaluate`."""
  command_line.run(evaluate, define_flags, verbosity=logging.ERROR)


if __name__ == "__main__":
  run()
