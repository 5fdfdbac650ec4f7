"""Tests the decoder against plain loops and its two ways against each other."""

import dataclasses
import functools

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from t2po_jax.models import config as config_lib
from t2po_jax.models import decoder, rope

LLAMA = config_lib.ModelConfig(
  "llama", 29, 16, 2, 4, 2, 8, 24, rope_theta=100.0, max_positions=64
)
LLAMA3 = dataclasses.replace(
  LLAMA, rope_scaling=config_lib.RopeScaling("llama3", 4.0, 16)
)
QWEN2 = dataclasses.replace(
  LLAMA, family="qwen2", attention_bias=True, tied_embeddings=False
)
QWEN3 = dataclasses.replace(LLAMA, family="qwen3", qk_norm=True)
MISTRAL = dataclasses.replace(
  LLAMA, family="mistral", kinds=(config_lib.LayerKind(3),) * 2
)
SMOLLM3 = dataclasses.replace(
  LLAMA,
  family="smollm3",
  kinds=(config_lib.LayerKind(rope="none"), config_lib.LayerKind()),
)
QWEN3_MOE = dataclasses.replace(
  QWEN3, family="qwen3_moe", experts=4, experts_per_token=2, mlp_width=12
)
GEMMA2 = dataclasses.replace(
  LLAMA,
  family="gemma2",
  kinds=(config_lib.LayerKind(3), config_lib.LayerKind()),
  activation="gelu_tanh",
  query_scalar=5.0,
  attention_softcap=2.0,
  logit_softcap=3.0,
  norm_offset=True,
  post_norms=True,
  scaled_embeddings=True,
)
GEMMA3 = dataclasses.replace(
  GEMMA2,
  family="gemma3_text",
  qk_norm=True,
  kinds=(config_lib.LayerKind(3, "local"), config_lib.LayerKind()),
  local_rope_theta=10.0,
  attention_softcap=0.0,
  logit_softcap=0.0,
)
NEWER = (
  ("mistral", MISTRAL),
  ("smollm3", SMOLLM3),
  ("qwen3_moe", QWEN3_MOE),
  ("gemma2", GEMMA2),
  ("gemma3", GEMMA3),
)
FAMILIES = (("llama", LLAMA), ("qwen2", QWEN2), ("qwen3", QWEN3), *NEWER)


@functools.cache
def make_params(config):
  """Random parameters, the biases and scales among them."""
  params = jax.jit(decoder.Policy(config).init)(jax.random.key(0))
  generator = np.random.default_rng(1)
  return jax.tree.map(
    lambda leaf: np.asarray(
      leaf + 0.1 * generator.normal(size=leaf.shape), np.float32
    ),
    params,
  )


@functools.partial(jax.jit, static_argnums=0)
def make_decode_params(policy, params):
  return policy.decode_params(params)


def draw_tokens(rows, length, vocab_size=29, seed=2):
  return np.random.default_rng(seed).integers(0, vocab_size, (rows, length))


def whole_row(tokens):
  """Positions and segments of rows that hold one text each."""
  positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  return positions, np.ones(tokens.shape, np.int32)


@functools.partial(jax.jit, static_argnums=0)
def run_hidden(policy, params, tokens, positions, segments):
  return policy.hidden(params, tokens, positions, segments)


@functools.partial(jax.jit, static_argnums=0, static_argnames="live")
def run_extend(policy, params, cache, tokens, start, *, live):
  return policy.extend(params, cache, tokens, start, live=live)


def loop_norm(x, scale, config):
  scale = scale + 1 if config.norm_offset else scale
  return x / np.sqrt(np.mean(x * x) + config.norm_eps) * scale


def loop_rotate(x, position, theta):
  """Rotates a head's pairs (i, i + H/2) by position * theta^(-2i/H)."""
  half = len(x) // 2
  out = np.zeros_like(x)
  for i in range(half):
    angle = position * theta ** (-2 * i / len(x))
    pair = complex(x[i], x[i + half]) * np.exp(1j * angle)
    out[i], out[i + half] = pair.real, pair.imag
  return out


def loop_cap(x, cap):
  return cap * np.tanh(x / cap) if cap else x


