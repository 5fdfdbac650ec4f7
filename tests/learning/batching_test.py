"""Packing turns into rows: nothing lost or repeated, little padding."""

import dataclasses

from absl.testing import absltest, parameterized
import chex
import numpy as np

from t2po_jax import types
from t2po_jax.learning import batching


def make_turn(prompt, response, *, forced=(), action_valid=True):
  response = np.asarray(response, np.int32)
  size = len(response)
  zeros = np.zeros(size, np.float32)
  attempt = types.Attempt(
    tokens=response,
    logprobs=-np.arange(1, size + 1, dtype=np.float32) / 10,
    uncertainty=zeros,
    entropy=zeros,
    confidence=zeros,
    forced=np.isin(np.arange(size), forced),
    text="",
    finish="stop",
    fired_at=-1,
    thinking_tokens=0,
    phi=0.5,
  )
  return types.Turn(
    prompt=np.asarray(prompt, np.int32),
    response=attempt,
    anchor="",
    action="",
    reward=0.0,
    penalty=0.0,
    format_valid=True,
    action_valid=action_valid,
    phi_change=float("nan"),
    prompt_shortened=False,
  )


def make_trajectory(*turns, aborted=False):
  return types.Trajectory(
    task_id="task",
    category="",
    group=0,
    member=0,
    turns=turns,
    success=False,
    aborted=aborted,
  )


