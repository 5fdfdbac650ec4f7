"""Players without a model: the scripted expert and a random policy.

They put scores into perspective: what is achievable, and what chance gives.
"""

import random

from t2po_jax.envs import base, prompts
from t2po_jax.judging import dialogues

# The most words of a random query or answer.
_WORDS = 3


class Expert:
  """The environment's scripted expert."""

  def __init__(self, seed: int = 0) -> None:
    self._seed = seed

  def begin(self, env: base.Env, place: dialogues.Place) -> dialogues.Respond:
    """See `dialogues.Player`.

    Raises:
      ValueError: if the data contains no solution.
    """
    try:
      expert = env.expert(_seed(self._seed, place))
    except NotImplementedError as error:
      raise ValueError(str(error)) from None
    return lambda messages, observation, state: dialogues.Reply(
      expert.respond()
    )


class Random:
  """Chooses a random admissible action, or random words of the observation.

  Every response follows the grammar, so that only the choice is evaluated.
  """

  def __init__(self, grammar: prompts.Grammar, seed: int = 0) -> None:
    self._grammar = grammar
    self._seed = seed

  def begin(self, env: base.Env, place: dialogues.Place) -> dialogues.Respond:
    """See `dialogues.Player`."""
    del env
    chance = random.Random(_seed(self._seed, place))

    def respond(
      messages: list[prompts.Message],
      observation: base.Observation,
      state: object,
    ) -> dialogues.Reply:
      del messages, state
      kind = chance.choice(self._grammar.actions)
      words = f"{observation.task} {observation.text}".split()
      count = chance.randint(1, _WORDS)
      words_drawn = " ".join(
        chance.choice(words or ["a"]) for _ in range(count)
      )
      content = words_drawn
      if observation.admissible:
        content = chance.choice(observation.admissible)
        # A form to fill in, such as `search[<words>]`.
        content = content.replace("<words>", words_drawn)
      return dialogues.Reply(f"<think></think><{kind}>{content}</{kind}>")

    return respond


def _seed(seed: int, place: dialogues.Place) -> int:
  """A separate seed for every episode."""
  return seed * 1_000_003 + place.repeat * 10_007 + place.number
