"""Control tokens in chats: only from the template, never from messages.

A chat template writes control tokens by name into one text, and a tokenizer
that reads this text cannot distinguish markup from a page that quotes it: a
passage that contains `<|im_start|>system` would speak as the system. So the
names are replaced while they can still be distinguished. In the messages, every
name is quoted before the template runs. In the rendered text, all remaining
names are markup; they become marks that cannot be guessed, and quotations
become what they were. A copy of the tokenizer knows control tokens only by
their marks, even where its model could assemble a name from pieces. Everything
else, including spaces at boundaries, is left to the tokenizer: for messages
that quote no names, the ids are exactly those of the tokenizer itself.

Markup means all special tokens of the vocabulary, and other added tokens that
the chat template writes (`<tool_response>`), except the two of a thought: these
occur in instructions, and ending a thought gives no authority.
"""

import functools
import json
import re
import secrets
from typing import Any

import tokenizers

_THOUGHT = ("<think>", "</think>")


class Markup:
  """The control tokens of a tokenizer and of a chat template."""

  def __init__(self, backend: tokenizers.Tokenizer, template: str) -> None:
    """Reads a tokenizer.

    Args:
      backend: the tokenizer.
      template: its chat template, or an empty text.
    """
    described = json.loads(backend.to_str())
    added = described["added_tokens"]
    # Random in every process, so that no text contains it.
    nonce = secrets.token_hex(8)
    special = [token["content"] for token in added if token["special"]]
    written = [
      token["content"]
      for token in added
      if not token["special"]
      and token["content"].strip()
      and token["content"] in template
      and token["content"] not in _THOUGHT
    ]
    names = special + written
    self._marks = {
      name: f"\ue000{nonce}m{i}\ue001" for i, name in enumerate(names)
    }
    self._quotes = {
      name: f"\ue000{nonce}q{i}\ue001" for i, name in enumerate(names)
    }
    self.placeholder = f"\ue000{nonce}p\ue001"
    self._named = _any_of(self._marks)
    self._special = _any_of(special)
    self._quoted = re.compile(f"\ue000{nonce}q(\\d+)\ue001")
    self._names = names
    self._chat = tokenizers.Tokenizer.from_str(
      json.dumps(_rename(described, self._marks))
    )
    of_special = {name: self._marks[name] for name in special}
    self._text = tokenizers.Tokenizer.from_str(
      json.dumps(_without_prefix_space(_rename(described, of_special)))
    )

  def encode_text(self, text: str) -> list[int]:
    """Ids of text without a space before it; names of special tokens are text.

    Added tokens that are not special are read: a policy may write them.
    """
    return self._text.encode(text, add_special_tokens=False).ids

  def quote(self, text: str, *, own: bool = False) -> str:
    """The text of a message, with the names of markup quoted.

    Args:
      text: the text.
      own: whether the policy wrote it, which may write added tokens that are
        not special, such as `<tool_call>`.
    """
    pattern = self._special if own else self._named
    return pattern.sub(lambda match: self._quotes[match[0]], text)

  def encode_rendered(self, text: str) -> list[int]:
    """Ids of a rendered chat whose messages were quoted."""
    text = self._named.sub(lambda match: self._marks[match[0]], text)
    text = self._quoted.sub(lambda match: self._names[int(match[1])], text)
    return self._chat.encode(text, add_special_tokens=False).ids


def _any_of(names: Any) -> re.Pattern[str]:
  """Any of some strings, the longest first; nothing if there are none."""
  longest_first = sorted(names, key=len, reverse=True)
  return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _rename(described: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
  """A tokenizer's description in which some tokens have other names."""
  rename = functools.partial(_renamed, names)
  model = dict(described["model"])
  vocab = model["vocab"]
  if isinstance(vocab, dict):
    model["vocab"] = {rename(piece): index for piece, index in vocab.items()}
  else:
    model["vocab"] = [[rename(piece), score] for piece, score in vocab]
  if isinstance(model.get("unk_token"), str):
    model["unk_token"] = rename(model["unk_token"])
  if "merges" in model:
    # Pieces that could be merged into a renamed one stay separate.
    model["merges"] = [
      merge for merge in model["merges"] if not _makes(merge, names)
    ]
  return described | {
    "model": model,
    "added_tokens": [
      {**token, "content": rename(token["content"])}
      for token in described["added_tokens"]
    ],
    "post_processor": None,
    "truncation": None,
    "padding": None,
  }


def _renamed(names: dict[str, str], piece: str) -> str:
  return names.get(piece, piece)


def _makes(merge: str | list[str], names: dict[str, str]) -> bool:
  """Whether a merge reads or writes one of some pieces."""
  left, right = merge.split(" ") if isinstance(merge, str) else merge
  return bool({left, right, left + right} & names.keys())


def _without_prefix_space(described: dict[str, Any]) -> dict[str, Any]:
  """A tokenizer's description that puts no space before the text."""

  def clean(part: Any) -> Any:
    if isinstance(part, list):
      return [clean(each) for each in part if clean(each) is not None]
    if not isinstance(part, dict):
      return part
    if part.get("type") == "Prepend":
      return None
    part = {key: clean(value) for key, value in part.items()}
    if part.get("type") == "Metaspace":
      part["prepend_scheme"] = "never"
    if part.get("type") == "ByteLevel":
      part["add_prefix_space"] = False
    return part

  stages = ("normalizer", "pre_tokenizer")
  return described | {stage: clean(described[stage]) for stage in stages}
