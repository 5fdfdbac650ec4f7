"""The products of a shop, from the files that WebShop publishes.

`items_shuffle*.json` contains the products, `items_ins_v2*.json` their
attributes and synthetic instructions, `items_human_ins*.json` instructions
written by people. A small catalogue is kept in memory. The full one (1.18
million products) is read once as a stream, object by object, into an SQLite
file; every worker opens that file read-only, so that all of them share one
copy in the page cache and each holds only its most recent products.

Deliberate difference from the original: a price is drawn from a price range in
a way that depends only on the product, so that the price of a product is the
same in every subset of the catalogue and on every machine.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import random
import re
import sqlite3
import threading
from typing import Literal, Protocol
import zlib

from t2po_jax.envs import base

MISSING_PRICE = 100.0
_PATH_SEPARATOR = "›"
_READ_SIZE = 1 << 22  # Characters per read of a JSON stream.
_LARGEST_OBJECT = 1 << 26  # Characters; a longer object means a broken file.
_CACHED_PRODUCTS = 4096  # Decoded products that a worker keeps.
FORMAT = 1  # Version of the SQLite file; a change makes old files stale.


@dataclasses.dataclass(frozen=True, slots=True)
class HumanInstruction:
  """An instruction that a person wrote for a product.

  Attributes:
    text: the instruction.
    attributes: the attributes it asks for.
    options: the option values it asks for.
  """

  text: str
  attributes: tuple[str, ...]
  options: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Product:
  """One product.

  Attributes:
    asin: its id, at most ten characters.
    title: its name.
    description: the long text.
    bullets: the features.
    price: dollars; drawn if the price is a range.
    price_tag: the price as shown on pages.
    category: the shop's department, e.g. `beauty`.
    query: the search that had found the product, in lower case.
    path: segments of the product category, from general to specific.
    attributes: hidden attributes that instructions ask for.
    options: option name -> values, in lower case and in the order of the page.
    image: URL of the main picture, or empty.
    instruction: the synthetic instruction, or empty.
    instruction_attributes: the attributes that it asks for.
    human: instructions written by people.
    nouns: lower-case nouns of the title, if the catalogue has them.
  """

  asin: str
  title: str
  description: str
  bullets: tuple[str, ...]
  price: float
  price_tag: str
  category: str
  query: str
  path: tuple[str, ...]
  attributes: tuple[str, ...]
  options: Mapping[str, tuple[str, ...]]
  image: str = ""
  instruction: str = ""
  instruction_attributes: tuple[str, ...] = ()
  human: tuple[HumanInstruction, ...] = ()
  nouns: tuple[str, ...] | None = None


class Catalogue(Protocol):
  """Products by position and by id; safe to use from many threads."""

  def __len__(self) -> int:
    """Number of products."""
    ...

  def at(self, position: int) -> Product:
    """The product at a position, from 0."""
    ...

  def find(self, asin: str) -> int | None:
    """The position of a product, or None."""

  def goal_counts(self, kind: str) -> list[int]:
    """Number of `synthetic` or `human` goals per product."""
    ...


def _parse_prices(text: str) -> list[float]:
  """The amounts in "", "$a" or "$a$b": at most two."""
  amounts = []
  for part in text.split("$")[1:]:
    digits = re.sub(r"[^\d.]", "", part)
    try:
      amounts.append(float(digits))
    except ValueError:
      continue
  return amounts[:2]


def _parse_options(
  raw: Mapping | Literal[""] | None,
) -> dict[str, tuple[str, ...]]:
  """Lower-case option names and values, without empty ones."""
  options = {}
  for name, contents in (raw or {}).items():
    if contents is not None:
      options[name.lower()] = tuple(
        content["value"].strip().replace("/", " | ").lower()
        for content in contents
      )
  return options


def parse_product(
  raw: Mapping,
  annotation: Mapping | None = None,
  human: Sequence[Mapping] = (),
) -> Product:
  """Builds a product from the published fields.

  Args:
    raw: one object of `items_shuffle*.json`.
    annotation: its entry in `items_ins_v2*.json`, if there is one.
    human: its entries in `items_human_ins*.json`.

  Raises:
    KeyError: if a required field is missing.
  """
  annotation = annotation or {}
  asin = raw["asin"]
  bullets = raw["small_description"]
  prices = _parse_prices(raw.get("pricing") or "")
  if not prices:
    price, price_tag = MISSING_PRICE, f"${MISSING_PRICE}"
  elif len(prices) == 1:
    price, price_tag = prices[0], f"${prices[0]}"
  else:
    draw = random.Random(f"{base.SPLIT_SEED}/price/{asin}")
    price = draw.uniform(*prices)
    price_tag = f"${prices[0]} to ${prices[1]}"
  segments = (raw.get("product_category") or "").split(_PATH_SEPARATOR)
  images = raw.get("images") or ("",)
  nouns = raw.get("nouns")
  return Product(
    asin=asin,
    title=raw["name"] or "",
    description=raw["full_description"] or "",
    bullets=tuple(bullets) if isinstance(bullets, list) else (bullets or "",),
    price=price,
    price_tag=price_tag,
    category=raw["category"],
    query=(raw["query"] or "").lower().strip(),
    path=tuple(segment.strip() for segment in segments),
    attributes=tuple(annotation.get("attributes", ())),
    options=_parse_options(raw["customization_options"]),
    image=images[0] or "",
    instruction=annotation.get("instruction") or "",
    instruction_attributes=tuple(
      annotation.get("instruction_attributes") or ()
    ),
    human=tuple(
      HumanInstruction(
        entry["instruction"],
        tuple(entry["instruction_attributes"]),
        tuple(entry["instruction_options"]),
      )
      for entry in human
    ),
    nouns=None if nouns is None else tuple(nouns),
  )


def stream_objects(path: pathlib.Path) -> Iterator[dict]:
  """Yields the objects of a JSON array without loading the whole file.

  Raises:
    ValueError: if the file is not a JSON array or is truncated.
  """
  decoder = json.JSONDecoder()
  with open(path, encoding="utf-8") as file:
    text = file.read(_READ_SIZE).lstrip()
    if not text.startswith("["):
      raise ValueError(f"{path}: starts with {text[:20]!r}; must be an array")
    start = 1
    while True:
      # Skips what separates two objects.
      while start < len(text) and text[start] in " \t\r\n,":
        start += 1
      if text[start : start + 1] == "]":
        return
      try:
        item, start = decoder.raw_decode(text, start)
      except json.JSONDecodeError as error:
        more = file.read(_READ_SIZE)
        if not more or len(text) - start > _LARGEST_OBJECT:
          raise ValueError(
            f"{path}: the array is cut short or broken ({error.msg}); "
            "download the file again"
          ) from error
        text, start = text[start:] + more, 0
        continue
      yield item


def read_products(
  items: pathlib.Path,
  instructions: pathlib.Path,
  human: pathlib.Path | None = None,
  *,
  limit: int = 0,
) -> Iterator[Product]:
  """Streams the products of the published files in their order.

  Repeated and malformed ids are left out, as in the original.

  Args:
    items: `items_shuffle*.json`.
    instructions: `items_ins_v2*.json`.
    human: `items_human_ins*.json`, if people's goals are wanted.
    limit: reads only the first objects of the file; 0 reads all.

  Raises:
    ValueError: if a file is missing or malformed.
  """
  annotations = _load_mapping(instructions)
  people = _load_mapping(human) if human else {}
  seen: set[str] = set()
  for number, raw in enumerate(stream_objects(items)):
    if limit and number >= limit:
      return
    asin = raw.get("asin", "nan")
    if asin == "nan" or len(asin) > 10 or asin in seen:
      continue
    seen.add(asin)
    try:
      yield parse_product(raw, annotations.get(asin), people.get(asin, ()))
    except KeyError as error:
      raise ValueError(
        f"{items}: product {asin} has no field {error}"
      ) from error


def _load_mapping(path: pathlib.Path) -> dict:
  """Loads a JSON object.

  Raises:
    ValueError: if the file is missing or not a JSON object.
  """
  if not path.is_file():
    raise ValueError(f"{path}: no such file; it belongs next to the products")
  with open(path, encoding="utf-8") as file:
    try:
      loaded = json.load(file)
    except json.JSONDecodeError as error:
      raise ValueError(f"{path}: not JSON ({error})") from error
  if not isinstance(loaded, dict):
    raise ValueError(f"{path}: a {type(loaded).__name__}; must be an object")
  return loaded


class MemoryCatalogue:
  """A catalogue in memory."""

  def __init__(self, products: Iterable[Product]) -> None:
    self._products = tuple(products)
    self._positions = {
      product.asin: position for position, product in enumerate(self._products)
    }

  def __len__(self) -> int:
    return len(self._products)

  def at(self, position: int) -> Product:
    """See `Catalogue.at`."""
    return self._products[position]

  def find(self, asin: str) -> int | None:
    """See `Catalogue.find`."""
    return self._positions.get(asin)

  def goal_counts(self, kind: str) -> list[int]:
    """See `Catalogue.goal_counts`."""
    return [GOAL_COUNTS[kind](product) for product in self._products]


class _Local(threading.local):
  """A thread's connection and the process that opened it."""

  connection: sqlite3.Connection | None = None
  owner = 0


