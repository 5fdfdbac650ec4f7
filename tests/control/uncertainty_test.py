"""Entropy, confidence, M and Phi against loops over their formulas."""

import dataclasses
import math

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from t2po_jax import keys
from t2po_jax.control import uncertainty

_measure = jax.jit(uncertainty.measure, static_argnums=1)


def _log_softmax(row):
  top = max(row)
  total = sum(math.exp(x - top) for x in row)
  return [x - top - math.log(total) for x in row]


def _entropy(row):
  return -sum(math.exp(x) * x for x in _log_softmax(row))


def _confidence(row, top_j):
  return -sum(sorted(_log_softmax(row))[-top_j:]) / top_j


def _measures(entropy, confidence=0.0, top_logprob=0.0):
  values = (0.0, entropy, confidence, top_logprob)
  return uncertainty.Measures(
    *(jnp.atleast_1d(jnp.asarray(v, jnp.float32)) for v in values)
  )


class MeasureTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_two_tokens_by_hand(self):
    # p = (3/4, 1/4).
    logits = jnp.log(jnp.array([[3.0, 1.0]]))
    found = self.variant(lambda x: uncertainty.measure(x, 2))(logits)
    entropy = math.log(4) - 0.75 * math.log(3)
    confidence = -(math.log(0.75) + math.log(0.25)) / 2
    np.testing.assert_allclose(found.entropy, [entropy], rtol=1e-6)
    np.testing.assert_allclose(found.confidence, [confidence], rtol=1e-6)
    np.testing.assert_allclose(found.log_z, [math.log(4)], rtol=1e-6)
    np.testing.assert_allclose(found.top_logprob, [math.log(0.75)], rtol=1e-6)

  def test_equals_loop(self):
    logits = np.random.default_rng(0).normal(0, 3, (3, 4, 37)).astype("f4")
    found = _measure(jnp.array(logits), 5)
    for place in np.ndindex(3, 4):
      row = logits[place].tolist()
      self.assertAlmostEqual(found.entropy[place], _entropy(row), places=4)
      self.assertAlmostEqual(
        found.confidence[place], _confidence(row, 5), places=4
      )
      self.assertAlmostEqual(
        found.top_logprob[place], max(_log_softmax(row)), places=4
      )

  def test_sharper_means_less_entropy_and_more_confidence(self):
    logits = np.random.default_rng(1).normal(size=(1, 50)).astype("f4")
    flat, sharp = (_measure(jnp.array(logits * s), 10) for s in (1.0, 5.0))
    self.assertLess(sharp.entropy[0], flat.entropy[0])
    self.assertGreater(sharp.confidence[0], flat.confidence[0])

  def test_shift_and_padding_change_nothing(self):
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(4, 30)).astype("f4")
    plain = _measure(jnp.array(logits), 7)
    padded = np.concatenate([logits, np.full((4, 9), -np.inf, "f4")], axis=1)
    padded = padded[:, rng.permutation(39)]
    chex.assert_trees_all_close(
      _measure(jnp.array(padded), 7), plain, rtol=1e-5
    )
    shifted = _measure(jnp.array(logits + 64.0), 7)
    np.testing.assert_allclose(shifted.log_z, plain.log_z + 64, rtol=1e-6)
    for name in ("entropy", "confidence", "top_logprob"):
      np.testing.assert_allclose(
        getattr(shifted, name), getattr(plain, name), atol=2e-5
      )

  def test_half_precision_logits_are_measured_in_float32(self):
    logits = jnp.arange(8, dtype=jnp.bfloat16)[None]
    found = _measure(logits, 3)
    chex.assert_type(found, jnp.float32)
    np.testing.assert_allclose(
      found.entropy[0], _entropy([float(i) for i in range(8)]), rtol=1e-5
    )

  @chex.variants(with_jit=True, without_jit=True)
  def test_degenerate_distributions(self):
    low = -np.inf
    logits = jnp.array(
      [[0.0, low, low], [2.0, 2.0, 2.0], [low, low, low], [1e4, -1e4, 0.0]]
    )
    with jax.debug_nans(True):
      found = self.variant(lambda x: uncertainty.measure(x, 2))(logits)
    np.testing.assert_allclose(found.entropy, [0, math.log(3), 0, 0], rtol=1e-6)
    # A single possible token: the mean is over it alone.
    np.testing.assert_allclose(
      found.confidence, [0, math.log(3), 0, 5e3], rtol=1e-6
    )
    self.assertEqual(found.log_z[2], -np.inf)

  def test_entropy_has_a_gradient_with_forbidden_tokens(self):
    logits = jnp.array([0.5, -1.0, -jnp.inf, 0.0])
    with jax.debug_nans(True):
      slope = jax.grad(lambda x: uncertainty.measure(x, 2).entropy)(logits)
    log_p = np.array(_log_softmax([0.5, -1.0, -1e9, 0.0]))
    entropy = _entropy([0.5, -1.0, -1e9, 0.0])
    np.testing.assert_allclose(
      slope, -np.exp(log_p) * (log_p + entropy), atol=1e-6
    )

  @parameterized.parameters(0, 6)
  def test_top_j_out_of_range(self, top_j):
    with self.assertRaisesRegex(ValueError, f"top_j: found {top_j}"):
      uncertainty.measure(jnp.zeros((1, 5)), top_j)


