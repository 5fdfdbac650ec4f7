"""Vector search with a stand-in encoder, and the encoder's own pooling."""

import importlib.util
import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest
import numpy as np

from t2po_jax.envs.searchqa import dense, retrieval

_MISSING = [
  name for name in ("faiss", "torch") if not importlib.util.find_spec(name)
]
_WORDS = ("river", "bank", "winter")
_PASSAGES = [
  retrieval.Passage(str(index), "", text)
  for index, text in enumerate(("river", "bank river", "winter winter bank"))
]


def _count_words(texts):
  """Unit vectors of word counts, after the prefix."""
  counts = np.array(
    [[text.split().count(word) for word in _WORDS] for text in texts], float
  )
  return counts / np.maximum(
    np.linalg.norm(counts, axis=1, keepdims=True), 1e-9
  )


@absltest.skipIf(_MISSING, f"not installed: {_MISSING}")
class DenseTest(absltest.TestCase):
  def test_scores_are_cosines(self):
    index = dense.Dense(_PASSAGES, encoder=_count_words)
    queries = ["river", "winter bank"]
    found = index.search(queries, 2)
    texts = [passage.contents for passage in _PASSAGES]
    cosines = _count_words(queries) @ _count_words(texts).T
    for row, hits in zip(cosines, found, strict=True):
      order = np.argsort(-row)[:2]
      self.assertEqual([int(p.id) for p, _ in hits], list(order))
      np.testing.assert_allclose([s for _, s in hits], row[order], rtol=1e-6)
    self.assertEqual(index.search([], 2), [])
    self.assertLen(index.search(["river"], 9)[0], 3)

  def test_prefixes(self):
    encode = mock.Mock(side_effect=_count_words)
    dense.Dense(_PASSAGES[:1], encoder=encode).search(["bank"], 1)
    asked = [call.args[0] for call in encode.call_args_list]
    self.assertEqual(asked, [["passage: river"], ["query: bank"]])

  def test_encoding_is_kept(self):
    with tempfile.TemporaryDirectory() as folder:
      encode = mock.Mock(side_effect=_count_words)
      with mock.patch.object(dense, "load_encoder", return_value=encode):
        for _ in range(2):
          index = dense.Dense(_PASSAGES, encoder="name", cache_dir=folder)
        self.assertEqual(index.search(["bank"], 1)[0][0][0].id, "1")
      self.assertEqual(encode.call_count, 2)
      self.assertLen(list(pathlib.Path(folder).iterdir()), 1)

  def test_empty_corpus(self):
    with self.assertRaisesRegex(ValueError, "corpus is empty"):
      dense.Dense([], encoder=_count_words)

  def test_mean_pooling_ignores_padding(self):
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
      words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_WORDS]
      vocabulary = pathlib.Path(folder) / "vocab.txt"
      vocabulary.write_text("\n".join(words))
      tokenizer = transformers.BertTokenizer(str(vocabulary))
      config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
      )
      torch.manual_seed(0)
      model = transformers.BertModel(config).eval()
      tokenizer.save_pretrained(folder)
      model.save_pretrained(folder)
      encode = dense.load_encoder(folder)
    texts = ["river", "bank winter river bank"]
    together = encode(texts)
    alone = np.concatenate([encode([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    with torch.inference_mode():
      states = model(**tokenizer(texts[0], return_tensors="pt"))[0][0].numpy()
    mean = states.mean(axis=0)
    np.testing.assert_allclose(
      together[0], mean / np.linalg.norm(mean), atol=1e-5
    )


class MissingTest(absltest.TestCase):
  def test_extra_is_named(self):
    with mock.patch.dict("sys.modules", {"faiss": None}):
      with self.assertRaisesRegex(ValueError, "faiss.*extra 'dense'"):
        dense.Dense(_PASSAGES, encoder=_count_words)
    with mock.patch.dict("sys.modules", {"torch": None}):
      with self.assertRaisesRegex(ValueError, "torch.*extra 'dense'"):
        dense.load_encoder("name")


if __name__ == "__main__":
  absltest.main()
