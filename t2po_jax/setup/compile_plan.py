"""Ahead-of-time compilation of a run's programs, for chips not present.

XLA's TPU compiler is part of libtpu and runs on any x86 host: from the shapes
and layouts of all arrays it compiles the programs that a slice would run, and
reports their memory and communication. No weights are read and nothing is
allocated. Only the size of the vocabulary matters, so its tokens are made up.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import time
from typing import Any, cast

import jax
from jax.experimental import topologies
import jax.numpy as jnp

from t2po_jax import types
from t2po_jax.configs import base as settings
from t2po_jax.distributed import collectives, sharding, traffic
from t2po_jax.learning import learner as learners
from t2po_jax.models import agent as agents
from t2po_jax.models import config as model_config
from t2po_jax.models import decoder, families
from t2po_jax.models import tokenizer as tokenizer_lib
from t2po_jax.rollout import weights
from t2po_jax.setup import build, memory_plan, roofline

# Stand-ins for the metadata that libtpu asks a TPU host for.
_HOST = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
}
_INSTALL = "pip install libtpu (Linux x86-64, the release of jax[tpu])"


@dataclasses.dataclass(frozen=True)
class Target:
  """The target of compilation.

  Attributes:
    name: of the topology.
    devices: all of them.
    local: those of one process, for its sampler.
    chip: its peak rates; None if unknown.
    limit: bytes of device memory that programs may use; 0 if unknown.
  """

  name: str
  devices: list[types.Device]
  local: list[types.Device]
  chip: roofline.Chip | None
  limit: int

  @property
  def shared(self) -> bool:
    """Whether a single process has all devices."""
    return len(self.devices) == len(self.local)


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program of a run; bytes are per device.

  Attributes:
    name: kind and size.
    arguments: bytes.
    results: bytes not aliased with arguments.
    temporaries: bytes.
    peak: peak bytes, arguments included.
    total: peak bytes plus everything else that the run holds.
    moved: bytes read from and written to main memory.
    flops: of matrix products. Loops of unknown trip count are counted once,
      here and in `moved`: one token when decoding, one micro-batch when
      learning.
    kernels: names of its Pallas kernels.
    exchanged: `kind over axes` -> bytes of results.
    bound: the lower bound on its time; None without a known chip.
    compile_seconds: compilation time on this host.
  """

  name: str
  arguments: int
  results: int
  temporaries: int
  peak: int
  total: int
  moved: int
  flops: float
  kernels: tuple[str, ...]
  exchanged: Mapping[str, int]
  bound: roofline.Bound | None
  compile_seconds: float


@dataclasses.dataclass(frozen=True)
class _Job:
  """A program to compile; `held`: bytes of the arguments that outlive it."""

  name: str
  trace: Callable[[], Any]
  mesh: jax.sharding.Mesh
  held: int

  @property
  def kind(self) -> str:
    return self.name.split()[0]


class DoesNotFit(ValueError):
  """A program needs more memory than the device has."""


def target(topology: str) -> Target:
  """The devices of a topology.

  Args:
    topology: e.g. `v5e:4x4`, or `cpu` or `gpu` for the devices present.

  Raises:
    ValueError: if the name is unknown, or libtpu is not installed.
  """
  if topology in ("cpu", "gpu"):
    try:
      devices = jax.local_devices(backend=topology)
    except RuntimeError:
      raise ValueError(
        f"topology: found {topology!r}, but no such device is here"
      ) from None
    limit = memory_plan.limit_bytes(devices[0])
    chip = roofline.of_device(devices[0])
    return Target(topology, devices, devices, chip, limit)
  name, _, grid = topology.partition(":")
  chips = {chip.name: chip for chip in roofline.CHIPS if chip.host}
  if name not in chips or not re.fullmatch(r"\d+(x\d+){1,2}", grid):
    raise ValueError(
      f"topology: found {topology!r}, expected cpu, gpu or one of "
      f"{', '.join(chips)} with a grid, as in v5e:4x4 or v5p:2x2x1"
    )
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(
      f"topology: {topology!r} needs the compiler for TPUs: {_INSTALL}"
    )
  for key, value in _HOST.items():
    os.environ.setdefault(key, value)
  chip = chips[name]
  bounds = [int(n) for n in grid.split("x")]
  host = [min(b, h) for b, h in zip(bounds, chip.host, strict=False)]
  devices = _describe(name, bounds, host)
  local = devices
  if any(d.process_index for d in devices):
    # Its programs number the devices of each process from 0.
    local = _describe(name, host, host)
  limit = int(chip.memory - roofline.RESERVED)
  return Target(topology, devices, local, chip, limit)


