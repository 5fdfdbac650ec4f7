"""Communication between devices: the collectives of a compiled program.

The text of an optimised program lists every all-gather, all-reduce,
reduce-scatter, all-to-all and collective-permute with its shapes and device
groups. Those inside a loop are counted once per iteration.
"""

import collections
import dataclasses
import math
import re

import jax
import numpy as np

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
  "ragged-all-to-all",
  "collective-broadcast",
)
BYTES = {
  "f32": 4,
  "s32": 4,
  "u32": 4,
  "bf16": 2,
  "f16": 2,
  "pred": 1,
  "f64": 8,
  "s64": 8,
  "u64": 8,
  "s16": 2,
  "u16": 2,
  "s8": 1,
  "u8": 1,
  "f8e4m3fn": 1,
  "f8e5m2": 1,
}
# Their start op lists both operands and results.
_BOTH_ENDS = ("all-gather-start", "collective-permute-start")
_OP = re.compile(
  r"= (?P<type>.*?) (?P<kind>" + "|".join(KINDS) + r")(?:-start)?\("
)
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_IOTA = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(
  r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\]\S*?)\))? \{(.*?)\}"
)
_CALLED = re.compile(r"(?:to_apply|calls|body|condition)=%?([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program.

  Attributes:
    kind: one of `KINDS`.
    axes: the mesh axes it runs over.
    shapes: of the result, one per array.
    size: bytes of the result, of all its arrays.
    times: executions per call; see `read` for loops of unknown length.
    source: its origin in the Python code, from the program's metadata.
  """

  kind: str
  axes: tuple[str, ...]
  shapes: tuple[tuple[int, ...], ...]
  size: int
  times: int
  source: str


def read(
  text: str, mesh: jax.sharding.Mesh, *, unknown: int = 0
) -> list[Collective]:
  """All collectives of a compiled program.

  Args:
    text: of the program, `compiled.as_text()`.
    mesh: the mesh it runs on.
    unknown: iterations to assume for loops of unknown trip count.

  Returns:
    One entry per line of the text.

  Raises:
    ValueError: if the notation of a device group is unknown.
  """
  bodies = computations(text)
  times = collections.Counter()

  def visit(name: str, factor: int) -> None:
    times[name] += factor
    for line in bodies[name]:
      inner = factor
      if " while(" in line:
        trips = TRIPS.search(line)
        inner *= int(trips.group(1)) if trips else unknown
      for called in _CALLED.findall(line):
        if called in bodies:
          visit(called, inner)

  visit("ENTRY", 1)
  operations = []
  for name, lines in bodies.items():
    for line in lines:
      if match := _OP.search(line):
        operations.append(_collective(line, match, times[name], mesh))
  return operations


def kernels(text: str) -> tuple[str, ...]:
  """Names of the Pallas kernels of a compiled program, each once."""
  names = re.findall(
    r'%([\w-]+)[\d.]* = [^\n]*custom_call_target="tpu_custom_call"', text
  )
  return tuple(dict.fromkeys(names))


def computations(text: str) -> dict[str, list[str]]:
  """Name -> lines of each computation of a program; its entry is `ENTRY`."""
  bodies, name = {}, None
  for line in text.splitlines():
    head = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
    if head:
      name = "ENTRY" if head.group(1) else head.group(2)
      bodies[name] = []
    elif name is not None:
      bodies[name].append(line)
  return bodies


def _collective(
  line: str, match: re.Match[str], times: int, mesh: jax.sharding.Mesh
) -> Collective:
  arrays = [
    (kind, tuple(int(n) for n in sizes.split(",") if n))
    for kind, sizes in _ARRAY.findall(match["type"])
  ]
  if any(f" {start}(" in line for start in _BOTH_ENDS):
    arrays = [max(arrays, key=lambda a: BYTES.get(a[0], 0) * math.prod(a[1]))]
  source = re.search(r'op_name="([^"]*)"', line)
  return Collective(
    kind=match["kind"],
    axes=_axes(line, mesh),
    shapes=tuple(shape for _, shape in arrays),
    size=sum(BYTES.get(kind, 4) * math.prod(shape) for kind, shape in arrays),
    times=times,
    source=source.group(1) if source else "",
  )


def _axes(line: str, mesh: jax.sharding.Mesh) -> tuple[str, ...]:
  """The mesh axes along which the devices of a group differ."""
  group = _first_group(line, mesh.devices.size)
  shape = tuple(mesh.shape.values())
  places = np.array(np.unravel_index(np.array(group), shape))
  varies = [len(set(row.tolist())) > 1 for row in places]
  return tuple(
    axis for axis, many in zip(mesh.axis_names, varies, strict=True) if many
  )


def _named_group(sizes: str, order: str | None, used: str) -> list[int]:
  """The first group of a mesh with named axes.

  Args:
    sizes: `'axis_0'=2,'axis_1'=4`.
    order: how the devices fill that mesh, `[2,4]T(1,0)`; None: in order.
    used: the axes that a group spans, `'axis_0'`.
  """
  lengths = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", sizes)}
  spanned = re.findall(r"'(\w+)'", used)
  ids = np.arange(math.prod(lengths.values()))
  if order and (named := _IOTA.fullmatch(order)):
    ids = _ordered(*named.groups())
  ids = ids.reshape(list(lengths.values()))
  place = tuple(slice(None) if name in spanned else 0 for name in lengths)
  return ids[place].ravel().tolist()


def _ordered(shape: str, order: str | None) -> np.ndarray:
  """All device ids, arranged by `[4,2]` or `[4,2]T(1,0)`."""
  sizes = [int(n) for n in shape.split(",")]
  ids = np.arange(math.prod(sizes)).reshape(sizes)
  return ids.transpose([int(n) for n in order.split(",")]) if order else ids


def _first_group(line: str, devices: int) -> list[int]:
  """The device ids of one group."""
  if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
    return [int(pairs.group(1)), int(pairs.group(2))]
  if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
    return [int(n) for n in listed.group(1).split(",")]
  if "replica_groups={}" in line:
    return list(range(devices))
  if named := _NAMED.search(line):
    return _named_group(*named.groups())
  iota = re.search(r"replica_groups=\[([\d,]+)\]<=" + _IOTA.pattern, line)
  if not iota:
    raise ValueError(f"cannot read the groups of: {line.strip()[:300]}")
  groups, *ids = iota.groups()
  groups = [int(n) for n in groups.split(",")]
  return _ordered(*ids).reshape(groups)[0].tolist()
