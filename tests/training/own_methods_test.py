"""An estimator, a loss and a signal from outside, named in a config file."""

import importlib.util
import math
import pathlib
import tempfile
import textwrap

from absl.testing import absltest
import jax

from t2po_jax.control import uncertainty
from t2po_jax.learning import estimators, policy_losses
from t2po_jax.setup import validate
from t2po_jax.training import loop, metrics

OWN = '''
"""Everything that three new methods need: functions, options, names."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from t2po_jax import keys
from t2po_jax.configs import smoke
from t2po_jax.control import uncertainty
from t2po_jax.learning import estimators, losses, policy_losses
from t2po_jax.learning.estimators import episodes
from t2po_jax.learning.policy_losses import record


@dataclasses.dataclass(frozen=True)
class MedianOptions:
  median_scale: float = keys.key(1.0, "Factor of the distance.", above=0)


def median(data, *, median_scale):
  """Distance of the return to the median of its group."""
  values = np.zeros(len(data.rewards))
  for members in episodes.groups(data):
    found = data.returns[members]
    values[members] = median_scale * (found - np.median(found))
  return episodes.Advantages(
    episodes.broadcast(values, data), {"advantage/own": 1.0}
  )


@dataclasses.dataclass(frozen=True)
class PlainOptions:
  own_cap: float = keys.key(5.0, "Largest ratio.", above=0)


def plain(logprobs, old_logprobs, advantages, mask, *, turn, own_cap):
  """The surrogate with a capped ratio."""
  log_ratio = losses.log_ratio(logprobs, old_logprobs, mask)
  ratio = jnp.exp(log_ratio)
  loss = -jnp.minimum(ratio, own_cap) * advantages
  return record.finish(loss, log_ratio, mask, clipped=ratio > own_cap)


@dataclasses.dataclass(frozen=True)
class DriftOptions:
  drift_decay: float = keys.key(0.9, "Of the mean so far.", least=0, most=1)


def drift(measures, state, *, vocab_size, top_j, drift_decay):
  """Entropy against a running mean that outlives the turn."""
  mean = drift_decay * state[:, 0] + (1 - drift_decay) * measures.entropy
  return jnp.abs(measures.entropy - mean), mean[:, None]


estimators.register(
  "median", episodes.Estimator(median, MedianOptions, grouped=True)
)
policy_losses.register("plain", record.PolicyLoss(plain, PlainOptions))
uncertainty.register(
  "drift", uncertainty.Signal(drift, DriftOptions, initial=(0.5,))
)


def get_config(presets=""):
  c = smoke.get_config(presets).unlock()
  c.advantage.estimator = "median"
  c.advantage.median_scale = 2.0
  c.loss.kind = "plain"
  c.loss.own_cap = 4.0
  c.control.signal = "drift"
  c.control.drift_decay = 0.8
  c.cold_start.episodes = 64
  c.cold_start.epochs = 1
  c.train.updates = 1
  c.train.eval_every = 0
  c.log.tensorboard = False
  return c.lock()
'''


class OwnMethodsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    jax.config.update("jax_disable_most_optimizations", True)
    self.folder = pathlib.Path(tempfile.mkdtemp())
    file = self.folder / "own.py"
    file.write_text(textwrap.dedent(OWN))
    spec = importlib.util.spec_from_file_location("own", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    self.config = module.get_config().unlock()
    self.config.cache_dir = str(self.folder / "cache")

  def tearDown(self):
    del estimators.ESTIMATORS["median"]
    del policy_losses.POLICY_LOSSES["plain"]
    del uncertainty.SIGNALS["drift"]
    jax.config.update("jax_disable_most_optimizations", False)
    super().tearDown()

  def test_trains_with_all_three(self):
    loop.train(validate.read(self.config), self.folder / "run")
    line = metrics.read(self.folder / "run" / "metrics.jsonl")[1]
    self.assertEqual(line["advantage/own"], 1.0)
    self.assertTrue(math.isfinite(line["learn/loss"]))
    self.assertGreater(line["learn/update_norm"], 0.0)
    self.assertGreater(line["train/phi_mean"], 0.0)

  def test_its_keys_are_checked_like_all_others(self):
    self.config.loss.own_cap = -1.0
    with self.assertRaisesRegex(ValueError, "loss.own_cap: .*above 0"):
      validate.read(self.config)
    self.config.loss.own_cap = 4.0
    self.config.advantage.estimator = "gigpo"
    with self.assertRaisesRegex(ValueError, "median_scale.*'gigpo'"):
      validate.read(self.config)


if __name__ == "__main__":
  absltest.main()