def _describe(
  name: str, bounds: Sequence[int], host: Sequence[int]
) -> list[types.Device]:
  grid = "x".join(map(str, bounds))
  try:
    topology = topologies.get_topology_desc(
      platform="tpu",
      topology_name=f"{name}:{grid}",
      chips_per_host_bounds=(*host, 1, 1)[:3],
    )
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).splitlines()[0]
    raise ValueError(f"topology: {name}:{grid} is refused: {reason}") from None
  return list(topology.devices)


def model_shape(config: settings.Config) -> model_config.ModelConfig:
  """The sizes of the configured model, without its weights.

  Raises:
    ValueError: if they cannot be determined locally.
  """
  model = config.model
  if model.source == "scratch":
    shape = model_config.named(model.size)
    return dataclasses.replace(shape, vocab_size=model.vocab_size)
  folder = pathlib.Path(model.source).expanduser()
  if (folder / "config.json").is_file():
    described = json.loads((folder / "config.json").read_text())
    return families.read_config(described)
  name = folder.name.lower().removesuffix("-instruct").removesuffix(".gguf")
  try:
    return model_config.named(name)
  except ValueError as error:
    raise ValueError(
      f"model.source: the sizes of {model.source!r} are not known here; "
      f"name a folder with its config.json ({error})"
    ) from None


