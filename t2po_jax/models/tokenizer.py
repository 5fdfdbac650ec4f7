"""Text <-> token ids, and chat messages -> prompts.

Two tokenizers behind one small interface: those of Hugging Face checkpoints
with their chat template, and SentencePiece models for policies that are
trained here from nothing. Both decode by concatenating the bytes that each
id stands for (`token_bytes`), so stop strings, forced strings and decoded
text always agree.

What a message says is never more than text: the names of control tokens in
pages, observations and data are spelled out, and only the markup of the chat
template becomes control tokens; see `markup`.

A tokenizer trained here holds whole words, names and numbers of its corpus,
each with and without the space before it as the corpus has them, then
characters and fragments, and single bytes below that: a tiny model copies a
name by emitting one token, and any text can still be encoded.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
import functools
import io
import json
import os
import pathlib
import re
from typing import Any, Protocol

import jinja2
import sentencepiece
import tokenizers

# Its advice to install PyTorch is of no use here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
import transformers

from t2po_jax.models import gguf_tokenizer, markup, sources

Message = dict[str, str]

SENTENCEPIECE_FILE = "sentencepiece.model"
SPACE = "▁"
ROLES = ("system", "user", "assistant")

# `SentencePieceTokenizer.render_chat`, for `transformers`.
_CHAT_TEMPLATE = (
  "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
  "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# A word, number or punctuation mark with the space before it.
_SURFACE = re.compile(r" ?\w+| ?[^\w\s]|\s")


class Tokenizer(Protocol):
  """What the rest of the code needs of a tokenizer.

  Attributes:
    vocab_size: number of ids; a model's V may be larger.
    eos_ids: ids that end a response.
    pad_id: id that fills rows.
  """

  vocab_size: int
  eos_ids: tuple[int, ...]
  pad_id: int

  def encode(self, text: str) -> list[int]:
    """Ids of plain text; adds nothing, and reads no control tokens in it."""
    ...

  def decode(self, ids: Iterable[int]) -> str:
    """Text of ids; control tokens vanish, broken UTF-8 becomes U+FFFD."""
    ...

  def render_chat(
    self, messages: Sequence[Message], prefix: str = ""
  ) -> list[int]:
    """Prompt ids of a chat.

    Args:
      messages: dicts with `role` and `content`.
      prefix: text that the response starts with, e.g. `<think>`.

    Returns:
      The ids of the messages, of the generation prompt and of the prefix.
    """
    ...

  def render_reply(
    self, messages: Sequence[Message], prefix: str = "", *, ended: bool
  ) -> list[int]:
    """Ids that continue a chat after a sampled response.

    Args:
      messages: what answers the response.
      prefix: text that the next response starts with.
      ended: whether the response's last token already is its end.

    Returns:
      The end of the response unless it has ended, then as `render_chat`.
    """
    ...

  def token_bytes(self) -> list[bytes]:
    """What each id adds to the text; empty for control tokens."""
    ...

  def save(self, directory: str | os.PathLike) -> None:
    """Writes files that `load` reads."""
    ...


def _join(pieces: list[bytes], ids: Iterable[int]) -> str:
  """Concatenates the bytes of ids; ids beyond the vocabulary add nothing."""
  data = b"".join(pieces[i] for i in ids if 0 <= i < len(pieces))
  return data.decode("utf-8", errors="replace")


def _byte_alphabet() -> dict[str, int]:
  """The printable character that byte-level BPE writes for each byte.

  Printable Latin-1 bytes stand for themselves; the others take the characters
  from U+0100 on, in order.
  """
  kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = [byte for byte in range(256) if byte not in kept]
  alphabet = {chr(byte): byte for byte in kept}
  return alphabet | {chr(256 + i): byte for i, byte in enumerate(rest)}


def _piece_bytes(piece: str) -> bytes:
  """Bytes of a SentencePiece-style piece."""
  if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
    return bytes([int(piece[3:5], 16)])
  return piece.replace(SPACE, " ").encode()


class HuggingFaceTokenizer:
  """The tokenizer of a Hugging Face checkpoint or GGUF file."""

  def __init__(
    self,
    tokenizer: transformers.PreTrainedTokenizerBase,
    eos_ids: Sequence[int] = (),
    template_arguments: Mapping[str, Any] | None = None,
  ) -> None:
    """Wraps a tokenizer.

    Args:
      tokenizer: a fast `transformers` tokenizer.
      eos_ids: further ids that end a response, besides the tokenizer's own.
      template_arguments: further arguments of the chat template, such as
        `enable_thinking` or `tools`.

    Raises:
      ValueError: if it is not a fast tokenizer or has no end-of-text token.
    """
    if not tokenizer.is_fast:
      raise ValueError(
        f"tokenizer {tokenizer.name_or_path!r}: found a slow tokenizer; a "
        "tokenizer.json is needed"
      )
    own: Any = tokenizer.eos_token_id
    ends: dict[int, None] = dict.fromkeys(
      [*([] if own is None else [own]), *eos_ids]
    )
    if not ends:
      raise ValueError(
        f"tokenizer {tokenizer.name_or_path!r}: eos_token is missing"
      )
    self._tokenizer = tokenizer
    self._arguments = dict(template_arguments or {})
    # Typed as anything a special token may be.
    self._backend: Any = tokenizer.backend_tokenizer
    template = str(tokenizer.chat_template or "")
    self._markup = markup.Markup(self._backend, template)
    self._bytes = self._read_bytes()
    self.vocab_size: int = len(self._bytes)
    self.eos_ids: tuple[int, ...] = tuple(ends)
    pad: Any = tokenizer.pad_token_id
    self.pad_id: int = self.eos_ids[0] if pad is None else pad

  def _read_bytes(self) -> list[bytes]:
    vocabulary = self._tokenizer.get_vocab()
    added = self._tokenizer.added_tokens_decoder
    described = json.loads(self._backend.to_str())
    alphabet = _byte_alphabet()
    byte_level = '"ByteLevel"' in json.dumps(described["decoder"])
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for piece, index in vocabulary.items():
      if index in added:
        content = added[index].content
        if not byte_level:  # Then spaces are a letter here too.
          content = content.replace(SPACE, " ")
        pieces[index] = b"" if added[index].special else content.encode()
      elif byte_level and alphabet.keys() >= set(piece):
        pieces[index] = bytes(alphabet[letter] for letter in piece)
      else:
        pieces[index] = _piece_bytes(piece)
    return pieces

  def encode(self, text: str) -> list[int]:
    """As `Tokenizer.encode`; a normaliser such as NFC still applies."""
    return self._markup.encode_text(text)

  def decode(self, ids: Iterable[int]) -> str:
    """As `Tokenizer.decode`."""
    return _join(self._bytes, ids)

  def render_chat(
    self, messages: Sequence[Message], prefix: str = ""
  ) -> list[int]:
    """As `Tokenizer.render_chat`, by the checkpoint's chat template."""
    return self._encode_rendered(self._render(messages)) + self.encode(prefix)

  def _encode_rendered(self, text: str) -> list[int]:
    return self._markup.encode_rendered(text)

  def _render(self, messages: Sequence[Message]) -> str:
    """The text of a chat, with what the messages say kept apart."""
    if not self._tokenizer.chat_template:
      raise ValueError(
        f"tokenizer {self._tokenizer.name_or_path!r}: chat_template is "
        "missing; use an instruction-tuned checkpoint"
      )
    quoted = [
      {
        **message,
        "content": self._markup.quote(
          message["content"], own=message["role"] == "assistant"
        ),
      }
      for message in messages
    ]
    if quoted and quoted[0]["role"] == "system" and not self._takes_system:
      quoted = _fold_system(quoted)
    try:
      return self._apply_template(quoted)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
      reason = " ".join(str(error).split())
      roles = ", ".join(message["role"] for message in messages)
      raise ValueError(
        f"tokenizer {self._tokenizer.name_or_path!r}: the chat template "
        f"refuses messages of {roles}: {reason}"
      ) from None

  def _apply_template(self, messages: Sequence[Message]) -> str:
    rendered = self._tokenizer.apply_chat_template(
      list(messages),
      tokenize=False,
      add_generation_prompt=True,
      **self._arguments,
    )
    return str(rendered)

  @functools.cached_property
  def _takes_system(self) -> bool:
    """Whether the template has a place for a message of the system."""
    word = self._markup.placeholder
    chat = [
      {"role": "system", "content": word},
      {"role": "user", "content": "?"},
    ]
    try:
      return word in self._apply_template(chat)
    except (jinja2.TemplateError, TypeError, ValueError):
      return False

  def render_reply(
    self, messages: Sequence[Message], prefix: str = "", *, ended: bool
  ) -> list[int]:
    """As `Tokenizer.render_reply`: what the template puts after a response.

    What templates leave out of earlier responses, thoughts above all, does
    not matter: the response itself is not rendered again.
    """
    word = self._markup.placeholder
    chat = [
      {"role": "user", "content": "?"},
      {"role": "assistant", "content": word},
      *messages,
    ]
    text = self._render(chat).rpartition(word)[2]
    ids = self._encode_rendered(text)
    if ended and ids[0] in self.eos_ids:
      ids = ids[1:]
    return ids + self.encode(prefix)

  def token_bytes(self) -> list[bytes]:
    """As `Tokenizer.token_bytes`."""
    return list(self._bytes)

  def save(self, directory: str | os.PathLike) -> None:
    """As `Tokenizer.save`; `transformers` reads the files as well."""
    self._tokenizer.save_pretrained(directory)
    _save_ends(self, pathlib.Path(directory))


