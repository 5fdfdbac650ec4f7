"""Attention of packed rows: a NumPy loop, and kernels against the reference."""

import functools

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from t2po_jax.models import attention


def draw_rows(length, width, *, groups=2, share=3, seed=0):
  """Two rows of three segments and padding: queries, keys, values, segments."""
  keys = jax.random.split(jax.random.key(seed), 3)
  queries = jax.random.normal(keys[0], (2, length, groups, share, width))
  others = [
    jax.random.normal(key, (2, length, groups, width)) for key in keys[1:]
  ]
  ends = np.asarray([[5, length // 2, length - 9], [17, 30, length - 2]])
  place = np.arange(length)
  segments = np.stack([1 + np.searchsorted(e, place, "right") for e in ends])
  return queries, *others, np.where(segments > 3, 0, segments).astype(np.int32)


def by_loop(queries, keys, values, segments):
  """One query at a time, in float64 or complex128."""
  mixed = np.zeros(queries.shape, np.result_type(queries, keys, values))
  for b, t, m, r in np.ndindex(queries.shape[:4]):
    seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
    scores = keys[b, seen, m] @ queries[b, t, m, r] / queries.shape[-1] ** 0.5
    weights = np.exp(scores - scores.real.max())
    mixed[b, t, m, r] = weights @ values[b, seen, m] / weights.sum()
  return mixed


def reference(queries, keys, values, segments):
  context = attention.EINSUM.context(segments)
  return attention.EINSUM.mix(queries, keys, values, context)


class ReferenceTest(parameterized.TestCase):
  # One block, three with a short last one, and as many as there may be.
  @parameterized.parameters((40, 8, 3), (300, 8, 3), (1100, 4, 1))
  def test_is_what_a_loop_computes(self, length, width, share):
    *arrays, segments = draw_rows(length, width, share=share)
    wide = [np.float64(x) for x in arrays]
    found, pull = jax.vjp(
      jax.jit(lambda *arrays: reference(*arrays, segments)), *arrays
    )
    expected = by_loop(*wide, segments)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    rng, step = np.random.default_rng(1), 1e-30
    weights = rng.normal(size=found.shape)
    gradients = pull(jnp.asarray(weights, jnp.float32))
    for place, gradient in enumerate(gradients):
      # Of one direction: an imaginary step has no rounding of differences.
      direction = rng.normal(size=gradient.shape)
      moved = list(wide)
      moved[place] = wide[place] + 1j * step * direction
      slope = np.sum(weights * by_loop(*moved, segments)).imag / step
      size = np.linalg.norm(gradient) * np.linalg.norm(direction)
      self.assertLess(abs(np.sum(gradient * direction) - slope) / size, 1e-6)

  def test_blocks_and_one_piece_have_the_same_gradients(self):
    *arrays, segments = draw_rows(300, 8)
    allowed = attention.allowed_in(segments)

    def in_one_piece(queries, keys, values):
      keys, values = keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3)
      return attention.attend(queries, keys[:, :, None], values, allowed)

    def gradients(mix):
      loss = jax.jit(lambda *arrays: jnp.sum(jnp.sin(mix(*arrays))))
      return jax.grad(loss, (0, 1, 2))(*arrays)

    found = gradients(lambda *arrays: reference(*arrays, segments))
    for one, other in zip(found, gradients(in_one_piece), strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)

  def test_bounded_scores_have_the_gradients_of_one_piece(self):
    *arrays, segments = draw_rows(150, 8)
    allowed = attention.allowed_in(segments)

    def in_one_piece(queries, keys, values):
      keys, values = keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3)
      keys = keys[:, :, None]
      return attention.attend(queries, keys, values, allowed, 0.7)

    def in_blocks(*arrays):
      return attention.attend_rows_capped(*arrays, allowed, 0.7)

    def gradients(mix):
      loss = jax.jit(lambda *arrays: jnp.sum(jnp.sin(mix(*arrays))))
      return jax.grad(loss, (0, 1, 2))(*arrays)

    plain = reference(*arrays, segments)
    found = in_blocks(*arrays)
    np.testing.assert_allclose(found, in_one_piece(*arrays), atol=1e-5)
    self.assertGreater(float(jnp.max(jnp.abs(found - plain))), 0.01)
    for one, other in zip(
      gradients(in_blocks), gradients(in_one_piece), strict=True
    ):
      np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)

  def test_a_window_ends_at_the_token_itself(self):
    segments = np.array([[1, 1, 1, 1, 2]])
    found = attention.allowed_in(segments, 2)[0].astype(int)
    np.testing.assert_array_equal(
      found,
      [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
      ],
    )

  @parameterized.parameters(1, 4, 20)  # Tokens: few rows, as many, more.
  def test_keys_in_blocks_and_in_one(self, count):
    *arrays, segments = draw_rows(48, 8)
    queries, keys, values = arrays
    keys, values = keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3)
    blocks = keys.reshape(2, 2, 8, 4, 12).swapaxes(2, 3)
    queries = queries[:, -count:]
    allowed = attention.allowed_in(segments)[:, -count:]
    found, expected = (
      attention.attend(queries, keys, values, allowed)
      for keys in (blocks, keys[:, :, None])
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)

  def test_blocks_of_a_cache(self):
    self.assertEqual(attention.cache_block(5, backend="cpu"), 5)
    self.assertEqual(attention.cache_block(48, backend="cpu"), 24)
    self.assertEqual(attention.cache_block(512, backend="cpu"), 32)
    for length in range(1, 2000):
      size = attention.cache_block(length, backend="cpu")
      self.assertLess(-(-length // size) * size, 1.05 * length)
    self.assertEqual(attention.cache_block(500, backend="gpu"), 500)

  def test_keeps_no_scores(self):
    *arrays, segments = draw_rows(300, 8)
    _, pull = jax.vjp(lambda *arrays: reference(*arrays, segments), *arrays)
    largest = max(leaf.size for leaf in jax.tree.leaves(pull))
    self.assertEqual(largest, 2 * 300 * 300)  # What may be looked at.

  def test_bfloat16_stays(self):
    *arrays, segments = draw_rows(160, 8)
    found, pull = jax.vjp(
      lambda *arrays: reference(*arrays, segments),
      *(x.astype(jnp.bfloat16) for x in arrays),
    )
    exact, pull_exact = jax.vjp(
      lambda *arrays: reference(*arrays, segments), *arrays
    )
    self.assertEqual(found.dtype, jnp.bfloat16)
    np.testing.assert_allclose(np.float32(found), exact, atol=0.05)
    wanted = pull_exact(jnp.ones_like(exact))
    for one, other in zip(pull(jnp.ones_like(found)), wanted, strict=True):
      self.assertEqual(one.dtype, jnp.bfloat16)
      np.testing.assert_allclose(
        np.float32(one), other, atol=0.05 * np.abs(other).max()
      )


class SplashTest(parameterized.TestCase):
  @parameterized.parameters(384, 300)  # Three blocks, the last one padded.
  def test_values_and_gradients_are_those_of_the_reference(self, length):
    *arrays, segments = draw_rows(length, 64)
    weights = jax.random.normal(jax.random.key(9), arrays[0].shape)

    def loss(mix, *arrays):
      mixed = mix(*arrays, segments)
      return jnp.sum(mixed * weights), mixed

    def both(mix):
      run = functools.partial(loss, mix)
      return jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(*arrays)

    interpreted = functools.partial(attention.mix_splash, interpret=True)
    (_, mixed), gradients = both(interpreted)
    (_, expected), wanted = both(reference)
    np.testing.assert_allclose(mixed, expected, atol=2e-5)
    for found, want in zip(gradients, wanted, strict=True):
      np.testing.assert_allclose(found, want, atol=1e-4)


class SelectTest(parameterized.TestCase):
  @parameterized.parameters(
    ("auto", "gpu", jnp.bfloat16, 96, 64, attention.CUDNN),
    ("auto", "gpu", jnp.float32, 96, 64, attention.EINSUM),
    ("auto", "gpu", jnp.bfloat16, 97, 64, attention.EINSUM),
    ("auto", "gpu", jnp.bfloat16, 96, 256, attention.EINSUM),
    ("einsum", "gpu", jnp.bfloat16, 96, 64, attention.EINSUM),
    ("auto", "tpu", jnp.float32, 384, 64, attention.SPLASH),
    ("auto", "tpu", jnp.float32, 96, 64, attention.SPLASH),
    ("einsum", "tpu", jnp.float32, 384, 64, attention.EINSUM),
    ("auto", "cpu", jnp.bfloat16, 384, 64, attention.EINSUM),
  )
  def test_a_kernel_where_it_serves(
    self, kind, backend, dtype, length, width, expected
  ):
    found = attention.select(
      kind, length=length, head_width=width, dtype=dtype, backend=backend
    )
    self.assertIs(found, expected)

  def test_windows_and_bounds_have_no_splash(self):
    select = functools.partial(
      attention.select,
      "auto",
      length=384,
      head_width=64,
      dtype=jnp.float32,
      backend="tpu",
    )
    self.assertIs(select(windowed=True), attention.EINSUM)
    capped = select(softcap=0.7)
    self.assertIs(capped.mix.func, attention.attend_rows_capped)
    self.assertEqual(capped.mix.keywords, {"softcap": 0.7})


if __name__ == "__main__":
  absltest.main()
