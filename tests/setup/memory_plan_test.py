"""The memory plan against real arrays, XLA's own figure, and a small limit."""

import dataclasses
import types

from absl.testing import absltest, parameterized
import chex
import jax

from t2po_jax.configs import base as settings
from t2po_jax.configs import smoke
from t2po_jax.models import agent as agents
from t2po_jax.models import config as config_lib
from t2po_jax.models import decoder
from t2po_jax.setup import build, memory_plan, validate

MODEL = dataclasses.replace(config_lib.named("nano"), vocab_size=512)


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


def make(**changes):
  """A configuration with its policy and learner."""
  config = smoke.get_config().unlock()
  for key, value in changes.items():
    section, name = key.split("__")
    config[section][name] = value
  config = settings.read(config)
  policy = decoder.Policy(
    MODEL,
    dtype=build.DTYPES[config.model.dtype],
    remat=config.model.remat,
  )
  agent = agents.Agent(policy, decoder.shapes(MODEL), None)
  return config, policy, build.policy_learner(config, agent)


def nbytes(tree):
  return sum(array.nbytes for array in jax.tree.leaves(tree))


class ArithmeticTest(chex.TestCase):
  def test_parts_are_the_bytes_of_the_arrays(self):
    config, policy, learner = make(loss__kl="k3", model__dtype="bfloat16")
    parts = memory_plan.plan(config, policy, learner).parts
    params = jax.jit(policy.init)(jax.random.key(0))
    state = learner.init_state(params)
    self.assertEqual(parts["parameters"], nbytes(state.params))
    self.assertEqual(parts["optimizer state"], nbytes(state.opt_state))
    reference = learner.place_reference(params)
    self.assertEqual(parts["reference policy"], nbytes(reference))
    self.assertEqual(
      parts["sampler's parameters"], nbytes(policy.decode_params(params))
    )
    self.assertEqual(
      parts["key/value cache"], nbytes(policy.init_cache(16, 32 + 16))
    )
    self.assertEqual(parts["base parameters"], 0)
    # By hand: L x (keys and values) x slots x M x H x length x 2 bytes.
    self.assertEqual(parts["key/value cache"], 2 * 2 * 16 * 1 * 32 * 48 * 2)

  def test_adapters_share_a_base(self):
    config, policy, learner = make(
      lora__rank=2,
      lora__targets="query",
      loss__kl="k3",
      model__dtype="bfloat16",
    )
    parts = memory_plan.plan(config, policy, learner).parts
    learner.load_base(jax.jit(policy.init)(jax.random.key(0)))
    self.assertEqual(parts["base parameters"], nbytes(learner._base))
    # L x (D x r + r x N H) floats; the reference is as small.
    self.assertEqual(parts["parameters"], 2 * (64 * 2 + 2 * 64) * 4)
    self.assertEqual(parts["reference policy"], parts["parameters"])

  def test_full_remat_keeps_the_input_of_each_layer(self):
    def kept(layers, remat):
      config = dataclasses.replace(MODEL, layers=layers)
      policy = decoder.Policy(config, remat=remat)
      return memory_plan._kept_bytes(policy, None, 4, 32)

    # B x T x D floats; what does not grow with the layers is the final norm's.
    self.assertEqual(kept(5, "full") - kept(2, "full"), 3 * 4 * 32 * 64 * 4)
    # Attention alone keeps several [B, N, T, T] of each.
    more = kept(3, "none") - kept(2, "none")
    self.assertGreater(more, 2 * 4 * 2 * 32 * 32 * 4)

  @parameterized.parameters("none", "full")
  def test_the_estimate_is_near_the_figure_of_xla(self, remat):
    config, policy, learner = make(model__remat=remat, train__row_tokens=256)
    parts = memory_plan.plan(config, policy, learner).parts
    estimate = sum(parts.get(name, 0) for name in memory_plan.UPDATE)
    batch = memory_plan.batch_shape(config, learner.rows)
    exact = learner.temporary_bytes(batch)
    self.assertBetween(estimate, 0.6 * exact, 2.0 * exact)


