"""Exact match and F1, the scores of open-domain question answering.

Only the model's own answer block is scored. Extracting an answer from the whole
history would also match what the search returned.
"""

import collections
from collections.abc import Sequence
import re
import string

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
  """Lower case, no punctuation, no articles, single spaces (as in SQuAD)."""
  bare = text.lower().translate(_PUNCTUATION)
  return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(answer: str, targets: Sequence[str]) -> bool:
  """Whether the normalised answer equals one of the normalised targets."""
  given = normalize(answer)
  return bool(given) and any(given == normalize(text) for text in targets)


def f1(answer: str, targets: Sequence[str]) -> float:
  """Word overlap with the best-matching target (as in SQuAD).

  The harmonic mean of precision and recall over the words of the normalised
  answer and target, each word counted as often as it occurs in both.

  Returns:
    From 0 to 1; 0 for an answer without words.
  """
  given = collections.Counter(normalize(answer).split())
  best = 0.0
  for target in targets:
    wanted = collections.Counter(normalize(target).split())
    shared = (given & wanted).total()
    if shared:
      best = max(best, 2.0 * shared / (given.total() + wanted.total()))
  return best
