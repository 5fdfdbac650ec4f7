"""Serves a policy over the OpenAI API: `experiments/serve.py`.

  python experiments/serve.py --workdir=runs/mine --port=8000
  python experiments/serve.py --config=configs/searchqa.py:smollm2 \
    --config.model.source=models/mine

Any client of that API can use it with `base_url=http://127.0.0.1:8000/v1` (see
`t2po_jax/serving/protocol.py` for our extensions). It listens on this machine
only, unless `--host` is given; `--key_variable` names an environment variable
with a key that clients must send. Needs the extra `serve`: pip install -e
".[serve]".
"""

import dataclasses
import os
import pathlib
import sys
import time
from typing import TYPE_CHECKING, Any

from absl import flags, logging
from ml_collections import config_flags

from t2po_jax.configs import base as settings
from t2po_jax.experiments import command_line
from t2po_jax.judging import policies
from t2po_jax.serving import engine, protocol
from t2po_jax.setup import build, validate
from t2po_jax.training import export, metrics

if TYPE_CHECKING:  # Of the extra `serve`.
  from starlette import applications


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
  """All flags of this program."""
  own: dict[str, Any] = {"flag_values": given}
  config_flags.DEFINE_config_file("config", lock_config=True, **own)
  flags.DEFINE_string("workdir", None, "Folder of a run to serve.", **own)
  flags.DEFINE_string(
    "step",
    None,
    "Of a run: best (default), latest or an update; of any configuration: "
    "start (after its cold start) or base (before it; default).",
    **own,
  )
  flags.DEFINE_string(
    "name", None, "Name of the model; default: the run's folder.", **own
  )
  flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.", **own)
  flags.DEFINE_integer(
    "port", 8000, "Port; 0 takes a free one.", 0, 65535, **own
  )
  flags.DEFINE_string(
    "key_variable", None, "Environment variable with the key.", **own
  )
  flags.DEFINE_bool(
    "control", True, "Exploration control unless a request sets it.", **own
  )
  flags.DEFINE_integer("slots", None, "Concurrent responses.", 1, **own)


def make_server(given: flags.FlagValues) -> "applications.Starlette":
  """Builds the application that the flags ask for.

  Raises:
    ValueError: if flags, configuration or weights are wrong.
  """
  if (given.workdir is None) == (given.config is None):
    raise ValueError("give either --workdir or --config")
  if given.step == "all":
    raise ValueError("--step: found 'all', expected one checkpoint")
  try:
    from t2po_jax.serving import app as apps
  except ImportError as error:
    raise ValueError(
      f"{error.name} is not installed: pip install -e '.[serve]'"
    ) from None
  workdir = pathlib.Path(given.workdir) if given.workdir else None
  config = (
    export.load_config(workdir) if workdir else validate.read(given.config)
  )
  if given.slots:
    rollout = dataclasses.replace(config.rollout, slots=given.slots)
    config = dataclasses.replace(config, rollout=rollout)
  key = ""
  if given.key_variable:
    key = os.environ.get(given.key_variable, "")
    if not key:
      raise ValueError(f"--key_variable: {given.key_variable} is not set")
  build.keep_programs(config)
  return _assemble(config, workdir, given, key, apps)


def _assemble(
  config: settings.Config,
  workdir: pathlib.Path | None,
  given: flags.FlagValues,
  key: str,
  apps: Any,
) -> "applications.Starlette":
  """Loads the weights and builds the application."""
  benchmark = build.benchmark(config)
  agent = build.agent(config, benchmark)
  step = given.step or ("best" if workdir else "base")
  (weights,) = policies.weights_of(config, agent, workdir, step)
  actor = build.actor(config, benchmark, agent)
  actor.pool.close()  # Clients have their own environments.
  actor.sampler.load(weights.params)
  sampling = build.eval_sampling(config)
  with metrics.progress("compiling") as advance:
    actor.sampler.warm_up(
      [sampling, build.GREEDY], lambda done, total: advance(done)
    )
  name = given.name or (workdir.name if workdir else config.name)
  model = protocol.Model(
    name=name,
    created=int(time.time()),
    prefix=config.rollout.prefix,
    max_prompt=config.rollout.max_prompt,
    max_response=config.rollout.max_response,
    sampling=sampling,
    epsilon=weights.thresholds["epsilon"],
    controlled=given.control,
    state_size=len(build.control(config).source.initial),
  )
  served = engine.Engine(
    actor.sampler, actor.scheduler, control=build.control(config)
  )
  metrics.print_line(f"{name}: {weights.label}, {config.rollout.slots} slots")
  return apps.Server(model, agent.tokenizer, served, key=key).app()


def serve(given: flags.FlagValues) -> None:
  """Serves until interrupted."""
  app_ = make_server(given)
  import socket

  import uvicorn

  listener = socket.socket()
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listener.bind((given.host, given.port))
  except OSError as error:
    raise ValueError(
      f"--port: {given.host}:{given.port} cannot be used ({error.strerror})"
    ) from None
  host, port = listener.getsockname()[:2]
  metrics.print_line(f"http://{host}:{port}/v1 (Ctrl-C ends it)")
  sys.stdout.flush()
  server = uvicorn.Server(uvicorn.Config(app_, log_level="warning"))
  server.run(sockets=[listener])


def run() -> None:
  """The command `t2po-serve`."""
  command_line.run(serve, define_flags, verbosity=logging.ERROR)


if __name__ == "__main__":
  run()
