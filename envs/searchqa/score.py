"""Exact match, the score of open-domain question answering.

Only the text of the model's own answer block is judged. Reading an answer
out of the whole history would also find what the search returned.
"""

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
