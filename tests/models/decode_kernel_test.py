"""The decoding kernel, interpreted, against a NumPy loop."""

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from t2po_jax.models import attention, decode_kernel


def draw(rows, heads, share, width, length, dtype):
  """Queries, new keys and values, a cache of keys and values."""
  shapes = (
    (rows, heads, share, width),
    (rows, heads, width),
    (rows, heads, width),
    (rows, heads, width, length),
    (rows, heads, length, width),
  )
  keys = jax.random.split(jax.random.key(0), len(shapes))
  return [
    jax.random.normal(key, shape, dtype)
    for key, shape in zip(keys, shapes, strict=True)
  ]


def by_loop(queries, new_keys, new_values, keys, values, positions):
  """One row and one query at a time, in float64."""
  arrays = (queries, new_keys, new_values, keys, values)
  queries, new_keys, new_values, keys, values = map(np.float64, arrays)
  mixed = np.zeros_like(queries)
  for row, place in enumerate(positions):
    if place < keys.shape[-1]:
      keys[row, :, :, place] = new_keys[row]
      values[row, :, place] = new_values[row]
    for head, query in np.ndindex(queries.shape[1:3]):
      seen = keys[row, head, :, : place + 1]
      scores = queries[row, head, query] @ seen / queries.shape[-1] ** 0.5
      weights = np.exp(scores - scores.max())
      found = weights @ values[row, head, : place + 1] / weights.sum()
      mixed[row, head, query] = found
  return mixed, keys, values


class KernelTest(parameterized.TestCase):
  @parameterized.parameters((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2))
  def test_appends_and_attends(self, dtype, tolerance):
    arrays = draw(5, 2, 3, 32, 384, dtype)
    # The first position, ends of blocks, the last, and one beyond.
    places = np.asarray([0, 127, 128, 383, 384])
    found = decode_kernel.extend(
      *arrays, jnp.asarray(places), live=384, interpret=True
    )
    expected = by_loop(*arrays, places)
    np.testing.assert_allclose(
      np.float64(found[0]), expected[0], atol=tolerance
    )
    # The cache is changed in one place, to the bit.
    np.testing.assert_array_equal(np.float64(found[1]), expected[1])
    np.testing.assert_array_equal(np.float64(found[2]), expected[2])

  def test_blocks_beyond_the_live_ones_are_not_read(self):
    *arrays, keys, values = draw(2, 1, 2, 32, 384, jnp.float32)
    keys = keys.at[..., 128:].set(jnp.nan)
    values = values.at[:, :, 128:].set(jnp.nan)
    places = jnp.asarray([5, 100])
    mixed, *_ = decode_kernel.extend(
      *arrays, keys, values, places, live=128, interpret=True
    )
    self.assertTrue(np.isfinite(mixed).all())

  def test_which_caches_it_takes(self):
    self.assertTrue(decode_kernel.supports(4608, 128))
    self.assertFalse(decode_kernel.supports(4596, 128))
    self.assertFalse(decode_kernel.supports(4608, 40))
    self.assertEqual(attention.cache_block(4596, backend="tpu"), 4608)
    # No TPU here: the reference takes over.
    self.assertFalse(attention.takes_one(jnp.zeros((1, 1, 1, 32, 128)), 1))


class LongQueriesTest(absltest.TestCase):
  def test_blocks_of_queries_equal_one_piece(self):
    keys = jax.random.split(jax.random.key(1), 3)
    queries = jax.random.normal(keys[0], (2, 200, 1, 2, 16))
    cached = jax.random.normal(keys[1], (2, 1, 1, 16, 256))
    values = jax.random.normal(keys[2], (2, 1, 256, 16))
    slots = jnp.asarray([[3], [40]]) + jnp.arange(200)[None]
    whole = attention.attend_cache(queries, cached, values, slots, live=256)
    with absltest.mock.patch.object(
      attention.sharding, "backend", return_value="gpu"
    ):
      blocks = attention.attend_cache(queries, cached, values, slots, live=256)
    np.testing.assert_allclose(blocks, whole, atol=1e-5)


if __name__ == "__main__":
  absltest.main()