class LimitTest(chex.TestCase):
  def test_refused_in_one_line(self):
    config, policy, learner = make(memory__limit=0.001)
    plan = memory_plan.plan(config, policy, learner)
    # So near the limit the figure is XLA's.
    self.assertIn("update (XLA)", plan.parts)
    self.assertNotIn("activations", plan.parts)
    with self.assertRaisesRegex(
      ValueError,
      r"^memory: 0\.\d\d GB needed on every device, found 0\.00 \(update "
      r"\(XLA\) 0\.0\d, .*\); lower train.micro_rows, .*memory.check to False",
    ) as raised:
      plan.require()
    self.assertNotIn("\n", str(raised.exception))

  def test_what_fits_is_shown_and_passes(self):
    config, policy, learner = make()
    plan = memory_plan.plan(config, policy, learner)
    plan.require()
    lines = plan.table().splitlines()
    self.assertRegex(lines[0], r"^memory per device, GB \(.*data 1 x fsdp 1")
    self.assertRegex(lines[-1], r"at the same time +\d+\.\d{3} of \d+\.\d{3}$")
    self.assertNotIn("reference", plan.table())

  def test_rollouts_ahead_keep_policies_and_take_no_turns(self):
    config, policy, learner = make(rollout__ahead=2)
    plan = memory_plan.plan(config, policy, learner)
    copies = plan.parts["policies of rollouts"] / plan.parts["parameters"]
    # Three that may play, the last of them twice while it is published.
    self.assertEqual(copies, 4)
    turns = dataclasses.replace(plan, overlap=False)
    passing = [
      sum(plan.parts.get(name, 0) for name in names)
      for names in (memory_plan.UPDATE, memory_plan.SAMPLING)
    ]
    self.assertGreater(min(passing), 0)
    self.assertEqual(plan.total - turns.total, min(passing))

  def test_a_rollback_keeps_the_policy_to_stay_close_to(self):
    def parts(**changes):
      config, policy, learner = make(**changes)
      return memory_plan.plan(config, policy, learner).parts

    name = "policy to return to"
    kept = parts(guard__action="rollback")
    self.assertEqual(kept[name], kept["parameters"])
    self.assertEqual(parts(guard__action="warn")[name], 0)
    free = parts(guard__action="rollback", guard__kl_coefficient=0.0)
    self.assertEqual(free[name], 0)

  def test_carried_groups_keep_the_policy_that_began_them(self):
    def parts(**changes):
      config, policy, learner = make(**changes)
      return memory_plan.plan(config, policy, learner).parts

    plain = parts()
    kept = parts(rollout__oversample=2)
    self.assertEqual(plain["policies of rollouts"], 0)
    # The one before, the current one, and a copy while it is published.
    self.assertEqual(kept["policies of rollouts"], 3 * kept["parameters"])
    name = "sampler's parameters"
    self.assertEqual(kept[name], 2 * plain[name])
    self.assertEqual(parts(rollout__oversample=2, rollout__refresh=True), plain)
    # Begun two updates before: one policy more.
    deep = parts(rollout__oversample=3, rollout__tasks=2)
    self.assertEqual(deep["policies of rollouts"], 4 * kept["parameters"])
    self.assertEqual(deep[name], 3 * plain[name])

  def test_update_and_sampling_take_turns(self):
    plan = memory_plan.Plan(
      {"parameters": 10, "activations": 5, "gradients": 3, "sampling": 7},
      18,
      "x",
    )
    self.assertEqual(plan.total, 18)
    plan.require()
    with self.assertRaisesRegex(ValueError, "parameters 0.00.*use more dev"):
      dataclasses.replace(plan, limit=17).require()
    dataclasses.replace(plan, limit=0).require()

  def test_the_compilers_figures_replace_estimates(self):
    parts = {
      "parameters": 10,
      "activations": 5,
      "gradients": 3,
      "sampling": 7,
      "loading weights": 4,
    }
    plan = memory_plan.Plan(parts, 18, "x")
    self.assertEqual(plan.total, 10 + 8)
    # By hand: what takes most of the three that take turns.
    self.assertEqual(plan.compiled(update=2).total, 10 + 7)
    self.assertEqual(plan.compiled(update=2, sampling=1).total, 10 + 4)
    self.assertEqual(plan.compiled(sampling=9).total, 10 + 9)
    self.assertEqual(plan.compiled(), plan)
    ahead = dataclasses.replace(plan, overlap=True)
    self.assertEqual(ahead.compiled(update=2, sampling=1).total, 10 + 2 + 4)
    # Devices that only roll out have the sampling.
    beside = memory_plan.Plan({"sampling": 7, "loading weights": 4}, 18, "y")
    split = memory_plan.Plan({"activations": 5}, 18, "x", beside=beside)
    split = split.compiled(update=2, sampling=1)
    self.assertEqual(split.total, 2)
    assert split.beside is not None
    self.assertEqual(split.beside.total, 4)

  def test_near_the_limit_all_figures_are_the_compilers(self):
    config, policy, learner = make(memory__limit=0.002)
    plan = memory_plan.plan(config, policy, learner)
    self.assertContainsSubset(("update (XLA)", "sampling (XLA)"), plan.parts)
    self.assertNotIn("sampling", plan.parts)
    self.assertGreater(plan.parts["sampling (XLA)"], 0)

  def test_a_device_may_tell_and_a_cpu_shares_the_host(self):
    def device(platform, stats):
      return types.SimpleNamespace(
        platform=platform, memory_stats=lambda: stats
      )

    self.assertEqual(
      memory_plan.limit_bytes(device("gpu", {"bytes_limit": 7})), 7
    )
    self.assertEqual(memory_plan.limit_bytes(device("tpu", None)), 0)
    self.assertGreater(memory_plan.limit_bytes(jax.devices()[0]), 1e8)

  def test_a_limit_that_nothing_reads_is_refused(self):
    config = smoke.get_config().unlock()
    config.memory.limit = 3.0
    validate.read(config)
    config.memory.check = False
    with self.assertRaisesRegex(ValueError, "memory.limit: found 3.0"):
      validate.read(config)


if __name__ == "__main__":
  absltest.main()