class DiskCatalogue:
  """A catalogue in an SQLite file that many workers read at once."""

  def __init__(self, path: pathlib.Path) -> None:
    self._path = path
    self._local = _Local()
    self._read = functools.lru_cache(_CACHED_PRODUCTS)(self._fetch)
    count = self._connect().execute("SELECT COUNT(*) FROM product")
    (self._size,) = count.fetchone()

  @classmethod
  def write(cls, path: pathlib.Path, products: Iterable[Product]) -> None:
    """Writes a catalogue file; a reader never sees half of one.

    Raises:
      OSError: if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    try:
      with contextlib.closing(sqlite3.connect(partial)) as connection:
        cls._fill(connection, products)
      os.replace(partial, path)
    except sqlite3.OperationalError as error:
      raise OSError(f"{path} could not be written: {error}") from error
    finally:
      partial.unlink(missing_ok=True)

  @staticmethod
  def _fill(
    connection: sqlite3.Connection, products: Iterable[Product]
  ) -> None:
    """Writes the product table."""
    connection.execute("PRAGMA journal_mode = OFF")
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute(
      "CREATE TABLE product (position INTEGER PRIMARY KEY, asin TEXT, "
      "synthetic INTEGER, human INTEGER, body BLOB)"
    )
    connection.executemany(
      "INSERT INTO product VALUES (?, ?, ?, ?, ?)",
      (
        (
          position,
          product.asin,
          count_combinations(product),
          count_requests(product),
          _pack(product),
        )
        for position, product in enumerate(products)
      ),
    )
    connection.execute("CREATE UNIQUE INDEX by_asin ON product (asin)")
    connection.commit()

  def __len__(self) -> int:
    return self._size

  def at(self, position: int) -> Product:
    """See `Catalogue.at`."""
    return self._read(position)

  def find(self, asin: str) -> int | None:
    """See `Catalogue.find`."""
    row = self._query("SELECT position FROM product WHERE asin = ?", (asin,))
    return row[0] if row else None

  def goal_counts(self, kind: str) -> list[int]:
    """See `Catalogue.goal_counts`."""
    if kind not in GOAL_COUNTS:
      raise ValueError(f"no goals of kind {kind!r}")
    rows = self._connect().execute(
      f"SELECT {kind} FROM product ORDER BY position"
    )
    return [count for (count,) in rows]

  def _connect(self) -> sqlite3.Connection:
    """This thread's connection; a fork must not inherit one."""
    connection = self._local.connection
    if connection is None or self._local.owner != os.getpid():
      connection = sqlite3.connect(
        f"{self._path.absolute().as_uri()}?mode=ro&immutable=1", uri=True
      )
      self._local.connection, self._local.owner = connection, os.getpid()
    return connection

  def _query(self, statement: str, values: tuple) -> tuple | None:
    return self._connect().execute(statement, values).fetchone()

  def _fetch(self, position: int) -> Product:
    row = self._query(
      "SELECT body FROM product WHERE position = ?", (position,)
    )
    if row is None:
      raise IndexError(f"no product at position {position}")
    return _unpack(row[0])


def count_combinations(product: Product) -> int:
  """Number of synthetic goals: the combinations of option values."""
  if not product.instruction:
    return 0
  count = 1
  for values in product.options.values():
    count *= len(values)
  return count


def count_requests(product: Product) -> int:
  """Number of a product's goals written by people that ask for an attribute."""
  return sum(bool(entry.attributes) for entry in product.human)


GOAL_COUNTS = {"synthetic": count_combinations, "human": count_requests}


def _pack(product: Product) -> bytes:
  # Level 1: a page reads ten products, so unpacking speed matters most.
  return zlib.compress(json.dumps(dataclasses.astuple(product)).encode(), 1)


def _unpack(body: bytes) -> Product:
  values = json.loads(zlib.decompress(body))
  fields = dict(
    zip((f.name for f in dataclasses.fields(Product)), values, strict=True)
  )
  for name, value in fields.items():
    if isinstance(value, list):
      fields[name] = tuple(value)
  fields["options"] = {
    name: tuple(values) for name, values in fields["options"].items()
  }
  fields["human"] = tuple(
    HumanInstruction(text, tuple(attributes), tuple(options))
    for text, attributes, options in fields["human"]
  )
  return Product(**fields)
