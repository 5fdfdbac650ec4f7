"""Reports on one run or several: settings, results and costs.

A report is a list of blocks, rendered as Markdown or HTML. Everything is read
from the files of the runs, so a report can be made while a run is in progress,
or from runs of another machine.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import html
import json
import math
import pathlib
from typing import Any

import numpy as np

from t2po_jax import records
from t2po_jax.configs import base as settings
from t2po_jax.judging import scores, tables
from t2po_jax.viewing import runs as runs_lib

CURVES = {
  "eval/success": "held-out success",
  "eval/tokens": "response tokens per held-out episode",
  "train/success": "success in training",
  "train/intervention_rate": "responses with an intervention",
  "train/resample_rate": "turns sampled again",
  "learn/entropy": "entropy, nats per token",
}
# The most episodes whose tokens are read.
MOST_EPISODES = 2000
_BINS = 10
_COLOURS = ("#2f6fd0", "#d9731a", "#2c9460", "#a04fc4", "#c23b4e", "#7a7a2e")


@dataclasses.dataclass(frozen=True)
class Heading:
  """The title of a section."""

  text: str


@dataclasses.dataclass(frozen=True)
class Lines:
  """Plain lines."""

  lines: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Curve:
  """Curves over updates: label -> (update, mean, low, high) of each point."""

  title: str
  lines: Mapping[str, tuple[tuple[float, float, float, float], ...]]


Block = Heading | Lines | Curve | tables.Table


def build(runs: Sequence[runs_lib.Run]) -> list[Block]:
  """All blocks of a report.

  Args:
    runs: those with the same label are repetitions with different seeds.

  Raises:
    ValueError: if none of them has metrics.
  """
  if not any(run.metrics() for run in runs):
    raise ValueError(f"{runs[0].folder}: holds no metrics yet")
  labels = list(dict.fromkeys(run.label for run in runs))
  groups = {
    label: [run for run in runs if run.label == label] for label in labels
  }
  blocks: list[Block] = [Heading("Report of " + ", ".join(labels))]
  blocks += _machines(runs)
  blocks += [
    Heading("Settings that differ from the default"),
    _settings(groups),
  ]
  blocks += [Heading("Results"), _results(groups)]
  blocks += _categories(groups)
  blocks.append(Heading("Curves"))
  for name, title in CURVES.items():
    curves = {label: _curve(group, name) for label, group in groups.items()}
    if any(curves.values()):
      blocks.append(Curve(title, curves))
  blocks += [Heading("Time"), _stages(groups)]
  blocks += [Heading("Tokens"), _tokens(groups)]
  blocks += _exploration(groups)
  blocks += [Heading("Alarms"), _alarms(groups)]
  return blocks


def write(workdir: pathlib.Path) -> pathlib.Path:
  """Writes `report.html` into the folder of a run; returns the file."""
  path = workdir / "report.html"
  run = runs_lib.Run(workdir.name, workdir)
  path.write_text(to_html(build([run])), encoding="utf-8")
  return path


def _number(value: float | None, digits: int = 3) -> str:
  return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _machines(runs: Sequence[runs_lib.Run]) -> list[Block]:
  """Commit and hardware, as recorded by the runs."""
  machines: dict[str, list[str]] = {}
  for run in runs:
    path = run.folder / "machine.json"
    description = "machine unknown"
    if path.is_file():
      noted = json.loads(path.read_text())
      description = ", ".join(f"{key} {value}" for key, value in noted.items())
    machines.setdefault(description, []).append(
      f"{run.label} ({run.folder.name})"
    )
  return [
    Lines(
      tuple(
        f"{', '.join(who)}: {description}"
        for description, who in machines.items()
      )
    )
  ]


def _settings(groups: Mapping[str, Sequence[runs_lib.Run]]) -> Block:
  """Every key whose value differs from the default in some run."""
  default = settings.flatten(settings.to_dict(settings.Config()))
  noted = {
    label: [_config(run.folder) for run in group]
    for label, group in groups.items()
  }
  keys = sorted({k for many in noted.values() for one in many for k in one})
  rows = []
  for key in keys:
    cells = []
    for many in noted.values():
      values = list(dict.fromkeys(repr(one.get(key)) for one in many))
      cells.append(", ".join(values))
    usual = repr(default[key]) if key in default else "-"
    if any(cell != usual for cell in cells):
      rows.append((key, usual, *cells))
  return tables.Table("settings", ("key", "default", *groups), tuple(rows))


def _config(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / "config.json"
  return json.loads(path.read_text()) if path.is_file() else {}


def _evaluations(run: runs_lib.Run) -> list[dict[str, Any]]:
  return [
    line for line in run.metrics() if line.get("eval/success") is not None
  ]


def _results(groups: Mapping[str, Sequence[runs_lib.Run]]) -> Block:
  """First, best and last evaluation; means over runs with intervals."""
  rows = []
  for label, group in groups.items():
    evaluations = [lines for run in group if (lines := _evaluations(run))]
    if not evaluations:
      continue
    last = [lines[-1]["eval/success"] for lines in evaluations]
    low, high = scores.interval(last)
    rows.append(
      (
        label,
        str(len(evaluations)),
        f"{max(lines[-1]['step'] for lines in evaluations):.0f}",
        _number(_mean(lines[0]["eval/success"] for lines in evaluations)),
        _number(
          _mean(max(x["eval/success"] for x in lines) for lines in evaluations)
        ),
        _number(_mean(last)),
        f"[{_number(low)}, {_number(high)}]" if len(last) > 1 else "-",
        _number(_mean(lines[-1].get("eval/return") for lines in evaluations)),
        _number(
          _mean(lines[-1].get("eval/tokens") for lines in evaluations), 1
        ),
        _number(_mean(lines[-1].get("eval/turns") for lines in evaluations), 2),
      )
    )
  head = ("run", "seeds", "updates", "first", "best", "last", "95 % interval")
  head += ("return", "tokens", "turns")
  return tables.Table("held-out success", head, tuple(rows))


def _mean(values: Iterable[float | None]) -> float:
  known = [float(v) for v in values if v is not None]
  return float(np.mean(known)) if known else math.nan


def _categories(groups: Mapping[str, Sequence[runs_lib.Run]]) -> list[Block]:
  """Last held-out success by category."""
  prefix, scores = "eval/success/", {}
  for label, group in groups.items():
    lines = [many[-1] for run in group if (many := _evaluations(run))]
    names = sorted({k for x in lines for k in x if k.startswith(prefix)})
    scores[label] = {
      name.removeprefix(prefix): _mean(line.get(name) for line in lines)
      for name in names
    }
  names = sorted({name for row in scores.values() for name in row})
  if not names:
    return []
  rows = tuple(
    (label, *(_number(row.get(name)) for name in names))
    for label, row in scores.items()
  )
  table = tables.Table("last evaluation", ("run", *names), rows)
  return [Heading("Success by category"), table]


def _curve(
  group: Sequence[runs_lib.Run], name: str
) -> tuple[tuple[float, float, float, float], ...]:
  """(update, mean, low, high) over the runs that have this metric there."""
  values: dict[float, list[float]] = {}
  for run in group:
    for line in run.metrics():
      if line.get(name) is not None:
        values.setdefault(line["step"], []).append(line[name])
  points = []
  for step in sorted(values):
    low, high = scores.interval(values[step])
    points.append((step, float(np.mean(values[step])), low, high))
  return tuple(points)


def _stages(groups: Mapping[str, Sequence[runs_lib.Run]]) -> Block:
  """Seconds per stage, summed over a run; means over runs."""
  sums = {label: _sums(group, "seconds/") for label, group in groups.items()}
  for row in sums.values():
    row.pop("rollout", None)  # It overlaps with the stages, or is one of them.
  names = sorted({name for row in sums.values() for name in row})
  rows = []
  for label, row in sums.items():
    whole = sum(row.values())
    cells = [
      f"{row[n]:.1f} s ({100 * row[n] / whole:.0f} %)" if n in row else "-"
      for n in names
    ]
    rows.append((label, *cells, f"{whole:.1f} s"))
  return tables.Table("seconds by stage", ("run", *names, "all"), tuple(rows))


def _sums(group: Sequence[runs_lib.Run], prefix: str) -> dict[str, float]:
  """Sums over a run of all metrics with a prefix; means over runs."""
  by_name: dict[str, list[float]] = {}
  for run in group:
    sums: dict[str, float] = {}
    for line in run.metrics():
      for key, value in line.items():
        if key.startswith(prefix) and value is not None:
          name = key.removeprefix(prefix)
          sums[name] = sums.get(name, 0.0) + value
    for name, value in sums.items():
      by_name.setdefault(name, []).append(value)
  return {name: _mean(values) for name, values in by_name.items()}


def _tokens(groups: Mapping[str, Sequence[runs_lib.Run]]) -> Block:
  """Thousands of tokens sampled, reused and learned from."""
  rows = []
  for label, group in groups.items():
    work = _sums(group, "sampler/")
    packed = _sums(group, "pack/")
    steps = work.get("slot_steps", 0.0)
    busy = work.get("slot_steps_used", 0.0) / steps if steps else math.nan
    kept, discarded = (
      _mean(
        sum(
          (line.get(key) or 0.0) * (line.get("train/episodes") or 0.0)
          for line in run.metrics()
        )
        for run in group
      )
      for key in ("train/tokens", "train/tokens_discarded")
    )
    rows.append(
      (
        label,
        *(
          f"{value / 1000:.1f}"
          for value in (
            work.get("slot_steps_used", 0.0),
            kept,
            discarded,
            work.get("prompt_tokens", 0.0),
            work.get("prompt_tokens_reused", 0.0),
            packed.get("tokens", 0.0),
          )
        ),
        f"{100 * busy:.0f} %",
      )
    )
  head = ("run", "sampled", "in kept responses", "discarded", "of prompts")
  head += ("of these reused", "packed for learning", "slots busy")
  return tables.Table("thousands of tokens in training", head, tuple(rows))


def _exploration(groups: Mapping[str, Sequence[runs_lib.Run]]) -> list[Block]:
  """How often the control intervened, and what resampling achieved."""
  positions: list[tuple[str, ...]] = []
  outcomes: list[tuple[str, ...]] = []
  edges: list[float] = []
  turns_by_label = {
    label: [turn for run in group for turn in _turns(run)]
    for label, group in groups.items()
  }
  if not any(turns_by_label.values()):
    return []
  fired = {
    label: [t["fired_at"] for t, _ in turns if t["fired_at"] >= 0]
    for label, turns in turns_by_label.items()
  }
  most = max((max(values) for values in fired.values() if values), default=0)
  width = max(1, math.ceil((most + 1) / _BINS))
  edges = [width * i for i in range(math.ceil((most + 1) / width))]
  for label, values in fired.items():
    counts = [sum(e <= v < e + width for v in values) for e in edges]
    share = len(values) / max(len(turns_by_label[label]), 1)
    positions.append((label, *map(str, counts), f"{100 * share:.0f} %"))
    outcomes.append((label, *_resampling(turns_by_label[label])))
  names = tuple(f"{e}" if width == 1 else f"{e}-{e + width - 1}" for e in edges)
  return [
    Heading("Exploration control, in the episodes that were written"),
    tables.Table(
      "token at which thinking was ended",
      ("run", *names, "of responses"),
      tuple(positions),
    ),
    tables.Table(
      "turns sampled again",
      (
        "run",
        "turns",
        "sampled again",
        "Phi discarded",
        "Phi kept",
        "success with",
        "success without",
      ),
      tuple(outcomes),
    ),
  ]


def _turns(run: runs_lib.Run) -> list[tuple[dict[str, Any], bool]]:
  """(turn, whether its episode succeeded) of the newest episodes."""
  entries = [e for e in run.entries() if e["kind"] == "train"]
  turns = []
  for entry in entries[-MOST_EPISODES:]:
    episode = records.read_episode(run.folder / records.FOLDER, entry)
    turns += [(turn, entry["success"]) for turn in episode["turns"]]
  return turns


def _resampling(
  turns: Sequence[tuple[Mapping[str, Any], bool]],
) -> tuple[str, ...]:
  """One row of the table on resampling."""
  again = [(turn, success) for turn, success in turns if turn["discarded"]]
  return (
    str(len(turns)),
    str(len(again)),
    _number(_mean(a["phi"] for turn, _ in again for a in turn["discarded"])),
    _number(_mean(turn["phi"] for turn, _ in again)),
    _number(_mean(success for _, success in again)),
    _number(_mean(success for turn, success in turns if not turn["discarded"])),
  )


def _alarms(groups: Mapping[str, Sequence[runs_lib.Run]]) -> Block:
  """Updates at which the collapse guard raised an alarm."""
  alarms = []
  for label, group in groups.items():
    for run in group:
      steps = [
        f"{line['step']:.0f}"
        for line in run.metrics()
        if (line.get("guard/alarms") or 0.0) > 0
      ]
      if steps:
        alarms.append(
          f"{label} ({run.folder.name}): updates {', '.join(steps)}"
        )
  return Lines(tuple(alarms or ["none"]))


def to_markdown(blocks: Sequence[Block]) -> str:
  """The report as Markdown; curves as tables."""
  parts, level = [], "#"
  for block in blocks:
    if isinstance(block, Heading):
      parts.append(f"{level} {block.text}")
      level = "##"
    elif isinstance(block, Lines):
      parts.append("\n".join(f"- {line}" for line in block.lines))
    elif isinstance(block, Curve):
      parts.append(_curve_table(block).markdown())
    else:
      parts.append(block.markdown())
  return "\n\n".join(parts) + "\n"


def _curve_table(curve: Curve) -> tables.Table:
  """At most eleven updates of a curve."""
  steps = sorted({p[0] for points in curve.lines.values() for p in points})
  if len(steps) > 11:
    chosen = np.linspace(0, len(steps) - 1, 11).round().astype(int)
    steps = [steps[i] for i in chosen]
  rows = []
  for label, points in curve.lines.items():
    known = {p[0]: p for p in points}
    cells = []
    for step in steps:
      if step not in known:
        cells.append("-")
        continue
      _, mean, low, high = known[step]
      spread = f" [{low:.3f}, {high:.3f}]" if low != high else ""
      cells.append(f"{mean:.3f}{spread}")
    rows.append((label, *cells))
  head = ("update", *(f"{step:.0f}" for step in steps))
  return tables.Table(curve.title, head, tuple(rows))


_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto;
  padding: 0 1em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .5em 0 1.2em; font-size: 13px; }
caption { text-align: left; font-weight: 600; }
th, td { padding: 2px 9px; border-bottom: 1px solid #8886; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.charts { display: grid; gap: 1em;
  grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); }
figure { margin: 0; } figcaption { font-weight: 600; font-size: 13px; }
svg text { fill: #888; font: 10px system-ui, sans-serif; }
"""


