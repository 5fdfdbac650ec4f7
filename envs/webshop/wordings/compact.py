"""The compact wording: few words, for tiny models trained from scratch.

A page is its name and its plain words, without the buttons, which never change;
what an agent has to write is in the prompt word for word. Every word follows a
space and no tag does; with the tags as tokens of their own, a word is always
the same token. Prices are plain numbers: a dollar sign would cost one more
token each time. The words of an action come last in a product's row and in a
thought, so that a small model can copy them by continuing the text as it
continued before. Deliberate difference from the original pages: the chosen
options are shown, so that a page contains the whole state.
"""

from collections.abc import Iterable, Sequence
import re

from t2po_jax.envs import prompts
from t2po_jax.envs.webshop import data, goals, pages
from t2po_jax.envs.webshop import session as sessions

GRAMMAR = prompts.Grammar(actions=("action",), closing="</think><action>")
NO_ACTION = "invalid"
AGAIN = "again"
NONE_FITS = "none fits"
WRONG_PRODUCT = "wrong product"
LEAVE = "nothing here"


def _plain(text: str) -> str:
  """Lower-case words without punctuation at their ends."""
  words = (word.strip(".,:;!?\"'()") for word in text.lower().split())
  return " ".join(filter(None, words))


def _price(tag: str) -> str:
  """The first price of a tag as a number, without needless decimals."""
  return tag.split()[0].removeprefix("$").removesuffix(".0")


def _limit(goal: goals.Goal) -> str:
  if goal.price_upper == goals.NO_LIMIT:
    return ""
  return f"under {goal.price_upper:g}"


def _row(product: data.Product) -> str:
  """A product as listed in results."""
  return " ".join(
    (
      _plain(product.title),
      _price(product.price_tag),
      product.asin.lower(),
    )
  )


def query(goal: goals.Goal) -> str:
  """The search for a goal."""
  return re.sub(r"^find me (an? )?", "", _plain(goal.request))


def task(goal: goals.Goal) -> str:
  """The task, e.g. "steel mug color red under 30"."""
  words = [query(goal)]
  for option in goal.options:
    words += [option] if isinstance(option, str) else option
  return " ".join(filter(None, (*words, _limit(goal))))


def page(visit: sessions.Session) -> str:
  """The current page."""
  shown = visit.page
  if shown.name == "results":
    rows = " ".join(map(_row, visit.results)) or "nothing"
    more = " more" if pages.NEXT.lower() in shown.clickables else ""
    return f"results {rows}{more}"
  if shown.name == "item":
    words = ["item", _row(visit.item)]
    for name, values in visit.item.options.items():
      words += [name, *values]
    return " ".join((*words, "have", _list(tuple(visit.chosen.values()))))
  if shown.name in pages.SUB_PAGES:
    return " ".join((shown.name.lower(), _plain(" ".join(shown.nodes[2:]))))
  return shown.name


def _list(values: Iterable[str]) -> str:
  return " ".join(values) or "none"


def think_of_search(words: str) -> str:
  """The thought before a search."""
  return words


def think_of_product(product: data.Product, goal: goals.Goal) -> str:
  """The thought that a listed product meets the request."""
  return " ".join(filter(None, (_limit(goal), _row(product))))


def think_of_options(wanted: Sequence[str], chosen: Sequence[str]) -> str:
  """The thought about which options are chosen and which are missing."""
  missing = [value for value in wanted if value not in chosen]
  return f"have {_list(chosen)} need {_list(missing)}"


def action(name: str, argument: str) -> str:
  """An action as the agent writes it."""
  return f"{name}[ {argument} ]" if argument else name


def respond(thoughts: Sequence[str], name: str, argument: str) -> str:
  """A well-formed response."""
  words = " ".join(thoughts)
  return f"<think> {words}</think><action> {action(name, argument)}</action>"


def render(view: prompts.View) -> list[prompts.Message]:
  """The goal, the last actions and the page."""
  parts = [f"goal {view.task}"]
  parts += [f"did {done or 'nothing'}" for _, done in view.memory]
  parts.append(f"see {view.observation}")
  return [{"role": "user", "content": " ".join(parts)}]
