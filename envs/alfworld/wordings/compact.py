"""The compact wording: few words, for tiny models trained from scratch.

Observations lose their filler words, and a thought is a short form of the
command it leads to, so that each word of the agent copies or continues
something in the prompt. Every word follows a space and no tag does; with the
tags as tokens of their own, a word is always the same token.
"""

from collections.abc import Sequence
import re

from t2po_jax.envs import prompts

NO_ACTION: str = "No action found."
AGAIN: str = "again"
SEPARATOR: str = ""
CLOSING: str = "</think><action>"

_FILLER = frozenset(
  (
    "a an and are arrive at at from is it its looking next on quickly room"
    " see some the there this to using with you your"
  ).split()
)
_MIDDLE = "You are in the middle of a room."


def look(seen: Sequence[str]) -> str:
  """What could be taken or used here, listed before a plan is made.

  Whether the object of the task is in the list is then decided by two adjacent
  words.
  """
  return f"{' '.join(seen) or 'nothing'} ."


def plan(aim: str, thing: str, command: str) -> str:
  """The thought behind a command, e.g. "find mug take 1 desk 1 .".

  The object comes first, so that the verb is chosen after it has been named.
  """
  words = _strip(command).removeprefix(f"{aim} ")
  return f"{aim} {thing} {words.replace(f'{thing} ', '')} ."


def _strip(text: str) -> str:
  """Text in lower case without punctuation and filler words."""
  words = re.findall(r"[a-z0-9]+", text.lower())
  return " ".join(word for word in words if word not in _FILLER)


def think(thought: str) -> str:
  """A thinking segment."""
  return f"<think> {thought}</think>"


def act(command: str) -> str:
  """An action as the agent writes it."""
  return f"<action> {command}</action>"


def observe(text: str) -> str:
  """An observation in few words; the actions list the room anyway."""
  if text.startswith(_MIDDLE):
    return "start ."
  # What is then seen repeats the arriving and opening.
  text = re.sub(r"^You (?:arrive at|open the) [^.]*\. (?=.)", "", text)
  return f"{_strip(text)} ."


def render(view: prompts.View) -> list[prompts.Message]:
  """The task, past observations and actions, and the admissible actions."""
  parts = [f"task {view.task} ."]
  for observation, done in view.memory:
    parts.append(f" {observe(observation)}{act(done)}")
  actions = " ; ".join(view.admissible)
  parts.append(f" {observe(view.observation)} : {actions}")
  return [{"role": "user", "content": "".join(parts)}]