def loop_attention(x, layer, config, kind):
  """Attention of one row [T, D], one query head and position at a time."""
  width = config.head_width
  thetas = {
    "global": config.rope_theta,
    "local": config.local_rope_theta,
    "none": np.inf,
  }

  def project(name):
    part = layer["attention"][name]
    return x @ part["kernel"] + part.get("bias", 0)

  def head(name, flat, index, position):
    vector = flat[position, index * width : (index + 1) * width]
    if config.qk_norm:
      scale = layer["attention"][f"{name}_norm"]["scale"]
      vector = loop_norm(vector, scale, config)
    if kind.rope == "none":
      return vector
    return loop_rotate(vector, position, thetas[kind.rope])

  queries, keys, values = project("query"), project("key"), project("value")
  mixed = np.zeros((len(x), config.heads * width))
  for n in range(config.heads):
    m = n // (config.heads // config.kv_heads)
    for t in range(len(x)):
      query = head("query", queries, n, t)
      first = max(t + 1 - kind.window, 0) if kind.window else 0
      scores = np.array(
        [query @ head("key", keys, m, s) for s in range(first, t + 1)]
      ) / np.sqrt(config.query_scalar or width)
      scores = loop_cap(scores, config.attention_softcap)
      weights = np.exp(scores - scores.max())
      weights /= weights.sum()
      mixed[t, n * width : (n + 1) * width] = (
        weights @ values[first : t + 1, m * width : (m + 1) * width]
      )
  return mixed @ layer["attention"]["out"]["kernel"]


def loop_gated(gate, up, config):
  if config.activation == "silu":
    return gate / (1 + np.exp(-gate)) * up
  inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
  return gate / 2 * (1 + np.tanh(inner)) * up


def loop_experts(row, mlp, config):
  """The experts of one token [D], each by itself."""
  scores = row @ mlp["router"]["kernel"]
  weights = np.exp(scores - scores.max())
  weights /= weights.sum()
  taken = np.argsort(-weights)[: config.experts_per_token]
  total = weights[taken].sum() if config.normalised_routing else 1.0
  out = np.zeros(len(row))
  for e in taken:
    inner = loop_gated(
      row @ mlp["expert_gate"]["kernel"][e],
      row @ mlp["expert_up"]["kernel"][e],
      config,
    )
    out += weights[e] / total * (inner @ mlp["expert_down"]["kernel"][e])
  return out


def loop_logits(params, tokens, config):
  """Logits [T, V] of one row of tokens, in float64."""
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  table = params["embed"]["table"]
  norm = lambda x, part: np.stack(  # noqa: E731
    [loop_norm(row, part["scale"], config) for row in x]
  )
  x = table[tokens]
  if config.scaled_embeddings:
    x = x * np.sqrt(config.width)
  for i, kind in enumerate(config.layer_kinds):
    layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
    mixed = loop_attention(
      norm(x, layer["attention_norm"]), layer, config, kind
    )
    if config.post_norms:
      mixed = norm(mixed, layer["attention_post_norm"])
    x = x + mixed
    inner, mlp = norm(x, layer["mlp_norm"]), layer["mlp"]
    if config.experts:
      mixed = np.stack([loop_experts(row, mlp, config) for row in inner])
    else:
      gate, up = inner @ mlp["gate"]["kernel"], inner @ mlp["up"]["kernel"]
      mixed = loop_gated(gate, up, config) @ mlp["down"]["kernel"]
    if config.post_norms:
      mixed = norm(mixed, layer["mlp_post_norm"])
    x = x + mixed
  x = norm(x, params["norm"])
  head = table.T if config.tied_embeddings else params["head"]["kernel"]
  return loop_cap(x @ head, config.logit_softcap)


class RopeTest(chex.TestCase):
  def test_plain_frequencies(self):
    frequencies, scale = rope.frequencies(LLAMA)
    np.testing.assert_allclose(
      frequencies, [1.0, 100**-0.25, 0.1, 100**-0.75], rtol=1e-6
    )
    self.assertEqual(scale, 1.0)

  def test_linear_divides_all(self):
    scaling = config_lib.RopeScaling("linear", 4.0)
    config = dataclasses.replace(LLAMA, rope_scaling=scaling)
    np.testing.assert_allclose(
      rope.frequencies(config)[0] * 4,
      rope.frequencies(LLAMA)[0],
      rtol=1e-6,
    )

  @parameterized.parameters(
    ("llama3", 1.0),
    ("yarn", 0.1 * np.log(8.0) + 1.0),
  )
  def test_ends_of_the_ramp(self, kind, expected_scale):
    # 64 pairs: the fastest turns often in 64 positions, the slowest hardly.
    plain = dataclasses.replace(LLAMA, head_width=128, rope_theta=10_000.0)
    scaling = config_lib.RopeScaling(kind, 8.0, 64, 1.0, 4.0)
    scaled, scale = rope.frequencies(
      dataclasses.replace(plain, rope_scaling=scaling)
    )
    ratio = rope.frequencies(plain)[0] / scaled
    np.testing.assert_allclose(ratio[0], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[-1], 8.0, rtol=1e-6)
    self.assertTrue(np.all(np.diff(ratio) > -1e-5))
    self.assertBetween(np.sum((ratio > 1.01) & (ratio < 7.9)), 1, 40)
    self.assertAlmostEqual(scale, expected_scale)