class Plan:
  """The programs of one configuration on one target.

  Attributes:
    config: the configuration.
    target: the target.
    policy: the network.
    learner: of the update.
    memory: the memory plan that a run would print.
  """

  def __init__(self, config: settings.Config, where: Target) -> None:
    """Describes all arrays, without compiling anything yet."""
    self.config, self.target = config, where
    shape = model_shape(config)
    self.policy = decoder.Policy(
      shape,
      dtype=build.DTYPES[config.model.dtype],
      remat=config.model.remat,
      scan_layers=config.model.scan_layers,
    )
    # No text is needed here: the learner only asks for sizes.
    nobody = cast(tokenizer_lib.Tokenizer, None)
    agent = agents.Agent(self.policy, decoder.shapes(shape), nobody)
    self._mesh = build.mesh(config, where.devices)
    self.learner = build.policy_learner(config, agent, self._mesh)
    self._sampling = build.sampling_mesh(config, where.local)
    self._sampler = build.abstract_sampler(config, self.policy, self._sampling)
    self.memory = memory_plan.plan(
      config,
      self.policy,
      self.learner,
      sampling=self._sampling,
      limit=where.limit,
      exact=False,
    )

  def compile(
    self,
    *,
    every_size: bool,
    progress: Callable[[str], None],
    kinds: Collection[str] = (),
  ) -> Iterator[Program]:
    """Compiles the programs one after the other, yielding each.

    Args:
      every_size: whether to compile all sizes of prompts, rows and caches, or
        only the largest program of each kind.
      progress: called with the name of the next program.
      kinds: prefixes of program names; empty for all.

    Raises:
      ValueError: for a kind that does not exist.
      DoesNotFit: if a program needs more memory than a device has.
    """
    jobs = list(self._jobs())
    known = dict.fromkeys(job.kind for job in jobs)
    for kind in kinds:
      if kind not in known:
        raise ValueError(
          f"kinds: found {kind!r}, expected some of {', '.join(known)}"
        )
    jobs = [job for job in jobs if not kinds or job.kind in kinds]
    if not every_size:
      jobs = list({job.kind: job for job in jobs}.values())
    for job in jobs:
      progress(job.name)
      yield self._compile(job)

  def measured(self, programs: Collection[Program]) -> memory_plan.Plan:
    """The memory plan as a run on these devices prints it.

    Args:
      programs: those compiled so far.

    Returns:
      The plan, with the compiler's figures for the kinds among them.
    """
    temporaries = {}
    for one in programs:  # The last of a kind is the largest.
      temporaries[one.name.split()[0]] = one.temporaries
    sampling = None
    if {"prefill", "decode"} <= set(temporaries):
      sampling = max(temporaries["prefill"], temporaries["decode"])
    return self.memory.compiled(
      update=temporaries.get("update"), sampling=sampling
    )

  def lasting(self, *, rollout: bool = False) -> int:
    """Bytes that a device holds for the whole run.

    Args:
      rollout: of the devices that only roll out, if there are any.
    """
    plan = self.memory
    if rollout and plan.beside is not None:
      plan = plan.beside
    return sum(plan.parts.get(name, 0) for name in memory_plan.LASTING)

  def _jobs(self) -> Iterator[_Job]:
    slots = memory_plan.device_bytes(self._sampler.abstract_state())
    decode = memory_plan.device_bytes(self._sampler.abstract_params())
    samplings = build.samplings(self.config)[:1]
    for program in self._sampler.programs(samplings):
      held = slots + decode * (program.kind in ("prefill", "decode"))
      yield _Job(
        f"{program.kind} {program.size}",
        lambda p=program: p.function.trace(*p.arguments, **p.settings),
        self._sampling,
        held,
      )
    yield from self._learner_jobs()
    yield from self._moving_jobs()

  def _learner_jobs(self) -> Iterator[_Job]:
    learner, config = self.learner, self.config
    batch = memory_plan.batch_shape(config, learner.rows)
    batch = learners.micro_batches(batch, learner.rows)
    state = learner.abstract_state()
    base = memory_plan.device_bytes(learner.abstract_base())
    params = memory_plan.device_bytes(state.params)
    size = f"{learner.rows} x {config.train.row_tokens}"
    compares = config.loss.kl != "off" or config.reward.kl != "off"
    if compares or config.loss.old_logprobs == "recompute":
      yield _Job(
        f"log-probs {size}",
        lambda: learner.trace("logprobs", batch),
        self._mesh,
        params + base,
      )
    held = memory_plan.device_bytes(state) + base
    yield _Job(
      f"update {size}",
      lambda: learner.trace("update", batch),
      self._mesh,
      held,
    )

  def _moving_jobs(self) -> Iterator[_Job]:
    """The programs that transfer new weights to the sampler."""
    learner = self.learner
    params = memory_plan.moved(learner)
    yield _Job(
      "layout",
      lambda: weights.decode_layout.trace(params, policy=self.policy),
      self._mesh,
      memory_plan.device_bytes(params),
    )
    if not self.target.shared:
      # Across processes every array is first replicated, one at a time.
      array = memory_plan.largest(params)
      array = jax.ShapeDtypeStruct(
        array.shape, self.policy.dtype, sharding=array.sharding
      )
      whole = jax.jit(jnp.copy, out_shardings=sharding.replicated(self._mesh))
      yield _Job(
        "gather (the largest array)",
        lambda: whole.trace(array),
        self._mesh,
        0,
      )

  def _compile(self, job: _Job) -> Program:
    start = time.perf_counter()
    with jax.set_mesh(job.mesh):
      traced = job.trace()
      lowered = traced.lower()
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      match = re.search(
        r"total memory required.*?available HBM \(.*?\)|"
        r"Ran out of memory[^.]*\.[^.]*\.",
        str(error),
      )
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      reason = match.group(0) if match else str(error).splitlines()[0]
      raise DoesNotFit(self._refusal(job.name, reason)) from None
    seconds = time.perf_counter() - start
    program = self._read(job, traced, compiled, seconds)
    if self.target.limit and program.total > self.target.limit:
      reason = (
        f"{program.total / 1e9:.2f} GB needed on every device, found "
        f"{self.target.limit / 1e9:.2f}"
      )
      raise DoesNotFit(self._refusal(job.name, reason))
    return program

  def _read(
    self,
    job: _Job,
    traced: jax.stages.Traced,
    compiled: jax.stages.Compiled,
    seconds: float,
  ) -> Program:
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None:
      raise ValueError(
        f"topology: the compiler of {self.target.name} reports no memory"
      )
    arguments = memory.argument_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporaries = memory.temp_size_in_bytes
    operations = collectives.read(text, job.mesh, unknown=1)
    flops = roofline.count_flops(traced.jaxpr.jaxpr) / job.mesh.size
    moved = traffic.count(text)
    bound = None
    if self.target.chip is not None:
      sent = [roofline.sent_bytes(one, job.mesh) for one in operations]
      bound = roofline.bound(
        self.target.chip, flops=flops, read=moved, sent=sent
      )
    peak = arguments + results + temporaries
    exchanged: dict[str, int] = {}
    for one in operations:
      if one.axes:
        key = f"{one.kind} over {', '.join(one.axes)}"
        exchanged[key] = exchanged.get(key, 0) + one.times * one.size
    return Program(
      name=job.name,
      arguments=arguments,
      results=results,
      temporaries=temporaries,
      peak=peak,
      total=self.lasting(rollout=job.mesh is self._sampling) - job.held + peak,
      moved=moved,
      flops=flops,
      kernels=collectives.kernels(text),
      exchanged=exchanged,
      bound=bound,
      compile_seconds=seconds,
    )

  def _refusal(self, name: str, reason: str) -> str:
    largest = ", ".join(
      f"{path} {size / 1e9:.2f}" for path, size in self.largest()
    )
    return (
      f"{self.target.name}: {name} does not fit: {reason}; the largest arrays "
      f"of a device, GB: {largest}"
    )

  def largest(self, count: int = 3) -> list[tuple[str, int]]:
    """Paths and sizes of the largest arrays on a device."""
    state = self.learner.abstract_state()
    trees = {
      "parameters": state.params,
      "optimizer": state.opt_state,
      "sampler": self._sampler.abstract_params(),
      "slots": self._sampler.abstract_state(),
    }
    sizes = [
      (f"{name}{jax.tree_util.keystr(path)}", memory_plan.device_bytes(leaf))
      for name, tree in trees.items()
      for path, leaf in jax.tree.leaves_with_path(tree)
    ]
    # One per kind: the cache has an equal array for every layer.
    kinds: dict[str, tuple[str, int]] = {}
    for path, size in sorted(sizes, key=lambda pair: pair[1]):
      kinds[re.sub(r"\d+", "*", path)] = (path, size)
    return sorted(kinds.values(), key=lambda pair: -pair[1])[:count]


