"""The update: its loss by a plain loop, and what must not change it.

What needs several devices is in `eight_devices.py`.
"""

import dataclasses
import functools
import warnings

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from t2po_jax.distributed import sharding
from t2po_jax.learning import (
  batching,
  learner,
  losses,
  objectives,
  optimizers,
  policy_losses,
  scoring,
)
from t2po_jax.learning.policy_losses import record

V, D = 11, 4
AXES = {
  "table": ("vocab", "width"),
  "mix": ("width", None),
  "head": ("width", "vocab"),
}


def setUpModule():
  # Compiling takes most of the time here, and nothing else depends on it.
  jax.config.update("jax_disable_most_optimizations", True)


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


@dataclasses.dataclass(frozen=True)
class ToyPolicy:
  """Mean of the embeddings so far, one tanh, one projection."""

  dtype: jnp.dtype = jnp.float32

  def init(self, key):
    keys = jax.random.split(key, 3)
    return {
      "table": jax.random.normal(keys[0], (V, D)),
      "mix": jax.random.normal(keys[1], (D, D)),
      "head": jax.random.normal(keys[2], (D, V)),
    }

  def hidden(self, params, tokens, positions, segments):
    seen = jnp.tril(jnp.ones((tokens.shape[1],) * 2))
    seen = seen * (segments[:, :, None] == segments[:, None, :])
    mean = jnp.einsum("bts,bsd->btd", seen, params["table"][tokens])
    mean = (mean / (positions[..., None] + 1)).astype(self.dtype)
    return jnp.tanh(mean @ params["mix"].astype(self.dtype))

  def head(self, params):
    return {"head": params["head"]}

  def logits(self, params, hidden):
    logits = hidden @ params["head"].astype(self.dtype)
    return logits.astype(jnp.float32)


def toy_logits(params, tokens):
  """The same for one sequence, in float64 numpy: logits [T, V]."""
  rows = []
  for end in range(1, len(tokens) + 1):
    mean = sum(params["table"][token] for token in tokens[:end]) / end
    rows.append(np.tanh(mean @ params["mix"]) @ params["head"])
  return np.stack(rows)


def make_segments(seed, count):
  """Random turns with every number that a loss may look at."""
  rng = np.random.default_rng(seed)
  segments = []
  for number in range(count):
    prompt, size = rng.integers(1, 6), rng.integers(1, 6)
    tokens = rng.integers(0, V, prompt + size).astype(np.int32)
    index = np.arange(prompt - 1, prompt + size - 1, dtype=np.int32)
    mask = (rng.random(size) < 0.8).astype(np.float32)
    mask[0] = 1.0 if number == 0 else mask[0]
    segments.append(
      batching.Segment(
        tokens=tokens,
        index=index,
        targets=tokens[index + 1],
        mask=mask,
        turn=np.full(size, number, np.int32),
        advantages=rng.normal(size=size).astype(np.float32),
        logprobs=rng.uniform(-4, -1, size).astype(np.float32),
      )
    )
  return segments


def loop_loss(params, segments, objective, *, old=None, reference=None):
  """The policy loss from its formula: plain loops, float64."""
  terms, entropies = [], []
  for number, segment in enumerate(segments):
    logits = toy_logits(params, segment.tokens) / objective.temperature
    for i, at in enumerate(segment.index):
      p = np.exp(logits[at] - logits[at].max())
      p /= p.sum()
      logp = np.log(p[segment.targets[i]])
      entropy = -np.sum(p * np.log(p))
      if not segment.mask[i]:
        continue
      entropies.append(entropy)
      old_logp = segment.logprobs[i] if old is None else old[number][i]
      a = float(segment.advantages[i])
      ratio = np.exp(logp - old_logp)
      clip = objective.settings or record.DualClip()
      low, high = 1 - clip.clip_low, 1 + clip.clip_high
      term = max(-ratio * a, -min(max(ratio, low), high) * a)
      if a < 0 and clip.dual_clip:
        term = min(term, -clip.dual_clip * a)
      if old is not None and objective.importance == "truncate":
        trust = np.exp(old_logp - segment.logprobs[i])
        term *= min(trust, objective.importance_cap)
      term -= objective.entropy_coefficient * entropy
      if reference is not None:
        d = logp - reference[number][i]
        term += objective.kl_coefficient * min(np.exp(-d) + d - 1, 10)
      terms.append((number, term))
  by_turn = {n: [t for m, t in terms if m == n] for n, _ in terms}
  loss = {
    "token_mean": np.mean([t for _, t in terms]),
    "seq_mean_token_mean": np.mean([np.mean(t) for t in by_turn.values()]),
    "seq_mean_token_sum": np.mean([np.sum(t) for t in by_turn.values()]),
  }[objective.aggregation]
  return loss, np.mean(entropies)


