"""The value of a purchase: WebShop's score (arXiv 2207.01206, section 3.2).

  score = type * (attributes + options + price) / (|A| + |O| + 1)

with the number of goal attributes and goal options that the purchased product
and the chosen values match, 1 if the price is within the limit, and a type
factor that compares the types of the two products. A success is a score of 1.

The similarity of strings is the token set ratio of thefuzz 0.19, computed on
rapidfuzz. The list of colour names is the benchmark's own table.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import re

from rapidfuzz import fuzz

from t2po_jax.envs.webshop import data, goals

MATCH = 85  # Ratios above this count as a match.

# WebShop's colour names, in its order: the first that a value contains wins.
COLOURS = tuple(
  """
  alabaster apricot aqua ash asphalt azure banana beige black blue blush
  bordeaux bronze brown burgundy camel camo caramel champagne charcoal cheetah
  chestnut chocolate christmas coffee cognac copper coral cranberry cream
  crystal dark denim eggplant elephant espresso fuchsia gold granite grape
  graphite grass gray green grey heather indigo ivory ivy khaki lavender lemon
  leopard light lilac lime magenta maroon mauve merlot midnight mint mocha
  multicolor mushroom mustard natural navy nude olive orange peach pewter pink
  plum purple rainbow red rose royal rust sand sapphire seashell silver skull
  slate steel stone stonewash sunflower tan taupe teal tiger turquoise violet
  walnut wheat white wine yellow
  """.split()
)


@dataclasses.dataclass(frozen=True)
class Score:
  """A score and its components.

  Attributes:
    total: the score, in [0, 1].
    type_factor: 0, 0.1, 0.5 or 1.
    query_match: whether both products were found by the same search.
    category_match: whether they share two category segments.
    title_score: fraction of the goal title's nouns in the purchased title.
    attributes: number of goal attributes matched.
    options: number of goal options matched.
    price: whether the price is within the limit.
  """

  total: float
  type_factor: float
  query_match: bool
  category_match: bool
  title_score: float
  attributes: int
  options: int
  price: bool


def _normalize(text: str) -> str:
  """ASCII words in lower case."""
  ascii_only = text.encode("ascii", "ignore").decode()
  return re.sub(r"\W", " ", ascii_only).lower().strip()


def _percent(first: str, second: str) -> int:
  """Similarity of two strings; 0 if one of them is empty."""
  return round(fuzz.ratio(first, second)) if first and second else 0


@functools.lru_cache(1 << 16)
def token_set_ratio(first: str, second: str) -> int:
  """How similar the word sets of two strings are.

  The larger of three similarities between the shared words, the shared words
  with the rest of the first string, and those with the rest of the second,
  all sorted (thefuzz 0.19).

  Returns:
    0 to 100; 0 if either string has no ASCII letter or digit.
  """
  first_words = set(_normalize(first).split())
  second_words = set(_normalize(second).split())
  if not first_words or not second_words:
    return 0
  shared = sorted(first_words & second_words)
  one = " ".join(shared + sorted(first_words - second_words))
  other = " ".join(shared + sorted(second_words - first_words))
  both = " ".join(shared)
  return max(_percent(both, one), _percent(both, other), _percent(one, other))


def normalize_colour(
  value: str | tuple[str, str],
) -> str | tuple[str, str]:
  """The first colour name in an option value, else the value itself.

  In a (name, value) pair a colour counts only if it is the whole value: that
  is how the original treats synthetic goals.
  """
  for colour in COLOURS:
    if colour in value:
      return colour
  return value


def match_option(goal_option: str | tuple[str, str], chosen: str) -> bool:
  """Whether a chosen option value matches an option of a goal."""
  wanted = normalize_colour(goal_option)
  # A pair is compared with its name, and as the original prints it.
  return token_set_ratio(normalize_colour(chosen), str(wanted)) > MATCH


def match_attribute(product: data.Product, attribute: str) -> bool:
  """Whether a product has an attribute, by its list or in its texts."""
  return any(
    token_set_ratio(own, attribute) > MATCH for own in product.attributes
  ) or any(
    attribute in text.lower()
    for text in (
      product.title,
      " ".join(product.bullets),
      product.description,
    )
  )


def compare_titles(bought: Sequence[str], wanted: Sequence[str]) -> float:
  """Fraction of the wanted title's nouns in the other; 0.2 without any."""
  if not wanted:
    return 0.2
  return len(set(bought) & set(wanted)) / len(wanted)


def type_factor(match: bool, title_score: float) -> float:
  """The type factor.

  Args:
    match: whether the searches or the categories match.
    title_score: see `compare_titles`.
  """
  if title_score == 0.0:
    return 0.0
  if title_score < 0.1:
    return 0.1
  return 1.0 if match or title_score > 0.2 else 0.5


def score(
  product: data.Product,
  goal: goals.Goal,
  chosen: Mapping[str, str],
  *,
  nouns: Sequence[str],
  goal_nouns: Sequence[str],
) -> Score:
  """Scores a purchase.

  Args:
    product: the product bought.
    goal: the goal.
    chosen: chosen value by option name.
    nouns: lower-case nouns of the purchased product's title.
    goal_nouns: those of the goal product's title.
  """
  query_match = product.query == goal.product.query
  shared = set(product.path) & set(goal.product.path)
  title_score = compare_titles(nouns, goal_nouns)
  factor = type_factor(query_match or len(shared) >= 2, title_score)
  attributes = sum(match_attribute(product, a) for a in goal.attributes)
  options = sum(
    any(match_option(wanted, value) for value in chosen.values())
    for wanted in goal.options
  )
  price = product.price <= goal.price_upper
  most = len(goal.attributes) + len(goal.options) + 1
  return Score(
    total=(attributes + options + price) / most * factor,
    type_factor=factor,
    query_match=query_match,
    category_match=len(shared) >= 2,
    title_score=title_score,
    attributes=attributes,
    options=options,
    price=price,
  )
