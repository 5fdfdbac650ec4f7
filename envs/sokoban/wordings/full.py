"""The full wording: an instruction prompt for pretrained language models."""

from collections.abc import Sequence

from t2po_jax.envs import prompts
from t2po_jax.envs.sokoban import engine

TASK = "Push every box onto a goal."
CLOSING = "</think>\n<action>"
AGAIN = "Let me go through this again."

_INSTRUCTION = """\
You play Sokoban. {task} You walk one cell up, down, left or right; walking \
into a box pushes it one cell further, if nothing stands behind it. You can \
never pull a box, so do not push one into a corner that is no goal.

# wall, . floor, o goal, x box, * box on a goal, @ you, + you on a goal

{history}This is move {turn} of {max_turns}. The level now:
{observation}

Moves that change something: {actions}.

First think inside <think> and </think>: which box has to go where, and from \
which cell do you push it? Then write exactly one of up, down, left, right \
inside <action> and </action>, and nothing after it."""


def show(level: engine.Level, state: engine.State) -> str:
  """The level as a picture."""
  return "\n".join(" ".join(row) for row in engine.draw(level, state))


def plan(push: tuple[engine.Cell, str] | None, direction: str) -> str:
  """The thought behind a move."""
  if push is None:
    return f"I go {direction}."
  (row, column), way = push
  return (
    f"I have to push {way} from row {row}, column {column}. So I go "
    f"{direction}."
  )


def respond(thoughts: Sequence[str], direction: str) -> str:
  """A well-formed response."""
  words = " ".join(thoughts)
  return f"<think>{words}</think>\n<action>{direction}</action>"


def render(view: prompts.View) -> list[prompts.Message]:
  """The rules, the last moves, the picture."""
  first = view.turn - len(view.memory)
  lines = [
    f"Move {first + index}: {done or 'none'}"
    for index, (_, done) in enumerate(view.memory)
  ]
  content = _INSTRUCTION.format(
    task=view.task,
    history="\n".join(lines) + "\n\n" if lines else "",
    turn=view.turn,
    max_turns=view.max_turns,
    observation=view.observation,
    actions=", ".join(view.admissible) or "none",
  )
  return [{"role": "user", "content": content}]
