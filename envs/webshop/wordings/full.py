"""The full wording: an instruction prompt for pretrained language models.

Pages are shown as the original's text, node by node, without the instruction,
which is given above. A long node (a description, a list of features) is
shortened in the middle, and pages in the memory more than the current one.
"""

from collections.abc import Sequence
import re
import textwrap

from t2po_jax.envs import prompts
from t2po_jax.envs.webshop import data, goals, pages
from t2po_jax.envs.webshop import session as sessions

GRAMMAR = prompts.Grammar()
NO_ACTION = (
  "Your answer held no action. End it with exactly one <action>...</action>."
)
AGAIN = "Wait, let me go through this once more."
NONE_FITS = "None of the products listed here meets the request."
WRONG_PRODUCT = "This is not what was asked for."
LEAVE = "There is nothing to do on this page."

_LONGEST_NODE = 400  # Characters of a text on the current page.
_LONGEST_MEMORY = 600  # Characters of a whole page in the memory.
_LONGEST_TITLE = 48  # Characters of a product's title in a thought.

_INSTRUCTION = """\
You are shopping in an online store for somebody who sent you this request:

{task}

Buy one product that meets every wish in it: the kind of product, its \
properties, the options such as size or colour, and the price. Choose the \
options on the product's page before you buy; a purchase is final and ends \
the task.

{history}Step {turn} of {max_turns}. The store shows you this page, its \
elements separated by [SEP]:
{observation}

Possible actions:
{actions}

Write first what you think inside <think> and </think>: what is still \
missing, and which action brings you closer? Then write exactly one possible \
action inside <action> and </action>, and nothing after it."""


def query(goal: goals.Goal) -> str:
  """The search for a goal."""
  words = re.sub(r"^find me (an? )?", "", goal.request, flags=re.IGNORECASE)
  return words.lower()


def task(goal: goals.Goal) -> str:
  """The task: the instruction as it is."""
  return goal.instruction


def page(visit: sessions.Session) -> str:
  """The current page."""
  return pages.SEPARATOR.join(
    prompts.shorten(node, _LONGEST_NODE) for node in visit.page.nodes
  )


def think_of_search(words: str) -> str:
  """The thought before a search."""
  return f"I should search the store for {words}."


def think_of_product(product: data.Product, goal: goals.Goal) -> str:
  """The thought that a listed product meets the request."""
  limit = (
    ""
    if goal.price_upper == goals.NO_LIMIT
    else f", and I may spend up to ${goal.price_upper:g}"
  )
  title = textwrap.shorten(product.title, _LONGEST_TITLE, placeholder=" ...")
  return (
    f"{product.asin} ({title}) meets the request: it costs "
    f"{product.price_tag}{limit}."
  )


def think_of_options(wanted: Sequence[str], chosen: Sequence[str]) -> str:
  """The thought about which options are wanted and which are chosen."""
  if not wanted:
    return "No options have to be chosen."
  done = ", ".join(chosen) or "nothing"
  return f"The wanted options are {', '.join(wanted)}; I have chosen {done}."


def action(name: str, argument: str) -> str:
  """An action as the agent writes it."""
  return f"{name}[{argument}]" if argument else name


def respond(thoughts: Sequence[str], name: str, argument: str) -> str:
  """A well-formed response."""
  words = " ".join(thoughts)
  return f"<think>{words}</think>\n<action>{action(name, argument)}</action>"


def render(view: prompts.View) -> list[prompts.Message]:
  """The request, the last steps, the page, the admissible actions."""
  lines = []
  first = view.turn - len(view.memory)
  for step, (observation, done) in enumerate(view.memory, first):
    lines.append(f"Page at step {step}:")
    lines.append(prompts.shorten(observation, _LONGEST_MEMORY))
    lines.append(f"Your action at step {step}: {done or 'none'}")
  history = "Your last steps:\n" + "\n".join(lines) + "\n\n"
  content = _INSTRUCTION.format(
    task=view.task,
    history=history if lines else "",
    turn=view.turn,
    max_turns=view.max_turns,
    observation=view.observation,
    actions="\n".join(view.admissible),
  )
  return [{"role": "user", "content": content}]
