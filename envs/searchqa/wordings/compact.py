"""The compact wording: few words, for tiny models trained from scratch.

Every sentence has the form "entity relation value", and questions and queries
are its beginning, so that each step of the agent continues or copies something
that is in the prompt. Every word follows a space and no tag does; with the
tags as tokens of their own, a word is always the same token.
"""

from collections.abc import Sequence

from t2po_jax.envs import prompts
from t2po_jax.envs.searchqa import retrieval

NOTHING = "nothing ."
INVALID = "invalid ."
OVER = "over ."
AGAIN = "again"
SEPARATOR = ""


def name(entity: str) -> str:
  """The name of an entity as it is written in a text."""
  return entity


def ask(start: str, relations: Sequence[str]) -> str:
  """The question for a chain of relations, e.g. "mira spouse teacher ?"."""
  return f"{start} {' '.join(relations)} ?"


def state(entity: str, relation: str, value: str) -> str:
  """One fact as a sentence, in passages and thoughts alike."""
  return f"{entity} {relation} {value} ."


def plan(entity: str, relation: str) -> str:
  """The thought that a fact is still missing."""
  return f"{entity} {relation} ?"


def query(entity: str, relation: str) -> str:
  """The search for a fact."""
  return f"{entity} {relation}"


def action(kind: str, content: str) -> str:
  """An action as the agent writes it."""
  return f"<{kind}> {content}</{kind}>"


def think(thought: str) -> str:
  """A thinking segment."""
  return f"<think> {thought}</think>"


def show(passages: Sequence[retrieval.Passage]) -> str:
  """The results of a search."""
  return " ".join(passage.text for passage in passages) or NOTHING


def render(view: prompts.View) -> list[prompts.Message]:
  """The question, then actions and observations, and nothing else."""
  parts = [f"Q {view.task}"]
  for observation, done in view.memory:
    if observation != view.task:
      parts.append(f" {observation}")
    parts.append(done)
  if view.turn > 1:
    parts.append(f" {view.observation}")
  return [{"role": "user", "content": "".join(parts)}]
