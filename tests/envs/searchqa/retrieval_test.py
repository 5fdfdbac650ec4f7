"""BM25 against the formula; the cache; ties; threads."""

import concurrent.futures
import math
import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized
import numpy as np

from t2po_jax.envs.searchqa import retrieval

_TEXTS = (
  "Foxes hunted the old river bank",
  "rivers flow, rivers bend, rivers freeze over in winter",
  "the bank opened a branch",
  "the bank closed a branch",
  "quiet winter morning",
)


def _passages(texts=_TEXTS):
  return [
    retrieval.Passage(str(i), f"title{i}", text) for i, text in enumerate(texts)
  ]


def _bm25(query, documents):
  """Okapi term weights, idf = log(1 + (n - df + .5) / (df + .5)), in loops."""
  mean = sum(map(len, documents)) / len(documents)
  scores = []
  for words in documents:
    total = 0.0
    for term in query:
      df = sum(term in other for other in documents)
      tf = words.count(term)
      if not tf:
        continue
      idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
      norm = retrieval.K1 * (1 - retrieval.B + retrieval.B * len(words) / mean)
      total += idf * tf / (tf + norm)
    scores.append(total)
  return scores


class PassageTest(parameterized.TestCase):
  @parameterized.parameters(
    ('"Ed Wood (film)"\nA film.', "Ed Wood (film)", "A film."),
    ("Plain\nText\nmore", "Plain", "Text\nmore"),
    ("only text", "", "only text"),
    ('"\ntext', '"', "text"),
    ('"Say ""hi"""\ntext', 'Say ""hi""', "text"),
  )
  def test_split_contents(self, contents, title, text):
    passage = retrieval.split_contents("7", contents)
    self.assertEqual(passage, retrieval.Passage("7", title, text))

  @parameterized.parameters('"A b"\nc d', "only text")
  def test_round_trip(self, contents):
    passage = retrieval.split_contents("7", contents)
    self.assertEqual(passage.contents, contents)


class BM25Test(parameterized.TestCase):
  @parameterized.parameters(
    "river", "bank branch", "winter rivers", "title2 bank", "frozen rivers flow"
  )
  def test_scores_follow_the_formula(self, query):
    passages = _passages()
    documents = retrieval.tokenize([p.contents for p in passages])
    (terms,) = retrieval.tokenize([query])
    expected = _bm25(terms, documents)
    (found,) = retrieval.BM25(passages).search([query], 5)
    order = sorted(range(5), key=lambda index: (-expected[index], index))
    order = [index for index in order if expected[index] > 0]
    self.assertEqual([int(p.id) for p, _ in found], order)
    np.testing.assert_allclose(
      [score for _, score in found], [expected[i] for i in order], rtol=1e-5
    )

  def test_stems_and_stop_words(self):
    index = retrieval.BM25(_passages())
    found = index.search(["RIVER!", "the a in"], 3)
    self.assertEqual([p.id for p, _ in found[0]], ["1", "0"])
    self.assertEqual(found[1], [])

  @parameterized.parameters("", "zzz", "?!")
  def test_nothing_found(self, query):
    self.assertEqual(retrieval.BM25(_passages()).search([query], 3), [[]])

  @parameterized.parameters(1, 7, 30, 90)
  def test_ties_in_corpus_order(self, topk):
    # Every third passage is better than the rest; each kind ties.
    texts = ["same words" if i % 3 else "same words words" for i in range(60)]
    passages = [retrieval.Passage(str(i), "", t) for i, t in enumerate(texts)]
    (found,) = retrieval.BM25(passages).search(["words"], topk)
    expected = [*range(0, 60, 3), *(i for i in range(60) if i % 3)]
    self.assertEqual([int(p.id) for p, _ in found], expected[:topk])

  def test_batch_equals_single(self):
    index = retrieval.BM25(_passages())
    queries = ["river", "", "bank winter", "river"]
    self.assertEqual(
      index.search(queries, 2), [index.search([q], 2)[0] for q in queries]
    )
    self.assertEqual(index.search([], 2), [])

  def test_many_threads_agree(self):
    index = retrieval.BM25(_passages())
    queries = ["river bank", "winter", "branches opened", "foxes"] * 50
    expected = index.search(queries, 3)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      found = pool.map(lambda query: index.search([query], 3)[0], queries)
    self.assertEqual(list(found), expected)

  def test_passage_without_words(self):
    index = retrieval.BM25([retrieval.Passage("e", "", "..."), *_passages()])
    self.assertEqual([p.id for p, _ in index.search(["foxes"], 3)[0]], ["0"])

  def test_empty_corpus(self):
    with self.assertRaisesRegex(ValueError, "corpus is empty"):
      retrieval.BM25([])


class CacheTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(folder) / "new"

  def _build(self, texts=_TEXTS):
    """(index, whether it was built rather than loaded)."""
    with mock.patch.object(
      retrieval, "_build_index", wraps=retrieval._build_index
    ) as build:
      index = retrieval.BM25(_passages(texts), cache_dir=self.folder)
    return index, build.called

  def test_second_time_is_loaded(self):
    first, built = self._build()
    self.assertTrue(built)
    second, built = self._build()
    self.assertFalse(built)
    queries = ["river", "bank branch", "winter"]
    self.assertEqual(first.search(queries, 4), second.search(queries, 4))

  def test_other_corpus_is_built(self):
    self._build()
    _, built = self._build((*_TEXTS[:-1], "quiet summer morning"))
    self.assertTrue(built)
    self.assertLen(list(self.folder.iterdir()), 2)

  def test_damaged_index_is_built_anew(self):
    self._build()
    (entry,) = self.folder.iterdir()
    for file in entry.iterdir():
      file.write_bytes(file.read_bytes()[:10])
    index, built = self._build()
    self.assertTrue(built)
    self.assertLen(index.search(["river"], 3)[0], 2)
    self.assertFalse(self._build()[1])


if __name__ == "__main__":
  absltest.main()
