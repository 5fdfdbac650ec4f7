"""The format of the published experiments, in our own words.

The question, then for every turn so far `Step n:`, the query or answer with its
tags, and the result. Everything that is not a prompt is worded as in `full`.
"""

from t2po_jax.envs import prompts, templates

_ANSWER = """\
Whenever something new is known, reason inside <think> </think>. Where a fact \
is missing, write <search> query </search>: the engine's passages come back \
inside <information> </information>, and there is no limit on searches. Where \
none is missing, write the bare answer, as in <answer> Lisbon </answer>."""

FIRST = f"""\
You answer a question step by step with the help of a search engine.
Question: {{task_description}}

{_ANSWER}"""

LATER = f"""\
You answer a question step by step with the help of a search engine.
Question: {{task_description}}

You have taken {{step_count}} step(s) before this one. What you did and what \
came back:
{{memory_context}}

{_ANSWER}"""


def _history(view: prompts.View) -> str:
  """Each action with its result, which is the next observation."""
  first = view.turn - len(view.memory)
  seen = [observation for observation, _ in view.memory[1:]]
  answers = [*seen, view.observation]
  return "\n".join(
    f"Step {turn}:{done} {answer}\n"
    for turn, ((_, done), answer) in enumerate(
      zip(view.memory, answers, strict=False), first
    )
  )


FORM = templates.Form(_history, lambda view: "")