def loop_logprobs(params, segments):
  """Log-probs of all targets, per segment, float64."""
  found = []
  for segment in segments:
    logits = toy_logits(params, segment.tokens)[segment.index]
    normaliser = np.log(np.sum(np.exp(logits), axis=-1))
    found.append(
      np.take_along_axis(logits, segment.targets[:, None], -1)[:, 0]
      - normaliser
    )
  return found


DEFAULT = objectives.PolicyObjective()
EVERYTHING = objectives.PolicyObjective(
  kl="k3",
  kl_coefficient=0.1,
  old_logprobs="recompute",
  importance_cap=1.5,
)
OPTIMIZER = optimizers.OptimizerConfig(
  learning_rate=0.01, eps=1e-3, max_grad_norm=10.0
)


def make_learner(
  objective=DEFAULT,
  *,
  rows=2,
  optimizer=OPTIMIZER,
  dtype=jnp.float32,
  max_kl=0.0,
):
  """A learner on one device; shared by tests, because compiling is slow."""
  return compiled_learner(objective, rows, optimizer, dtype, max_kl)


@functools.cache
def compiled_learner(objective, rows, optimizer, dtype, max_kl):
  return learner.Learner(
    ToyPolicy(dtype),
    AXES,
    sharding.create_mesh(devices=jax.devices()[:1]),
    optimizer=optimizer,
    objective=objective,
    rows=rows,
    max_kl=max_kl,
    chunk=4,
  )


def pack(segments, **options):
  """Rows of 16, with empty rows and positions up to the same shape."""
  packed = batching.pack(segments, lengths=[16], rows=2, **options)

  def widen(batch):
    shape = (8, 12)
    filled = {}
    for field in dataclasses.fields(batch):
      array = getattr(batch, field.name)
      width = 16 if array.shape[1] == 16 else shape[1]
      room = [(0, shape[0] - array.shape[0]), (0, width - array.shape[1])]
      empty = -1 if field.name == "turn" else 0
      filled[field.name] = np.pad(array, room, constant_values=empty)
    return batch.replace(**filled)

  return tuple(widen(batch) for batch in packed.batches)


def make_params(seed=0):
  return ToyPolicy().init(jax.random.key(seed))


def wide(params):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


