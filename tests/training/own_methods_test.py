"""The estimator, loss, signal and config file of docs/extending.md, run."""

import importlib.util
import math
import pathlib
import re
import tempfile

from absl.testing import absltest
import jax

from t2po_jax.control import uncertainty
from t2po_jax.learning import estimators, policy_losses
from t2po_jax.setup import validate
from t2po_jax.training import loop, metrics
from tests import places

PAGE = places.ROOT / "docs" / "extending.md"
OWN = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S))


class OwnMethodsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    jax.config.update("jax_disable_most_optimizations", True)
    self.folder = pathlib.Path(tempfile.mkdtemp())
    file = self.folder / "own.py"
    file.write_text(OWN)
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