class PolicyTest(chex.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(jax.numpy_rank_promotion("raise"))

  @parameterized.named_parameters(*FAMILIES)
  def test_matches_plain_loop(self, config):
    policy, params = decoder.Policy(config), make_params(config)
    tokens = draw_tokens(2, 7)
    hidden = run_hidden(policy, params, tokens, *whole_row(tokens))
    logits = policy.logits(params, hidden)
    chex.assert_shape(logits, (2, 7, 29))
    self.assertEqual(logits.dtype, jnp.float32)
    for row in range(2):
      expected = loop_logits(params, tokens[row], config)
      np.testing.assert_allclose(logits[row], expected, rtol=2e-4, atol=2e-5)

  @parameterized.parameters(
    QWEN2,  # A vocabulary projection of its own.
    LLAMA,
    GEMMA2,
  )
  def test_logits_of_both_layouts(self, config):
    policy, params = decoder.Policy(config), make_params(config)
    hidden = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    found = policy.decode_logits(make_decode_params(policy, params), hidden)
    expected = policy.logits(params, hidden)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

  @parameterized.parameters(
    (QWEN2, "float32", 1),
    (QWEN3, "float32", 1),
    (QWEN2, "bfloat16", 1),
    (QWEN3, "float32", 7),  # Several blocks of keys.
    (MISTRAL, "float32", 1),
    (LLAMA3, "float32", 1),
    (SMOLLM3, "float32", 1),
    (QWEN3_MOE, "float32", 1),
    (GEMMA2, "float32", 1),
    (GEMMA3, "float32", 7),
  )
  def test_cached_equals_full(self, config, dtype, stretch):
    """Ragged prompts, padded prefill, then one token at a time."""
    policy = decoder.Policy(config, dtype=jnp.dtype(dtype))
    params = make_params(config)
    decode_params = make_decode_params(policy, params)
    tokens = draw_tokens(3, 10 * stretch)
    full = run_hidden(policy, params, tokens, *whole_row(tokens))
    lengths, most = np.array([2, 5, 4]) * stretch, 6 * stretch
    cache = policy.init_cache(3, 12 * stretch)
    prompt = tokens[:, :most]
    prompt = np.where(np.arange(most) < lengths[:, None], prompt, 28)
    found, cache = run_extend(
      policy, decode_params, cache, prompt, np.zeros(3, int), live=most
    )
    error = [np.abs(found[b, :n] - full[b, :n]) for b, n in enumerate(lengths)]
    worst = max(float(np.max(e)) for e in error)
    for step in range(5):
      start = lengths + step
      column = tokens[np.arange(3), start][:, None]
      found, cache = run_extend(
        policy, decode_params, cache, column, start, live=12 * stretch
      )
      gap = np.abs(found[:, 0] - full[np.arange(3), start])
      worst = max(worst, float(np.max(gap)))
    self.assertLess(worst, 2e-5 if dtype == "float32" else 0.15)

  def test_rewound_slot_forgets(self):
    policy, params = decoder.Policy(LLAMA), make_params(LLAMA)
    decode_params = make_decode_params(policy, params)
    tokens = draw_tokens(2, 8)
    extend = functools.partial(run_extend, policy, decode_params, live=8)
    start = np.array([4, 4])
    _, prompt = extend(policy.init_cache(2, 8), tokens[:, :4], start - 4)
    expected, _ = extend(prompt, tokens[:, 4:5], start)
    _, longer = extend(prompt, (tokens[:, 4:] + 1) % 29, start)
    found, _ = extend(longer, tokens[:, 4:5], start)
    np.testing.assert_array_equal(found, expected)

  def test_live_bucket_and_writes_beyond_the_cache(self):
    policy, params = decoder.Policy(LLAMA), make_params(LLAMA)
    decode_params = make_decode_params(policy, params)
    tokens = draw_tokens(2, 4)
    start = np.zeros(2, int)
    short, cache = run_extend(
      policy, decode_params, policy.init_cache(2, 8), tokens, start, live=4
    )
    long, _ = run_extend(
      policy, decode_params, policy.init_cache(2, 8), tokens, start, live=8
    )
    np.testing.assert_allclose(short, long, atol=1e-6)
    # Row 0 is past its end: nothing of it changes. Row 1 keeps its first two.
    _, after = run_extend(
      policy, decode_params, cache, tokens, np.array([8, 6]), live=8
    )
    for old, new in zip(cache.values, after.values, strict=True):
      np.testing.assert_array_equal(old[0], new[0])
      np.testing.assert_array_equal(old[1, :, :6], new[1, :, :6])
      self.assertTrue(np.any(np.asarray(old[1, :, 6:] != new[1, :, 6:])))

  def test_cache_layout(self):
    cache = decoder.Policy(LLAMA).init_cache(3, 5, jnp.bfloat16)
    chex.assert_shape(cache.keys, (3, 2, 1, 8, 5))
    chex.assert_shape(cache.values, (3, 2, 5, 8))
    chex.assert_type(cache.keys, jnp.bfloat16)
    self.assertLen(cache.keys, LLAMA.layers)

  def test_cache_is_of_whole_blocks(self):
    cache = decoder.Policy(LLAMA).init_cache(3, 70)
    chex.assert_shape(cache.keys, (3, 2, 3, 8, 24))
    chex.assert_shape(cache.values, (3, 2, 72, 8))

  @parameterized.parameters(QWEN3, GEMMA3, QWEN3_MOE)
  def test_packing_and_padding_change_nothing(self, config):
    """Two texts in one row, then each alone in rows with other padding."""
    policy, params = decoder.Policy(config), make_params(config)
    run = functools.partial(run_hidden, policy, params)
    (text,) = draw_tokens(1, 5)
    packed = run(
      np.array([[*text, 7, 7], [9] * 7]),
      np.array([[0, 1, 2, 0, 1, 0, 0], [0] * 7]),
      np.array([[1, 1, 1, 2, 2, 0, 0], [0] * 7]),
    )
    alone = run(
      np.array([[*text[:3], 1, 2, 3, 4], [*text[3:], 5, 6, 7, 8, 9]]),
      np.array([[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4]]),
      np.array([[1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]]),
    )
    np.testing.assert_allclose(packed[0, :3], alone[0, :3], atol=1e-5)
    np.testing.assert_allclose(packed[0, 3:5], alone[1, :2], atol=1e-5)

  def test_later_tokens_do_not_matter(self):
    policy, params = decoder.Policy(LLAMA), make_params(LLAMA)
    tokens = draw_tokens(2, 7)
    other = np.where(np.arange(7) < 3, tokens, (tokens + 1) % 29)
    one = run_hidden(policy, params, tokens, *whole_row(tokens))
    two = run_hidden(policy, params, other, *whole_row(other))
    np.testing.assert_array_equal(one[:, :3], two[:, :3])
    self.assertGreater(float(np.abs(one[:, 3:] - two[:, 3:]).max()), 1e-3)

  @parameterized.parameters(LLAMA, GEMMA3)
  def test_unrolling_changes_nothing(self, config):
    params, tokens = make_params(config), draw_tokens(2, 7)
    found, expected = (
      run_hidden(policy, params, tokens, *whole_row(tokens))
      for policy in (
        decoder.Policy(config, scan_layers=False),
        decoder.Policy(config),
      )
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)

  @parameterized.parameters(LLAMA, GEMMA3)
  def test_remat_changes_no_gradient(self, config):
    params, tokens = make_params(config), draw_tokens(2, 5)

    def loss(policy, params):
      hidden = policy.hidden(params, tokens, *whole_row(tokens))
      return jnp.mean(jnp.square(policy.logits(params, hidden)))

    grad = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    expected = grad(decoder.Policy(config), params)
    for remat in ("full", "dots"):
      found = grad(decoder.Policy(config, remat=remat), params)
      chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)

  def test_bfloat16_is_close_and_has_finite_gradients(self):
    tokens, params = draw_tokens(2, 7), make_params(QWEN2)
    positions, _ = whole_row(tokens)
    segments = np.array([[1] * 7, [0] * 7])  # The second row is all padding.
    exact = run_hidden(
      decoder.Policy(QWEN2), params, tokens, positions, segments
    )
    policy = decoder.Policy(QWEN2, dtype=jnp.bfloat16)

    def loss(params):
      hidden = policy.hidden(params, tokens, positions, segments)
      return jnp.mean(policy.logits(params, hidden[:1])), hidden

    grads, rough = jax.jit(jax.grad(loss, has_aux=True))(params)
    self.assertEqual(rough.dtype, jnp.bfloat16)
    gap = float(np.mean(np.abs(np.asarray(rough, np.float32) - exact)))
    self.assertBetween(gap, 1e-5, 0.05)
    chex.assert_tree_all_finite(grads)
    chex.assert_type(jax.tree.leaves(grads), jnp.float32)

  def test_decode_compiles_once(self):
    policy = decoder.Policy(LLAMA)
    decode_params = make_decode_params(policy, make_params(LLAMA))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(cache, tokens, start):
      return policy.extend(decode_params, cache, tokens, start, live=8)

    cache = policy.init_cache(2, 8)
    for i in range(3):
      _, cache = step(cache, draw_tokens(2, 1), jnp.full(2, i))

  @parameterized.parameters({}, {"norm_offset": True, "post_norms": True})
  def test_init_has_unit_scale(self, **options):
    config = dataclasses.replace(config_lib.named("tiny"), layers=2, **options)
    policy = decoder.Policy(config)
    params = jax.jit(policy.init)(jax.random.key(0))
    tokens = draw_tokens(2, 16, config.vocab_size)
    hidden = run_hidden(policy, params, tokens, *whole_row(tokens))
    self.assertBetween(float(jnp.std(policy.logits(params, hidden))), 0.5, 2.0)
    first, second = params["layers"]["mlp"]["up"]["kernel"][:2]
    self.assertGreater(float(jnp.abs(first - second).max()), 0.01)

  def test_unknown_options_are_refused(self):
    with self.assertRaisesRegex(ValueError, "remat 'some'.*none, dots, full"):
      decoder.Policy(LLAMA, remat="some")
    with self.assertRaisesRegex(ValueError, "attention 'x'.*auto, einsum"):
      decoder.Policy(LLAMA, attention="x")