class LossTest(chex.TestCase):
  @parameterized.parameters(
    objectives.PolicyObjective(
      settings=record.DualClip(clip_low=0.1, clip_high=0.3, dual_clip=1.5)
    ),
    objectives.PolicyObjective(
      aggregation="seq_mean_token_mean",
      settings=record.DualClip(dual_clip=0.0),
      temperature=0.7,
    ),
    objectives.PolicyObjective(
      aggregation="seq_mean_token_sum",
      kl="k3",
      kl_coefficient=0.3,
      entropy_coefficient=0.2,
    ),
    EVERYTHING,
  )
  def test_loss_and_gradient_are_those_of_the_loop(self, objective):
    segments = make_segments(0, 9)
    params, ref_params = make_params(0), make_params(1)
    trainer = make_learner(objective)
    (batch,) = pack(segments)
    _, metrics = trainer.update(
      trainer.init_state(params),
      [batch],
      ref_params=trainer.place_params(ref_params),
    )
    options = {}
    if objective.recomputes_old:
      options["old"] = loop_logprobs(wide(params), segments)
    if objective.needs_reference:
      options["reference"] = loop_logprobs(wide(ref_params), segments)

    def loop(params):
      return loop_loss(params, segments, objective, **options)

    loss, entropy = loop(wide(params))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-5)
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=2e-5)
    norm = numeric_gradient_norm(lambda p: loop(p)[0], wide(params))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-3)
    self.assertEqual(metrics["tokens"], sum(s.mask.sum() for s in segments))

  def test_mismatch_is_that_of_the_loop(self):
    segments, params = make_segments(3, 6), make_params()
    trainer = make_learner()
    (batch,) = pack(segments)
    _, metrics = trainer.update(trainer.init_state(params), [batch], epochs=2)
    gaps = []
    for segment, logprobs in zip(
      segments, loop_logprobs(wide(params), segments), strict=True
    ):
      gaps += list((logprobs - segment.logprobs)[segment.mask > 0])
    gaps = np.array(gaps)
    np.testing.assert_allclose(
      metrics["mismatch_mean"], np.mean(np.abs(gaps)), rtol=1e-5
    )
    np.testing.assert_allclose(
      metrics["mismatch_max"], np.max(np.abs(gaps)), rtol=1e-5
    )
    np.testing.assert_allclose(
      metrics["mismatch_kl"], np.mean(np.exp(gaps) - gaps - 1), rtol=1e-5
    )

  def test_logprobs_are_those_of_the_loop(self):
    segments, params = make_segments(4, 6), make_params()
    trainer = make_learner()
    (batch,) = pack(segments)
    found = trainer.logprobs(trainer.place_params(params), batch)
    chex.assert_equal_shape([found, batch.targets])
    wanted = np.concatenate(loop_logprobs(wide(params), segments))
    order = np.concatenate([segment.turn for segment in segments])
    for number in range(6):
      np.testing.assert_allclose(
        np.asarray(found)[batch.turn == number],
        wanted[order == number],
        rtol=1e-4,
      )


def numeric_gradient_norm(function, params, step=1e-5):
  """Norm of the gradient by central differences."""
  total = 0.0
  for name, value in params.items():
    for place in np.ndindex(value.shape):
      ends = []
      for sign in (1, -1):
        moved = value.copy()
        moved[place] += sign * step
        ends.append(function({**params, name: moved}))
      total += ((ends[0] - ends[1]) / (2 * step)) ** 2
  return np.sqrt(total)


