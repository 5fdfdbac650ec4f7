"""Memory traffic of a compiled program: what it moves from and to HBM.

Computed from the text of an optimised TPU program, in which every array names
its memory space: arrays that the compiler keeps in fast memory, `S(1)`, cost no
bandwidth. A fusion that slices an array reads only the slices, and one that
updates a part in place writes only that part.
"""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import math
import re

from t2po_jax.distributed import collectives

_LINE = re.compile(
  r"\s+(?P<root>ROOT )?%(?P<name>[\w.-]+) = (?P<type>.*?) "
  r"(?P<op>[a-z][\w-]*)\((?P<rest>.*)$"
)
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
# These move nothing, or are counted where they end.
_FREE = {
  "parameter",
  "get-tuple-element",
  "tuple",
  "bitcast",
  "constant",
  "while",
  "conditional",
  "call",
  "after-all",
  "partition-id",
  "replica-id",
  "iota",
}
_SLICES = {"dynamic-slice", "gather", "slice"}
_UPDATES = {"dynamic-update-slice", "scatter"}
_CALLED = re.compile(r"(?:body|to_apply|branch_computations)=\{?%?([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class _Operation:
  """One line.

  Attributes:
    size: bytes of its result in main memory.
    fast: bytes of its result elsewhere.
  """

  name: str
  op: str
  size: int
  fast: int
  operands: tuple[str, ...]
  rest: str
  root: bool


def count(text: str) -> int:
  """Bytes read and written per call; loops of unknown length count once.

  Args:
    text: of the program, `compiled.as_text()`.

  Returns:
    Bytes on one device.
  """
  bodies = {
    name: {one.name: one for one in _operations(lines)}
    for name, lines in collectives.computations(text).items()
  }
  total = 0

  def visit(name: str, factor: int) -> None:
    nonlocal total
    for one in bodies[name].values():
      total += factor * _moved(one, bodies[name], bodies)
      if one.op in ("while", "call", "conditional"):
        trips = collectives.TRIPS.search(one.rest)
        inner = factor * (int(trips.group(1)) if trips else 1)
        for called in _CALLED.findall(one.rest):
          if called in bodies:
            visit(called, inner)

  visit("ENTRY", 1)
  return total


def _operations(lines: Iterable[str]) -> Iterator[_Operation]:
  for line in lines:
    if match := _LINE.match(line):
      inside = match["rest"].split("), ")[0]
      yield _Operation(
        name=match["name"],
        op=match["op"],
        size=_bytes(match["type"], fast=False),
        fast=_bytes(match["type"], fast=True),
        operands=tuple(re.findall(r"%([\w.-]+)", inside)),
        rest=match["rest"],
        root=bool(match["root"]),
      )


def _bytes(kind: str, *, fast: bool) -> int:
  """Bytes of the arrays of a type that lie in fast or in main memory."""
  return sum(
    collectives.BYTES.get(name, 0)
    * math.prod(int(n) for n in sizes.split(",") if n)
    for name, sizes, layout in _ARRAY.findall(kind)
    if ("S(" in layout) == fast
  )


def _moved(
  one: _Operation,
  around: Mapping[str, _Operation],
  bodies: Mapping[str, Mapping[str, _Operation]],
) -> int:
  if one.op in _FREE or one.op.endswith("-start"):
    return 0
  if one.op.endswith("-done"):
    return one.size + one.fast  # One end is main memory.
  sizes = [around[n].size if n in around else 0 for n in one.operands]
  sizes = [
    0 if n in around and around[n].op.endswith("-start") else size
    for n, size in zip(one.operands, sizes, strict=True)
  ]
  if one.op in _SLICES:
    return 2 * one.size
  if one.op in _UPDATES:
    return 2 * sum(sizes[1:])
  if one.op == "fusion":
    called = re.search(r"calls=%?([\w.-]+)", one.rest)
    if called and called.group(1) in bodies:
      return _fused(one, sizes, bodies[called.group(1)])
  result = one.size
  for operand in re.findall(r"\{\d*\}: \((\d+), \{\}", one.rest):
    result -= sizes[int(operand)]  # The same memory, updated in place.
  return max(result, 0) + sum(sizes)


def _fused(
  one: _Operation, sizes: list[int], inner: Mapping[str, _Operation]
) -> int:
  """Bytes that a fusion reads of its operands and writes of its result."""
  total, result = 0, one.size
  parameters = [p for p in inner.values() if p.op == "parameter"]
  parameters.sort(key=lambda p: int(p.rest.split(")")[0]))
  for size, parameter in zip(sizes, parameters, strict=False):
    users = _users(parameter.name, inner)
    if users and all(u.op in _SLICES for u, _ in users):
      total += min(size, sum(u.size for u, _ in users))
    elif users and all(
      u.op in _UPDATES and u.operands[0] == alias for u, alias in users
    ):
      updates = sum(
        inner[n].size for u, _ in users for n in u.operands[1:] if n in inner
      )
      result = min(result, updates)
    else:
      total += size
  return total + result


def _users(
  name: str, inner: Mapping[str, _Operation]
) -> list[tuple[_Operation, str]]:
  """The users of a value, through bitcasts, and its name in each of them."""
  users = []
  for one in inner.values():
    if name in one.operands:
      if one.op == "bitcast":
        users += _users(one.name, inner)
      else:
        users.append((one, name))
  return users
