"""The embedded world: one answer per question, fixed disjoint splits."""

import collections
import itertools
import os
import subprocess
import sys

from absl.testing import absltest, parameterized

from t2po_jax.envs.searchqa import retrieval, world
from t2po_jax.envs.searchqa.wordings import compact
from tests import places

_SIZES = {"train": 1000, "valid": 100, "test": 200}


def _read_facts(built):
  """(entity, relation) -> values, read back from the compact passages."""
  facts = collections.defaultdict(set)
  for entity, known in built.facts.items():
    for relation, value in known.items():
      words = compact.state(entity, relation, value).split()
      assert words[3] == "." and len(words) == 4
      facts[tuple(words[:2])].add(words[2])
  return facts


class WorldTest(parameterized.TestCase):
  @parameterized.parameters(0, 1, 2)
  def test_every_question_has_one_answer(self, seed):
    built = world.build(seed)
    facts = _read_facts(built)
    questions = world.ask(built)
    self.assertEqual(sorted(questions), [1, 2, 3])
    ids = set()
    for hops, asked in questions.items():
      for question in asked:
        entity = question.start
        for relation in question.relations:
          (entity,) = facts[entity, relation]
        self.assertEqual(entity, question.answer)
        self.assertLen(question.relations, hops)
        self.assertLen(set(question.relations), hops)
        self.assertLen(set(question.path), hops + 1)
        ids.add(question.task_id)
    self.assertLen(ids, sum(map(len, questions.values())))

  def test_number_of_one_hop_questions(self):
    # Three relations per entity, none of which leads back to it.
    self.assertLen(world.ask(world.build(0))[1], 3 * (48 + 24 + 32 + 6))

  def test_names_are_distinct_words_for_a_stemmer_too(self):
    for seed in range(5):
      names = list(world.build(seed).facts)
      self.assertLen({name[:4] for name in names}, len(names))
      self.assertTrue(all(name.isalpha() and name.islower() for name in names))
      stems = [tuple(stems) for stems in retrieval.tokenize(names)]
      self.assertLen(set(stems), len(names))
      self.assertTrue(all(len(stem) == 1 for stem in stems))

  def test_marriages_are_mutual(self):
    facts = world.build(3).facts
    married = {name for name in facts if "spouse" in facts[name]}
    self.assertLen(married, 48)
    for name in married:
      self.assertEqual(facts[facts[name]["spouse"]]["spouse"], name)
      self.assertNotEqual(facts[name]["spouse"], name)

  def test_facts_follow_the_schema(self):
    built = world.build(0)
    for entity, facts in built.facts.items():
      schema = world.SCHEMA[built.kinds[entity]]
      self.assertEqual(list(facts), list(schema))
      for relation, value in facts.items():
        self.assertEqual(built.kinds[value], schema[relation])
      self.assertLen({entity, *facts.values()}, 4)

  def test_seed_decides(self):
    self.assertEqual(world.build(4), world.build(4))
    self.assertNotEqual(world.build(4), world.build(5))

  def test_smallest_world(self):
    built = world.build(0, people=4, places=3, works=1, regions=3)
    self.assertLen(built.facts, 11)

  @parameterized.parameters(
    ({"people": 47}, "env.people: 47 people cannot all be married"),
    ({"people": 2}, "'person'; between 4"),
    ({"places": 0}, "'place'"),
    ({"works": 401}, "'work'"),
    ({"regions": 1}, "'region'"),
  )
  def test_bad_sizes(self, sizes, message):
    with self.assertRaisesRegex(ValueError, message):
      world.build(0, **sizes)


class SplitsTest(parameterized.TestCase):
  @parameterized.parameters(0, 7)
  def test_disjoint_stratified_and_mixed(self, seed):
    splits = world.draw_splits(world.build(seed), _SIZES)
    ids = [q.task_id for q in itertools.chain(*splits.values())]
    self.assertLen(set(ids), len(ids))
    for name, questions in splits.items():
      self.assertLen(questions, _SIZES[name])
      for part in (questions, questions[: len(questions) // 2]):
        counts = collections.Counter(question.hops for question in part)
        for hops, share in zip(world.HOPS, world.HOP_SHARES, strict=True):
          self.assertAlmostEqual(counts[hops] / len(part), share, delta=0.1)
      starts = [question.start for question in questions]
      self.assertNotEqual(starts, sorted(starts))

  def test_same_in_every_process(self):
    code = (
      "from t2po_jax.envs.searchqa import world\n"
      "import zlib\n"
      f"splits = world.draw_splits(world.build(0), {_SIZES})\n"
      "print(zlib.crc32(repr(splits).encode()))"
    )
    prints = {
      subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": seed},
        cwd=places.ROOT,
        capture_output=True,
        text=True,
        check=True,
      ).stdout
      for seed in ("1", "2")
    }
    self.assertLen(prints, 1)

  def test_growing_a_later_split_leaves_earlier_ones(self):
    built = world.build(0)
    small = world.draw_splits(built, _SIZES)
    large = world.draw_splits(built, {**_SIZES, "test": 300})
    for name in ("train", "valid"):
      self.assertEqual(small[name], large[name])

  def test_too_many_questions(self):
    with self.assertRaisesRegex(ValueError, "330 questions of 1 hops, too few"):
      world.draw_splits(world.build(0), {"train": 1000, "test": 1000})


if __name__ == "__main__":
  absltest.main()