def to_html(blocks: Sequence[Block]) -> str:
  """The report as a single self-contained HTML file."""
  parts, level, charts = [], 1, []
  for block in [*blocks, Heading("")]:
    if isinstance(block, Curve):
      charts.append(_svg(block))
      continue
    if charts:
      parts.append(f'<div class="charts">{"".join(charts)}</div>')
      charts = []
    if isinstance(block, Heading):
      if block.text:
        parts.append(f"<h{level}>{html.escape(block.text)}</h{level}>")
      level = 2
    elif isinstance(block, Lines):
      items = "".join(f"<li>{html.escape(line)}</li>" for line in block.lines)
      parts.append(f"<ul>{items}</ul>")
    else:
      parts.append(_html_table(block))
  title = html.escape(next(b.text for b in blocks if isinstance(b, Heading)))
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n"
    + "\n".join(parts)
    + "\n</body></html>\n"
  )


def _html_table(table: tables.Table) -> str:
  def row(cells: Sequence[str], tag: str) -> str:
    inner = "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells)
    return f"<tr>{inner}</tr>"

  body = "".join(row(cells, "td") for cells in table.rows)
  return (
    f'<div class="scroll"><table><caption>{html.escape(table.title)}</caption>'
    f"<thead>{row(table.head, 'th')}</thead><tbody>{body}</tbody></table></div>"
  )