class InvarianceTest(chex.TestCase):
  def test_micro_batches_and_packing_change_nothing(self):
    segments, found = make_segments(1, 11), []
    for rows, lengths in ((16, [16]), (3, [16]), (1, [48])):
      trainer = make_learner(rows=rows)
      packed = batching.pack(segments, lengths=lengths, rows=rows)
      state = trainer.init_state(make_params())
      for _ in range(2):
        state, metrics = trainer.update(state, packed.batches)
      found.append(sharding.gather((state.params, metrics)))
    self.assertGreater(float(found[0][1]["update_norm"]), 1e-3)
    for other in found[1:]:
      chex.assert_trees_all_close(other, found[0], rtol=1e-4, atol=1e-6)

  @parameterized.parameters((1, 2), (2, 2), (3, 2), (5, 4), (4, 4), (6, 8))
  def test_nothing_is_computed_for_nothing(self, turns, rows):
    computed = []

    class Counting(ToyPolicy):
      def hidden(self, params, tokens, positions, segments):
        jax.debug.callback(lambda x: computed.extend(x), segments)
        return super().hidden(params, tokens, positions, segments)

    # Every turn takes more than half a row, so it has one for itself.
    rng = np.random.default_rng(turns)
    segments = [
      batching.Segment(
        tokens=rng.integers(0, V, 10).astype(np.int32),
        index=np.arange(8, 9, dtype=np.int32),
        targets=np.zeros(1, np.int32),
        mask=np.ones(1, np.float32),
        turn=np.full(1, number, np.int32),
        advantages=np.ones(1, np.float32),
        logprobs=np.full(1, -2.0, np.float32),
      )
      for number in range(turns)
    ]
    packed = batching.pack(segments, lengths=[16], rows=rows, by_row=True)
    self.assertEqual(packed.stats["padding"], 1 - 10 / 16)
    trainer = learner.Learner(
      Counting(),
      AXES,
      sharding.create_mesh(devices=jax.devices()[:1]),
      optimizer=OPTIMIZER,
      objective=DEFAULT,
      rows=rows,
      chunk=4,
    )
    state = trainer.init_state(make_params())
    (batch,) = packed.batches
    for call in (
      lambda: trainer.logprobs(state.params, batch),
      lambda: trainer.update(state, packed.batches),
    ):
      computed.clear()
      jax.block_until_ready(call())
      jax.effects_barrier()
      self.assertLen(computed, turns)
      self.assertTrue(all(np.any(row > 0) for row in computed))

  def test_agreement_of_micro_batches(self):
    trainer, parts = make_learner(rows=2), make_segments(1, 11)
    (batch,) = batching.pack(parts, lengths=[16], rows=2).batches

    def learn(batch):
      state = trainer.init_state(make_params())
      state, metrics = trainer.update(state, [batch], agreement=True)
      return state, {name: float(x) for name, x in metrics.items()}

    moved, whole = learn(batch)
    # Each micro-batch alone; the mean over tokens weighs it by its tokens.
    norms = count = 0.0
    for start in range(0, batch.tokens.shape[0], 2):
      part = jax.tree.map(lambda x, i=start: x[i : i + 2], batch)
      if part.mask.any():
        _, alone = learn(part)
        self.assertAlmostEqual(alone["grad_agreement"], 1.0, places=5)
        norms += alone["tokens"] / whole["tokens"] * alone["grad_norm"]
        count += 1
    self.assertGreater(count, 1)
    wanted = whole["grad_norm"] / norms
    self.assertLess(wanted, 0.95)
    self.assertAlmostEqual(whole["grad_agreement"], wanted, places=4)
    # Measuring changes nothing.
    state = trainer.init_state(make_params())
    other, metrics = trainer.update(state, [batch])
    self.assertNotIn("grad_agreement", metrics)
    chex.assert_trees_all_equal(moved.params, other.params)

  def test_padding_may_hold_anything(self):
    (batch,) = pack(make_segments(5, 5))
    noise = {
      name: np.where(batch.mask > 0, getattr(batch, name), np.nan)
      for name in ("advantages", "sampler_logprobs", "old_logprobs")
    }
    found = []
    for given in (batch, batch.replace(**noise)):
      trainer = make_learner()
      state = trainer.init_state(make_params())
      found.append(sharding.gather(trainer.update(state, [given])))
    chex.assert_trees_all_equal(*found)


