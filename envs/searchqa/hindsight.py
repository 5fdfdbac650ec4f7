"""Demonstrations for real questions, made from their known answers.

Real question sets have answers but no solutions. This expert searches for the
question itself, looks for a known answer in the passages, quotes the sentence
that contains it and answers; if the first search does not show it, it searches
once more, about the top-ranked passage, and then gives up. It teaches the
format of a response and to answer from what was read, but nothing about hard
questions: use it for a short cold start of a pretrained model, on training
questions only, and leave out the episodes in which it gave up
(`cold_start.only_successes`).
"""

from collections.abc import Sequence
import re
from typing import Any

from t2po_jax.envs.searchqa import retrieval, score

SEARCHES = 2
# A quotation is truncated to this many characters.
QUOTE = 160
# Answers that any passage may hold by chance.
_UNQUOTABLE = ("yes", "no")


class HindsightExpert:
  """Answers one real question; see `envs.base.Expert`."""

  def __init__(
    self,
    question: str,
    targets: Sequence[str],
    shown: list[retrieval.Passage],
    wording: Any,
  ) -> None:
    """Binds the expert to the current episode.

    Args:
      question: the question.
      targets: its accepted answers.
      shown: passages shown so far; the episode appends to it.
      wording: the module that words the episode.
    """
    self._question = question
    self._targets = targets
    self._shown = shown
    self._wording = wording
    self._searches = 0

  def respond(self) -> str:
    """The response to the episode's current state."""
    for target in self._targets:
      for passage in self._shown:
        sentence = find_sentence(passage.text, target)
        if sentence:
          thought = f'{passage.title}: "{sentence}" That is the answer.'
          return self._compose(thought, "answer", target)
    self._searches += 1
    if self._searches == 1:
      return self._compose(
        "I do not know this yet, so I search for it.", "search", self._question
      )
    if self._searches <= SEARCHES and self._shown:
      title = self._shown[0].title
      thought = f"The answer is not there. {title} may help."
      return self._compose(thought, "search", f"{title} {self._question}")
    return self._compose("The passages do not say it.", "answer", "unknown")

  def _compose(self, thought: str, kind: str, content: str) -> str:
    wording = self._wording
    return (
      wording.think(thought) + wording.SEPARATOR + wording.action(kind, content)
    )


def find_sentence(text: str, target: str) -> str:
  """The first sentence that contains the target word for word, else empty.

  A yes or no is never found: such an answer cannot be quoted.
  """
  normal = score.normalize(target)
  if not normal or normal in _UNQUOTABLE:
    return ""
  wanted = f" {normal} "
  for sentence in re.split(r"(?<=[.!?])\s+", text):
    if wanted in f" {score.normalize(sentence)} ":
      return sentence[:QUOTE].strip()
  return ""
