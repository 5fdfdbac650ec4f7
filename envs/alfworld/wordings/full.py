"""The full wording: an instruction prompt for pretrained language models."""

from collections.abc import Sequence

from t2po_jax.envs import prompts

NO_ACTION: str = (
  "Your response held no action. After your thoughts write exactly one "
  "<action>...</action>."
)
AGAIN: str = "Let me go through this again."
SEPARATOR: str = "\n"
CLOSING: str = "</think>\n<action>"

_REASONS = {
  "find": "I still have to find a {thing}.",
  "clean": "I hold the {thing} and have to clean it.",
  "heat": "I hold the {thing} and have to heat it.",
  "cool": "I hold the {thing} and have to cool it.",
  "put": "I hold the {thing} and have to bring it to its place.",
  "light": "I hold the {thing} and have to find the lamp.",
  "drop": "I hold the {thing}, which is of no use here.",
}

_INSTRUCTION = """\
You do housework in a simulated home, described to you in text. You act by \
text commands, one per turn.

Your task: {task}.

{history}This is turn {turn} of {max_turns}. What you see now:
{observation}

You can do one of these:
{actions}

First think inside <think> and </think>: what have you done, what is still \
missing, and which command brings you closer? Then copy exactly one command \
from the list into <action> and </action>, and write nothing after it."""


def look(seen: Sequence[str]) -> str:
  """What could be taken or used here, as a sentence."""
  return f"I see {', '.join(seen) or 'nothing'} here."


def plan(aim: str, thing: str, command: str) -> str:
  """The thought behind a command, as two sentences."""
  return f"{_REASONS[aim].format(thing=thing)} So I {command}."


def think(thought: str) -> str:
  """A thinking segment."""
  return f"<think>{thought}</think>"


def act(command: str) -> str:
  """An action as the agent writes it."""
  return f"<action>{command}</action>"


def render(view: prompts.View) -> list[prompts.Message]:
  """The instruction with the last turns and the admissible actions."""
  content = _INSTRUCTION.format(
    task=view.task,
    history=prompts.history(view),
    turn=view.turn,
    max_turns=view.max_turns,
    observation=view.observation,
    actions="\n".join(f"- {command}" for command in view.admissible),
  )
  return [{"role": "user", "content": content}]
