"""One visit to the shop: from the instruction to the purchase.

The state machine of WebShop's text environment. A search is possible
everywhere; a click needs its target on the page. A new search and returning
from a product to the results discard the chosen options; looking at a
description does not. An invalid action changes nothing.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import re

from t2po_jax.envs.webshop import data, goals, nouns, pages, reward

RESULTS = 50  # The most results of a search.


@dataclasses.dataclass(frozen=True)
class Shop:
  """The part that all visits share.

  Attributes:
    catalogue: the products.
    search: returns the positions of the best products for a query, best first.
    nouns: returns the nouns of a product's title.
    show_attributes: whether product pages have a button for attributes.
  """

  catalogue: data.Catalogue
  search: Callable[[str], Sequence[int]]
  nouns: nouns.Source
  show_attributes: bool = False

  @functools.cached_property
  def item_page(self) -> Callable[[str], pages.Page]:
    """Builds a product's page by its id; recent ones are cached."""

    @functools.lru_cache(4096)
    def build(asin: str) -> pages.Page:
      return pages.item_page(
        self.product(asin), show_attributes=self.show_attributes
      )

    return build

  def product(self, asin: str) -> data.Product:
    """A product by its id.

    Raises:
      KeyError: if there is none.
    """
    position = self.catalogue.find(asin)
    if position is None:
      raise KeyError(f"webshop: no product {asin!r}")
    return self.catalogue.at(position)

  def score(
    self,
    product: data.Product,
    goal: goals.Goal,
    chosen: dict[str, str],
  ) -> reward.Score:
    """The score of buying a product."""
    return reward.score(
      product,
      goal,
      chosen,
      nouns=self.nouns(product),
      goal_nouns=self.nouns(goal.product),
    )


def parse_action(text: str) -> tuple[str, str]:
  """Splits `name[argument]`; the argument is empty if there is none."""
  match = re.match(r"(.+)\[(.+)\]", text)
  if match is None:
    return text, ""
  name, argument = match.groups()
  return name, argument.lower().strip()


class Session:
  """A visit.

  Attributes:
    goal: the goal of the visit.
    page: the current page.
    query: the last search, or empty.
    product: the product whose page is shown, or None.
    chosen: chosen value by option name.
    score: the score of the purchase, once there is one.
  """

  def __init__(self, shop: Shop, goal: goals.Goal) -> None:
    self._shop = shop
    self.goal = goal
    self.page = pages.SEARCH_PAGE
    self.query = ""
    self.product: data.Product | None = None
    self.chosen: dict[str, str] = {}
    self.score: reward.Score | None = None
    self._found: Sequence[int] = ()
    self._number = 1

  @property
  def text(self) -> str:
    """The current page as the original environment shows it."""
    return self.page.text(self.goal.instruction)

  @property
  def item(self) -> data.Product:
    """The product whose page is shown, or that was bought.

    Raises:
      RuntimeError: on a page that is not about a single product.
    """
    if self.product is None:
      raise RuntimeError(f"webshop: page {self.page.name!r} has no product")
    return self.product

  @property
  def results(self) -> list[data.Product]:
    """The products on the current page of results."""
    first = (self._number - 1) * pages.PAGE_SIZE
    catalogue = self._shop.catalogue
    window = self._found[first : first + pages.PAGE_SIZE]
    return [catalogue.at(position) for position in window]

  def act(self, action: str) -> bool:
    """Executes `search[...]` or `click[...]`.

    Returns:
      Whether the action was possible; if not, nothing has changed.
    """
    if self.score is not None:
      return False
    name, argument = parse_action(action)
    if name == "search" and argument:
      self.query = argument
      self._found = self._shop.search(argument)
      self._show_results(1)
      return True
    # The search button is listed, but only a search action presses it.
    possible = (
      name == "click"
      and argument in self.page.clickables
      and argument != "search"
    )
    if possible:
      self._click(argument)
    return possible

  def _click(self, target: str) -> None:
    page = self.page
    sub_pages = {button.lower(): button for button in pages.SUB_PAGES}
    if target == pages.BUY.lower():
      self.score = self._shop.score(self.item, self.goal, self.chosen)
      self.page = pages.done_page(self.item, self.chosen, self.score.total)
    elif target == pages.BACK.lower():
      self.page, self.query, self.product = pages.SEARCH_PAGE, "", None
      self._found, self._number, self.chosen = (), 1, {}
    elif target == pages.NEXT.lower() and page.name == "results":
      self._show_results(self._number + 1)
    elif target == pages.PREVIOUS.lower():
      if page.name == "results":
        self._show_results(self._number - 1)
      elif page.name == "item":
        self._show_results(self._number)
      else:
        self._show_item()
    elif page.name == "results":
      self.product = self._shop.product(target.upper())
      self._show_item()
    elif target in sub_pages:
      self.page = pages.sub_page(self.item, sub_pages[target])
    else:
      self.chosen[page.options[target]] = target

  def _show_results(self, number: int) -> None:
    self._number, self.product, self.chosen = number, None, {}
    self.page = pages.results_page(self.results, number, len(self._found))

  def _show_item(self) -> None:
    self.page = self._shop.item_page(self.item.asin)
