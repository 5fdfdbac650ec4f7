"""The WebShop benchmark: catalogue, tasks, episodes.

WebShop (arXiv 2207.01206) asks an agent to buy the product that an instruction
describes. Without files the shop is the embedded catalogue; with the published
ones it is the real shop, whose index and (for a large catalogue) products are
kept in a cache directory that all workers share. An episode succeeds if the
purchase scores 1. Deliberate differences from the original: the search runs in
this process, without Java, and prices are drawn per product.
"""

from collections.abc import Iterator, Mapping
import functools
import hashlib
import os
import pathlib
import re

from t2po_jax.envs import base, prompts, templates
from t2po_jax.envs.webshop import data, expert, nouns, retrieval, world
from t2po_jax.envs.webshop import goals as goals_lib
from t2po_jax.envs.webshop import session as sessions
from t2po_jax.envs.webshop import settings as settings_lib
from t2po_jax.envs.webshop.wordings import compact, full, reference

_WORDINGS = {"compact": compact, "full": full, "reference": full}
_LARGE = 256 * 2**20  # Bytes of a product file from which `auto` uses the disk.
_EMBEDDED_PRODUCTS = 300
_CORPUS_EPISODES = 200


class WebShop:
  """Shopping by instruction; implements `envs.base.Benchmark`."""

  Settings = settings_lib.Settings
  threadsafe = True

  def __init__(self, settings: settings_lib.Settings | None = None) -> None:
    """Opens the shop.

    Raises:
      ValueError: if a file is missing or malformed.
    """
    settings = settings or settings_lib.Settings()
    self.settings = settings
    self.wording = _WORDINGS[settings.wording]
    self.grammar = settings.adapt(self.wording.GRAMMAR)
    self._prompts = templates.choose(
      settings.wording, settings.prompt_file, reference, self.wording
    )
    # The format includes the pages.
    self.page = (
      reference.page if settings.wording == "reference" else self.wording.page
    )
    self.max_turns = settings.max_turns
    embedded = settings.catalogue == "embedded"
    if embedded:
      products = settings.products or _EMBEDDED_PRODUCTS
      stock = data.MemoryCatalogue(
        world.build(settings.seed, products=products)
      )
      index = retrieval.Index.build(map(stock.at, range(len(stock))))
    else:
      stock, index = open_shop(
        _expand(settings.catalogue),
        limit=settings.products,
        storage=settings.storage,
        cache_dir=settings.cache_dir,
      )
    self.shop = sessions.Shop(
      catalogue=stock,
      search=lambda query: index.search(query, sessions.RESULTS),
      nouns=self._choose_nouns(settings.catalogue, settings.nouns),
      show_attributes=settings.show_attributes,
    )
    goals = goals_lib.Goals(stock, settings.goals)
    # A group plays one task many times.
    self._goal = functools.lru_cache(1024)(goals.at)
    self._order = goals_lib.draw_order(len(goals))
    self._prefix = "embedded" if embedded else settings.goals
    self.splits: Mapping[str, tuple[str, ...]] = {
      name: tuple(f"{self._prefix}-{number}" for number in numbers)
      for name, numbers in goals_lib.cut_splits(len(self._order)).items()
    }

  @staticmethod
  def _choose_nouns(catalogue: str, source: str) -> nouns.Source:
    if catalogue == "embedded":
      return lambda product: product.nouns or ()
    return nouns.choose(
      os.path.expandvars(source), folder=_expand(catalogue).parent
    )

  def goal(self, task_id: str) -> goals_lib.Goal:
    """The goal of a task.

    Raises:
      KeyError: if the task is unknown.
    """
    prefix, _, number = task_id.rpartition("-")
    if prefix != self._prefix or not number.isdecimal():
      raise KeyError(f"webshop: unknown task {task_id!r}")
    if int(number) >= len(self._order):
      raise KeyError(
        f"webshop: task {task_id!r}, but there are {len(self._order)}"
      )
    return self._goal(self._order[int(number)])

  def env(self) -> "WebShopEnv":
    """A new environment; shares catalogue and index."""
    return WebShopEnv(self)

  def render(self, view: prompts.View) -> list[prompts.Message]:
    """The prompt of a turn in the benchmark's wording."""
    return self._prompts.render(view)

  def category(self, task_id: str) -> str:
    """The department of the goal's product."""
    return self.goal(task_id).product.category

  def corpus(self) -> list[str]:
    """Whole episodes of the expert on training tasks, prompts included."""
    return [
      text
      for task_id in self.splits["train"][:_CORPUS_EPISODES]
      for text in base.transcribe(self, task_id, 0)
    ]


def _expand(path: str) -> pathlib.Path:
  """A path with environment variables and `~` expanded."""
  return pathlib.Path(os.path.expandvars(path)).expanduser()


