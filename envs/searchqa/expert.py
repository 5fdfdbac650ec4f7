"""A scripted searcher of the embedded world, with bad habits to unlearn.

Its thought is one line: the facts found since its last turn, then the missing
fact, for which it searches. Every fact that a passage has shown counts, so
without noise it needs as few turns as the retrieval allows. Three knobs degrade
it. `hesitation` makes it repeat its line word for word before it acts; the
repetition carries no information, and is what a thinking intervention should
cut. `doubt` makes it lose the thread in such a round and act on a wrong entity:
this hesitation costs success, and any reinforcement learning removes it. `slip`
makes it go wrong however long it has thought: then hesitation only costs
tokens, and the return does not discourage it. A policy cloned from the degraded
expert hesitates and fails in the same way.
"""

import random
from typing import Any

from t2po_jax.envs.searchqa import world as world_lib

# The most needless rounds per turn, so that responses stay bounded.
MAX_ROUNDS = 5


class ScriptedExpert:
  """Answers questions of the embedded world; see `envs.base.Expert`."""

  def __init__(
    self,
    world: world_lib.World,
    question: world_lib.Question,
    shown: list[str],
    wording: Any,
    *,
    hesitation: float,
    doubt: float,
    slip: float,
    seed: int,
  ) -> None:
    """Binds the expert to the current episode.

    Args:
      world: the world that the question is about.
      question: the question of the episode.
      shown: ids of the passages shown so far; the episode appends to it.
      wording: the module that words the episode.
      hesitation: mean number of needless rounds per turn, >= 0; the number
        is geometric, truncated at `MAX_ROUNDS`.
      doubt: probability per needless round of an error, in [0, 1].
      slip: probability per turn of an error in its last line, in [0, 1].
      seed: seed of the expert's draws.
    """
    self._world = world
    self._question = question
    self._shown = shown
    self._wording = wording
    self._hesitation = hesitation
    self._doubt = doubt
    self._slip = slip
    self._random = random.Random(seed)
    self._stated = 0

  def respond(self) -> str:
    """The response to the episode's current state."""
    question, wording = self._question, self._wording
    known = self._count_known()
    first = min(self._stated, max(known - 1, 0))
    facts = [
      wording.state(
        question.path[hop], question.relations[hop], question.path[hop + 1]
      )
      for hop in range(first, known)
    ]
    self._stated = known
    entity = question.path[known]
    relation = question.relations[min(known, question.hops - 1)]
    complete = known == question.hops
    line = facts if complete else [*facts, wording.plan(entity, relation)]
    thought = list(line)
    continued = self._hesitation / (1.0 + self._hesitation)
    for _ in range(MAX_ROUNDS):
      if self._random.random() >= continued:
        break
      thought.append(wording.AGAIN)
      if self._random.random() < self._doubt:
        derailed, act = self._derail(known)
        thought.extend((*line[:-1], derailed))
        return self._compose(thought, *act)
      thought.extend(line)
    if self._random.random() < self._slip:
      thought[-1], act = self._derail(known)
      return self._compose(thought, *act)
    if complete:
      return self._compose(thought, "answer", wording.name(entity))
    return self._compose(thought, "search", wording.query(entity, relation))

  def _count_known(self) -> int:
    """Number of hops whose facts are in the passages shown so far."""
    known = 0
    for entity in self._question.path[:-1]:
      if entity not in self._shown:
        break
      known += 1
    return known

  def _derail(self, known: int) -> tuple[str, tuple[str, str]]:
    """A wrong last sentence, and the action that follows from it.

    With equal probability, either a fact with a wrong value that is taken for
    the answer, or a search for a wrong entity.
    """
    question, wording = self._question, self._wording
    hop = min(known, question.hops - 1)
    relation = question.relations[hop]
    if self._random.random() < 0.5:
      value = self._confuse(question.path[hop + 1])
      sentence = wording.state(question.path[hop], relation, value)
      return sentence, ("answer", wording.name(value))
    entity = self._confuse(question.path[hop])
    return wording.plan(entity, relation), (
      "search",
      wording.query(entity, relation),
    )

  def _confuse(self, entity: str) -> str:
    """Another entity of the same kind, from the passages if possible."""
    world = self._world
    seen = [
      name
      for shown in self._shown
      for name in (shown, *world.facts[shown].values())
    ]
    for names in (seen, world.kinds):
      others = [
        name
        for name in names
        if world.kinds[name] == world.kinds[entity]
        and name not in self._question.path
      ]
      if others:
        return self._random.choice(others)
    return self._question.start

  def _compose(self, thought: list[str], kind: str, content: str) -> str:
    """The words of a response."""
    wording = self._wording
    segment = wording.think(" ".join(thought))
    return segment + wording.SEPARATOR + wording.action(kind, content)