class StepTest(chex.TestCase):
  def setUp(self):
    super().setUp()
    self.batches = pack(make_segments(6, 8), minibatches=2)

  def test_every_batch_and_epoch_is_one_step(self):
    trainer = make_learner()
    state, metrics = trainer.update(
      trainer.init_state(make_params()), self.batches, epochs=3
    )
    self.assertEqual(int(state.step), 6)
    self.assertEqual(float(metrics["steps"]), 6)

  def test_no_batch_is_no_step(self):
    trainer = make_learner()
    state = trainer.init_state(make_params())
    same, metrics = trainer.update(state, [])
    self.assertIs(same, state)
    self.assertEqual(metrics, {})

  def test_nothing_is_traced_again(self):
    trainer = make_learner(EVERYTHING)
    state = trainer.init_state(make_params())
    ref_params = trainer.place_params(make_params(1))
    counts = []
    for seed in range(3):
      batches = pack(make_segments(6, 8), minibatches=2, seed=seed)
      state, _ = trainer.update(state, batches, ref_params=ref_params)
      counts.append(dict(trainer.traces))
    self.assertEqual(counts[0], counts[-1])
    self.assertEqual(counts[0].keys(), {"update", "logprobs"})

  def test_state_is_donated_and_the_given_parameters_are_not(self):
    params = make_params()
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      trainer = make_learner()
      state = trainer.init_state(params)
      trainer.update(state, self.batches[:1])
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
      self.assertTrue(leaf.is_deleted())
    for leaf in jax.tree.leaves(params):
      self.assertFalse(leaf.is_deleted())

  def test_no_transfer_inside_the_update(self):
    trainer, batches = make_learner(EVERYTHING), self.batches
    state = trainer.init_state(make_params())
    ref_params = trainer.place_params(make_params(1))
    with jax.transfer_guard("disallow"):
      state, _ = trainer.update(state, batches, ref_params=ref_params)
      trainer.update(state, batches, ref_params=ref_params)

  def test_gradient_that_is_not_finite_is_skipped_and_counted(self):
    trainer = make_learner()
    params = make_params()
    good, other = self.batches
    bad = good.replace(advantages=np.full_like(good.advantages, np.inf))
    state, metrics = trainer.update(trainer.init_state(params), [bad])
    self.assertEqual(float(metrics["skipped"]), 1)
    self.assertEqual(int(state.step), 0)
    fresh = trainer.init_state(params)
    chex.assert_trees_all_equal(state, fresh)
    state, metrics = trainer.update(state, [good, bad, other])
    self.assertEqual(float(metrics["skipped"]), 1)
    wanted, _ = trainer.update(fresh, [good, other])
    chex.assert_trees_all_equal(state, wanted)

  @parameterized.parameters((0.99, 1), (1.01, 0))
  def test_a_policy_that_has_moved_far_stays(self, part, halted):
    params = make_params()
    plain = make_learner()
    own = plain.init_state(params).params
    # The policy itself has sampled the first batch, another one the second.
    ratio = np.random.default_rng(0).normal(size=self.batches[1].mask.shape)
    first, second = (
      batch.replace(old_logprobs=np.float32(plain.logprobs(own, batch) - moved))
      for batch, moved in zip(self.batches, (0.0, ratio), strict=True)
    )
    tokens = second.mask > 0
    kl = np.mean((np.exp(ratio) - 1 - ratio)[tokens])
    trainer = make_learner(
      optimizer=dataclasses.replace(OPTIMIZER, learning_rate=1e-5),
      max_kl=float(kl * part),
    )
    batches = [first, second, first]
    state, metrics = trainer.update(trainer.init_state(params), batches)
    self.assertEqual(float(metrics["halted"]), halted)
    self.assertEqual(float(metrics["skipped"]), 0)
    self.assertEqual(float(metrics["steps"]), 3)
    self.assertEqual(int(state.step), 3 - halted)
    if halted:
      wanted, _ = trainer.update(trainer.init_state(params), [first, first])
      chex.assert_trees_all_equal(state, wanted)

  def test_likely_where_the_advantage_is_positive(self):
    trainer = make_learner(EVERYTHING)
    (batch,) = pack(make_segments(7, 1))
    state = trainer.init_state(make_params())
    for sign in (1.0, -1.0):
      before = np.asarray(trainer.logprobs(state.params, batch))
      signed = batch.replace(advantages=sign * batch.mask)
      state, metrics = trainer.update(state, [signed])
      after = np.asarray(trainer.logprobs(state.params, batch))
      self.assertGreater(sign * np.sum((after - before) * batch.mask), 0)
      np.testing.assert_allclose(metrics["ratio_max"], 1.0, rtol=1e-6)

  def test_clipping_bounds_the_gradient(self):
    trainer = make_learner(
      optimizer=optimizers.OptimizerConfig(
        learning_rate=1.0, eps=1e3, max_grad_norm=1e-3
      )
    )
    state = trainer.init_state(make_params())
    _, metrics = trainer.update(state, self.batches[:1])
    self.assertGreater(float(metrics["grad_norm"]), 1e-2)
    # With a huge eps, AdamW's step is the gradient / eps.
    np.testing.assert_allclose(metrics["update_norm"], 1e-6, rtol=1e-3)

  def test_bfloat16_computes_on_float32_masters(self):
    found = []
    for dtype in (jnp.float32, jnp.bfloat16):
      trainer = make_learner(dtype=dtype)
      state, metrics = trainer.update(
        trainer.init_state(make_params()), self.batches[:1]
      )
      for leaf in jax.tree.leaves(state.params):
        self.assertEqual(leaf.dtype, jnp.float32)
      found.append(float(metrics["loss"]))
    self.assertNotEqual(*found)
    np.testing.assert_allclose(*found, rtol=0.05, atol=0.02)


