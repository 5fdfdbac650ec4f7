"""Filters and the inverse-CDF draw against plain loops."""

from absl.testing import absltest, parameterized
import chex
import jax.numpy as jnp
import numpy as np

from t2po_jax.rollout import draw

Sampling = draw.Sampling


def loop_filter(logits, sampling):
  """Kept token ids of one row, by the definitions."""
  order = sorted(range(len(logits)), key=lambda v: -logits[v])
  if sampling.top_k:
    order = order[: sampling.top_k]
  probs = np.exp([logits[v] - max(logits) for v in order])
  probs = probs / probs.sum()
  kept, total = [], 0.0
  for token, p in zip(order, probs, strict=True):
    if total >= sampling.top_p:
      break
    kept.append(token)
    total += p
  floor = max(logits) + np.log(sampling.min_p) if sampling.min_p else -np.inf
  return {v for v in kept if logits[v] >= floor}


class FilterTest(chex.TestCase):
  @parameterized.parameters(
    (Sampling(top_k=5),),
    (Sampling(top_p=0.7),),
    (Sampling(min_p=0.2),),
    (Sampling(top_k=20, top_p=0.9),),
    (Sampling(top_k=20, top_p=0.9, min_p=0.05),),
    (Sampling(top_k=1000),),
  )
  def test_keeps_what_the_definitions_keep(self, sampling):
    logits = np.random.default_rng(0).normal(0, 2, (6, 50)).astype(np.float32)
    found = np.asarray(draw.filter_logits(jnp.asarray(logits), sampling))
    for row, answer in zip(logits, found, strict=True):
      kept = set(np.flatnonzero(np.isfinite(answer)).tolist())
      self.assertEqual(kept, loop_filter(row.tolist(), sampling))

  def test_the_likeliest_token_always_stays(self):
    logits = jnp.asarray([[0.0, 100.0, 0.0]])
    kept = draw.filter_logits(logits, Sampling(top_p=1e-6, min_p=0.99))
    np.testing.assert_array_equal(np.isfinite(kept), [[False, True, False]])

  @parameterized.parameters(
    ({"temperature": -1.0}, "temperature"),
    ({"top_k": -1}, "top_k"),
    ({"top_p": 0.0}, "top_p"),
    ({"min_p": 1.0}, "min_p"),
  )
  def test_refuses_bad_settings_by_name(self, setting, name):
    with self.assertRaisesRegex(ValueError, f"sampling.{name}"):
      Sampling(**setting)


class DrawTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(3, 256, 257, 1000)
  def test_is_the_inverse_of_the_cumulative_distribution(self, size):
    generator = np.random.default_rng(size)
    probs = generator.dirichlet(np.full(size, 0.3), 64).astype(np.float32)
    uniform = generator.uniform(size=64).astype(np.float32)
    found = np.asarray(self.variant(draw.invert_cdf)(probs, uniform))
    for p, u, token in zip(probs, uniform, found, strict=True):
      edges = np.cumsum(p.astype(np.float64))
      edges = np.concatenate([[0], edges]) / edges[-1]
      self.assertGreater(p[token], 0)
      self.assertLessEqual(edges[token], u + 1e-5)
      self.assertGreaterEqual(edges[token + 1], u - 1e-5)

  def test_extreme_numbers_stay_inside_the_support(self):
    probs = np.zeros((2, 600), np.float32)
    probs[:, 300] = probs[:, 301] = 1e-30
    uniform = np.asarray([0.0, np.nextafter(np.float32(1), np.float32(0))])
    found = np.asarray(draw.invert_cdf(jnp.asarray(probs), uniform))
    self.assertContainsSubset(found.tolist(), [300, 301])

  def test_the_largest_number_is_below_any_sum(self):
    uniform = np.nextafter(np.float32(1), np.float32(0))
    weights = np.zeros((4096, 300), np.float32)
    sums = np.random.default_rng(0).uniform(1, 2, 4094).astype(np.float32)
    edges = np.float32([1, np.nextafter(np.float32(2), np.float32(0))])
    weights[:, 280] = np.concatenate([sums, edges])
    found = draw.invert_cdf(jnp.asarray(weights), jnp.full(4096, uniform))
    np.testing.assert_array_equal(found, 280)

  def test_a_row_without_probabilities_stays_in_the_vocabulary(self):
    logits = jnp.asarray([[jnp.nan] * 3, [-jnp.inf] * 3])
    found = draw.draw(logits, jnp.asarray([0.5, 0.5]), Sampling())
    self.assertTrue(np.all((found >= 0) & (found < 3)))

  def test_temperature_zero_is_greedy(self):
    logits = jnp.asarray([[1.0, 3.0, 2.0]])
    token = draw.draw(logits, jnp.zeros(1), Sampling(temperature=0.0))
    np.testing.assert_array_equal(token, [1])

  def test_filtered_draws_follow_the_renormalised_distribution(self):
    logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.15, 0.1]]))
    rows = 20_000
    uniform = (np.arange(rows) + 0.5).astype(np.float32) / rows
    tokens = draw.draw(
      jnp.tile(logits, (rows, 1)),
      jnp.asarray(uniform),
      Sampling(top_k=2),
    )
    found = np.bincount(np.asarray(tokens), minlength=4) / rows
    np.testing.assert_allclose(found, [2 / 3, 1 / 3, 0, 0], atol=1e-3)

  def test_uniforms_belong_to_key_and_position(self):
    keys = jnp.asarray([[1, 2], [3, 4], [1, 2]], jnp.uint32)
    first = draw.uniforms(keys, jnp.asarray([5, 5, 5]))
    swapped = draw.uniforms(keys[::-1], jnp.asarray([5, 5, 6]))
    self.assertEqual(first[0], first[2])
    self.assertEqual(first[0], swapped[0])
    self.assertEqual(first[1], swapped[1])
    self.assertNotEqual(first[0], swapped[2])
    many = draw.uniforms(jnp.tile(keys[:1], (4000, 1)), jnp.arange(4000))
    self.assertAlmostEqual(float(jnp.mean(many)), 0.5, delta=0.02)


if __name__ == "__main__":
  absltest.main()