def _fold_system(messages: Sequence[Message]) -> list[Message]:
  """What the system says, put before what the user says first."""
  system, *rest = messages
  if not rest or rest[0]["role"] != "user":
    return [{**system, "role": "user"}, *rest]
  both = f"{system['content']}\n\n{rest[0]['content']}"
  return [{**rest[0], "content": both}, *rest[1:]]


class SentencePieceTokenizer:
  """A SentencePiece model made by `train_sentencepiece`."""

  def __init__(self, model: bytes) -> None:
    """Reads a serialised SentencePiece model."""
    self._model = model
    self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    self.vocab_size = self._processor.vocab_size()
    self.eos_ids = (self._processor.eos_id(),)
    self.pad_id = self._processor.pad_id()
    self._roles = {
      role: self._processor.piece_to_id(f"<|{role}|>") for role in ROLES
    }
    self._bytes = [
      b""
      if self._processor.is_control(i) or self._processor.is_unknown(i)
      else _piece_bytes(self._processor.id_to_piece(i))
      for i in range(self.vocab_size)
    ]
    # The model writes spaces with this letter, so the letter itself is
    # spelled in bytes.
    self._letter = [
      self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()
    ]

  def encode(self, text: str) -> list[int]:
    """As `Tokenizer.encode`."""
    first, *rest = text.split(SPACE)
    ids = self._processor.encode(first)
    for part in rest:
      ids += self._letter + self._processor.encode(part)
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    """As `Tokenizer.decode`."""
    return _join(self._bytes, ids)

  def render_chat(
    self, messages: Sequence[Message], prefix: str = ""
  ) -> list[int]:
    """As `Tokenizer.render_chat`: a role's id, then what it says."""
    ids = []
    for message in messages:
      if message["role"] not in self._roles:
        raise ValueError(
          f"message role {message['role']!r} is unknown; use one of "
          f"{', '.join(ROLES)}"
        )
      ids += [self._roles[message["role"]], *self.encode(message["content"])]
      if message["role"] == "assistant":
        ids.append(self.eos_ids[0])
    return [*ids, self._roles["assistant"], *self.encode(prefix)]

  def render_reply(
    self, messages: Sequence[Message], prefix: str = "", *, ended: bool
  ) -> list[int]:
    """As `Tokenizer.render_reply`."""
    end = [] if ended else [self.eos_ids[0]]
    return [*end, *self.render_chat(messages, prefix)]

  def token_bytes(self) -> list[bytes]:
    """As `Tokenizer.token_bytes`."""
    return list(self._bytes)

  def save(self, directory: str | os.PathLike) -> None:
    """As `Tokenizer.save`; `transformers` reads the files as well."""
    path = pathlib.Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    (path / SENTENCEPIECE_FILE).write_bytes(self._model)
    piece = self._processor.id_to_piece
    transformers.PreTrainedTokenizerFast(
      tokenizer_object=_as_tokenizers(self._processor),
      eos_token=piece(self.eos_ids[0]),
      pad_token=piece(self.pad_id),
      unk_token=piece(self._processor.unk_id()),
      chat_template=_CHAT_TEMPLATE,
      clean_up_tokenization_spaces=False,
    ).save_pretrained(path)
    _save_ends(self, path)


