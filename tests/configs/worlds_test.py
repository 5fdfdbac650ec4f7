"""The worlds of the study: what fits into their prompts and responses."""

import tempfile

from absl.testing import parameterized
import numpy as np

from t2po_jax.configs import base as settings
from t2po_jax.configs import gridworld, searchqa
from t2po_jax.rollout import demonstrate
from t2po_jax.setup import build


class WorldTest(parameterized.TestCase):
  def demonstrate(self, module, preset):
    """The expert's turns in a preset's own lengths; its success."""
    chosen = module.get_config(preset).unlock()
    chosen.cache_dir = tempfile.mkdtemp()
    config = settings.read(chosen)
    benchmark = build.benchmark(config)
    tokenizer = build.agent(config, benchmark).tokenizer
    rules = build.rules(config, build.train_sampling(config))
    pairs, success = demonstrate.demonstrate(
      benchmark, tokenizer, rules, benchmark.splits["train"][:40], seed=0
    )
    self.assertLessEqual(
      max(len(prompt) + len(response) for prompt, response in pairs),
      config.train.row_tokens,
    )
    prompts = np.array([len(prompt) for prompt, _ in pairs])
    responses = np.array([len(response) for _, response in pairs])
    return config, prompts, responses, success

  def test_loops_costs_the_expert_most_of_its_walks(self):
    config, prompts, responses, success = self.demonstrate(gridworld, "loops")
    # No prompt is cut, no response either: turns alone are lost.
    self.assertLess(prompts.max(), config.rollout.max_prompt)
    self.assertLess(responses.max(), config.rollout.max_response)
    self.assertBetween(success, 0.1, 0.6)

  def test_lake_is_hard(self):
    _, _, _, success = self.demonstrate(gridworld, "lake")
    self.assertBetween(success, 0.1, 0.7)

  def test_the_limit_of_deep_binds(self):
    config, prompts, responses, success = self.demonstrate(searchqa, "deep")
    self.assertLess(prompts.max(), config.rollout.max_prompt)
    limit = config.rollout.max_response
    self.assertBetween(np.mean(responses == limit), 0.05, 0.4)
    self.assertBetween(success, 0.1, 0.7)
