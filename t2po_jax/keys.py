"""Keys of a configuration: type, default, meaning and bounds in one place.

A section of a configuration is a frozen dataclass whose fields are made by
`key`. Defaults, checks, the command line and the documentation all read them
here. This module imports only the standard library, so that environments may
use it too.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
import dataclasses
import difflib
import math
from typing import Any

_METADATA = "t2po_jax.key"


@dataclasses.dataclass(frozen=True)
class Key:
  """The definition of one key.

  Attributes:
    name: inside its section.
    default: its value unless set; its type is the key's type.
    meaning: one or two sentences, with the unit.
    choices: the values that are allowed; empty for any.
    least: the smallest value that is allowed; None for no bound.
    most: the largest; None for no bound.
    above: what the value must exceed; None for no bound.
  """

  name: str
  default: Any
  meaning: str
  choices: tuple[Any, ...] = ()
  least: float | None = None
  most: float | None = None
  above: float | None = None

  @property
  def expected(self) -> str:
    """The allowed values, in words."""
    if self.choices:
      return f"one of {', '.join(str(c) for c in sorted(self.choices))}"
    parts = []
    if self.above is not None:
      parts.append(f"above {self.above:g}")
    if self.least is not None:
      parts.append(f"at least {self.least:g}")
    if self.most is not None:
      parts.append(f"at most {self.most:g}")
    return " and ".join(parts) or f"a finite {type(self.default).__name__}"

  def check(self, value: Any, *, section: str = "") -> None:
    """Raises an error if a value is not allowed.

    Args:
      value: the value that was set.
      section: the section's name, for the message.

    Raises:
      ValueError: naming the key, what was found and what would be right.
    """
    wrong = bool(self.choices) and value not in self.choices
    if isinstance(value, (int, float)) and not isinstance(value, bool):
      wrong = wrong or not math.isfinite(value)
      wrong = wrong or (self.least is not None and value < self.least)
      wrong = wrong or (self.most is not None and value > self.most)
      wrong = wrong or (self.above is not None and value <= self.above)
    if wrong:
      name = f"{section}.{self.name}" if section else self.name
      near = ""
      if self.choices and isinstance(value, str):
        near = suggestion(value, map(str, self.choices))
      raise ValueError(
        f"{name}: found {value!r}, expected {self.expected}{near}"
      )


def key(
  default: Any,
  meaning: str,
  *,
  choices: Collection[Any] | Callable[[], Iterable[Any]] = (),
  least: float | None = None,
  most: float | None = None,
  above: float | None = None,
) -> Any:
  """Defines a key: a field of a section.

  Args:
    default: the value where nobody sets it.
    meaning: one or two sentences, with the unit.
    choices: the allowed values, or a function that returns them, for tables
      that may still grow.
    least: the smallest value that is allowed.
    most: the largest value that is allowed.
    above: what the value must exceed.

  Returns:
    A dataclass field.
  """
  known = {
    "meaning": meaning,
    "choices": choices,
    "least": least,
    "most": most,
    "above": above,
  }
  return dataclasses.field(default=default, metadata={_METADATA: known})


def field(known: Key) -> Any:
  """A field for a key that another section defines."""
  return key(
    known.default,
    known.meaning,
    choices=known.choices,
    least=known.least,
    most=known.most,
    above=known.above,
  )


def select(section: type, values: Any) -> Any:
  """Builds a section's record from any object with its keys as attributes."""
  return section(**{name: getattr(values, name) for name in keys_of(section)})


def keys_of(section: type) -> dict[str, Key]:
  """The keys of a section by name, in the order of its fields.

  Args:
    section: a dataclass; fields not made by `key` are left out.
  """
  own = {}
  for field in dataclasses.fields(section):
    if _METADATA in field.metadata:
      known: dict[str, Any] = dict(field.metadata[_METADATA])
      choices: Any = known.pop("choices")
      if callable(choices):
        choices = choices()
      known["choices"] = tuple(choices)
      own[field.name] = Key(field.name, field.default, **known)
  return own


def union(sections: Iterable[type]) -> dict[str, Key]:
  """The keys of several sections combined.

  Raises:
    ValueError: if two of them define the same name differently.
  """
  together: dict[str, Key] = {}
  for section in sections:
    for name, key in keys_of(section).items():
      if together.setdefault(name, key) != key:
        raise ValueError(
          f"key {name!r} of {section.__name__} differs from another section's"
        )
  return together


def check(section: type, values: Mapping[str, Any], *, name: str) -> None:
  """Checks each value of a section on its own.

  Args:
    section: the dataclass with the keys.
    values: by key; missing keys are not checked.
    name: of the section, for messages.

  Raises:
    ValueError: for the first value that is out of bounds.
  """
  for known in keys_of(section).values():
    if known.name in values:
      known.check(values[known.name], section=name)


def add(table: dict[str, Any], name: str, entry: Any, *, kind: str) -> None:
  """Adds a method with options to a table of methods.

  Args:
    table: known methods by name.
    name: of the method.
    entry: its record, whose `options` are a dataclass of keys.
    kind: of the method, for messages.

  Raises:
    ValueError: if the name belongs to another method, or another method
      defines one of its keys differently.
  """
  if table.get(name, entry) != entry:
    raise ValueError(f"{kind} {name!r}: the name is taken")
  union(known.options for known in (*table.values(), entry))
  table[name] = entry


def suggestion(name: str, known: Iterable[str]) -> str:
  """`; did you mean ...?` with the closest known name; empty without one."""
  match = difflib.get_close_matches(name, sorted(known), n=1)
  return f"; did you mean {match[0]!r}?" if match else ""


def nearest(name: str, known: Iterable[str]) -> str:
  """Completes a message about an unknown name: a suggestion, and all names."""
  names = sorted(known)
  return f"{suggestion(name, names)} (known: {', '.join(names)})"