class LogicalAxesTest(chex.TestCase):
  @parameterized.named_parameters(*FAMILIES)
  def test_one_name_per_axis(self, config):
    policy = decoder.Policy(config)
    params = jax.eval_shape(policy.init, jax.random.key(0))
    for tree in (params, jax.eval_shape(policy.decode_params, params)):
      axes = decoder.logical_axes(tree)
      jax.tree.map(
        lambda leaf, names: self.assertLen(names, leaf.ndim), tree, axes
      )
    stacked = decoder.logical_axes(params)["layers"]["attention"]
    self.assertEqual(stacked["key"]["kernel"], ("layers", "width", "kv_heads"))
    self.assertEqual(stacked["out"]["kernel"], ("layers", "heads", "width"))
    decoding = jax.eval_shape(policy.decode_params, params)
    decoding = decoder.logical_axes(decoding)["layers"][0]
    self.assertEqual(
      decoding["attention"]["key"]["kernel"], ("kv_heads", "width")
    )
    if config.experts:
      self.assertEqual(
        decoding["mlp"]["expert_up"]["kernel"],
        ("experts", "expert_mlp", "width"),
      )

  def test_widths_agree_with_the_names(self):
    """Equal names mean equal sizes over the whole model."""
    config = dataclasses.replace(QWEN3, tied_embeddings=False)
    params = jax.eval_shape(decoder.Policy(config).init, jax.random.key(0))
    sizes = {}
    for leaf, names in zip(
      jax.tree.leaves(params),
      jax.tree.leaves(
        decoder.logical_axes(params), is_leaf=lambda x: isinstance(x, tuple)
      ),
      strict=True,
    ):
      for size, name in zip(leaf.shape, names, strict=True):
        self.assertEqual(sizes.setdefault(name, size), size)
    self.assertEqual(
      sizes,
      {
        "vocab": 29,
        "width": 16,
        "layers": 2,
        "heads": 32,
        "kv_heads": 16,
        "head_width": 8,
        "mlp": 24,
      },
    )

  def test_unstacked_layers_are_slices(self):
    layers = make_params(LLAMA)["layers"]
    first, second = decoder.unstack_layers(layers)
    chex.assert_trees_all_equal(
      jax.tree.map(lambda *each: np.stack(each), first, second), layers
    )


if __name__ == "__main__":
  absltest.main()
