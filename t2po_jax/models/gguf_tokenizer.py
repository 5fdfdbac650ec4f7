"""The tokenizer inside a GGUF file.

Byte-level BPE, used in files of Llama 3, Qwen2, Qwen3 and SmolLM2, is rebuilt
from the metadata with the library `tokenizers`; the readers of transformers
would need PyTorch. The pre-tokenisation is not stored in the file but only
named there (`tokenizer.ggml.pre`): a name that is not in `CUTS` is refused
rather than guessed, because the wrong one would silently give different ids.
"""

from collections.abc import Mapping
import pathlib
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers
import transformers

from t2po_jax.models import sources

# Token types in `tokenizer.ggml.token_type`.
_CONTROL, _USER_DEFINED = 3, 4


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
  found = {
    name.removeprefix("tokenizer.").removeprefix("ggml."): field.contents()
    for name, field in sources.read_gguf(path).fields.items()
    if name.startswith("tokenizer.")
  }
  kind = found.get("model")
  if kind != "gpt2":
    raise ValueError(
      f"{path}: tokenizer.ggml.model is {kind!r}, expected 'gpt2' (byte-level "
      "BPE); give the model's Hugging Face directory instead"
    )
  for key in ("tokens", "merges"):
    if key not in found:
      raise ValueError(f"{path}: metadata key tokenizer.ggml.{key} is missing")
  pieces = found["tokens"]
  backend = _rebuild(found, path)
  named = {
    f"{name}_token": pieces[found[f"{key}_token_id"]]
    for name, key in (
      ("bos", "bos"),
      ("eos", "eos"),
      ("unk", "unknown"),
      ("pad", "padding"),
    )
    if f"{key}_token_id" in found
  }
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    chat_template=found.get("chat_template"),
    clean_up_tokenization_spaces=False,
    **named,
  )


def _rebuild(
  found: Mapping[str, Any], path: pathlib.Path
) -> tokenizers.Tokenizer:
  """Builds the tokenizer that the metadata describes."""
  cut = found.get("pre", "default")
  if cut not in CUTS:
    raise ValueError(
      f"{path}: tokenizer.ggml.pre is {cut!r}, expected one of "
      f"{', '.join(CUTS)}; give the model's Hugging Face directory instead"
    )
  pattern, single_digits = CUTS[cut]
  pieces = found["tokens"]
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab={piece: i for i, piece in enumerate(pieces)},
      merges=[tuple(merge.split(" ")) for merge in found["merges"]],
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
  for piece, kind in zip(pieces, found.get("token_type", ()), strict=False):
    if kind in (_CONTROL, _USER_DEFINED):
      token = tokenizers.AddedToken(
        piece, special=kind == _CONTROL, normalized=False
      )
      backend.add_tokens([token])
  return backend