def random_rollout(seed, trajectories, *, longest=40):
  """Trajectories of 1 to 4 turns with random ids, and their advantages."""
  rng = np.random.default_rng(seed)
  rollout, advantages = [], []
  for _ in range(trajectories):
    turns = []
    for _ in range(rng.integers(1, 5)):
      prompt = rng.integers(1, 99, rng.integers(1, longest))
      response = rng.integers(1, 99, rng.integers(1, longest // 2))
      turns.append(make_turn(prompt, response, forced=rng.integers(0, 9, 2)))
    rollout.append(make_trajectory(*turns))
    advantages.append(rng.normal(size=len(turns)))
  return rollout, advantages


def unpack(packed):
  """Every response position as (turn, context, target, mask, numbers)."""
  found = []
  for batch in packed.batches:
    for row, position in np.argwhere(batch.turn >= 0):
      at = batch.index[row, position]
      same = batch.segments[row] == batch.segments[row, at]
      context = batch.tokens[row, : at + 1][same[: at + 1]]
      assert batch.positions[row, at] == len(context) - 1
      found.append(
        (
          int(batch.turn[row, position]),
          tuple(context.tolist()),
          int(batch.targets[row, position]),
          float(batch.mask[row, position]),
          float(batch.advantages[row, position]),
          float(batch.sampler_logprobs[row, position]),
        )
      )
  return sorted(found)


def expected(rollout, advantages):
  """The same list by a plain loop over turns and tokens."""
  found, number = [], 0
  for trajectory, values in zip(rollout, advantages, strict=True):
    for turn, value in zip(trajectory.turns, values, strict=True):
      tokens = [*turn.prompt.tolist(), *turn.response.tokens.tolist()]
      for i in range(len(turn.response.tokens)):
        end = len(turn.prompt) + i
        found.append(
          (
            number,
            tuple(tokens[:end]),
            tokens[end],
            0.0 if turn.response.forced[i] else 1.0,
            float(np.float32(value)),
            float(turn.response.logprobs[i]),
          )
        )
      number += 1
  return sorted(found)


def pack_rollout(rollout, advantages, **options):
  segments = batching.trajectory_segments(
    rollout, advantages, max_length=max(options["lengths"])
  )
  return batching.pack(segments, **options)


# Prompt length, response length and how often: one update of Search QA.
RECORDED = (
  (7, 8, 23), (7, 12, 1), (8, 8, 62), (8, 12, 8), (8, 16, 1), (9, 8, 33),
  (9, 12, 6), (9, 16, 3), (9, 20, 2), (23, 8, 18), (23, 13, 6), (24, 8, 5),
  (24, 12, 58), (24, 16, 1), (24, 20, 2), (24, 28, 2), (25, 8, 2),
  (25, 12, 33), (25, 19, 1), (25, 20, 3), (25, 28, 2), (25, 36, 2),
  (37, 10, 1), (39, 8, 1), (40, 8, 53), (40, 9, 1), (40, 13, 8), (40, 26, 1),
  (40, 28, 1), (41, 11, 1), (41, 12, 30), (41, 13, 1), (41, 20, 6),
  (41, 28, 1), (41, 36, 1), (46, 8, 1), (57, 8, 26), (57, 12, 1), (57, 13, 3),
  (57, 18, 3), (57, 36, 1),
)  # fmt: skip


class PackTest(chex.TestCase):
  def test_two_turns_in_one_row_by_hand(self):
    turns = [make_turn([5, 6], [7, 8, 9], forced=[1]), make_turn([3], [4])]
    packed = pack_rollout(
      [make_trajectory(*turns)], [[2.0, -1.0]], lengths=[16], rows=1
    )
    (batch,) = packed.batches
    chex.assert_shape(batch.tokens, (1, 16))
    np.testing.assert_array_equal(batch.tokens[0, :8], [5, 6, 7, 8, 9, 3, 4, 0])
    np.testing.assert_array_equal(
      batch.positions[0, :8], [0, 1, 2, 3, 4, 0, 1, 0]
    )
    np.testing.assert_array_equal(
      batch.segments[0, :8], [1, 1, 1, 1, 1, 2, 2, 0]
    )
    np.testing.assert_array_equal(batch.index[0, :4], [1, 2, 3, 5])
    np.testing.assert_array_equal(batch.targets[0, :4], [7, 8, 9, 4])
    np.testing.assert_array_equal(batch.mask[0, :4], [1, 0, 1, 1])
    np.testing.assert_array_equal(batch.turn[0, :4], [0, 0, 0, 1])
    np.testing.assert_array_equal(batch.advantages[0, :4], [2, 2, 2, -1])
    np.testing.assert_allclose(
      batch.sampler_logprobs[0, :4], [-0.1, -0.2, -0.3, -0.1], rtol=1e-6
    )
    np.testing.assert_array_equal(batch.old_logprobs, batch.sampler_logprobs)
    np.testing.assert_array_equal(batch.mask[0, 4:], 0)
    np.testing.assert_array_equal(batch.turn[0, 4:], -1)
    self.assertAlmostEqual(packed.stats["padding"], 9 / 16)

  @parameterized.product(
    rows=(1, 3, 4), lengths=((64,), (64, 256)), minibatches=(1, 3)
  )
  def test_every_token_is_there_once(self, rows, lengths, minibatches):
    rollout, advantages = random_rollout(3, 12)
    packed = pack_rollout(
      rollout,
      advantages,
      lengths=lengths,
      rows=rows,
      minibatches=minibatches,
      seed=5,
    )
    self.assertLen(packed.batches, minibatches)
    self.assertEqual(unpack(packed), expected(rollout, advantages))
    shapes = {batch.tokens.shape for batch in packed.batches}
    self.assertLen(shapes, 1)
    micro, left = divmod(shapes.pop()[0], rows)
    self.assertEqual(left, 0)
    self.assertEqual(micro & (micro - 1), 0)

  def test_empty_rows_stand_at_the_end(self):
    rollout, advantages = random_rollout(4, 9)
    (batch,) = pack_rollout(rollout, advantages, lengths=[64], rows=4).batches
    filled = np.any(batch.segments > 0, axis=1)
    self.assertTrue(np.all(filled[:-1] >= filled[1:]))
    self.assertFalse(np.any(batch.mask[~filled]))

  def test_same_input_gives_same_rows(self):
    rollout, advantages = random_rollout(5, 8)
    options = dict(lengths=[64, 128], rows=2, minibatches=2)
    first = pack_rollout(rollout, advantages, seed=1, **options)
    again = pack_rollout(rollout, advantages, seed=1, **options)
    other = pack_rollout(rollout, advantages, seed=2, **options)
    chex.assert_trees_all_equal(first.batches, again.batches)
    self.assertFalse(
      np.array_equal(first.batches[0].tokens, other.batches[0].tokens)
    )

  def test_padding_is_small_on_turns_of_many_lengths(self):
    rng = np.random.default_rng(0)
    pairs = [
      (np.ones(int(a)), np.ones(int(b)))
      for a, b in zip(
        np.clip(rng.lognormal(5.0, 0.6, 400), 30, 700),
        np.clip(rng.lognormal(4.0, 0.5, 400), 10, 300),
        strict=True,
      )
    ]
    packed = batching.pack(
      batching.pair_segments(pairs), lengths=[1024], rows=4
    )
    self.assertLess(packed.stats["padding"], 0.1)
    self.assertLess(packed.stats["response_padding"], 0.3)

  @parameterized.parameters(1, 2, 4)
  def test_padding_is_small_on_a_recorded_rollout(self, minibatches):
    pairs = [
      (np.ones(prompt), np.ones(response))
      for prompt, response, count in RECORDED
      for _ in range(count)
    ]
    packed = batching.pack(
      batching.pair_segments(pairs),
      lengths=[160],
      rows=8,
      minibatches=minibatches,
    )
    self.assertLen(pairs, 415)
    self.assertLess(packed.stats["padding"], 0.1)
    self.assertLess(packed.stats["response_padding"], 0.3)

  def test_loose_rows_make_whole_micro_batches(self):
    # Eleven rows in each of three parts; one row is a segment of 16.
    segments = batching.pair_segments([(np.ones(15), np.ones(1))] * 33)
    packed = batching.pack(segments, lengths=[16], rows=4, minibatches=3)
    counts = [int(batch.mask.sum()) for batch in packed.batches]
    self.assertEqual(sorted(counts), [9, 12, 12])
    turns = [batch.turn[batch.turn >= 0] for batch in packed.batches]
    self.assertEqual(sorted(np.concatenate(turns)), list(range(33)))

  def test_loose_rows_go_where_there_are_fewest(self):
    rng = np.random.default_rng(0)
    found = batching._join_loose([[1] * 16, [2] * 15], 4, rng)
    self.assertEqual([len(part) for part in found], [16, 15])
    parts = [[i] * count for i, count in enumerate((32, 30, 31, 31))]
    found = batching._join_loose(parts, 8, rng)
    self.assertEqual([len(part) for part in found], [32, 32, 32, 28])
    self.assertEqual(sorted(sum(found, [])), sorted(sum(parts, [])))

  def test_parts_smaller_than_a_micro_batch_stay(self):
    segments = batching.pair_segments([(np.ones(15), np.ones(1))] * 9)
    packed = batching.pack(segments, lengths=[16], rows=4, minibatches=3)
    counts = [int(batch.mask.sum()) for batch in packed.batches]
    self.assertEqual(counts, [3, 3, 3])

  def test_shortest_row_that_is_full_enough_wins(self):
    pairs = [(np.ones(30), np.ones(34))] * 8
    segments = batching.pair_segments(pairs)
    packed = batching.pack(segments, lengths=[512, 64, 128], rows=2)
    self.assertEqual(packed.stats["row_length"], 64)
    pairs = [(np.ones(30), np.ones(12))] * 9
    segments = batching.pair_segments(pairs)
    packed = batching.pack(segments, lengths=[64, 128], rows=1)
    self.assertEqual(packed.stats["row_length"], 128)

    pairs = [(np.ones(29), np.ones(30))] * 13
    segments = batching.pair_segments(pairs)
    packed = batching.pack(segments, lengths=[64, 768], rows=1)
    self.assertEqual(packed.stats["row_length"], 64)

  def test_few_turns_get_rows_that_they_fill(self):
    self.assertEqual(batching.row_lengths(1024), tuple(range(256, 1025, 64)))
    self.assertEqual(batching.row_lengths(64), (16, 32, 48, 64))
    self.assertEqual(batching.row_lengths(160), tuple(range(48, 161, 16)))
    self.assertEqual(batching.row_lengths(16), (16,))
    options = dict(longest=1024, rows=2, by_row=True)
    # Two turns, each in a row that it nearly fills; by hand, 1 - 860 / 896.
    pairs = [(np.ones(390), np.ones(40))] * 2
    packed = batching.pack_close(batching.pair_segments(pairs), **options)
    self.assertEqual(packed.stats["rows"], 2)
    self.assertEqual(packed.stats["row_length"], 448)
    self.assertAlmostEqual(packed.stats["padding"], 1 - 860 / 896)
    # The same where empty rows of a micro-batch are computed as well.
    packed = batching.pack_close(
      batching.pair_segments(pairs), longest=1024, rows=2
    )
    self.assertEqual(packed.stats["row_length"], 448)
    # Many turns fill the usual rows well enough, though shorter ones better.
    pairs = [(np.ones(290), np.ones(30))] * 60
    packed = batching.pack_close(batching.pair_segments(pairs), **options)
    self.assertEqual(packed.stats["row_length"], 1024)
    self.assertAlmostEqual(packed.stats["padding"], 1 - 960 / 1024)

  def test_long_turns_are_placed_first(self):
    pairs = [(np.ones(size - 1), np.ones(1)) for size in (4, 4, 4, 12, 12, 12)]
    segments = batching.pair_segments(pairs)
    packed = batching.pack(segments, lengths=[16], rows=1)
    self.assertEqual(packed.stats["rows"], 3)

  def test_nothing_to_train_on_gives_no_batch(self):
    rollout = [make_trajectory(make_turn([1], [2]), aborted=True)]
    packed = pack_rollout(rollout, [[1.0]], lengths=[16], rows=1)
    self.assertEqual(packed.batches, ())


class SelectionTest(chex.TestCase):
  def test_aborted_and_void_trajectories_are_left_out(self):
    rollout = [
      make_trajectory(make_turn([1], [2]), aborted=True),
      make_trajectory(
        make_turn([1], [3]), make_turn([1], [4], action_valid=False)
      ),
      make_trajectory(make_turn([1], [5]), make_turn([1], [])),
    ]
    values = [[1.0], [1.0, 1.0], [1.0, 1.0]]
    segments = batching.trajectory_segments(rollout, values, max_length=8)
    self.assertEqual([int(s.targets[0]) for s in segments], [3, 4, 5])
    self.assertEqual([int(s.turn[0]) for s in segments], [1, 2, 3])
    segments = batching.trajectory_segments(
      rollout, values, max_length=8, drop_void=True
    )
    self.assertEqual([int(s.targets[0]) for s in segments], [5])

  def test_discarded_attempts_follow_the_turns(self):
    again = make_turn([7, 8], [1, 2, 3], forced=[1])
    other = make_turn([5], [4])
    tried = dataclasses.replace(
      make_turn([7, 8], [9]), discarded=(again.response, other.response)
    )
    rollout = [make_trajectory(tried), make_trajectory(other, other)]
    advantages = [[0.5], [1.0, -1.0]]
    segments = batching.trajectory_segments(
      rollout, advantages, max_length=16, discarded=-0.25
    )
    self.assertEqual([s.turn[0] for s in segments], [0, 1, 2, 3, 4])
    for segment, response in zip(segments[3:], ([1, 2, 3], [4]), strict=True):
      np.testing.assert_array_equal(segment.tokens, [7, 8, *response])
      np.testing.assert_array_equal(segment.advantages, -0.25)
    np.testing.assert_array_equal(segments[3].mask, [1, 0, 1])
    np.testing.assert_allclose(segments[3].logprobs, [-0.1, -0.2, -0.3])
    packed = batching.pack(segments, lengths=[16], rows=2)
    values = [batch.advantages for batch in packed.batches]
    taken = batching.to_turns(packed.batches, values, turns=3)
    self.assertEqual([t.tolist() for t in taken], [[0.5], [1.0], [-1.0]])
    without = batching.trajectory_segments(rollout, advantages, max_length=16)
    self.assertLen(without, 3)

  def test_discarded_attempts_of_an_aborted_episode_are_left_out(self):
    turn = make_turn([1], [2])
    tried = dataclasses.replace(turn, discarded=(turn.response,))
    segments = batching.trajectory_segments(
      [make_trajectory(tried, aborted=True), make_trajectory(tried)],
      [[0.0], [1.0]],
      max_length=16,
      discarded=-1.0,
    )
    # Turns 0 and 1, attempts 2 and 3.
    self.assertEqual([s.turn[0] for s in segments], [1, 3])

  def test_advantages_may_differ_by_token(self):
    rollout = [make_trajectory(make_turn([1], [2, 3, 4]))]
    values = [[np.array([0.5, 0.25, -1.0])]]
    (segment,) = batching.trajectory_segments(rollout, values, max_length=8)
    np.testing.assert_array_equal(segment.advantages, [0.5, 0.25, -1.0])

  def test_growing_dialogue_becomes_one_segment(self):
    turns = [
      make_turn([1, 2], [3, 4]),
      make_turn([1, 2, 3, 4, 5], [6]),
      make_turn([1, 2, 3, 4, 5, 6, 7], [8, 9]),
    ]
    rollout, values = [make_trajectory(*turns)], [[1.0, 2.0, 3.0]]
    (whole,) = batching.trajectory_segments(rollout, values, max_length=9)
    np.testing.assert_array_equal(whole.tokens, np.arange(1, 10))
    np.testing.assert_array_equal(whole.turn, [0, 0, 1, 2, 2])
    packed = pack_rollout(rollout, values, lengths=[16], rows=1)
    self.assertEqual(unpack(packed), expected(rollout, values))
    cut = batching.trajectory_segments(rollout, values, max_length=8)
    self.assertEqual([len(segment.tokens) for segment in cut], [6, 9])


class PerTurnTest(chex.TestCase):
  def test_taken_apart_by_turn(self):
    rollout, advantages = random_rollout(6, 5)
    everything = [turn for one in rollout for turn in one.turns]
    packed = pack_rollout(rollout, advantages, lengths=[64], rows=2)
    found = batching.to_turns(
      packed.batches,
      [batch.sampler_logprobs for batch in packed.batches],
      turns=len(everything) + 1,
    )
    self.assertLen(found, len(everything) + 1)
    for turn, values in zip(everything, found, strict=False):
      np.testing.assert_array_equal(values, turn.response.logprobs)
    self.assertEmpty(found[-1])

  @parameterized.parameters(1, 3)
  def test_laid_out_again(self, minibatches):
    rollout, advantages = random_rollout(5, 6)
    rng = np.random.default_rng(0)
    values = [
      rng.normal(size=len(turn.response.tokens)).astype(np.float32)
      for one in rollout
      for turn in one.turns
    ]
    packed = pack_rollout(
      rollout, advantages, lengths=[64], rows=2, minibatches=minibatches
    )
    laid = [batching.from_turns(batch, values) for batch in packed.batches]
    for batch, of_batch in zip(packed.batches, laid, strict=True):
      self.assertFalse(np.any(of_batch[batch.turn < 0]))
    back = batching.to_turns(packed.batches, laid, turns=len(values))
    chex.assert_trees_all_equal(back, values)

  def test_nothing_on_empty_rows(self):
    rollout, advantages = random_rollout(2, 1)
    (batch,) = pack_rollout(rollout, advantages, lengths=[64], rows=1).batches
    empty = batch.replace(turn=np.full_like(batch.turn, -1))
    found = batching.to_turns([empty], [batch.advantages], turns=2)
    self.assertEqual([len(values) for values in found], [0, 0])
    self.assertFalse(np.any(batching.from_turns(empty, [])))


class OverlongTest(chex.TestCase):
  def test_only_the_responses_that_were_cut_off_are_left_out(self):
    turns = [make_turn([1, 2], [3]), make_turn([4], [5, 6])]
    cut = dataclasses.replace(
      turns[0],
      response=dataclasses.replace(turns[0].response, finish="length"),
    )
    rollout = [make_trajectory(cut, turns[1])]
    segments = batching.trajectory_segments(
      rollout, max_length=9, drop_overlong=True
    )
    self.assertEqual([int(segment.turn[0]) for segment in segments], [1])
    kept = batching.trajectory_segments(rollout, max_length=9)
    self.assertEqual([int(segment.turn[0]) for segment in kept], [0, 1])


class RefusalTest(chex.TestCase):
  @parameterized.parameters(
    (dict(lengths=[16], rows=1), "turn 0 has 20 tokens, 2 of them response;"),
    (dict(lengths=[30], rows=1), "row length 30 is not a multiple of 16.*32"),
    (dict(lengths=[], rows=1), "row lengths are"),
    (dict(lengths=[32], rows=0), "rows is 0"),
    (dict(lengths=[32], rows=1, minibatches=0), "minibatches is 0"),
  )
  def test_bad_input_gets_one_line(self, options, message):
    segments = batching.pair_segments([(np.ones(18), np.ones(2))])
    with self.assertRaisesRegex(ValueError, message) as raised:
      batching.pack(segments, **options)
    self.assertNotIn("\n", str(raised.exception))

  def test_advantages_must_match_the_rollout(self):
    rollout = [make_trajectory(make_turn([1], [2]))]
    with self.assertRaisesRegex(ValueError, "2 advantages for the 1 turns"):
      batching.trajectory_segments(rollout, [[1.0, 2.0]], max_length=8)
    with self.assertRaisesRegex(ValueError, "advantages of 0 trajectories"):
      batching.trajectory_segments(rollout, [], max_length=8)

  def test_empty_prompt_is_refused(self):
    with self.assertRaisesRegex(ValueError, "turn 0 has an empty prompt"):
      batching.pair_segments([(np.zeros(0), np.ones(2))])


if __name__ == "__main__":
  absltest.main()