class LargestValuesTest(parameterized.TestCase):
  @parameterized.product(
    vocab_size=(20, 97, 128), blocks=(16, 32), count=(1, 7)
  )
  def test_blockwise_equals_sorting_with_ties(self, vocab_size, blocks, count):
    rng = np.random.default_rng(vocab_size + blocks)
    # Few different values, some of them -inf: ties everywhere.
    values = rng.integers(-3, 4, (2, 3, vocab_size)).astype("f4")
    values[values == -3] = -np.inf
    np.testing.assert_array_equal(
      uncertainty.blockwise_largest(jnp.array(values), count, blocks=blocks),
      -np.sort(-values)[..., :count],
    )

  @parameterized.parameters(16_384, 16_411, 49_152)
  def test_the_chosen_path_finds_the_same(self, vocab_size):
    values = jax.random.normal(jax.random.key(0), (2, vocab_size)).round(2)
    expected = -np.sort(-np.asarray(values))[:, :20]
    chosen = jax.jit(lambda x: uncertainty.largest_values(x, 20))
    np.testing.assert_array_equal(chosen(values), expected)
    np.testing.assert_array_equal(jax.vmap(chosen)(values), expected)


def _advance(
  kind, measures, state, *, active=None, vocab_size=10, top_j=20, **o
):
  signal = uncertainty.SIGNALS[kind]
  active = jnp.ones(state.shape[0], bool) if active is None else active
  return signal.advance(
    measures,
    state,
    active,
    vocab_size=vocab_size,
    top_j=top_j,
    settings=signal.options(**o),
  )


