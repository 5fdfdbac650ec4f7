"""Builds prompts from a memory window, and parses responses into actions.

Each benchmark words its own prompts (`Benchmark.render`); this file decides
what they contain. A prompt that is too long first drops its oldest memory, then
shortens long observations in the middle; the task and the admissible actions
are never changed.

The response grammar is strict: one `<think>` block, then exactly one action
block and nothing after it. A response that violates it may still contain an
action, which is executed, but it counts as malformed.
"""

from collections.abc import Callable
import dataclasses
import re
from typing import Any

Message = dict[str, str]
ELLIPSIS = " ... "
_CHINESE = re.compile("[\u4e00-\u9fff]")


@dataclasses.dataclass(frozen=True)
class Tool:
  """An action as a tool that is called by name; see `tool_calls`.

  Attributes:
    name: the action's kind, e.g. `search`.
    argument: the name of its only argument, a string.
    meaning: the description that the model reads.
  """

  name: str
  argument: str = "text"
  meaning: str = "Does one of the possible actions."


@dataclasses.dataclass(frozen=True)
class Grammar:
  """The format of a response.

  Attributes:
    actions: the tags that may contain the action, e.g. `("search", "answer")`.
    closing: the text forced when thinking is cut short; it closes the thinking
      segment and, if there is only one kind of action, opens it.
    any_case: whether tags are case-insensitive, so that `<Action>` is one.
    refuse_chinese: whether a response with a Chinese character is malformed, as
      in the released code.
    tools: the actions as tools, in the same order; empty for tagged actions.
  """

  actions: tuple[str, ...] = ("action",)
  closing: str = "</think>\n<action>"
  any_case: bool = False
  refuse_chinese: bool = False
  tools: tuple[Tool, ...] = ()

  @property
  def stops(self) -> tuple[str, ...]:
    """The strings at which a response ends."""
    return tuple(f"</{tag}>" for tag in self.actions)

  def write(self, content: str, kind: str = "") -> str:
    """Formats an action; `kind` defaults to the first."""
    tag = kind or self.actions[0]
    return f"<{tag}>{content}</{tag}>"

  def schemas(self) -> list[dict[str, Any]]:
    """The tools for a chat template; empty for tagged actions."""
    return []


@dataclasses.dataclass(frozen=True)
class Response:
  """A parsed response.

  Attributes:
    thought: the text of the first `<think>` block, or None.
    kind: the tag of the first action block, or None if there is none.
    content: the text of that block, stripped.
    opened: number of opening action tags of any kind, anywhere.
    format_valid: whether the whole response follows the grammar.
  """

  thought: str | None
  kind: str | None
  content: str
  opened: int
  format_valid: bool


def parse(text: str, grammar: Grammar) -> Response:
  """Parses one response; see the module docstring for the grammar."""
  tags = "|".join(re.escape(tag) for tag in grammar.actions)
  flags = re.DOTALL | (re.IGNORECASE if grammar.any_case else 0)
  counted = text.lower() if grammar.any_case else text
  thought = re.search(r"<think>(.*?)</think>", text, flags)
  action = re.search(rf"<({tags})>(.*?)</\1>", text, flags)
  # A lazy match may still span a second tag, so all tags are counted first.
  counts = [
    counted.count(f"<{slash}{tag}>")
    for tag in ("think", *grammar.actions)
    for slash in ("", "/")
  ]
  strict = counts[:2] == [1, 1] and sum(counts) == 4
  if strict:
    form = rf"\s*<think>.*</think>\s*<({tags})>.*</\1>\s*"
    strict = re.fullmatch(form, text, flags) is not None
  if grammar.refuse_chinese and _CHINESE.search(text):
    strict = False
  return Response(
    thought=thought.group(1).strip() if thought else None,
    kind=action.group(1).lower() if action else None,
    content=action.group(2).strip() if action else "",
    opened=sum(counts[2::2]),
    format_valid=strict,
  )


@dataclasses.dataclass(frozen=True)
class View:
  """The contents of the prompt of one turn.

  Attributes:
    task: the task in words.
    memory: (observation, action) pairs of the last turns, oldest first.
    observation: the current observation.
    admissible: the admissible actions, or empty.
    turn: the number of the turn, from 1.
    max_turns: turns after which the episode ends in any case.
  """

  task: str
  memory: tuple[tuple[str, str], ...]
  observation: str
  admissible: tuple[str, ...]
  turn: int
  max_turns: int


def history(view: View) -> str:
  """The remembered turns of a view as text; empty if there are none."""
  lines = []
  first = view.turn - len(view.memory)
  for turn, (observation, done) in enumerate(view.memory, first):
    lines.append(f"Turn {turn}: {observation}")
    lines.append(f"You did: {done or 'nothing'}")
  return "The last turns:\n" + "\n".join(lines) + "\n\n" if lines else ""


def follow_up(view: View) -> Message:
  """The message that continues a dialogue with the new observation.

  The observation, then the admissible actions, one per line.
  """
  content = "\n".join([view.observation, *view.admissible])
  return {"role": "user", "content": content}


def shorten(text: str, keep: int) -> str:
  """Cuts out the middle of a text, leaving at most `keep` characters."""
  if len(text) <= keep:
    return text
  if keep < len(ELLIPSIS):
    return text[:keep]
  head = keep - len(ELLIPSIS)
  tail = head // 2
  return text[: head - tail] + ELLIPSIS + (text[-tail:] if tail else "")


def fit(view: View, fits: Callable[[View], bool]) -> tuple[View, bool]:
  """Shrinks a view until its prompt fits.

  Args:
    view: the whole view.
    fits: whether the prompt of a view is short enough.

  Returns:
    The shrunk view, and whether anything was dropped or shortened.

  Raises:
    ValueError: if even task and admissible actions do not fit.
  """
  if fits(view):
    return view, False
  while view.memory:
    view = dataclasses.replace(view, memory=view.memory[1:])
    if fits(view):
      return view, True

  def cut(keep: int) -> View:
    return dataclasses.replace(
      view, observation=shorten(view.observation, keep)
    )

  low, high = 0, len(view.observation)
  if not fits(cut(low)):
    raise ValueError(
      f"prompt too long: the task of {len(view.task)} characters and "
      f"{len(view.admissible)} admissible actions do not fit even without an "
      "observation; raise the prompt length"
    )
  while low + 1 < high:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(cut(middle)) else (low, middle)
  return cut(low), True
