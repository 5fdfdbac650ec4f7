"""A scripted shopper that reasons and buys, with bad habits to unlearn.

It searches for what is requested, opens the first listed product that meets the
request, chooses the options and buys. It decides only from the current page and
the goal, so that it recovers from any state. Two knobs degrade it. `hesitation`
makes it go through its thought again before it acts; the repetition carries no
information, and is what a thinking intervention should cut. `doubt` makes it
lose the thread in such a round and do something wrong: search for another
product, open one that does not fit, choose a wrong option, or buy too early. A
policy cloned from the degraded expert hesitates and fails in the same way.
"""

import random
from types import ModuleType

from t2po_jax.envs.webshop import data, pages, reward
from t2po_jax.envs.webshop import session as sessions

MOST_ROUNDS = 4  # The most needless rounds in a turn.

# A thought, and the resulting action as name and argument.
Decision = tuple[str, tuple[str, str]]


def pick_options(
  product: data.Product, wanted: tuple[tuple[str, str] | str, ...]
) -> dict[str, str] | None:
  """A product's option values that match the options of a goal.

  Returns:
    Value by option name, or None if an option cannot be matched.
  """
  picked = {}
  for option in wanted:
    name, value = ("", option) if isinstance(option, str) else option
    if value in product.options.get(name, ()):
      picked[name] = value
      continue
    for own, values in product.options.items():
      match = next((v for v in values if reward.match_option(option, v)), None)
      if match is not None:
        picked[own] = match
        break
    else:
      return None
  return picked


class ScriptedExpert:
  """Shops for a goal; see `envs.base.Expert`."""

  def __init__(
    self,
    shop: sessions.Shop,
    visit: sessions.Session,
    wording: ModuleType,
    *,
    hesitation: float,
    doubt: float,
    seed: int,
  ) -> None:
    """Binds the expert to a visit.

    Args:
      shop: the shop.
      visit: the visit; it is only read.
      wording: the module that words the episode.
      hesitation: mean number of needless rounds per turn, >= 0; the number
        is geometric, truncated at `MOST_ROUNDS`.
      doubt: probability per round of an error, in [0, 1].
      seed: seed of the expert's draws.
    """
    self._shop = shop
    self._visit = visit
    self._goal = visit.goal
    self._wording = wording
    self._hesitation = hesitation
    self._doubt = doubt
    self._random = random.Random(f"{seed}/{visit.goal.instruction}")
    # The title is the shopper's last resort; few goals need it.
    self._queries = (
      wording.query(self._goal),
      self._goal.product.title.lower(),
    )

  def respond(self) -> str:
    """The response to the current page."""
    thought, action = self._decide()
    thoughts = [thought]
    continued = self._hesitation / (1.0 + self._hesitation)
    for _ in range(MOST_ROUNDS):
      if self._random.random() >= continued:
        break
      thoughts.append(self._wording.AGAIN)
      if self._random.random() < self._doubt:
        thought, action = self._derail()
        thoughts.append(thought)
        break
      thoughts.append(thought)
    return self._wording.respond(thoughts, *action)

  def _decide(self) -> Decision:
    """The right decision on the current page."""
    visit = self._visit
    if visit.page.name == "search":
      return self._search(self._queries[0])
    if visit.page.name == "results":
      return self._decide_on_results()
    if visit.page.name == "item":
      if not self._fits(visit.item):
        return self._wording.WRONG_PRODUCT, ("click", pages.PREVIOUS.lower())
      wanted = pick_options(visit.item, self._goal.options)
      return self._choose(wanted or {})
    return self._wording.LEAVE, ("click", pages.PREVIOUS.lower())

  def _decide_on_results(self) -> Decision:
    visit = self._visit
    for product in visit.results:
      if self._fits(product):
        return self._open(product)
    if visit.query not in self._queries:
      return self._wording.NONE_FITS, ("click", pages.BACK.lower())
    if pages.NEXT.lower() in visit.page.clickables:
      return self._wording.NONE_FITS, ("click", pages.NEXT.lower())
    return self._search(self._queries[1])

  def _fits(self, product: data.Product) -> bool:
    """Whether buying a product can give the best score."""
    if product.asin == self._goal.product.asin:
      return True
    picked = pick_options(product, self._goal.options)
    return (
      picked is not None
      and self._shop.score(product, self._goal, picked).total == 1.0
    )

  def _search(self, words: str) -> Decision:
    return self._wording.think_of_search(words), ("search", words)

  def _open(self, product: data.Product) -> Decision:
    thought = self._wording.think_of_product(product, self._goal)
    return thought, ("click", product.asin.lower())

  def _choose(self, wanted: dict[str, str]) -> Decision:
    """Chooses the next wanted option, or buys."""
    values, chosen = tuple(wanted.values()), self._visit.chosen.values()
    thought = self._wording.think_of_options(values, tuple(chosen))
    missing = [value for value in values if value not in chosen]
    return thought, ("click", missing[0] if missing else pages.BUY.lower())

  def _derail(self) -> Decision:
    """A wrong decision on the current page."""
    visit, draw = self._visit, self._random
    if visit.page.name == "search":
      catalogue = self._shop.catalogue
      other = catalogue.at(draw.randrange(len(catalogue)))
      return self._search(other.title.lower())
    if visit.page.name == "results":
      wrong = [product for product in visit.results if not self._fits(product)]
      return self._open(draw.choice(wrong)) if wrong else self._decide()
    if visit.page.name != "item":
      return self._decide()
    wanted = pick_options(visit.item, self._goal.options) or {}
    missing = set(wanted.values()) - set(visit.chosen.values())
    if not self._fits(visit.item) or (missing and draw.random() < 0.5):
      return self._buy_early(tuple(wanted.values()))
    return self._choose_wrongly(wanted)

  def _buy_early(self, values: tuple[str, ...]) -> Decision:
    """Buys as if the options were chosen."""
    thought = self._wording.think_of_options(values, values)
    return thought, ("click", pages.BUY.lower())

  def _choose_wrongly(self, wanted: dict[str, str]) -> Decision:
    """Confuses one wanted option value with another."""
    confusable = [
      (name, value)
      for name, right in wanted.items()
      for value in self._visit.item.options[name]
      if value != right
    ]
    if not confusable:
      return self._wording.WRONG_PRODUCT, ("click", pages.PREVIOUS.lower())
    name, value = self._random.choice(confusable)
    thought = self._wording.think_of_options(
      tuple((wanted | {name: value}).values()),
      tuple(self._visit.chosen.values()),
    )
    return thought, ("click", value)