def project(head, hidden):
  return hidden @ head


class TargetLogprobsTest(chex.TestCase):
  def setUp(self):
    super().setUp()
    keys = jax.random.split(jax.random.key(0), 3)
    self.hidden = jax.random.normal(keys[0], (2, 12, D))
    self.head = jax.random.normal(keys[1], (D, V))
    self.targets = jax.random.randint(keys[2], (2, 12), 0, V)

  def compute(self, chunk, *, entropy_gradient=True):
    def value(hidden, head):
      logprobs, entropy = scoring.target_logprobs(
        project,
        head,
        hidden,
        self.targets,
        temperature=0.5,
        chunk=chunk,
        entropy_gradient=entropy_gradient,
      )
      total = jnp.sum(jnp.sin(logprobs)) + jnp.sum(jnp.cos(entropy))
      return total, (logprobs, entropy)

    differentiate = jax.value_and_grad(value, (0, 1), has_aux=True)
    return jax.jit(differentiate)(self.hidden, self.head)

  @parameterized.parameters(None, 5, 100)
  def test_values_by_the_formula_and_same_gradient(self, chunk):
    (_, (logprobs, entropy)), grads = self.compute(chunk)
    logits = np.asarray(self.hidden, np.float64) @ np.asarray(self.head) / 0.5
    p = np.exp(logits)
    p /= p.sum(-1, keepdims=True)
    for b in range(2):
      for r in range(12):
        np.testing.assert_allclose(
          logprobs[b, r],
          np.log(p[b, r, self.targets[b, r]]),
          rtol=1e-4,
          atol=1e-5,
        )
        np.testing.assert_allclose(
          entropy[b, r],
          -np.sum(p[b, r] * np.log(p[b, r])),
          rtol=1e-4,
          atol=1e-5,
        )

    def plain(hidden, head):
      logp = jax.nn.log_softmax(hidden @ head / 0.5)
      entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
      chosen = jnp.take_along_axis(logp, self.targets[..., None], axis=-1)
      return jnp.sum(jnp.sin(chosen)) + jnp.sum(jnp.cos(entropy))

    wanted = jax.grad(plain, (0, 1))(self.hidden, self.head)
    chex.assert_trees_all_close(grads, wanted, rtol=1e-3, atol=1e-5)

  @parameterized.parameters(None, 4)
  def test_gradients_have_the_dtype_of_what_they_belong_to(self, chunk):
    def loss(hidden, head, dtype):
      logprobs, _ = scoring.target_logprobs(
        lambda head, x: jnp.dot(x, head, preferred_element_type=jnp.float32),
        head.astype(dtype),
        hidden.astype(dtype),
        self.targets,
        chunk=chunk,
      )
      return jnp.sum(logprobs)

    half = [x.astype(jnp.bfloat16) for x in (self.hidden, self.head)]
    found = jax.grad(loss, (0, 1))(*half, jnp.bfloat16)
    wanted = jax.grad(loss, (0, 1))(
      *(x.astype(jnp.float32) for x in half), jnp.float32
    )
    for grad, right in zip(found, wanted, strict=True):
      self.assertEqual(grad.dtype, jnp.bfloat16)
      np.testing.assert_allclose(
        grad.astype(jnp.float32), right, rtol=0.05, atol=0.05
      )

  def test_entropy_is_only_measured_without_a_bonus(self):
    _, with_entropy = self.compute(4)
    (_, (_, entropy)), without = self.compute(4, entropy_gradient=False)
    self.assertGreater(float(jnp.min(entropy)), 0.0)

    def value(hidden):
      logprobs, _ = scoring.target_logprobs(
        project, self.head, hidden, self.targets, temperature=0.5
      )
      return jnp.sum(jnp.sin(logprobs))

    only_logprobs = jax.jit(jax.grad(value))(self.hidden)
    np.testing.assert_allclose(without[0], only_logprobs, rtol=1e-5, atol=1e-7)
    self.assertGreater(float(jnp.max(jnp.abs(with_entropy[0] - without[0]))), 0)

  def test_all_logits_never_exist_at_once(self):
    rows, positions, vocab = 2, 256, 4096

    def loss(hidden, head, targets):
      logprobs, entropy = scoring.target_logprobs(
        project, head, hidden, targets, chunk=16
      )
      return jnp.sum(logprobs) + jnp.sum(entropy)

    compiled = (
      jax.jit(jax.grad(loss, (0, 1)))
      .lower(
        jax.ShapeDtypeStruct((rows, positions, 8), jnp.float32),
        jax.ShapeDtypeStruct((8, vocab), jnp.float32),
        jax.ShapeDtypeStruct((rows, positions), jnp.int32),
      )
      .compile()
    )
    held = compiled.memory_analysis().temp_size_in_bytes
    self.assertLess(held, rows * positions * vocab * 4 / 3)