class SignalTest(chex.TestCase):
  def test_running_extremes_over_active_rows(self):
    state = uncertainty.SIGNALS["calibrated"].start(2)
    for h, c, active in (
      ([1.0, 5.0], [4.0, 2.0], [True, True]),
      ([3.0, 9.0], [2.0, 9.0], [True, False]),
      ([2.0, 4.0], [3.0, 1.0], [True, True]),
    ):
      _, state = _advance(
        "calibrated",
        _measures(jnp.array(h), jnp.array(c)),
        state,
        active=jnp.array(active),
      )
    # Smallest and largest entropy, smallest and largest confidence.
    np.testing.assert_array_equal(state, [[1, 3, 2, 4], [4, 5, 1, 2]])

  @chex.variants(with_jit=True, without_jit=True)
  def test_by_hand(self):
    state = jnp.array([[1.0, 3.0, 2.0, 6.0]])
    # H~ = 1/4, C~ = 3/4.
    measures = _measures(1.5, 5.0)
    for kind, expected in (
      ("calibrated", 0.4 * 0.25 + 0.6 * 0.25),
      ("entropy", 0.25),
      ("confidence", 0.25),
    ):
      found, after = self.variant(lambda m, e, kind=kind: _advance(kind, m, e))(
        measures, state
      )
      np.testing.assert_allclose(found, [expected], rtol=1e-6)
      np.testing.assert_array_equal(after, state)

  def test_alpha_blends(self):
    found, _ = _advance(
      "calibrated",
      _measures(1.0, 1.0),
      jnp.array([[0.0, 4.0, 0.0, 4.0]]),
      alpha=0.25,
    )
    np.testing.assert_allclose(found, [0.25 * 0.25 + 0.75 * 0.75], rtol=1e-6)

  def test_released_formula(self):
    state = uncertainty.SIGNALS["released"].start(1)
    found, after = _advance(
      "released", _measures(1.0, 0.0, -0.5), state, vocab_size=100
    )
    expected = 0.6 * -0.5 + 0.4 * (1 - 1 / math.log(100))
    np.testing.assert_allclose(found, [expected], rtol=1e-6)
    self.assertEqual(after.shape, (1, 0))

  def test_vocab_normalizer_needs_no_history(self):
    top = math.log(16)
    found, _ = _advance(
      "calibrated",
      _measures(top / 2, 2 * top * 3 / 4 / 2),
      uncertainty.SIGNALS["calibrated"].start(1),
      normalizer="vocab",
      vocab_size=16,
      top_j=4,
    )
    np.testing.assert_allclose(found, [0.5], rtol=1e-6)

  def test_a_sequence_equals_a_loop_over_its_prefixes(self):
    rng = np.random.default_rng(3)
    entropies, confidences = rng.uniform(0, 5, (2, 12)).astype("f4")
    state = uncertainty.SIGNALS["calibrated"].start(1)
    for t, (h, c) in enumerate(zip(entropies, confidences, strict=True)):
      found, state = _advance("calibrated", _measures(h, c), state)
      past_h, past_c = entropies[: t + 1], confidences[: t + 1]
      expected = 0.6
      if t > 0:
        spread = (h - past_h.min()) / (past_h.max() - past_h.min())
        sharp = (c - past_c.min()) / (past_c.max() - past_c.min())
        expected = 0.4 * spread + 0.6 * (1 - sharp)
      self.assertAlmostEqual(float(found[0]), expected, places=5)

  @chex.variants(with_jit=True, without_jit=True)
  def test_no_range_gives_zero(self):
    signal = self.variant(lambda m, e: _advance("entropy", m, e)[0])
    with jax.debug_nans(True):
      before = signal(_measures(1.0), uncertainty.SIGNALS["entropy"].start(1))
      after = signal(_measures(1.0, 1.0), jnp.ones((1, 4)))
    self.assertEqual(before[0], 0.0)
    self.assertEqual(after[0], 0.0)

  def test_unknown_normalizer(self):
    with self.assertRaisesRegex(ValueError, "normalizer: found 'batch'"):
      _advance("entropy", _measures(1.0), jnp.ones((1, 4)), normalizer="batch")

  def test_a_name_or_a_key_that_is_taken(self):
    @dataclasses.dataclass(frozen=True)
    class Other:
      alpha: float = keys.key(0.9, "Something else.")

    other = uncertainty.Signal(uncertainty.released, Other)
    with self.assertRaisesRegex(ValueError, "'entropy': the name is taken"):
      uncertainty.register("entropy", other)
    with self.assertRaisesRegex(ValueError, "key 'alpha' of Other differs"):
      uncertainty.register("other", other)
    self.assertNotIn("other", uncertainty.SIGNALS)


class TurnScoreTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_by_hand(self):
    signal = jnp.array([[0.5, 0.125, 0.9], [0.0, 1.0, 1.0], [0.3, 0.3, 0.3]])
    mask = jnp.array([[1, 1, 0], [1, 1, 0], [0, 0, 0]])
    with jax.debug_nans(True):
      score = self.variant(uncertainty.turn_score)(signal, mask)
    # sqrt(0.5 * 0.125), sqrt(1e-6 * 1), and nothing sampled.
    np.testing.assert_allclose(score, [0.25, 1e-3, 0.0], rtol=1e-5)

  @parameterized.parameters(
    # What the paper's released code finds for the same numbers.
    ([0.4, 0.4, -0.5], 0.1),
    ([0.4, 0.4, -0.3], 0.5 / 3),
  )
  def test_the_arithmetic_mean_of_a_signal_that_may_be_negative(self, m, phi):
    score = uncertainty.turn_score(
      jnp.array([m + [9.0], m + [9.0]]),
      jnp.array([[1, 1, 1, 0], [0, 0, 0, 0]]),
      mean="arithmetic",
    )
    np.testing.assert_allclose(score, [phi, 0.0], rtol=1e-5)
    self.assertEqual(uncertainty.SIGNALS["released"].mean, "arithmetic")
    with self.assertRaisesRegex(ValueError, "mean: found 'harmonic'"):
      uncertainty.turn_score(score, score, mean="harmonic")

  def test_equals_loop_whatever_the_padding_holds(self):
    rng = np.random.default_rng(4)
    signal = rng.uniform(size=(3, 9)).astype("f4")
    mask = rng.uniform(size=(3, 9)) < 0.6
    mask[:, 0] = True
    expected = []
    for row, kept in zip(signal, mask, strict=True):
      product, count = 1.0, 0
      for value, keep in zip(row, kept, strict=True):
        if keep:
          product, count = product * max(float(value), 1e-6), count + 1
      expected.append(product ** (1 / count))
    signal[~mask] = np.nan
    score = uncertainty.turn_score(jnp.array(signal), jnp.array(mask))
    np.testing.assert_allclose(score, expected, rtol=1e-5)


if __name__ == "__main__":
  absltest.main()
