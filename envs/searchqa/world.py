"""The embedded world: fictional people, places, works and regions.

Everything is drawn from one seed: names, who married whom, who taught whom.
A relation is a total function on the entities of its kind, so that a chain of
relations from a start entity ("mira spouse teacher") has exactly one answer.
Every name is a single distinct word, and no two names share their first four
letters, so that a stemmer keeps them apart. The world is the project's own
and stands in for Wikipedia where nothing can be downloaded.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import random

from t2po_jax.envs import base

# Kind of entity -> its relations -> kind of the value.
SCHEMA = {
  "person": {"birthplace": "place", "spouse": "person", "teacher": "person"},
  "place": {"region": "region", "mayor": "person", "founder": "person"},
  "work": {"author": "person", "setting": "place", "hero": "person"},
  "region": {"capital": "place", "ruler": "person", "rival": "region"},
}
HOPS = (1, 2, 3)
# Fractions of 1-, 2- and 3-hop questions in every split.
HOP_SHARES = (0.2, 0.4, 0.4)

_CONSONANTS = "bdfgklmnprtvz"
_VOWELS = "aeiou"
# The ending of a name tells its kind.
_ENDINGS = {
  "person": ("", "n", "r", "l"),
  "place": ("holm", "mar", "wick", "dor"),
  "work": ("song", "tale", "lay", "ode"),
  "region": ("land", "nia", "gard", "stan"),
}


@dataclasses.dataclass(frozen=True)
class Question:
  """A chain of relations from a start entity.

  Attributes:
    start: the entity the chain starts from.
    relations: one or more distinct relations, in the order of resolution.
    path: the entities visited, from the start to the answer; all distinct.
  """

  start: str
  relations: tuple[str, ...]
  path: tuple[str, ...]

  @property
  def task_id(self) -> str:
    """Unique name, e.g. `mira/spouse/teacher`."""
    return "/".join((self.start, *self.relations))

  @property
  def answer(self) -> str:
    return self.path[-1]

  @property
  def hops(self) -> int:
    return len(self.relations)


@dataclasses.dataclass(frozen=True)
class World:
  """Entities and facts.

  Attributes:
    kinds: entity -> `person`, `place`, `work` or `region`.
    facts: entity -> relation -> entity.
  """

  kinds: Mapping[str, str]
  facts: Mapping[str, Mapping[str, str]]


def _draw_names(
  sizes: Mapping[str, int], generator: random.Random
) -> dict[str, list[str]]:
  """Distinct names per kind; the first four letters never repeat."""
  stems: set[str] = set()
  names: dict[str, list[str]] = {}
  for kind, size in sizes.items():
    names[kind] = []
    while len(names[kind]) < size:
      stem = "".join(
        generator.choice(letters)
        for letters in (_CONSONANTS, _VOWELS, _CONSONANTS, _VOWELS)
      )
      if stem not in stems:
        stems.add(stem)
        names[kind].append(stem + generator.choice(_ENDINGS[kind]))
  return names


def _marry(people: list[str], generator: random.Random) -> dict[str, str]:
  """A perfect matching: everybody's spouse."""
  order = generator.sample(people, len(people))
  pairs = zip(order[::2], order[1::2], strict=True)
  return {a: b for pair in pairs for a, b in (pair, pair[::-1])}


def build(
  seed: int,
  *,
  people: int = 48,
  places: int = 24,
  works: int = 32,
  regions: int = 6,
) -> World:
  """Draws a world.

  Args:
    seed: determines every name and fact.
    people: number of people, even and at least 4.
    places: number of places, at least 2.
    works: number of works, at least 1.
    regions: number of regions, at least 2.

  Raises:
    ValueError: if a size is out of range.
  """
  sizes = {
    "person": people,
    "place": places,
    "work": works,
    "region": regions,
  }
  least = {"person": 4, "place": 2, "work": 1, "region": 2}
  for kind, size in sizes.items():
    if not least[kind] <= size <= 400:
      raise ValueError(
        f"env: a world with {size} of kind {kind!r}; "
        f"between {least[kind]} and 400 are possible"
      )
  if people % 2:
    raise ValueError(
      f"env.people: {people} people cannot all be married; use an even number"
    )
  generator = random.Random(seed)
  names = _draw_names(sizes, generator)
  spouses = _marry(names["person"], generator)
  facts: dict[str, dict[str, str]] = {}
  for kind, relations in SCHEMA.items():
    for entity in names[kind]:
      facts[entity] = {}
      for relation, target in relations.items():
        if relation == "spouse":
          facts[entity][relation] = spouses[entity]
          continue
        # Values of one passage are distinct, and never the entity itself.
        taken = {entity, *facts[entity].values(), spouses.get(entity)}
        facts[entity][relation] = generator.choice(
          [name for name in names[target] if name not in taken]
        )
  kinds = {name: kind for kind in SCHEMA for name in names[kind]}
  return World(kinds, facts)


def ask(world: World, hops: Sequence[int] = HOPS) -> dict[int, list[Question]]:
  """All questions by number of hops.

  A chain never repeats a relation or returns to an entity that it has visited,
  so every hop is needed.

  Args:
    world: the world to ask about.
    hops: the numbers of hops, at least 1 each.
  """
  questions: dict[int, list[Question]] = {count: [] for count in hops}

  def extend(question: Question) -> None:
    for relation, value in world.facts[question.path[-1]].items():
      if relation in question.relations or value in question.path:
        continue
      longer = Question(
        question.start,
        (*question.relations, relation),
        (*question.path, value),
      )
      if longer.hops in questions:
        questions[longer.hops].append(longer)
      if longer.hops < max(hops):
        extend(longer)

  for entity in world.facts:
    extend(Question(entity, (), (entity,)))
  return questions


def draw_splits(
  world: World,
  sizes: Mapping[str, int],
  shares: Mapping[int, float] | None = None,
) -> dict[str, tuple[Question, ...]]:
  """Divides the questions into disjoint splits with equal fractions of hops.

  Args:
    world: the world to ask about.
    sizes: number of questions per split.
    shares: number of hops -> its fraction of every split; `HOP_SHARES` if None.

  Raises:
    ValueError: if the world has too few questions of some length.
  """
  splits: dict[str, list[Question]] = {name: [] for name in sizes}
  if shares is None:
    shares = dict(zip(HOPS, HOP_SHARES, strict=True))
  for hops, questions in ask(world, tuple(shares)).items():
    random.Random(base.SPLIT_SEED).shuffle(questions)
    start = 0
    for name, size in sizes.items():
      share = round(size * shares[hops])
      if start + share > len(questions):
        raise ValueError(
          f"env: the world has {len(questions)} questions of {hops} hops, too "
          f"few for {share} in {name!r}; enlarge the world or shrink the split"
        )
      splits[name].extend(questions[start : start + share])
      start += share
  for questions in splits.values():
    # Shuffled, so that any prefix of a split is a fair sample.
    random.Random(base.SPLIT_SEED).shuffle(questions)
  return {name: tuple(questions) for name, questions in splits.items()}
