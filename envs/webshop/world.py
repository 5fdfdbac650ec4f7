"""The embedded catalogue: a small shop that needs no download.

Products are drawn from one seed in the format of the published files, so that
the same loader, index, pages and score apply. A title is two attributes and a
noun ("Steel Insulated Mug"), everything that a goal asks for is a single word,
and all products of a noun have the same options: a page of results shows
whether a product meets a goal. About a third of the products have a twin that
differs only in being too expensive for the other's price limits. Every goal can
be satisfied in full, by its own product. Products include their nouns.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import random

from t2po_jax.envs.webshop import data


@dataclasses.dataclass(frozen=True)
class _Department:
  """A department's nouns, attributes, and the options of every noun."""

  nouns: Sequence[str]
  attributes: Sequence[str]
  options: Mapping[str, Sequence[str]]


_COLOURS = "red blue green black white yellow pink brown".split()
_SIZES = "small medium large".split()
_SCENTS = "lemon mint rose vanilla".split()

_DEPARTMENTS = {
  "kitchen": _Department(
    "mug bowl kettle pan tray".split(),
    "steel glass ceramic wooden insulated stackable nonstick portable".split(),
    {"color": _COLOURS, "size": _SIZES},
  ),
  "fashion": _Department(
    "shirt jacket scarf hat belt".split(),
    "cotton leather silk fleece waterproof padded striped hooded".split(),
    {"color": _COLOURS, "size": _SIZES},
  ),
  "home": _Department(
    "lamp rug pillow curtain mirror".split(),
    "velvet bamboo marble antique dimmable washable handmade foldable".split(),
    {"color": _COLOURS, "size": _SIZES},
  ),
  "garden": _Department(
    "bench trellis lantern hose ladder".split(),
    "cedar solar plastic concrete rustproof windproof movable robust".split(),
    {"color": _COLOURS, "size": _SIZES},
  ),
  "beauty": _Department(
    "soap shampoo lotion candle perfume".split(),
    "organic vegan herbal mineral gentle soothing foaming creamy".split(),
    {"scent": _SCENTS, "size": _SIZES},
  ),
}
# Attributes that are nouns themselves, as a tagger would say.
_NOUN_ATTRIBUTES = frozenset(
  """
  steel glass cotton leather silk fleece velvet bamboo marble cedar plastic
  concrete mineral
  """.split()
)
_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"
_PRICES = range(9, 50, 5)  # Dollars, without the twins.
# Above every price limit of the cheaper twin.
_TWIN_SURCHARGE = 40
_TWINS = 1 / 3  # Fraction of products that are a twin of the previous one.


def _draw_ids(count: int, draw: random.Random) -> list[str]:
  """Distinct two-syllable words, none a prefix of a noun or attribute."""
  syllables = [c + v for c in _CONSONANTS for v in _VOWELS]
  words = [
    word
    for word in (a + b for a in syllables for b in syllables)
    if not any(
      other.startswith(word)
      for department in _DEPARTMENTS.values()
      for other in (*department.nouns, *department.attributes)
    )
  ]
  if count > len(words):
    raise ValueError(
      f"env.products: {count} embedded products; at most {len(words)}"
    )
  return draw.sample(words, count)


def _draw_options(
  department: _Department, draw: random.Random
) -> dict[str, list[str]]:
  """The options that all products of a noun have."""
  names = list(department.options)
  kept = draw.choice((names, names, names, names[:1], names[1:]))
  options = {}
  for name in kept:
    values = department.options[name]
    chosen = draw.sample(values, draw.randint(3, min(4, len(values))))
    options[name] = sorted(chosen, key=list(values).index)
  return options


def _record(
  asin: str,
  name: str,
  noun: str,
  attributes: Sequence[str],
  price: int,
  options: Mapping[str, Sequence[str]],
) -> tuple[dict, dict]:
  """A product and its annotation in the format of the published files."""
  title = " ".join((*attributes, noun))
  raw = {
    "asin": asin.upper(),
    "name": title.title(),
    "full_description": f"This {noun} is {' and '.join(attributes)}.",
    "small_description": [f"{attribute} {noun}" for attribute in attributes],
    "pricing": f"${price}",
    "images": [],
    "product_category": " › ".join(("shop", name, noun)),
    "category": name,
    "query": noun,
    "customization_options": {
      option.title(): [{"value": value} for value in values]
      for option, values in options.items()
    },
    "nouns": [
      word
      for word in (*attributes, noun)
      if word == noun or word in _NOUN_ATTRIBUTES
    ],
  }
  article = "an" if title[0] in _VOWELS else "a"
  annotation = {
    "attributes": list(attributes),
    "instruction": f"Find me {article} {title}",
    "instruction_attributes": list(attributes),
  }
  return raw, annotation


def build(seed: int, *, products: int) -> list[data.Product]:
  """Draws the embedded catalogue.

  Args:
    seed: seed of everything.
    products: number of products, at least one per noun.

  Raises:
    ValueError: if the number of products is out of range.
  """
  draw = random.Random(f"webshop/{seed}")
  nouns = [
    (name, noun)
    for name, department in _DEPARTMENTS.items()
    for noun in department.nouns
  ]
  if products < len(nouns):
    raise ValueError(
      f"env.products: {products} embedded products; at least {len(nouns)}"
    )
  options = {
    noun: _draw_options(_DEPARTMENTS[name], draw) for name, noun in nouns
  }
  wares: list[tuple[str, str, tuple[str, ...], int]] = []
  for index in range(products):
    name, noun = nouns[index % len(nouns)]
    # The previous product of the same noun, if it can have a twin.
    before = wares[index - len(nouns)] if index >= len(nouns) else None
    if before and before[3] in _PRICES and draw.random() < _TWINS:
      wares.append((*before[:3], before[3] + _TWIN_SURCHARGE))
      continue
    available = _DEPARTMENTS[name].attributes
    attributes = draw.sample(available, 2)
    attributes.sort(key=list(available).index)
    wares.append((name, noun, tuple(attributes), draw.choice(_PRICES)))
  draw.shuffle(wares)
  return [
    data.parse_product(
      *_record(asin, name, noun, attributes, price, options[noun])
    )
    for asin, (name, noun, attributes, price) in zip(
      _draw_ids(products, draw), wares, strict=True
    )
  ]
