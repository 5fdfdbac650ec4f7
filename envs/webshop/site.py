"""The shop as a web site for people, on the standard library's server.

It serves one visitor and one task at a time, on this machine only. A click on
the page is the same action that an agent writes, so every rule of the benchmark
applies, including the turn limit; the sidebar lists the actions so far, the
score, and the prompt that a model would see.
"""

import dataclasses
import html
from http import server
import random
from typing import Any
import urllib.parse

from t2po_jax.envs import base, prompts
from t2po_jax.envs.webshop import benchmark as benchmarks
from t2po_jax.envs.webshop import data, pages

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0; color: #1c2733;
  background: #f3f5f7; }
header { background: #1c2733; color: #fff; padding: .7rem 1.5rem; }
main { display: flex; gap: 1.5rem; padding: 1.5rem; align-items: flex-start; }
#page { flex: 3; min-width: 0; }
aside { flex: 1; min-width: 15rem; }
.task { background: #fff3cd; border-left: .3rem solid #e0a800;
  padding: .7rem 1rem; margin-bottom: 1rem; }
.card, aside section { background: #fff; border-radius: .4rem; padding: 1rem;
  margin-bottom: 1rem; box-shadow: 0 1px 3px #0002; }
.grid { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); }
.grid .card { margin: 0; }
.price { font-weight: 600; }
.row { margin: 1rem 0; }
img { max-width: 100%; max-height: 12rem; }
form { display: inline; }
button { font: inherit; padding: .3rem .8rem; margin: .15rem;
  border: 1px solid #8795a5; border-radius: .3rem; background: #fff;
  cursor: pointer; }
button.chosen { background: #1c2733; color: #fff; }
button.buy { background: #ffb300; border-color: #c98c00; font-weight: 600; }
input[type=text] { font: inherit; padding: .3rem; width: 60%; }
pre { white-space: pre-wrap; font-size: .8rem; }
table { border-collapse: collapse; }
td { padding: .1rem .8rem .1rem 0; }
.impossible { color: #b00020; }
"""


@dataclasses.dataclass
class Visitor:
  """The current episode.

  Attributes:
    env: the environment.
    task_id: its task.
    observation: the current observation.
    results: the environment's answers so far.
    memory: (observation, action) pairs so far.
  """

  env: benchmarks.WebShopEnv
  task_id: str
  observation: base.Observation
  results: list[base.StepResult] = dataclasses.field(default_factory=list)
  memory: list[tuple[str, str]] = dataclasses.field(default_factory=list)

  @property
  def done(self) -> bool:
    """Whether the episode is over."""
    return bool(self.results) and self.results[-1].done

  def act(self, action: str) -> None:
    """Executes an action, as a response of an agent would."""
    result = self.env.step(f"<think>{action}</think><action>{action}</action>")
    self.memory.append((self.observation.text, result.action))
    self.results.append(result)
    self.observation = result.observation


def _button(text: str, action: str, style: str = "") -> str:
  """A button that sends an action."""
  return (
    '<form method="post" action="/act">'
    f'<button class="{style}" name="action" value="{html.escape(action)}">'
    f"{html.escape(text)}</button></form>"
  )


def _click(text: str, style: str = "") -> str:
  return _button(text, f"click[{text.lower()}]", style)


def _picture(product: data.Product) -> str:
  if not product.image:
    return ""
  return f'<img src="{html.escape(product.image)}" alt="">'


def _show_search(visitor: Visitor) -> str:
  return (
    '<div class="card"><form method="post" action="/act">'
    '<input type="text" name="words" placeholder="Search the store" autofocus>'
    "<button>Search</button></form></div>"
  )


def _show_results(visitor: Visitor) -> str:
  visit = visitor.env.visit
  cards = [
    f'<div class="card">{_picture(product)}'
    f"<div>{html.escape(product.title)}</div>"
    f'<div class="price">{html.escape(product.price_tag)}</div>'
    f"{_click(product.asin)}</div>"
    for product in visit.results
  ]
  buttons = [
    _click(button)
    for button in (pages.BACK, pages.PREVIOUS, pages.NEXT)
    if button.lower() in visit.page.clickables
  ]
  heading = html.escape(visit.page.nodes[1])
  return (
    f'<div class="row">{"".join(buttons)} {heading}</div>'
    f'<div class="grid">{"".join(cards) or "Nothing was found."}</div>'
  )


def _show_item(visitor: Visitor) -> str:
  visit = visitor.env.visit
  product = visit.item
  options = []
  for name, values in product.options.items():
    chosen = visit.chosen.get(name)
    buttons = (
      _click(value, "chosen" if value == chosen else "") for value in values
    )
    options.append(
      f'<div class="row"><b>{html.escape(name)}</b><br>{"".join(buttons)}</div>'
    )
  sub_pages = (
    _click(button)
    for button in pages.SUB_PAGES
    if button.lower() in visit.page.clickables
  )
  return (
    f'<div class="row">{_click(pages.BACK)}{_click(pages.PREVIOUS)}</div>'
    f'<div class="card">{_picture(product)}'
    f"<h2>{html.escape(product.title)}</h2>"
    f'<p class="price">Price: {html.escape(product.price_tag)}</p>'
    f'{"".join(options)}<div class="row">{"".join(sub_pages)}</div>'
    f'<div class="row">{_click(pages.BUY, "buy")}</div></div>'
  )


def _show_sub_page(visitor: Visitor) -> str:
  visit = visitor.env.visit
  nodes = visit.page.nodes[2:] or ("There is nothing here.",)
  lines = "".join(f"<p>{html.escape(node)}</p>" for node in nodes)
  return (
    f'<div class="row">{_click(pages.BACK)}{_click(pages.PREVIOUS)}</div>'
    f'<div class="card"><h2>{visit.page.name}</h2>{lines}</div>'
  )


def _show_end(visitor: Visitor) -> str:
  score = visitor.env.visit.score
  if score is None:
    return '<div class="card"><h2>No more turns</h2></div>'
  goal, product = visitor.env.visit.goal, visitor.env.visit.item
  rows = {
    "Score": f"{score.total:.3f}",
    "Attributes": f"{score.attributes} of {len(goal.attributes)}",
    "Options": f"{score.options} of {len(goal.options)}",
    "Price": "within the limit" if score.price else "too high",
    "Kind of product": f"factor {score.type_factor:g}",
    "Bought": f"{product.asin} {product.title}",
    "Asked for": f"{goal.product.asin} {goal.product.title}",
  }
  lines = "".join(
    f"<tr><td>{name}</td><td>{html.escape(text)}</td></tr>"
    for name, text in rows.items()
  )
  title = "Right!" if score.total == 1.0 else "Bought"
  return (
    f'<div class="card" id="score"><h2>{title}</h2><table>{lines}</table></div>'
  )


def _show_page(visitor: Visitor) -> str:
  if visitor.done:
    return _show_end(visitor)
  show = {
    "search": _show_search,
    "results": _show_results,
    "item": _show_item,
  }
  return show.get(visitor.env.visit.page.name, _show_sub_page)(visitor)


class Site:
  """The web site of a shop; `handle` executes requests without a socket."""

  def __init__(
    self, benchmark: benchmarks.WebShop, *, split: str, memory: int, seed: int
  ) -> None:
    """Opens the site with a first task.

    Args:
      benchmark: the shop.
      split: the split that tasks are drawn from.
      memory: (observation, action) pairs in the prompt that is shown.
      seed: seed of the task order.
    """
    self._benchmark = benchmark
    self._tasks = benchmark.splits[split]
    self._memory = memory
    self._random = random.Random(seed)
    self._scores: dict[str, float] = {}
    self.visitor = self._enter(self._random.choice(self._tasks))

  def _enter(self, task_id: str) -> Visitor:
    env = self._benchmark.env()
    return Visitor(env=env, task_id=task_id, observation=env.reset(task_id))

  def handle(self, path: str, fields: dict[str, str]) -> str | None:
    """Executes a submitted form.

    Args:
      path: `/act` for an action or a search, `/task` for another task.
      fields: the form: `action` or `words`; `task`, or empty for any.

    Returns:
      None, or an error message.
    """
    if path == "/task":
      task_id = fields.get("task") or self._random.choice(self._tasks)
      try:
        self.visitor = self._enter(task_id)
      except KeyError as error:
        return str(error.args[0])
    elif path == "/act":
      action = fields.get("action") or f"search[{fields.get('words', '')}]"
      visitor = self.visitor
      if not visitor.done:
        visitor.act(action)
        if visitor.done:
          score = visitor.results[-1].info["task_score"]
          self._scores[visitor.task_id] = score
    else:
      return f"no such form: {path}"
    return None

  def show(self) -> str:
    """The current page as HTML."""
    visitor = self.visitor
    task = html.escape(visitor.env.visit.goal.instruction)
    return (
      '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
      '<link rel="icon" href="data:,">'
      f"<title>WebShop</title><style>{_STYLE}</style></head><body>"
      '<header><b>WebShop</b> <form method="post" action="/task">'
      "<button>Another task</button></form></header>"
      f'<main><div id="page"><div class="task">{task}</div>'
      f"{_show_page(visitor)}</div>{self._show_side()}</main></body></html>"
    )

  def _show_side(self) -> str:
    """Task, history, earlier scores and the model's prompt."""
    visitor = self.visitor
    steps = "".join(
      f'<li class="{"" if result.action_valid else "impossible"}">'
      f"{html.escape(result.action or 'no action')}</li>"
      for result in visitor.results
    )
    scores = "".join(
      f"<li>{html.escape(task_id)}: {score:.3f}</li>"
      for task_id, score in self._scores.items()
    )
    reward = sum(result.reward for result in visitor.results)
    return (
      f"<aside><section><b>Task</b> {html.escape(visitor.task_id)}<br>"
      f"Turn {len(visitor.results)} of {self._benchmark.max_turns}, "
      f"reward {reward:g}</section>"
      f'<section id="history"><b>History</b><ol>{steps}</ol></section>'
      f'<section id="scores"><b>Scores</b><ul>{scores}</ul></section>'
      f"{'' if visitor.done else self._show_prompt()}</aside>"
    )

  def _show_prompt(self) -> str:
    """The prompt that a model would see now."""
    visitor, benchmark = self.visitor, self._benchmark
    view = prompts.View(
      task=visitor.observation.task,
      memory=tuple(visitor.memory[-self._memory :]) if self._memory else (),
      observation=visitor.observation.text,
      admissible=visitor.observation.admissible,
      turn=len(visitor.results) + 1,
      max_turns=benchmark.max_turns,
    )
    messages = "\n\n".join(
      f"{message['role']}: {message['content']}"
      for message in benchmark.render(view)
    )
    return (
      "<section><details><summary>What a model sees</summary>"
      f"<pre>{html.escape(messages)}</pre></details></section>"
    )


def make_server(site: Site, port: int) -> server.HTTPServer:
  """A server of the site, for this machine only.

  Args:
    site: the site.
    port: port number; 0 takes a free one.
  """

  class Handler(server.BaseHTTPRequestHandler):
    """Serves the page; executes a form, then shows the page again."""

    def do_GET(self) -> None:
      if self.path != "/":
        self.send_error(404)
        return
      body = site.show().encode()
      self.send_response(200)
      self.send_header("Content-Type", "text/html; charset=utf-8")
      self.send_header("Content-Length", str(len(body)))
      self.end_headers()
      self.wfile.write(body)

    def do_POST(self) -> None:
      length = int(self.headers.get("Content-Length", 0))
      form = urllib.parse.parse_qs(self.rfile.read(length).decode())
      wrong = site.handle(
        self.path, {name: values[0] for name, values in form.items()}
      )
      if wrong:
        self.send_error(400, wrong)
        return
      self.send_response(303)
      self.send_header("Location", "/")
      self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
      """Logs nothing: the page itself shows the history."""

  # One request at a time: the site has one visitor.
  return server.HTTPServer(("127.0.0.1", port), Handler)