def table(programs: list[Program], where: Target) -> str:
  """A readable table of the programs."""
  head = (
    "program",
    "arguments",
    "temporaries",
    "peak",
    "in all",
    "moved",
    "GFLOP",
    "ms at least",
    "kernels",
  )
  lines: list[tuple[str, ...]] = [head]
  for one in programs:
    bound = one.bound
    lines.append(
      (
        one.name,
        f"{one.arguments / 1e9:.3f}",
        f"{one.temporaries / 1e9:.3f}",
        f"{one.peak / 1e9:.3f}",
        f"{one.total / 1e9:.3f}",
        f"{one.moved / 1e9:.3f}",
        f"{one.flops / 1e9:.1f}",
        f"{1e3 * bound.seconds:.2f} {bound.by}" if bound else "-",
        ", ".join(one.kernels) or "-",
      )
    )
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  rows = [
    "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True))
    for line in lines
  ]
  limit = f", {where.limit / 1e9:.2f} usable" if where.limit else ""
  title = (
    f"{where.name}: {len(where.devices)} devices, {len(where.local)} of a "
    f"process; GB on a device{limit}"
  )
  exchanged = [
    f"{one.name}: {what} {size / 1e6:.2f} MB"
    for one in programs
    for what, size in one.exchanged.items()
  ]
  return "\n".join([title, *(row.rstrip() for row in rows), *exchanged])


def to_json(plan: Plan, programs: list[Program]) -> dict[str, Any]:
  """All results, as JSON."""
  return {
    "topology": plan.target.name,
    "devices": len(plan.target.devices),
    "limit": plan.target.limit,
    "config": plan.config.name,
    "estimate": dict(plan.memory.parts) | {"total": plan.memory.total},
    "memory_plan": plan.measured(programs).total,
    "largest": plan.largest(8),
    "programs": [dataclasses.asdict(one) for one in programs],
  }
