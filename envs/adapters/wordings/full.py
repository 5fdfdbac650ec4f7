"""The full wording: an instruction prompt for pretrained language models."""

from t2po_jax.envs import prompts

CLOSING = "</think>\n<action>"

_INSTRUCTION = """\
{task}

{history}This is turn {turn} of {max_turns}. What you see now:
{observation}

{actions}First think inside <think> and </think>. Then write exactly one \
action inside <action> and </action>, and nothing after it."""


def render(view: prompts.View) -> list[prompts.Message]:
  """The rules, the last turns, the observation, the admissible actions."""
  actions = "Possible actions: " + ", ".join(view.admissible) + "\n\n"
  content = _INSTRUCTION.format(
    task=view.task,
    history=prompts.history(view),
    turn=view.turn,
    max_turns=view.max_turns,
    observation=view.observation,
    actions=actions if view.admissible else "",
  )
  return [{"role": "user", "content": content}]
