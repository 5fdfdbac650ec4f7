"""The tokenizer inside a GGUF file.

It is rebuilt from the metadata with the library `tokenizers`; the readers of
transformers would need PyTorch. There are two kinds:

Byte-level BPE (`gpt2`), used in files of Llama 3, Qwen2, Qwen3 and SmolLM2.
The pre-tokenisation is not stored in the file but only named there
(`tokenizer.ggml.pre`): a name that is not in `CUTS` is refused rather than
guessed, because the wrong one would silently give different ids.

SentencePiece BPE (`llama`), used in files of Gemma, Llama 2 and Mistral. It has
no list of merges: two neighbours are merged if the result is a piece, the piece
with the highest score first.
"""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers
import transformers

from t2po_jax.models import sources

# Token types in `tokenizer.ggml.token_type`.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_SPACE = "▁"


def _pattern(digits: str) -> str:
  """The regular expression of Llama 3 and Qwen, which differ in digits."""
  return "|".join(
    (
      r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
      r"[^\r\n\p{L}\p{N}]?\p{L}+",
      digits,
      r" ?[^\s\p{L}\p{N}]+[\r\n]*",
      r"\s*[\r\n]+",
      r"\s+(?!\S)",
      r"\s+",
    )
  )


# Name in the file -> the splitting expression (None: GPT-2's), and whether
# digits are split individually.
CUTS: Mapping[str, tuple[str | None, bool]] = {
  "default": (None, False),
  "gpt-2": (None, False),
  "smollm": (None, True),
  "qwen2": (_pattern(r"\p{N}"), False),
  "llama-bpe": (_pattern(r"\p{N}{1,3}"), False),
}


# What a tokenizer of each kind must have.
_NEEDED: Mapping[str, tuple[str, ...]] = {
  "gpt2": ("tokens", "merges"),
  "llama": ("tokens", "scores", "token_type"),
}


def load(path: pathlib.Path) -> transformers.PreTrainedTokenizerBase:
  """Reads the tokenizer of a GGUF file.

  Args:
    path: the file.

  Returns:
    A fast tokenizer with the file's chat template and special tokens.

  Raises:
    ValueError: if the file is damaged, has no tokenizer, or one of another
      kind.
  """
  metadata = {
    name.removeprefix("tokenizer.").removeprefix("ggml."): field.contents()
    for name, field in sources.read_gguf(path).fields.items()
    if name.startswith("tokenizer.")
  }
  kind = str(metadata.get("model"))
  if kind not in _NEEDED:
    raise ValueError(
      f"{path}: tokenizer.ggml.model is {kind!r}, expected 'gpt2' (byte-level "
      "BPE) or 'llama' (SentencePiece); give the model's Hugging Face "
      "directory instead"
    )
  for key in _NEEDED[kind]:
    if key not in metadata:
      raise ValueError(f"{path}: metadata key tokenizer.ggml.{key} is missing")
  pieces = metadata["tokens"]
  if kind == "gpt2":
    backend = _rebuild(metadata, path)
  else:
    backend = _rebuild_sentencepiece(metadata)
  named = {
    f"{name}_token": pieces[metadata[f"{key}_token_id"]]
    for name, key in (
      ("bos", "bos"),
      ("eos", "eos"),
      ("unk", "unknown"),
      ("pad", "padding"),
    )
    if f"{key}_token_id" in metadata
  }
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    chat_template=metadata.get("chat_template"),
    clean_up_tokenization_spaces=False,
    **named,
  )


def ends(path: pathlib.Path) -> list[int]:
  """Ids that end a turn in a GGUF file, beside that which ends a text.

  Args:
    path: the file.
  """
  fields = sources.read_gguf(path).fields
  names = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
  return [int(fields[name].contents()) for name in names if name in fields]


def _rebuild(
  metadata: Mapping[str, Any], path: pathlib.Path
) -> tokenizers.Tokenizer:
  """Builds the tokenizer that the metadata describes."""
  cut = metadata.get("pre", "default")
  if cut not in CUTS:
    raise ValueError(
      f"{path}: tokenizer.ggml.pre is {cut!r}, expected one of "
      f"{', '.join(CUTS)}; give the model's Hugging Face directory instead"
    )
  pattern, single_digits = CUTS[cut]
  pieces = metadata["tokens"]
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab={piece: i for i, piece in enumerate(pieces)},
      merges=[tuple(merge.split(" ")) for merge in metadata["merges"]],
      # Llama 3 keeps a word that is in the vocabulary, whatever the merges.
      ignore_merges=cut == "llama-bpe",
    )
  )
  steps: list[pre_tokenizers.PreTokenizer] = []
  if single_digits:
    steps.append(pre_tokenizers.Digits(individual_digits=True))
  if pattern is not None:
    split = tokenizers.Regex(pattern)
    steps.append(pre_tokenizers.Split(split, behavior="isolated"))
  steps.append(
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
  )
  backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
  backend.decoder = decoders.ByteLevel()
  if cut == "qwen2":
    backend.normalizer = normalizers.NFC()
  _add_tokens(backend, pieces, metadata.get("token_type", ()))
  return backend


def _add_tokens(
  backend: tokenizers.Tokenizer, pieces: Sequence[str], kinds: Sequence[int]
) -> None:
  """Tells the tokenizer which pieces are read before all others."""
  backend.add_tokens(
    [
      tokenizers.AddedToken(
        piece,
        special=kind == _CONTROL,
        # Where spaces are a letter, that is what they are when it is read.
        normalized=kind == _USER_DEFINED and _SPACE in piece,
      )
      for piece, kind in zip(pieces, kinds, strict=False)
      if kind in (_CONTROL, _USER_DEFINED)
    ]
  )


def _rebuild_sentencepiece(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
  """The tokenizer that pieces and their scores describe."""
  kinds = metadata["token_type"]
  # Pieces that were given to the trainer are stored with plain spaces.
  pieces = [
    piece.replace(" ", _SPACE) if kind == _USER_DEFINED else piece
    for piece, kind in zip(metadata["tokens"], kinds, strict=True)
  ]
  unknown = metadata.get("unknown_token_id")
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab={piece: i for i, piece in enumerate(pieces)},
      merges=_merges(pieces, metadata["scores"], kinds),
      unk_token=None if unknown is None else pieces[unknown],
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  prefixed = bool(metadata.get("add_space_prefix", True))
  backend.normalizer = normalizers.Sequence(
    [normalizers.Prepend(_SPACE)] * prefixed
    + [normalizers.Replace(" ", _SPACE)]
  )
  backend.decoder = decoders.Sequence(
    [
      decoders.Replace(_SPACE, " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      *[decoders.Strip(" ", 1, 0)] * prefixed,
    ]
  )
  _add_tokens(backend, pieces, kinds)
  return backend


def _merges(
  pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
  """All pairs of pieces that make a piece, that of the highest score first."""
  ranks = {
    piece: (-score, i)
    for i, (piece, score, kind) in enumerate(
      zip(pieces, scores, kinds, strict=True)
    )
    if kind == _NORMAL
  }
  pairs = [
    (rank, cut, piece)
    for piece, rank in ranks.items()
    for cut in range(1, len(piece))
    if piece[:cut] in ranks and piece[cut:] in ranks
  ]
  return [(piece[:cut], piece[cut:]) for _, cut, piece in sorted(pairs)]
