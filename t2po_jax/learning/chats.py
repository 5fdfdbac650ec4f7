"""User-supplied demonstrations: chats, one JSON object per line.

  {"messages": [{"role": "user", "content": "..."},
                {"role": "assistant", "content": "..."}, ...]}

Every message of the assistant is one training example, given all messages
before it in the model's chat template.
"""

from collections.abc import Sequence
import json
import os
import pathlib

import numpy as np

from t2po_jax.models import tokenizer as tokenizer_lib

Pair = tuple[np.ndarray, np.ndarray]


def read_pairs(
  path: str | os.PathLike,
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  max_length: int,
) -> list[Pair]:
  """Reads a file of chats.

  Args:
    path: a JSON Lines file; empty lines are skipped.
    tokenizer: of the model to train.
    max_length: the most tokens of a prompt and its response.

  Returns:
    (prompt ids [T], response ids [T]) of every message of the assistant, in
    order; a response ends with the end-of-sequence token.

  Raises:
    ValueError: naming file and line, if a line is not a valid chat or is too
      long, or if the file has no message of the assistant.
    OSError: if the file cannot be read.
  """
  path, pairs = pathlib.Path(path), []
  with path.open(encoding="utf-8") as lines:
    for number, line in enumerate(lines, 1):
      if line.strip():
        messages = _parse(line, f"{path}, line {number}")
        pairs += _pairs(
          messages, tokenizer, max_length, f"{path}, line {number}"
        )
  if not pairs:
    raise ValueError(f"{path}: found no message of the assistant to learn from")
  return pairs


def _parse(line: str, place: str) -> list[tokenizer_lib.Message]:
  """Parses and checks the messages of one line."""
  try:
    messages = json.loads(line)["messages"]
  except (ValueError, KeyError, TypeError):
    raise ValueError(
      f'{place}: expected a JSON object with a list "messages"'
    ) from None
  if not isinstance(messages, list) or not messages:
    raise ValueError(f'{place}: "messages" is not a list with an entry')
  for message in messages:
    texts = [
      isinstance(message, dict) and message.get(key)
      for key in ("role", "content")
    ]
    if not isinstance(texts[0], str) or not isinstance(texts[1], str):
      raise ValueError(
        f'{place}: a message is {message!r:.60}; expected "role" and '
        '"content" with texts'
      )
    if texts[0] not in tokenizer_lib.ROLES:
      raise ValueError(
        f"{place}: role is {texts[0]!r}, expected one of "
        f"{', '.join(tokenizer_lib.ROLES)}"
      )
  return messages


def _pairs(
  messages: Sequence[tokenizer_lib.Message],
  tokenizer: tokenizer_lib.Tokenizer,
  max_length: int,
  place: str,
) -> list[Pair]:
  """The training examples of one chat."""
  pairs = []
  for turn, message in enumerate(messages):
    if message["role"] != "assistant":
      continue
    if not turn:
      raise ValueError(f"{place}: begins with a message of the assistant")
    try:
      prompt = tokenizer.render_chat(messages[:turn])
    except Exception as error:  # Templates raise errors of any kind.
      reason = " ".join(str(error).split())
      raise ValueError(f"{place}: the chat template says: {reason}") from None
    response = [*tokenizer.encode(message["content"]), tokenizer.eos_ids[0]]
    if len(prompt) + len(response) > max_length:
      raise ValueError(
        f"{place}: message {turn + 1} has {len(prompt)} + {len(response)} "
        f"tokens; train.row_tokens is {max_length}"
      )
    pairs.append((np.asarray(prompt, np.int32), np.asarray(response, np.int32)))
  return pairs
