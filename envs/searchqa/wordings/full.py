"""The full wording: an instruction prompt for pretrained language models."""

from collections.abc import Sequence

from t2po_jax.envs import prompts
from t2po_jax.envs.searchqa import retrieval

NOTHING = "The search found no passage. Try other words."
INVALID = (
  "Your response was not understood. After your thoughts write exactly one "
  "<search>...</search> or one <answer>...</answer>."
)
OVER = "The episode is over."
AGAIN = "Let me go through this again."
SEPARATOR = "\n"

_SENTENCES = {
  "birthplace": "{entity} was born in {value}.",
  "spouse": "{entity} is married to {value}.",
  "teacher": "{entity} was a student of the teacher {value}.",
  "region": "{entity} lies in the region {value}.",
  "mayor": "The mayor of {entity} is {value}.",
  "founder": "The founder of {entity} was {value}.",
  "author": "The author of {entity} is {value}.",
  "setting": "The setting of {entity} is {value}.",
  "hero": "The hero of {entity} is {value}.",
  "capital": "The capital of {entity} is {value}.",
  "ruler": "The ruler of {entity} is {value}.",
  "rival": "The rival of {entity} is {value}.",
}
_THINGS = ("birthplace", "region", "setting", "capital", "rival")

_INSTRUCTION = """\
Find the answer to a question with the help of a search engine.

Question: {task}

Every response has two parts. First think between <think> and </think>: what \
is known already, and what is still missing? Then do exactly one of these, \
and write nothing after it:
- To search, write a query between <search> and </search>. The passages that \
fit it best are then shown between <information> and </information>.
- To end the task, write the answer between <answer> and </answer>, the \
answer alone and in as few words as possible.

{history}This is turn {turn} of {max_turns}. {order}"""


def name(entity: str) -> str:
  """The name of an entity as it is written in a text."""
  return entity.capitalize()


def ask(start: str, relations: Sequence[str]) -> str:
  """The question for a chain of relations."""
  word = "What" if relations[-1] in _THINGS else "Who"
  chain = " of ".join(f"the {relation}" for relation in reversed(relations))
  return f"{word} is {chain} of {name(start)}?"


def state(entity: str, relation: str, value: str) -> str:
  """One fact as a sentence, in passages and thoughts alike."""
  return _SENTENCES[relation].format(entity=name(entity), value=name(value))


def plan(entity: str, relation: str) -> str:
  """The thought that a fact is still missing."""
  return f"I need to find the {relation} of {name(entity)}."


def query(entity: str, relation: str) -> str:
  """The search for a fact."""
  return f"{relation} of {name(entity)}"


def action(kind: str, content: str) -> str:
  """An action as the agent writes it."""
  return f"<{kind}>{content}</{kind}>"


def think(thought: str) -> str:
  """A thinking segment."""
  return f"<think>{thought}</think>"


def show(passages: Sequence[retrieval.Passage]) -> str:
  """The results of a search."""
  if not passages:
    return NOTHING
  lines = [
    f"Doc {rank}: {passage.title}\n{passage.text}"
    for rank, passage in enumerate(passages, 1)
  ]
  return "\n".join(("<information>", *lines, "</information>"))


def render(view: prompts.View) -> list[prompts.Message]:
  """The instruction, actions and observations so far, and the turn count."""
  lines = []
  first = view.turn - len(view.memory)
  for index, (observation, done) in enumerate(view.memory):
    if observation != view.task:
      lines.append(observation)
    lines.append(f"Your action at turn {first + index}: {done or 'none'}")
  if view.turn > 1:
    lines.append(view.observation)
  history = "What happened so far:\n" + "\n".join(lines) + "\n\n"
  last = view.turn == view.max_turns
  content = _INSTRUCTION.format(
    task=view.task,
    history=history if lines else "",
    turn=view.turn,
    max_turns=view.max_turns,
    order="You must answer now." if last else "What do you do next?",
  )
  return [{"role": "user", "content": content}]