def _svg(curve: Curve) -> str:
  """A curve with its interval band, as SVG."""
  points = [p for line in curve.lines.values() for p in line]
  left, top, width, height = 44, 8, 280, 120
  x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
  y0, y1 = min(p[2] for p in points), max(p[3] for p in points)
  x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)

  def at(step: float, value: float) -> str:
    x = left + width * (step - x0) / (x1 - x0)
    y = top + height - height * (value - y0) / (y1 - y0)
    return f"{x:.1f},{y:.1f}"

  parts = []
  for number, (label, line) in enumerate(curve.lines.items()):
    colour = _COLOURS[number % len(_COLOURS)]
    ring = [at(s, high) for s, _, _, high in line]
    ring += [at(s, low) for s, _, low, _ in reversed(line)]
    parts.append(
      f'<polygon points="{" ".join(ring)}" fill="{colour}" opacity="0.15"/>'
      f'<polyline points="{" ".join(at(p[0], p[1]) for p in line)}" '
      f'fill="none" stroke="{colour}" stroke-width="1.8">'
      f"<title>{html.escape(label)}</title></polyline>"
    )
  for value in (y0, y1):
    y = top + height - height * (value - y0) / (y1 - y0)
    parts.append(
      f'<text x="{left - 4}" y="{y + 3:.0f}" text-anchor="end">{value:.3g}'
      f'</text><line x1="{left}" x2="{left + width}" y1="{y:.0f}" '
      f'y2="{y:.0f}" stroke="#8886"/>'
    )
  for step, x in ((x0, left), (x1, left + width)):
    parts.append(
      f'<text x="{x}" y="144" text-anchor="middle">{step:.0f}</text>'
    )
  legend = " ".join(
    f'<span style="color:{_COLOURS[n % len(_COLOURS)]}">■</span> '
    f"{html.escape(label)}"
    for n, label in enumerate(curve.lines)
  )
  return (
    f"<figure><figcaption>{html.escape(curve.title)}</figcaption>"
    f'<svg viewBox="0 0 330 150" role="img">{"".join(parts)}</svg>'
    f"{legend}</figure>"
  )
