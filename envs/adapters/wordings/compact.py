"""The compact wording: few words, for tiny models trained from scratch."""

from t2po_jax.envs import prompts

CLOSING = "</think><action>"


def render(view: prompts.View) -> list[prompts.Message]:
  """The last actions and the observation; a tiny model learns the rules."""
  parts = [f"did {done or 'nothing'}" for _, done in view.memory]
  parts.append(view.observation)
  return [{"role": "user", "content": " ".join(parts)}]
