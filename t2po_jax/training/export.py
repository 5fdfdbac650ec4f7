"""From a run's checkpoint to a directory that other programs load.

`merged` writes a whole Hugging Face model: config, weights, tokenizer and how
to sample from it. `adapter` writes the low-rank adapters alone, in the format
of the PEFT library, beside the tokenizer. The run is only read, so it may go
on meanwhile.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import pathlib
from typing import Any

from etils import epath
import jax
from ml_collections import config_dict
import numpy as np

from t2po_jax import files, types
from t2po_jax.configs import base as settings
from t2po_jax.learning import lora
from t2po_jax.models import agent as agents
from t2po_jax.models import decoder
from t2po_jax.setup import build
from t2po_jax.training import checkpoint, cold_start

KINDS = ("merged", "adapter")
STEPS = ("best", "latest")


def export(
  workdir: pathlib.Path,
  out: pathlib.Path,
  *,
  step: str = "best",
  kind: str = "merged",
  dtype: str = "",
) -> int:
  """Writes a checkpoint of a run as a new directory, whole or not at all.

  Args:
    workdir: of the run.
    out: the directory, which must not exist.
    step: `best` by held-out score (the newest if there are no scores),
      `latest`, or the number of an update.
    kind: one of `KINDS`.
    dtype: of the weights, a name from `build.DTYPES`; empty for the run's
      `model.dtype`. Adapters are always float32.

  Returns:
    The update that was written.

  Raises:
    ValueError: if there is no such run or checkpoint, or something does not
      fit.
  """
  if out.exists():
    raise ValueError(f"--out: {out} exists already; name a new folder")
  config = load_config(workdir)
  if kind not in KINDS:
    raise ValueError(f"--kind: found {kind!r}, expected {' or '.join(KINDS)}")
  if kind == "adapter" and not config.lora.rank:
    raise ValueError(
      f"--kind: found 'adapter', but {workdir} trained all weights (lora.rank "
      "0), expected 'merged'"
    )
  dtype = dtype or config.model.dtype
  if dtype not in build.DTYPES:
    raise ValueError(
      f"--dtype: found {dtype!r}, expected {' or '.join(build.DTYPES)}"
    )
  agent = _agent(config)
  spec = build.adapters(config, agent.policy)
  with _open(workdir, config) as store:
    number = _choose(store, step)
    trained, score = _read(store, agent.policy, spec, number)
  base = config.model.source
  if spec is not None:
    base, params = cold_start.initial_parameters(config, agent)
    agent = dataclasses.replace(agent, params=params)
  report = {
    "workdir": str(workdir),
    "environment": config.env.name,
    "update": number,
    "score": score,
  }
  with files.draft(out) as draft:
    if kind == "adapter" and spec is not None:
      lora.save(spec, trained, draft, base=base)
      agent.tokenizer.save(draft)
    else:
      params = trained if spec is None else spec.merge(agent.params, trained)
      params = jax.tree.map(lambda x: x.astype(build.DTYPES[dtype]), params)
      cold_start.write(draft, dataclasses.replace(agent, params=params))
      _write_sampling(draft / "generation_config.json", config)
    _write_json(draft / "export.json", report)
    draft.chmod(0o755)
    draft.rename(out)
  return number


def load_config(workdir: pathlib.Path) -> settings.Config:
  """The configuration that a run noted in its workdir.

  Args:
    workdir: of the run.

  Returns:
    The configuration; keys that are newer than the run have their defaults.

  Raises:
    ValueError: if there is none.
  """
  path = workdir / "config.json"
  try:
    noted = json.loads(path.read_text())
  except (OSError, json.JSONDecodeError) as error:
    raise ValueError(
      f"--workdir: {path} cannot be read ({error}); name the folder of a run"
    ) from None
  nested: dict[str, Any] = {}
  for key, value in noted.items():
    *sections, name = key.split(".")
    place = nested
    for section in sections:
      place = place.setdefault(section, {})
    place[name] = value
  config = settings.get_config()
  config.env = config_dict.ConfigDict(nested.pop("env"))
  config.update(nested)
  return settings.read(config)


def _agent(config: settings.Config) -> agents.Agent:
  """The agent before training; its benchmark only where it made it."""
  from_scratch = config.model.source == "scratch"
  return build.agent(config, build.benchmark(config) if from_scratch else None)


@dataclasses.dataclass(frozen=True)
class Kept:
  """A checkpoint as it is played.

  Attributes:
    step: number of the update.
    score: held-out score it was saved with; None without.
    params: of the whole policy, adapters merged, on the host.
    position: the loop position, thresholds among it.
  """

  step: int
  score: float | None
  params: types.Params
  position: dict[str, Any]


def read_checkpoints(
  workdir: pathlib.Path,
  config: settings.Config,
  agent: agents.Agent,
  step: str,
) -> Iterator[Kept]:
  """The checkpoints that `step` names, one after the other.

  Args:
    workdir: of the run.
    config: of the run.
    agent: before any training here.
    step: as in `export`, or `all` for every one that was kept, in order.

  Raises:
    ValueError: if there is no such checkpoint, or it does not fit.
  """
  spec = build.adapters(config, agent.policy)
  base = agent.params
  if spec is not None:
    _, base = cold_start.initial_parameters(config, agent)
  with _open(workdir, config) as store:
    steps = store.steps() if step == "all" else [_choose(store, step)]
    if not steps:
      raise ValueError(f"{store.directory} holds no checkpoint")
    for number in steps:
      trained, score = _read(store, agent.policy, spec, number)
      params = trained if spec is None else spec.merge(base, trained)
      yield Kept(number, score, params, store.position(number))


@contextlib.contextmanager
def _open(
  workdir: pathlib.Path, config: settings.Config
) -> Iterator[checkpoint.Checkpoints]:
  """The checkpoints of a run, to read only."""
  place = epath.Path(config.train.checkpoints or workdir / "checkpoints")
  if not place.is_dir():
    raise ValueError(f"--workdir: {place} is missing; no checkpoint was saved")
  store = checkpoint.Checkpoints(place, read_only=True)
  try:
    yield store
  finally:
    store.close()


def _read(
  store: checkpoint.Checkpoints,
  policy: decoder.Policy,
  spec: lora.Adapters | None,
  number: int,
) -> tuple[types.Params, float | None]:
  """What was trained, on the host, and its score."""
  shapes = decoder.shapes(policy.config)
  if spec is not None:
    shapes = jax.eval_shape(spec.init)
  host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host), shapes
  )
  params = jax.tree.map(np.asarray, store.restore_params(like, step=number))
  return params, store.score(number)


def _choose(store: checkpoint.Checkpoints, step: str) -> int:
  """The number of the checkpoint that `step` names."""
  if step not in STEPS and not step.isdigit():
    raise ValueError(
      f"--step: found {step!r}, expected {', '.join(STEPS)} or a number"
    )
  newest = store.latest()
  if newest is None:
    raise ValueError(f"{store.directory} holds no checkpoint")
  if step == "best":
    best = store.best()
    return newest if best is None else best
  return newest if step == "latest" else int(step)


def _write_sampling(path: pathlib.Path, config: settings.Config) -> None:
  """Adds the sampling of the evaluation to a generation config."""
  sampling = build.eval_sampling(config)
  options = json.loads(path.read_text()) if path.is_file() else {}
  options |= {
    "do_sample": sampling.temperature > 0,
    "max_new_tokens": config.rollout.max_response,
  }
  if sampling.temperature > 0:
    options |= {
      "temperature": sampling.temperature,
      "top_k": sampling.top_k,
      "top_p": sampling.top_p,
    }
  _write_json(path, options)


def _write_json(path: pathlib.Path, value: dict) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n")
