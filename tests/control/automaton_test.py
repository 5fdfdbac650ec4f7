"""The token automaton against plain substring search."""

import time

from absl.testing import absltest, parameterized
import chex
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from t2po_jax.control import automaton as automata


def _search(text: bytes, pattern: bytes) -> list[int]:
  """Ends of every occurrence, overlapping ones included."""
  return [
    i + len(pattern)
    for i in range(len(text) - len(pattern) + 1)
    if text[i : i + len(pattern)] == pattern
  ]


def _pending(text: bytes, pattern: bytes) -> int:
  """Length of the longest proper prefix of the pattern at the text's end."""
  return max(n for n in range(len(pattern)) if text.endswith(pattern[:n]))


class AutomatonTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_tag_over_token_borders(self):
    tokens = [b"", b"</", b"think", b">\n<action>", b" so </think> a", b"x"]
    machine = automata.build(tokens, ["</think>", "<action>"])
    step = self.variant(automata.step)
    state = automata.start(2)
    seen = []
    for pair in ((1, 5), (0, 4), (2, 0), (3, 1), (5, 3)):
      state, hits = step(machine, state, jnp.array(pair))
      seen.append(hits.tolist())
    # The second row ends in "</" + ">\n<action>": no </think> there.
    self.assertEqual(seen, [[0, 0], [0, 1], [0, 0], [3, 0], [0, 2]])

  def test_begun_counts_bytes_of_the_unfinished_tag(self):
    machine = automata.build([b"a<", b"/", b"think", b">", b"."], ["</think>"])
    state = automata.start(1)
    depths = []
    for token in (0, 1, 2, 4, 0, 1, 2, 3):
      state, _ = automata.step(machine, state, jnp.array([token]))
      depths.append(int(automata.partial_match(machine, state, 0)[0]))
    self.assertEqual(depths, [1, 2, 7, 0, 1, 2, 7, 0])

  @hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
  @hypothesis.given(
    patterns=st.lists(
      st.text("ab<é", min_size=1, max_size=4),
      min_size=1,
      max_size=5,
      unique=True,
    ),
    tokens=st.lists(
      st.text("ab<é", max_size=6).map(str.encode)
      # Single bytes split the two-byte letter.
      | st.sampled_from([b"\xc3", b"\xa9", b"a"]),
      min_size=1,
      max_size=8,
    ),
    stream=st.lists(st.integers(0, 7), max_size=12),
  )
  def test_equals_substring_search(self, patterns, tokens, stream):
    machine = automata.build(tokens, patterns, vocab_size=9)
    encoded = [pattern.encode() for pattern in patterns]
    text, state = b"", 0
    for token in stream:
      before = len(text)
      text += tokens[token] if token < len(tokens) else b""
      hits = machine.hit[state, token]
      state = machine.next[state, token]
      for i, pattern in enumerate(encoded):
        completed = any(end > before for end in _search(text, pattern))
        self.assertEqual(bool(automata.completed(hits, i)), completed)
        self.assertEqual(machine.depth[state, i], _pending(text, pattern))

  def test_rows_are_independent(self):
    rng = np.random.default_rng(0)
    tokens = [bytes(rng.choice(list(b"ab<"), size=n)) for n in range(6)]
    machine = automata.build(tokens, ["ab<", "ba"])
    streams = rng.integers(0, len(tokens), (5, 20))
    together = automata.start(5)
    alone = [automata.start(1) for _ in range(5)]
    for column in streams.T:
      together, hits = automata.step(machine, together, jnp.array(column))
      for row in range(5):
        alone[row], hit = automata.step(
          machine, alone[row], jnp.array(column[row : row + 1])
        )
        self.assertEqual(int(hit[0]), int(hits[row]))

  def test_is_a_pytree_and_steps_inside_scan(self):
    machine = jax.device_put(automata.build([b"a", b"b"], ["ab"]))

    @jax.jit
    def count(machine, tokens):
      def body(state, token):
        state, hits = automata.step(machine, state, token)
        return state, automata.completed(hits, 0)

      return jax.lax.scan(body, automata.start(1), tokens)[1].sum()

    self.assertEqual(
      int(count(machine, jnp.array([[0], [1], [1], [0], [1]]))), 2
    )

  def test_mask_grows_with_the_number_of_patterns(self):
    for count, dtype in ((8, np.uint8), (9, np.uint16), (32, np.uint32)):
      patterns = [f"{i:02d}" for i in range(count)]
      tokens = [pattern.encode() for pattern in patterns]
      machine = automata.build(tokens, patterns)
      self.assertEqual(machine.hit.dtype, dtype)
      np.testing.assert_array_equal(
        machine.hit[0], [1 << i for i in range(count)]
      )

  def test_vocabulary_without_text(self):
    machine = automata.build([b"", b""], ["a"], vocab_size=5)
    self.assertFalse(machine.hit.any())
    self.assertFalse(machine.next[0].any())

  def test_a_large_vocabulary_builds_quickly(self):
    rng = np.random.default_rng(0)
    letters = rng.integers(32, 127, 2_000_000, dtype=np.uint8).tobytes()
    lengths = np.minimum(rng.geometric(1 / 6, 151_669), 128)
    ends = np.cumsum(lengths)
    tokens = [letters[e - n : e] for e, n in zip(ends, lengths, strict=True)]
    begin = time.process_time()
    machine = automata.build(
      tokens, ["</think>", "</search>", "</answer>", "</action>"]
    )
    # About 0.5 s of processor time.
    self.assertLess(time.process_time() - begin, 4.0)
    self.assertEqual(machine.next.dtype, np.int16)


class BadInputTest(parameterized.TestCase):
  @parameterized.parameters(
    ([], "patterns: found 0 strings"),
    (["a"] * 33, "patterns: found 33 strings"),
    (["a", ""], "non-empty"),
    (["a", "a"], "different"),
  )
  def test_patterns(self, patterns, message):
    with self.assertRaisesRegex(ValueError, message):
      automata.build([b"a"], patterns)

  def test_vocabulary_too_small(self):
    with self.assertRaisesRegex(ValueError, "vocab_size: found 1"):
      automata.build([b"a", b"b"], ["a"], vocab_size=1)


if __name__ == "__main__":
  absltest.main()
