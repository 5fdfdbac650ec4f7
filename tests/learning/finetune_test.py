"""Supervised fine-tuning: it learns, in an order that can be repeated."""

from absl.testing import absltest
import chex
import jax
import jax.numpy as jnp
import numpy as np

from t2po_jax import types
from t2po_jax.distributed import sharding
from t2po_jax.learning import (
  batching,
  finetune,
  learner,
  objectives,
  optimizers,
)

V, D = 12, 16


class BigramPolicy:
  """Predicts the next token from the last one alone."""

  def init(self, key):
    keys = jax.random.split(key)
    return {
      "table": 0.1 * jax.random.normal(keys[0], (V, D)),
      "head": 0.1 * jax.random.normal(keys[1], (D, V)),
    }

  def hidden(self, params, tokens, positions, segments):
    return params["table"][tokens]

  def head(self, params):
    return {"head": params["head"]}

  def logits(self, params, hidden):
    return hidden @ params["head"]


def make_attempt(tokens, forced=()):
  tokens = np.asarray(tokens, np.int32)
  zeros = np.zeros(len(tokens), np.float32)
  return types.Attempt(
    tokens=tokens,
    logprobs=zeros,
    uncertainty=zeros,
    entropy=zeros,
    confidence=zeros,
    forced=np.isin(np.arange(len(tokens)), forced),
    text="",
    finish="stop",
    fired_at=-1,
    thinking_tokens=0,
    phi=0.0,
  )


def make_trajectory(responses, *, success=True, aborted=False):
  """From (tokens, forced, format_valid) per turn."""
  turns = tuple(
    types.Turn(
      prompt=np.array([1], np.int32),
      response=make_attempt(tokens, forced),
      anchor="",
      action="",
      reward=0.0,
      penalty=0.0,
      format_valid=valid,
      action_valid=True,
      phi_change=0.0,
      prompt_shortened=False,
    )
    for tokens, forced, valid in responses
  )
  return types.Trajectory("task", "", 0, 0, turns, success, aborted)


class SuccessfulTest(chex.TestCase):
  def test_solved_and_well_formed_turns_are_kept(self):
    rollout = [
      make_trajectory([([2, 3], (), True), ([4], (), False)]),
      make_trajectory([([5], (), True)], success=False),
      make_trajectory([([6], (), True)], aborted=True),
      make_trajectory([([7, 8], (1,), True)]),
    ]
    found = finetune.successful_segments(rollout, max_length=16)
    self.assertEqual([s.targets.tolist() for s in found], [[2, 3], [7, 8]])
    self.assertEqual([s.mask.tolist() for s in found], [[1, 1], [1, 0]])


class FinetuneTest(chex.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    policy = BigramPolicy()
    cls.params = policy.init(jax.random.key(0))
    cls.trainer = learner.Learner(
      policy,
      {"table": ("vocab", "width"), "head": ("width", "vocab")},
      sharding.create_mesh(devices=jax.devices()[:1]),
      optimizer=optimizers.OptimizerConfig(learning_rate=0.05),
      objective=objectives.LikelihoodObjective(),
      rows=2,
    )
    rng = np.random.default_rng(0)
    cls.segments = []
    for start in rng.integers(0, V, 10):
      count = np.arange(start, start + 8) % V
      cls.segments += batching.pair_segments([(count[:3], count[3:])])

  def run_epochs(self, epochs, **options):
    return finetune.finetune(
      self.trainer,
      self.trainer.init_state(self.params),
      self.segments,
      lengths=[16],
      batch_size=4,
      epochs=epochs,
      **options,
    )

  def test_loss_is_the_mean_negative_log_likelihood(self):
    (batch,) = batching.pack(self.segments, lengths=[16], rows=2).batches
    state = self.trainer.init_state(self.params)
    _, metrics = self.trainer.update(state, [batch])
    logits = np.asarray(self.params["table"] @ self.params["head"], np.float64)
    terms = []
    for segment in self.segments:
      for at, target in zip(segment.index, segment.targets, strict=True):
        p = np.exp(logits[segment.tokens[at]])
        terms.append(-np.log(p[target] / p.sum()))
    np.testing.assert_allclose(metrics["loss"], np.mean(terms), rtol=1e-5)

  def test_counting_is_learned(self):
    calls = []
    state, history = self.run_epochs(
      30, progress=lambda *given: calls.append(given)
    )
    self.assertLen(history, 30)
    self.assertGreater(history[0]["loss"], 2.0)
    self.assertLess(history[-1]["loss"], 0.1)
    steps = finetune.count_steps(10, batch_size=4, epochs=30)
    self.assertEqual(steps, 90)
    self.assertEqual(int(state.step), steps)
    numbers = [(done, total) for done, total, _ in calls]
    self.assertEqual(numbers, [(i, steps) for i in range(1, steps + 1)])
    self.assertEqual(calls[-1][2]["skipped"], 0.0)
    self.assertEqual(self.trainer.traces["update"], 1)

  def test_same_seed_gives_the_same_state(self):
    first, _ = self.run_epochs(2, seed=1)
    again, _ = self.run_epochs(2, seed=1)
    other, _ = self.run_epochs(2, seed=2)
    chex.assert_trees_all_equal(first, again)
    gap = jnp.max(jnp.abs(first.params["head"] - other.params["head"]))
    self.assertGreater(float(gap), 0)

  def test_nothing_to_learn_is_refused(self):
    state = self.trainer.init_state(self.params)
    with self.assertRaisesRegex(ValueError, "found nothing to fine-tune on"):
      finetune.finetune(self.trainer, state, [], lengths=[16], batch_size=4)


if __name__ == "__main__":
  absltest.main()
