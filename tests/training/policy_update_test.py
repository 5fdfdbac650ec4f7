"""How an update charges KL and lays out advantages, with a scripted learner."""

import dataclasses

from absl.testing import absltest
import numpy as np

from t2po_jax.configs import base
from t2po_jax.configs import base as settings
from t2po_jax.learning import batching, collapse_guard
from t2po_jax.training import experience, policy_update
from tests.training import experience_test


class FakeLearner:
  """Scores every token by a rule; keeps what it is asked to learn."""

  skips_rows = True

  def __init__(self):
    self.batches = None

  def logprobs(self, params, batch):
    del params
    # d = logp - logp_ref is 0.1 x (target + 1) at every token.
    return batch.sampler_logprobs - 0.1 * (batch.targets + 1)

  def values(self, state, batch):
    del state
    return 0.01 * (batch.turn + 1) + 0.1 * batch.targets

  def update(self, state, batches, **options):
    self.batches, self.options = batches, options
    return state, {"loss": 0.0}


def improve_once(changes, rewards, discarded=0, caution=None):
  """One update over episodes of the given rewards per turn.

  The first turn of each has so many discarded attempts.
  """
  config = base.get_config()
  config.train.row_tokens = 32
  config.train.micro_rows = 1
  config.update_from_flattened_dict(changes)
  trajectories = [
    experience_test.make_episode("t", 0, member, of_turns, tokens=2 + member)
    for member, of_turns in enumerate(rewards)
  ]
  if discarded:
    trajectories = [_with_discarded(t, discarded) for t in trajectories]
  found = experience.Experience(
    trajectories=trajectories,
    played=trajectories,
    baselines=None,
    deltas=np.zeros(0),
    phi_changes=np.zeros(0),
    cursor=0,
    scalars={},
  )
  under = FakeLearner()
  improver = policy_update.Improver(settings.read(config), under, reference={})
  if caution is not None:
    improver.caution, improver.good = caution, {}
  _, numbers = improver.improve("state", found, update=1)
  turns = sum(len(of_turns) for of_turns in rewards)

  def per_turn(field):
    values = [getattr(batch, field) for batch in under.batches]
    return batching.to_turns(under.batches, values, turns=turns)

  return numbers, per_turn, under


def _with_discarded(trajectory, count):
  first, *others = trajectory.turns
  first = dataclasses.replace(first, discarded=(first.response,) * count)
  return dataclasses.replace(trajectory, turns=(first, *others))


class DiscardedTest(absltest.TestCase):
  def test_attempts_are_charged_beside_the_turns(self):
    rewards = [[1.0, 2.0], [5.0]]
    options = {
      "advantage.estimator": "rloo",
      "reward.kl": "k1",
      "reward.kl_coefficient": 0.5,
    }
    plain, of_turns, _ = improve_once(options, rewards, discarded=2)
    negative = {"control.resampling.negative": 0.75}
    charged, same, under = improve_once(
      options | negative, rewards, discarded=2
    )
    # What the turns get does not change, nor the KL measured on them.
    self.assertEqual(plain["reward/kl"], charged["reward/kl"])
    wanted = of_turns("advantages")
    for values, other in zip(same("advantages"), wanted, strict=True):
      np.testing.assert_array_equal(values, other)
    # Three turns, then two attempts of two tokens and two of three.
    values = [batch.advantages for batch in under.batches]
    everything = batching.to_turns(under.batches, values, turns=7)
    self.assertEqual([len(v) for v in everything[3:]], [2, 2, 3, 3])
    np.testing.assert_array_equal(np.concatenate(everything[3:]), -0.75)

  def test_the_distance_from_the_good_policy_is_that_of_the_turns(self):
    options = {
      "advantage.estimator": "rloo",
      "control.resampling.negative": 0.75,
    }
    caution = collapse_guard.Caution(kl=0.5)
    numbers, _, _ = improve_once(
      options, [[1.0, 2.0], [5.0]], discarded=2, caution=caution
    )
    # Token i is 0.1 (i + 1) from the good policy; turns have 2, 2 and 3 tokens.
    wanted = (2 * (0.1 + 0.2) + 0.1 + 0.2 + 0.3) / 7
    self.assertAlmostEqual(numbers["guard/kl"], wanted, places=6)


