"""Tables of scores, including those of the paper.

A table is a header and rows of strings, so that terminal, Markdown and HTML
show the same.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math

from t2po_jax.judging import scores

# Question sets in the order of the paper, by their names in Search-R1's files.
QUESTION_SETS = {
  "nq": "NQ",
  "triviaqa": "TriviaQA",
  "popqa": "PopQA",
  "hotpotqa": "HotpotQA",
  "2wikimultihopqa": "2Wiki",
  "musique": "MuSiQue",
  "bamboogle": "Bamboogle",
}
# Task types of ALFWorld in the order of the paper.
TASK_TYPES = {
  "pick_and_place_simple": "Pick",
  "look_at_obj_in_light": "Look",
  "pick_clean_then_place_in_recep": "Clean",
  "pick_heat_then_place_in_recep": "Heat",
  "pick_cool_then_place_in_recep": "Cool",
  "pick_two_obj_and_place": "Pick2",
}
SEEN = {"valid": "seen", "test": "unseen"}


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of strings.

  Attributes:
    title: one line.
    head: names of the columns; the first one is text, all others numbers.
    rows: cells.
  """

  title: str
  head: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]

  def text(self) -> str:
    """Aligned columns for a terminal."""
    lines = [self.head, *self.rows]
    widths = [
      max(len(line[i]) for line in lines) for i in range(len(self.head))
    ]
    drawn = [
      "  ".join(
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(line, widths, strict=True))
      )
      for line in lines
    ]
    return "\n".join([self.title, *drawn])

  def markdown(self) -> str:
    """A Markdown table under its title."""
    rule = ["---", *["---:"] * (len(self.head) - 1)]
    lines = [self.head, rule, *self.rows]
    drawn = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([f"**{self.title}**", "", *drawn])


def by_variant(
  episodes: Sequence[scores.Episode],
) -> dict[str, list[scores.Episode]]:
  """Episodes by variant and, if there are several, by split."""
  several = len({e.split for e in episodes}) > 1
  groups: dict[str, list[scores.Episode]] = {}
  for e in episodes:
    name = f"{e.variant} ({e.split})" if several else e.variant
    groups.setdefault(name, []).append(e)
  return groups


def _number(value: float, digits: int) -> str:
  return "-" if math.isnan(value) else f"{value:.{digits}f}"


def overview(episodes: Sequence[scores.Episode]) -> Table:
  """One row per variant: success with its interval, pass@k, costs."""
  summaries = {
    name: scores.summarise(group)
    for name, group in by_variant(episodes).items()
  }
  passes = list(
    dict.fromkeys(k for n in summaries.values() for k in n if "@" in k)
  )
  head = ["policy", "tasks", "episodes", "success", "95 % interval", *passes]
  head += ["return", "turns", "tokens", "discarded", "format", "aborted"]
  rows = []
  for name, n in summaries.items():
    rows.append(
      (
        name,
        f"{n['tasks']:.0f}",
        f"{n['episodes']:.0f}",
        _number(n["success"], 3),
        f"[{_number(n['low'], 3)}, {_number(n['high'], 3)}]",
        *(_number(n.get(k, math.nan), 3) for k in passes),
        _number(n["return"], 3),
        _number(n["turns"], 2),
        _number(n["tokens"], 1),
        _number(n["discarded"], 1),
        _number(n["format"], 3),
        f"{n['aborted']:.0f}",
      )
    )
  return Table("all tasks", tuple(head), tuple(rows))


def by_category(
  episodes: Sequence[scores.Episode],
  names: Mapping[str, str],
  *,
  title: str,
  average: bool,
) -> Table:
  """Success in per cent, one column per category.

  Args:
    episodes: of any number of variants.
    names: categories that come first, with their column headings; the others
      follow in alphabetical order. Categories without episodes get no column.
    title: of the table.
    average: whether the last column is the mean of the categories; otherwise
      it is the mean over tasks.
  """
  present = {e.category for e in episodes}
  categories = [c for c in names if c in present]
  categories += sorted(present - set(categories))
  last = "Avg." if average else "All"
  head = ("policy", *(names.get(c, c) for c in categories), last)
  rows = []
  for name, group in by_variant(episodes).items():
    values = [
      scores.summarise([e for e in group if e.category == c])["success"]
      for c in categories
    ]
    whole = scores.summarise(group)["success"]
    known = [v for v in values if not math.isnan(v)]
    if average:
      whole = sum(known) / len(known) if known else math.nan
    cells = [_number(100 * v, 1) for v in (*values, whole)]
    rows.append((name, *cells))
  return Table(title, head, tuple(rows))


def of_webshop(episodes: Sequence[scores.Episode]) -> Table:
  """Mean score and success rate, both in per cent."""
  rows = []
  for name, group in by_variant(episodes).items():
    n = scores.summarise(group)
    # An episode that buys nothing scores 0.
    played = [e for e in group if not e.aborted]
    points = [0.0 if math.isnan(e.score) else e.score for e in played]
    mean = 100 * sum(points) / len(points) if points else math.nan
    rows.append((name, _number(mean, 1), _number(100 * n["success"], 1)))
  return Table("WebShop", ("policy", "Score", "Success"), tuple(rows))


def of_benchmark(name: str, episodes: Sequence[scores.Episode]) -> Table:
  """The paper's table of a benchmark; success per category for others.

  Args:
    name: `config.env.name`.
    episodes: at least one.
  """
  if name == "webshop":
    return of_webshop(episodes)
  if name == "alfworld":
    seen = [
      dataclasses.replace(e, split=SEEN.get(e.split, e.split)) for e in episodes
    ]
    return by_category(
      seen, TASK_TYPES, title="ALFWorld, success in %", average=False
    )
  if name == "searchqa":
    return by_category(
      episodes, QUESTION_SETS, title="Search QA, success in %", average=True
    )
  return by_category(episodes, {}, title="success in %", average=False)