def _as_tokenizers(
  processor: sentencepiece.SentencePieceProcessor,
) -> tokenizers.Tokenizer:
  """The same model for the `tokenizers` library: equal ids for equal text."""
  pieces, special = [], []
  for i in range(processor.vocab_size()):
    piece, score = processor.id_to_piece(i), processor.get_score(i)
    if processor.is_control(i) or processor.is_unknown(i):
      special.append(tokenizers.AddedToken(piece, special=True))
    elif score == 0.0 and not processor.is_byte(i):
      # SentencePiece scores pieces that were given to it like this.
      score = -0.1
    pieces.append((piece, score))
  made = tokenizers.Tokenizer(
    tokenizers.models.Unigram(
      pieces, unk_id=processor.unk_id(), byte_fallback=True
    )
  )
  made.normalizer = tokenizers.normalizers.Replace(" ", SPACE)
  made.decoder = tokenizers.decoders.Sequence(
    [
      tokenizers.decoders.Replace(SPACE, " "),
      tokenizers.decoders.ByteFallback(),
      tokenizers.decoders.Fuse(),
    ]
  )
  made.add_special_tokens(special)
  return made


def _save_ends(tokenizer: Tokenizer, directory: pathlib.Path) -> None:
  """Writes what `transformers` needs to know to end a text."""
  settings = {
    "eos_token_id": list(tokenizer.eos_ids),
    "pad_token_id": tokenizer.pad_id,
  }
  path = directory / "generation_config.json"
  path.write_text(json.dumps(settings, indent=2) + "\n")


