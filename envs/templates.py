"""Prompts from templates with the fields of the published experiments.

A policy trained elsewhere expects one prompt format: its sections, their order,
the format of history and admissible actions. The wording `reference` has that
format with sentences of our own; a file given as `env.prompt_file` provides the
original sentences. It contains one template, or two separated by a line
`=====`, for the first turn and for later ones; fields are in braces, and `{{`
is a literal brace.
"""

from collections.abc import Callable, Mapping
import dataclasses
import os
import pathlib
import string
from types import ModuleType
from typing import Protocol

from t2po_jax import keys
from t2po_jax.envs import prompts

SEPARATOR = "====="

# Field -> its meaning; the names are those of the published templates.
FIELDS = {
  "task_description": "the task",
  "current_observation": "what is seen now",
  "admissible_actions": "the possible actions, in the benchmark's form",
  "available_actions": "the same",
  "action_history": "the last observations and actions, in its form",
  "memory_context": "the same",
  "step_count": "turns that were played",
  "history_length": "turns in the history",
  "current_step": "number of this turn, from 1",
  "max_turns": "turns until the episode ends",
}


@dataclasses.dataclass(frozen=True)
class Form:
  """How a benchmark formats the fields of its templates.

  Attributes:
    history: formats the last turns of a view.
    actions: formats its admissible actions.
    observation: formats the current observation; the first one may contain
      more.
  """

  history: Callable[[prompts.View], str]
  actions: Callable[[prompts.View], str]
  observation: Callable[[prompts.View], str] = lambda view: view.observation


@dataclasses.dataclass(frozen=True)
class Template:
  """A prompt template.

  Attributes:
    first: the text of the first turn.
    later: the text of all others.
    form: how the fields are filled.
  """

  first: str
  later: str
  form: Form

  def render(self, view: prompts.View) -> list[prompts.Message]:
    """The prompt of a turn, as one message."""
    text = self.later if view.turn > 1 else self.first
    actions, history = self.form.actions(view), self.form.history(view)
    values: Mapping[str, object] = {
      "task_description": view.task,
      "current_observation": self.form.observation(view),
      "admissible_actions": actions,
      "available_actions": actions,
      "action_history": history,
      "memory_context": history,
      "step_count": view.turn - 1,
      "history_length": len(view.memory),
      "current_step": view.turn,
      "max_turns": view.max_turns,
    }
    return [{"role": "user", "content": text.format_map(values)}]


class Renderer(Protocol):
  """Writes the prompts of a benchmark: a wording, or a template."""

  def render(self, view: prompts.View) -> list[prompts.Message]:
    """The prompt of a turn."""
    ...


def choose(
  name: str,
  prompt_file: str,
  reference: ModuleType,
  wording: Renderer | ModuleType,
) -> Renderer | ModuleType:
  """What writes the prompts, according to the settings.

  Args:
    name: the wording's name.
    prompt_file: a file of templates, or empty.
    reference: the benchmark's module `wordings.reference`.
    wording: the wording, for all other cases.

  Raises:
    ValueError: if the file is invalid.
  """
  if prompt_file:
    return read(prompt_file, reference.FORM)
  if name == "reference":
    return Template(reference.FIRST, reference.LATER, reference.FORM)
  return wording


def read(place: str, form: Form) -> Template:
  """Reads a file of templates; `~` and environment variables are expanded.

  Raises:
    ValueError: if it cannot be read, or names an unknown field.
  """
  path = pathlib.Path(os.path.expandvars(place)).expanduser()
  try:
    text = path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, "strerror", None) or "no UTF-8 text"
    raise ValueError(f"env.prompt_file: {place}: {reason}") from None
  parts = [part.strip("\n") for part in text.split(f"\n{SEPARATOR}\n")]
  if len(parts) > 2:
    raise ValueError(
      f"env.prompt_file: {place}: found {len(parts)} templates, expected one "
      f"or two around a line {SEPARATOR}"
    )
  for part in parts:
    check(part, place)
  return Template(parts[0], parts[-1], form)


def check(text: str, place: str) -> None:
  """Raises an error unless every pair of braces contains a known field.

  Raises:
    ValueError: names the file, what was found and what was expected.
  """
  try:
    fields = [field for _, field, _, _ in string.Formatter().parse(text)]
  except ValueError as error:
    raise ValueError(
      f"env.prompt_file: {place}: {error}; a brace itself is written twice"
    ) from None
  for field in fields:
    if field is not None and field not in FIELDS:
      raise ValueError(
        f"env.prompt_file: {place}: unknown field {field!r}"
        f"{keys.nearest(field, FIELDS)}"
      )
  if all(field is None for field in fields):
    raise ValueError(f"env.prompt_file: {place}: holds no field at all")


def write_history(
  view: prompts.View, show: Callable[[str, int], str] = lambda text, turn: text
) -> str:
  """The last turns as `[Observation 3: '...', Action 3: '...']`, one per line.

  Args:
    view: the contents of the prompt.
    show: formats the observation of a turn for the history.
  """
  first = view.turn - len(view.memory)
  return "\n".join(
    f"[Observation {turn}: '{show(seen, turn)}', Action {turn}: '{done}']"
    for turn, (seen, done) in enumerate(view.memory, first)
  )
