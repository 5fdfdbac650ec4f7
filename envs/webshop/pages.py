"""The pages of the shop as text.

A page is what remains of WebShop's HTML when only its visible texts are kept in
order: the nodes, joined by ` [SEP] `. Every page except the last begins with
the instruction. Buttons, product ids and option values can be clicked, by their
text in lower case. Chosen options are not shown, as in the original.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import json

from t2po_jax.envs.webshop import data

SEPARATOR = " [SEP] "
PAGE_SIZE = 10  # Products on a page of results.

BACK, NEXT, PREVIOUS, BUY = "Back to Search", "Next >", "< Prev", "Buy Now"
SUB_PAGES = ("Description", "Features", "Reviews", "Attributes")


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
  """One page.

  Attributes:
    name: `search`, `results`, `item`, `done`, or a sub-page's button.
    nodes: the visible texts, without the instruction.
    clickables: what can be clicked, in lower case, each once.
    options: option name by value; a value with the text of a button cannot be
      chosen, as in the original.
    has_search_bar: whether there is a search bar.
  """

  name: str
  nodes: tuple[str, ...]
  clickables: tuple[str, ...]
  options: Mapping[str, str] = dataclasses.field(default_factory=dict)
  has_search_bar: bool = False

  def text(self, instruction: str) -> str:
    """The whole page, as the original environment shows it."""
    task = () if self.name == "done" else ("Instruction:", instruction)
    # The banner of the search page precedes the instruction.
    banner = 1 if self.name == "search" else 0
    return SEPARATOR.join((*self.nodes[:banner], *task, *self.nodes[banner:]))


def _visible(texts: Iterable[str]) -> tuple[str, ...]:
  """The text nodes that the original keeps."""
  return tuple(text.strip() for text in texts if text not in ("", "\n"))


def _lower(*buttons: str) -> tuple[str, ...]:
  return tuple(button.lower() for button in buttons)


SEARCH_PAGE = Page(
  "search", ("WebShop", "Search"), ("search",), has_search_bar=True
)


def results_page(
  products: Sequence[data.Product], number: int, total: int
) -> Page:
  """One page of search results.

  Args:
    products: the products on this page, at most `PAGE_SIZE`.
    number: page number, from 1.
    total: number of results on all pages.
  """
  buttons = [BACK]
  if number > 1:
    buttons.append(PREVIOUS)
  if number * PAGE_SIZE < total:
    buttons.append(NEXT)
  nodes = [BACK, f"Page {number} (Total results: {total})", *buttons[1:]]
  for product in products:
    nodes += [product.asin, product.title, product.price_tag]
  asins = [product.asin for product in products]
  return Page("results", _visible(nodes), _lower(*buttons, *asins))


def item_page(product: data.Product, *, show_attributes: bool) -> Page:
  """A product's own page."""
  nodes = [BACK, PREVIOUS]
  for name, values in product.options.items():
    nodes += [name, *values]
  sub_pages = SUB_PAGES if show_attributes else SUB_PAGES[:3]
  # There are no ratings in the published files.
  nodes += [
    product.title,
    f"Price: {product.price_tag}",
    "Rating: N.A.",
    *sub_pages,
    BUY,
  ]
  # A value shared by two options chooses the later one, as in the original.
  options = {
    value: name for name, values in product.options.items() for value in values
  }
  buttons = dict.fromkeys(_lower(BACK, PREVIOUS, *sub_pages, BUY))
  return Page(
    "item",
    _visible(nodes),
    tuple(buttons | dict.fromkeys(options)),
    options=options,
  )


def sub_page(product: data.Product, button: str) -> Page:
  """Description, features, reviews or attributes of a product.

  Args:
    product: the product.
    button: one of `SUB_PAGES`.
  """
  # The original's template leaves a blank node for an empty bullet, while an
  # empty description leaves none.
  bullets = tuple(bullet.strip() for bullet in product.bullets)
  contents = {
    "Description": (product.description,),
    "Features": (),
    "Reviews": (),  # The published files contain none.
    "Attributes": (
      *product.attributes,
      product.category,
      product.query,
      " › ".join(product.path),
    ),
  }
  return Page(
    button,
    _visible((BACK, PREVIOUS, *contents[button]))
    + (bullets if button == "Features" else ()),
    _lower(BACK, PREVIOUS),
  )


def done_page(
  product: data.Product, chosen: Mapping[str, str], total: float
) -> Page:
  """The page after a purchase; its odd format is the original's.

  Args:
    product: the product bought.
    chosen: chosen value by option name.
    total: the score.
  """
  options = json.dumps(dict(sorted(chosen.items())))
  for character in "<>&'":
    options = options.replace(character, f"\\u{ord(character):04x}")
  bought = ("attrs", "category", "query", "product category")
  nodes = [
    "Thank you for shopping with us!",
    *("Your code:", "None", "(Paste it in your MTurk interface.)"),
    *("Purchased", "asin", product.asin, "options", options),
    *(text for name in bought for text in (name, "None")),
    *("Target", "asin", "options", "attrs", "price upper"),
    *("instuction text", "category", "product category", "query"),
    *("Goal", "None", "Reward", "Your score (min 0.0, max 1.0)"),
    *(str(total), "Reward Details", "None"),
  ]
  return Page("done", tuple(nodes), ())