def _choose_words(
  sentences: Sequence[str], symbols: Sequence[str], room: int
) -> list[str]:
  """The most frequent words, as written, that fit into the vocabulary.

  If not all fit, some room is left for fragments of the others: as many
  pieces as there are words too many, at most a quarter.
  """
  longest_first = sorted(symbols, key=len, reverse=True)
  split = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
  counts = collections.Counter(
    surface
    for sentence in sentences
    for part in split.split(sentence)
    for surface in _SURFACE.findall(part)
    if len(surface) > 1
  )
  words = sorted(counts, key=lambda word: (-counts[word], word))
  fragments = min(max(len(words) - room, 0), room // 4)
  return words[: room - fragments]


def train_sentencepiece(
  sentences: Iterable[str],
  vocab_size: int,
  symbols: Sequence[str],
  directory: str | os.PathLike,
) -> SentencePieceTokenizer:
  """Trains a tokenizer on a corpus; the same input gives the same model.

  Args:
    sentences: texts in the environment's language.
    vocab_size: upper bound; 262 ids are control tokens and bytes.
    symbols: strings that become one token each, e.g. `<think>`.
    directory: where the model is written.

  Returns:
    The tokenizer.

  Raises:
    ValueError: if the bound leaves no room for the corpus' characters.
  """
  sentences = [sentence.replace(SPACE, " ") for sentence in sentences]
  letters = sorted(set("".join(sentences)) - set(symbols) - {" "})
  # pad, eos, unknown; roles; bytes; the space; one spare for the trainer.
  taken = 3 + len(ROLES) + 256 + len(symbols) + len(letters) + 2
  if vocab_size < taken:
    raise ValueError(
      f"vocab_size = {vocab_size} is too small for {len(letters)} characters "
      f"and {len(symbols)} symbols; use at least {taken}"
    )
  words = _choose_words(sentences, symbols, vocab_size - taken)
  defined = [*symbols, SPACE, *(word.replace(" ", SPACE) for word in words)]
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([*sentences, *letters]),
    model_writer=model,
    model_type="unigram",
    vocab_size=vocab_size,
    hard_vocab_limit=False,
    user_defined_symbols=list(dict.fromkeys(defined)),
    control_symbols=[f"<|{role}|>" for role in ROLES],
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    byte_fallback=True,
    character_coverage=1.0,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    add_dummy_prefix=False,
    max_sentence_length=1 << 20,
    num_threads=1,
    minloglevel=2,
  )
  tokenizer = SentencePieceTokenizer(model.getvalue())
  tokenizer.save(directory)
  return tokenizer


def _generation_eos(directory: pathlib.Path) -> list[int]:
  """End ids that a checkpoint's generation_config.json lists."""
  path = directory / "generation_config.json"
  if not path.is_file():
    return []
  ids = sources.read_json(path).get("eos_token_id")
  if ids is None:
    return []
  return list(ids) if isinstance(ids, list) else [ids]


def load(
  source: str | os.PathLike,
  template_arguments: Mapping[str, Any] | None = None,
) -> Tokenizer:
  """Loads the tokenizer of a model.

  Args:
    source: a directory, a GGUF file, a known name or a hub id; see `sources`.
    template_arguments: further arguments of the chat template; tokenizers
      that were trained here have none and ignore them.

  Returns:
    The tokenizer.

  Raises:
    ValueError: if there is none.
  """
  path = sources.locate(source, sources.TOKENIZER_FILES)
  if (path / SENTENCEPIECE_FILE).is_file():
    return SentencePieceTokenizer((path / SENTENCEPIECE_FILE).read_bytes())
  if path.suffix == ".gguf" and path.is_file():
    return HuggingFaceTokenizer(
      gguf_tokenizer.load(path), gguf_tokenizer.ends(path), template_arguments
    )
  names = ("tokenizer_config.json", "tokenizer.json")
  if not any((path / name).is_file() for name in names):
    raise ValueError(
      f"tokenizer {os.fspath(path)!r}: found neither {SENTENCEPIECE_FILE} "
      "nor tokenizer.json; give a directory that has one of them"
    )
  return HuggingFaceTokenizer(
    transformers.AutoTokenizer.from_pretrained(path),
    _generation_eos(path),
    template_arguments,
  )