def open_shop(
  items: pathlib.Path, *, limit: int, storage: str, cache_dir: str
) -> tuple[data.Catalogue, retrieval.Index]:
  """Opens the published files; slow steps are done once and cached.

  Args:
    items: `items_shuffle*.json`.
    limit: number of products to take from the start; 0 takes all.
    storage: `memory`, `disk` or `auto`.
    cache_dir: where to keep index and catalogue; empty for the default.

  Raises:
    ValueError: if a file is missing or malformed.
  """
  ending = re.fullmatch(r"items_shuffle(.*)\.json", items.name)
  if ending is None or not items.is_file():
    raise ValueError(
      f"env.catalogue: {items} is no file named items_shuffle*.json; give its "
      "path or `embedded`"
    )
  instructions = items.with_name(f"items_ins_v2{ending[1]}.json")
  people = items.with_name("items_human_ins.json")
  sources = [items, instructions, *([people] if people.is_file() else [])]
  given = cache_dir or os.environ.get("T2PO_CACHE") or "~/.cache/t2po_jax"
  cache = pathlib.Path(given).expanduser() / "webshop"
  # A file that changes gets another name in the cache.
  identity = [(str(s), s.stat().st_size, s.stat().st_mtime_ns) for s in sources]
  formats = (limit, data.FORMAT, retrieval.FORMAT)
  name = hashlib.sha256(repr((identity, formats)).encode()).hexdigest()[:16]
  cache = cache / f"{items.stem}-{name}"

  def read() -> Iterator[data.Product]:
    return data.read_products(
      items, instructions, people if people in sources else None, limit=limit
    )

  stock: data.Catalogue
  if storage == "memory" or (
    storage == "auto" and items.stat().st_size < _LARGE
  ):
    stock = data.MemoryCatalogue(read())
  else:
    file = cache / "products.sqlite"
    if not file.is_file():
      data.DiskCatalogue.write(file, read())
    stock = data.DiskCatalogue(file)
  folder = cache / "index"
  if not folder.is_dir():
    cache.mkdir(parents=True, exist_ok=True)
    retrieval.Index.build(map(stock.at, range(len(stock)))).save(folder)
  return stock, retrieval.Index.load(folder)


class WebShopEnv:
  """Plays one episode after another; see `envs.base.Env`."""

  def __init__(self, benchmark: WebShop) -> None:
    self._benchmark = benchmark
    self._visit: sessions.Session | None = None
    self._task = ""
    self._turn = 0
    self._done = True

  @property
  def visit(self) -> sessions.Session:
    """The visit of the current episode.

    Raises:
      RuntimeError: if there is none yet.
    """
    if self._visit is None:
      raise RuntimeError("webshop: no episode is running; call reset first")
    return self._visit

  def reset(self, task_id: str) -> base.Observation:
    """Enters the shop with a task; see `envs.base.Env.reset`."""
    benchmark = self._benchmark
    visit = sessions.Session(benchmark.shop, benchmark.goal(task_id))
    self._visit, self._task = visit, benchmark.wording.task(visit.goal)
    self._turn, self._done = 0, False
    return self._observe()

  def step(self, response: str) -> base.StepResult:
    """Searches, clicks or buys; see `envs.base.Env.step`."""
    if self._done:
      raise RuntimeError("webshop: the episode is over; call reset first")
    benchmark, visit = self._benchmark, self.visit
    parsed = prompts.parse(response, benchmark.grammar)
    self._turn += 1
    action, possible = "", False
    if parsed.content:
      name, argument = sessions.parse_action(parsed.content.lower())
      action = benchmark.wording.action(name, argument)
      possible = visit.act(f"{name}[{argument}]")
    score = visit.score.total if visit.score else 0.0
    success = score == 1.0
    self._done = visit.score is not None or self._turn == benchmark.max_turns
    return base.StepResult(
      observation=self._observe("" if action else benchmark.wording.NO_ACTION),
      action=action,
      reward=benchmark.settings.reward_success * success
      + benchmark.settings.reward_score * score,
      done=self._done,
      format_valid=parsed.format_valid,
      action_valid=parsed.format_valid and possible,
      success=success,
      info={"task_score": score} if self._done else {},
    )

  def expert(self, seed: int) -> expert.ScriptedExpert:
    """The scripted shopper for the current episode."""
    benchmark = self._benchmark
    return expert.ScriptedExpert(
      benchmark.shop,
      self.visit,
      benchmark.wording,
      hesitation=benchmark.settings.expert_hesitation,
      doubt=benchmark.settings.expert_doubt,
      seed=seed,
    )

  def close(self) -> None:
    """Nothing to release."""

  def _observe(self, remark: str = "") -> base.Observation:
    """The current page, after a remark."""
    page = self.visit.page
    actions = ["search[<words>]"] if page.has_search_bar else []
    actions += [
      f"click[{target}]" for target in page.clickables if target != "search"
    ]
    text = self._benchmark.page(self.visit)
    return base.Observation(
      task=self._task,
      text=f"{remark} {text}" if remark else text,
      admissible=tuple(actions),
    )
