"""The format of the published experiments, in our own words.

The request, then the number of turns played and the history, the page, and the
actions, each in quotes with a comma, one per line. The nodes of a page are in
quotes between [SEP], none of them shortened. Everything that is not a prompt is
worded as in `full`.
"""

from t2po_jax.envs import prompts, templates
from t2po_jax.envs.webshop import pages
from t2po_jax.envs.webshop import session as sessions

_ANSWER = """\
Possible actions now:
[
{available_actions}
].

Decide on your next action. First reason inside <think> </think>, step by \
step. Then give one of the possible actions inside <action> </action>."""

FIRST = f"""\
You are an agent that shops in the online store WebShop.
Your task is to: {{task_description}}.
You observe: {{current_observation}}.
{_ANSWER}"""

LATER = f"""\
You are an agent that shops in the online store WebShop.
Your task is to: {{task_description}}.
You have taken {{step_count}} step(s) before this one. These are the last \
{{history_length}} observations, with the actions you took: {{action_history}}
This is step {{current_step}}, and you observe: {{current_observation}}.
{_ANSWER}"""


def page(visit: sessions.Session) -> str:
  """The current page, node by node."""
  return pages.SEPARATOR.join(f"'{node}'" for node in visit.page.nodes)


def _actions(view: prompts.View) -> str:
  return "\n".join(
    f"'{action.replace('<words>', '<your query>')}',"
    for action in view.admissible
  )


FORM = templates.Form(templates.write_history, _actions)