class ScheduleTest(chex.TestCase):
  @parameterized.parameters(
    (dict(), [1.0] * 6),
    (dict(warmup_steps=2), [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    (
      dict(schedule="linear", warmup_steps=1, total_steps=5),
      [1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0],
    ),
    (
      dict(schedule="cosine", total_steps=4, final_fraction=0.2),
      [1.0, 0.2 + 0.4 * (1 + np.cos(np.pi / 4)), 0.6],
    ),
  )
  def test_by_hand(self, options, wanted):
    config = optimizers.OptimizerConfig(learning_rate=2.0, **options)
    schedule = optimizers.learning_rate(config)
    found = [float(schedule(step)) for step in range(len(wanted))]
    np.testing.assert_allclose(found, 2.0 * np.array(wanted), atol=1e-6)

  def test_optimizer_is_adamw_behind_clipping(self):
    config = optimizers.OptimizerConfig(
      learning_rate=0.1,
      b1=0.8,
      b2=0.9,
      eps=1e-3,
      weight_decay=0.5,
      max_grad_norm=1.0,
    )
    w = np.array([1.0, -2.0])
    params, m, v = jnp.asarray(w), np.zeros(2), np.zeros(2)
    state = optimizers.create(config).init(params)
    for t, g in enumerate((np.array([3.0, 4.0]), np.array([0.1, 0.0])), 1):
      updates, same = optimizers.update(
        config, params * jnp.nan, state, params, taken=jnp.array(False)
      )
      np.testing.assert_array_equal(updates, 0.0)
      chex.assert_trees_all_equal(same, state)
      updates, state = optimizers.update(
        config, jnp.asarray(g), state, params, taken=jnp.array(True)
      )
      params = optax.apply_updates(params, updates)
      g = g / max(1.0, np.linalg.norm(g))
      m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
      step = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
      w = w - 0.1 * (step + 0.5 * w)
      np.testing.assert_allclose(params, w, rtol=1e-5)

  def test_a_step_that_may_be_skipped_copies_no_state(self):
    jax.config.update("jax_disable_most_optimizations", False)
    self.addCleanup(jax.config.update, "jax_disable_most_optimizations", True)

    def step(params, opt_state, grads):
      updates, opt_state = optimizers.update(
        OPTIMIZER,
        grads,
        opt_state,
        params,
        taken=jnp.isfinite(optax.tree.norm(grads)),
      )
      return optax.apply_updates(params, updates), opt_state

    params = [jax.ShapeDtypeStruct((256, 1024), jnp.float32)] * 3
    opt_state = jax.eval_shape(optimizers.create(OPTIMIZER).init, params)
    compiled = (
      jax.jit(step, donate_argnums=(0, 1))
      .lower(params, opt_state, params)
      .compile()
    )
    held = compiled.memory_analysis().temp_size_in_bytes
    # What is added to the parameters; moments would be twice as much more.
    self.assertLess(held, 1.5 * 3 * 256 * 1024 * 4)


class RefusalTest(chex.TestCase):
  def test_rows_must_divide_over_the_mesh(self):
    with self.assertRaisesRegex(ValueError, "rows: found 0 per micro-batch"):
      make_learner(rows=0)

  def test_batch_must_divide_into_micro_batches(self):
    trainer = make_learner(rows=3)
    (batch,) = batching.pack(make_segments(8, 2), lengths=[16], rows=2).batches
    with self.assertRaisesRegex(ValueError, "batch of 2 rows does not divide"):
      trainer.update(trainer.init_state(make_params()), [batch])

  @parameterized.parameters(
    (dict(schedule="cosin"), "schedule: found 'cosin'"),
    (dict(schedule="linear"), "total_steps: found 0, expected more than"),
    (dict(max_grad_norm=0.0), "max_grad_norm: found 0.0"),
  )
  def test_optimizer_options(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      optimizers.OptimizerConfig(**options)

  @parameterized.parameters(
    (dict(kind="pppo"), "kind: found 'pppo'"),
    (dict(kl="k4"), "kl: found 'k4'"),
    (dict(old_logprobs="both"), "old_logprobs: found 'both'"),
    (dict(aggregation="sum"), "aggregation: found 'sum'"),
    (dict(kl_coefficient=-1.0), "kl_coefficient: found -1.0"),
    (dict(temperature=0.0), "temperature: found 0.0"),
  )
  def test_objective_options(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      objectives.PolicyObjective(**options)

  def test_every_policy_loss_has_its_options(self):
    (batch,) = pack(make_segments(0, 3))
    for kind, loss in policy_losses.POLICY_LOSSES.items():
      objective = objectives.PolicyObjective(kind=kind)
      self.assertIs(objective.policy_loss, loss)
      per_token, _ = loss.evaluate(batch.old_logprobs, batch, loss.options())
      chex.assert_shape(per_token, batch.mask.shape)

  def test_rejected_turns_add_nothing(self):
    (batch,) = pack(make_segments(0, 3))
    mask, turn = batch.mask, batch.turn
    chosen = np.max(turn)
    sampler = np.where(turn == chosen, batch.old_logprobs + 1.0, 0.0)
    sampler = np.where(turn == chosen, sampler, batch.old_logprobs)
    batch = batch.replace(sampler_logprobs=sampler)
    weights = losses.token_weights(mask, turn, mode="token_mean")
    for rejection, kept in (("off", turn >= 0), ("geometric", turn < chosen)):
      objective = objectives.PolicyObjective(
        old_logprobs="recompute", importance="off", rejection=rejection
      )
      parts = objective.evaluate(
        batch.old_logprobs, 0 * mask, batch, weights, weights
      )
      expected = -np.sum(weights * batch.advantages * kept)
      self.assertAlmostEqual(float(parts.loss), float(expected), places=5)


if __name__ == "__main__":
  absltest.main()
