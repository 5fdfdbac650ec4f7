"""The format of the published experiments, in our own words.

At the first turn the engine's whole opening, including the task, and the list
of commands; later the task, the number of turns played, the history, and the
same list. Commands are in quotes, one per line. Everything that is not a prompt
is worded as in `full`.
"""

from t2po_jax.envs import prompts, templates
from t2po_jax.envs.alfworld import engine

_ANSWER = """\
Possible commands now: [{admissible_actions}].

Decide on your next command. First reason inside <think> </think>, step by \
step. Then give one of the possible commands inside <action> </action>."""

FIRST = f"""\
You are an agent in a simulated household, as in ALFRED.
You observe: {{current_observation}}
{_ANSWER}"""

LATER = f"""\
You are an agent in a simulated household, as in ALFRED. \
Your task is to: {{task_description}}
You have taken {{step_count}} step(s) before this one. These are the last \
{{history_length}} observations, with the actions you took: {{action_history}}
This is step {{current_step}}, and you observe: {{current_observation}}
{_ANSWER}"""


def _opening(task: str, text: str, turn: int) -> str:
  """An observation; the first one as the engine gives it."""
  if turn > 1:
    return text
  return f"{engine.BANNER}\n\n{text}\n\n{engine.TASK_PREFIX}{task}."


def _observation(view: prompts.View) -> str:
  return _opening(view.task, view.observation, view.turn)


def _history(view: prompts.View) -> str:
  return templates.write_history(
    view, lambda text, turn: _opening(view.task, text, turn)
  )


def _actions(view: prompts.View) -> str:
  return "\n ".join(f"'{command}'" for command in view.admissible)


FORM = templates.Form(_history, _actions, _observation)
