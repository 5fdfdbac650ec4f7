"""The goals: what an agent is asked to buy.

A synthetic goal is a product's instruction with one combination of its option
values and a price limit; a human goal is an instruction written by a person.
Both are constructed as in the original: the same goals in the same order, in
the same words. Goals are built on demand, because the full catalogue has
millions of them.

Deliberate difference from the original: the price limit is drawn from a
generator that depends only on the product (and, for human goals, on the index
of the instruction), not from one stream over the catalogue.
"""

import bisect
from collections.abc import Mapping
import dataclasses
import itertools
import random

import numpy as np

from t2po_jax.envs import base
from t2po_jax.envs.webshop import data

NO_LIMIT = 1_000_000.0
_LIMITS = tuple(10.0 * step for step in range(1, 100))
_CHOICES = 4  # Number of limits above the price to draw from.


@dataclasses.dataclass(frozen=True, slots=True)
class Goal:
  """One shopping task.

  Attributes:
    product: the product that the instruction was made from.
    request: the instruction without options and price.
    instruction: the whole instruction.
    attributes: the attributes it asks for.
    options: the option values it asks for: (name, value) pairs of a
      synthetic goal, plain values of a human one; the score treats them
      differently.
    price_upper: dollars; `NO_LIMIT` if there is none.
  """

  product: data.Product
  request: str
  instruction: str
  attributes: tuple[str, ...]
  options: tuple[tuple[str, str], ...] | tuple[str, ...]
  price_upper: float


def draw_limit(price: float, draw: random.Random) -> float:
  """The price limit: the larger of two of the next multiples of ten.

  Args:
    price: dollars.
    draw: random generator.

  Returns:
    Dollars, above the price; `NO_LIMIT` if fewer than two are left.
  """
  first = bisect.bisect_right(_LIMITS, price)
  above = _LIMITS[first : first + _CHOICES]
  return max(draw.sample(above, 2)) if len(above) >= 2 else NO_LIMIT


def price_text(limit: float) -> str:
  """How an instruction words a price limit."""
  if limit == NO_LIMIT:
    return ""
  return f", and price lower than {limit:.2f} dollars"


def synthetic_goal(product: data.Product, combination: int) -> Goal:
  """The goal for one combination of a product's option values.

  Args:
    product: a product with an instruction.
    combination: index in the order of `itertools.product` over the values of
      the options, the options sorted by name.
  """
  names = sorted(product.options)
  values: list[str] = []
  for name in reversed(names):
    combination, index = divmod(combination, len(product.options[name]))
    values.append(product.options[name][index])
  options = tuple(zip(names, reversed(values), strict=True))
  draw = random.Random(f"{base.SPLIT_SEED}/limit/{product.asin}")
  limit = draw_limit(product.price, draw)
  wished = ", and ".join(f"{name}: {value}" for name, value in options)
  return Goal(
    product=product,
    request=product.instruction,
    instruction=product.instruction
    + (f" with {wished}" if wished else "")
    + price_text(limit),
    attributes=product.instruction_attributes,
    options=options,
    price_upper=limit,
  )


def human_goal(product: data.Product, number: int) -> Goal:
  """The goal of a human instruction, counting only those with attributes."""
  asking = (entry for entry in product.human if entry.attributes)
  entry = next(itertools.islice(asking, number, None))
  draw = random.Random(f"{base.SPLIT_SEED}/limit/{product.asin}/{number}")
  limit = draw_limit(product.price, draw)
  request = entry.text.strip(".")
  return Goal(
    product=product,
    request=request,
    instruction=request + price_text(limit),
    attributes=entry.attributes,
    options=entry.options,
    price_upper=limit,
  )


_BUILDERS = {"synthetic": synthetic_goal, "human": human_goal}
KINDS = tuple(_BUILDERS)


class Goals:
  """All goals of a catalogue, in the order of its products."""

  def __init__(self, catalogue: data.Catalogue, kind: str) -> None:
    """Counts the goals.

    Args:
      catalogue: the products.
      kind: `synthetic` or `human`.

    Raises:
      ValueError: if the kind is unknown.
    """
    if kind not in _BUILDERS:
      raise ValueError(
        f"env.goals: unknown kind {kind!r} (known: {', '.join(KINDS)})"
      )
    self._catalogue = catalogue
    self._build = _BUILDERS[kind]
    self._ends = np.cumsum(catalogue.goal_counts(kind))

  def __len__(self) -> int:
    return int(self._ends[-1]) if self._ends.size else 0

  def at(self, index: int) -> Goal:
    """The goal at an index, from 0."""
    position = int(np.searchsorted(self._ends, index, side="right"))
    first = int(self._ends[position - 1]) if position else 0
    return self._build(self._catalogue.at(position), index - first)


def draw_order(count: int, *, most: int = 100_000) -> tuple[int, ...]:
  """The order in which goals become tasks, the same on every machine.

  Args:
    count: number of goals.
    most: the most goals to use; the full catalogue has millions.

  Returns:
    Goal indices; task number n is the goal at position n.
  """
  order = list(range(count))
  random.Random(base.SPLIT_SEED).shuffle(order)
  return tuple(order[:most])


def cut_splits(count: int) -> Mapping[str, range]:
  """Divides task numbers into disjoint splits.

  As in the original, the first 500 tasks are the test tasks. The next 500 are
  for validation, all others for training. Test and validation take at most a
  quarter of the tasks each.

  Args:
    count: number of tasks.

  Returns:
    Task numbers by split.

  Raises:
    ValueError: if there are fewer than four tasks.
  """
  if count < 4:
    raise ValueError(
      f"env.goals: {count} goals in the catalogue; splits need at least 4"
    )
  held_out = min(500, count // 4)
  return {
    "train": range(2 * held_out, count),
    "valid": range(held_out, 2 * held_out),
    "test": range(held_out),
  }