class ChargeTest(absltest.TestCase):
  def test_the_reward_of_every_turn_pays_for_its_kl(self):
    rewards = [[1.0, 2.0], [5.0]]
    numbers, per_turn, under = improve_once(
      {
        "advantage.estimator": "rloo",
        "reward.kl": "k2",
        "reward.kl_coefficient": 0.5,
      },
      rewards,
    )
    # Tokens are 0, 1, ...: k2 of token i is (0.1 (i + 1))^2 / 2.
    kl = {n: sum((0.1 * (i + 1)) ** 2 / 2 for i in range(n)) for n in (2, 3)}
    returns = [3.0 - 0.5 * 2 * kl[2], 5.0 - 0.5 * kl[3]]
    wanted = [returns[0] - returns[1]] * 2 + [returns[1] - returns[0]]
    for values, advantage in zip(per_turn("advantages"), wanted, strict=True):
      np.testing.assert_allclose(values, advantage, rtol=1e-4)
    self.assertAlmostEqual(
      numbers["reward/kl"], (2 * kl[2] + kl[3]) / 7, places=6
    )
    self.assertEqual(numbers["reward/kl_coefficient"], 0.5)
    self.assertIsNone(under.options["ref_params"])


class CriticTest(absltest.TestCase):
  def test_values_and_targets_lie_on_their_tokens(self):
    _, per_turn, _ = improve_once(
      {
        "advantage.estimator": "gae",
        "advantage.whiten": False,
        "advantage.discount": 0.9,
        "advantage.gae_lambda": 0.8,
        "advantage.token_discount": 0.7,
        "advantage.token_gae_lambda": 0.6,
      },
      [[1.0, 2.0], [5.0]],
    )
    # The first episode by hand: two turns of two tokens.
    values = [0.01, 0.11, 0.02, 0.12]
    rewards = [0.0, 1.0, 0.0, 2.0]
    gamma, trace = [0.7, 0.9, 0.7, 0.9], [0.6, 0.8, 0.6, 0.8]
    wanted, later, after = [0.0] * 4, 0.0, 0.0
    for t in (3, 2, 1, 0):
      delta = rewards[t] + gamma[t] * after - values[t]
      later = delta + gamma[t] * trace[t] * later
      wanted[t], after = later, values[t]
    advantages = np.concatenate(per_turn("advantages")[:2])
    np.testing.assert_allclose(advantages, wanted, rtol=1e-5)
    np.testing.assert_allclose(
      np.concatenate(per_turn("old_values")[:2]), values, rtol=1e-5
    )
    np.testing.assert_allclose(
      np.concatenate(per_turn("value_targets")[:2]),
      np.add(wanted, values),
      rtol=1e-5,
    )

  def test_turn_level_targets_stand_at_first_tokens_only(self):
    _, per_turn, _ = improve_once(
      {"advantage.estimator": "gae_turn"}, [[1.0, 2.0], [5.0]]
    )
    for target in per_turn("value_targets"):
      self.assertTrue(np.isfinite(target[0]))
      self.assertTrue(np.all(np.isnan(target[1:])))


class NothingLeftTest(absltest.TestCase):
  def test_no_segments_change_nothing(self):
    config = base.get_config()
    trajectories = [
      experience_test.make_episode("t", 0, 0, [1.0], aborted=True)
    ]
    found = experience.Experience(
      trajectories, trajectories, None, np.zeros(0), np.zeros(0), 0, {}
    )
    under = FakeLearner()
    state, numbers = policy_update.Improver(
      settings.read(config), under, None
    ).improve("state", found, update=1)
    self.assertEqual((state, numbers), ("state", {"pack/segments": 0.0}))
    self.assertIsNone(under.batches)


if __name__ == "__main__":
  absltest.main()
