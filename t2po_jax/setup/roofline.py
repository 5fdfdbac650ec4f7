"""Peak rates of accelerators, and the work of a program.

Peaks are the vendors' figures per chip: dense bfloat16, memory bandwidth, and
outgoing bandwidth over all links together. Times computed from them are lower
bounds that no program reaches. Sources: Google Cloud's pages "TPU v4", "TPU
v5e", "TPU v5p" and "TPU v6e" (cloud.google.com/tpu/docs/v4 and so on); NVIDIA's
data sheets "H100 Tensor Core GPU" and "H200 Tensor Core GPU" (SXM, without
sparsity).
"""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import math
from typing import Any

from jax.extend import core

from t2po_jax import types
from t2po_jax.distributed import collectives

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """An accelerator, as JAX sees a device of it.

  Attributes:
    name: its name in topologies.
    kind: prefix of the device's `device_kind`.
    memory: bytes.
    bandwidth: of the memory, bytes per second.
    flops: bfloat16 operations per second.
    interconnect: outgoing bytes per second, all links together.
    host: chips of one host, as the bounds of a grid; empty for GPUs.
  """

  name: str
  kind: str
  memory: float
  bandwidth: float
  flops: float
  interconnect: float
  host: tuple[int, ...] = ()


# A v4 chip is two devices, each with half of everything.
CHIPS = (
  Chip("v4", "TPU v4", 16 * GIB, 600e9, 137.5e12, 150e9, (2, 2, 1)),
  Chip("v5e", "TPU v5 lite", 16 * GIB, 819e9, 197e12, 200e9, (2, 2, 1)),
  Chip("v5p", "TPU v5", 95 * GIB, 2765e9, 459e12, 600e9, (2, 2, 1)),
  Chip("v6e", "TPU v6 lite", 32 * GIB, 1638e9, 918e12, 400e9, (2, 2, 1)),
  Chip("H100", "NVIDIA H100", 80e9, 3350e9, 989e12, 450e9),
  Chip("H200", "NVIDIA H200", 141e9, 4800e9, 989e12, 450e9),
)
# The part of a chip's memory that XLA's TPU compiler reserves.
RESERVED = GIB // 4


def of_device(device: types.Device) -> Chip | None:
  """The chip of a device; None if it is not in the table."""
  kind = device.device_kind.lower()
  known = sorted(CHIPS, key=lambda chip: -len(chip.kind))
  return next((c for c in known if kind.startswith(c.kind.lower())), None)


def count_flops(jaxpr: core.Jaxpr) -> float:
  """FLOPs of all matrix products of a traced function, over all devices.

  A loop of unknown length counts once; of several branches, the costliest
  counts. A kernel counts its declared cost, or its body once per grid point.

  Args:
    jaxpr: of the function, before partitioning.

  Returns:
    Multiplications and additions.
  """
  return sum(map(_equation_flops, jaxpr.eqns))


def _equation_flops(equation: core.JaxprEqn) -> float:
  params, name = equation.params, equation.primitive.name
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    left: Any = equation.invars[0].aval
    result: Any = equation.outvars[0].aval
    depth = math.prod(left.shape[axis] for axis in contracted)
    return 2.0 * depth * math.prod(result.shape)
  if name == "cond":
    return max(count_flops(branch.jaxpr) for branch in params["branches"])
  inner = sum(map(count_flops, _inner(params)))
  if name == "scan":
    return params["length"] * inner
  if name == "shard_map":
    # Its name has changed between releases of JAX.
    manual = params.get("newly_manual_axes") or params.get("manual_axes", ())
    return math.prod(params["mesh"].shape[axis] for axis in manual) * inner
  if name == "pallas_call":
    cost = params.get("cost_estimate")
    if cost is not None:
      return float(cost.flops)
    return math.prod(params["grid_mapping"].grid) * inner
  return inner


def _inner(params: Mapping[str, Any]) -> Iterator[core.Jaxpr]:
  """The jaxprs that an equation calls."""
  for value in params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      item = getattr(item, "jaxpr", item)
      if hasattr(item, "eqns"):
        yield item


def sent_bytes(collective: collectives.Collective, mesh: Any) -> float:
  """Bytes that each device sends for a collective, on a ring.

  Args:
    collective: the collective.
    mesh: the mesh it runs on.

  Returns:
    Bytes per call of the program.
  """
  size = math.prod(mesh.shape[axis] for axis in collective.axes)
  if size == 1:
    return 0.0
  share = (size - 1) / size
  factor = {"all-reduce": 2 * share, "reduce-scatter": size - 1}
  return collective.times * collective.size * factor.get(collective.kind, share)


@dataclasses.dataclass(frozen=True)
class Bound:
  """Lower bounds on the seconds of a program on a chip, by resource.

  Attributes:
    compute: matrix products.
    memory: reads and writes of main memory.
    exchange: transfers to other devices.
  """

  compute: float
  memory: float
  exchange: float

  @property
  def seconds(self) -> float:
    """The largest: all three may overlap."""
    return max(self.compute, self.memory, self.exchange)

  @property
  def by(self) -> str:
    """The resource that bounds the program."""
    parts = dataclasses.asdict(self)
    return max(parts, key=parts.__getitem__)


def bound(
  chip: Chip, *, flops: float, read: float, sent: Iterable[float]
) -> Bound:
  """The bound of a program.

  Args:
    chip: the chip it runs on.
    flops: per device.
    read: bytes read from and written to memory.
    sent: bytes that leave a device.

  Returns:
    The bound.
  """
  return Bound(
    compute=flops / chip.flops,
    memory=read / chip.bandwidth,
    exchange=sum(sent) / chip.interconnect,
  )
