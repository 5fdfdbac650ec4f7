"""Sampling on eight devices; `mesh_test.py` runs this in a process whose CPU
poses as eight. Any mesh must sample what one device samples."""

from absl.testing import absltest, parameterized
import jax
import numpy as np

from t2po_jax.configs import smoke
from t2po_jax.distributed import sharding
from t2po_jax.models import decoder
from t2po_jax.rollout import draw
from t2po_jax.setup import build
from t2po_jax.training import machine
from tests.rollout import sampler_test as toy


def make_mesh(data, tensor):
  devices = jax.devices()[-data * tensor :]
  return sharding.create_mesh(data=data, fsdp=1, tensor=tensor, devices=devices)


def serve_twice(mesh, slots=8):
  """Responses, then those to prompts that partly lie in the cache."""
  under = toy.make(slots=slots, mesh=mesh, buckets=True)
  under._sampler.warm_up([draw.Sampling()])
  prompts = toy.random_prompts(10, seed=4)
  programs = machine.CompileCounter()
  found = toy.serve(
    under, [toy.request(i, p) for i, p in enumerate(prompts + prompts[:4])]
  )
  longer = [np.append(p, [98, 99])[: toy.MAX_PROMPT] for p in prompts]
  found |= toy.serve(
    under, [toy.request(20 + i, p) for i, p in enumerate(longer)]
  )
  return under, found, programs.count


class SamplingMeshTest(parameterized.TestCase):
  @parameterized.parameters((4, 1), (1, 2), (2, 2))
  def test_every_mesh_samples_the_same(self, data, tensor):
    _, expected, _ = serve_twice(None, slots=3)
    under, found, compiled = serve_twice(make_mesh(data, tensor))
    self.assertEqual(compiled, 0)
    self.assertGreater(under.counters["prompt_tokens_reused"], 0)
    self.assertSameElements(found, expected)
    edges = 0
    for ticket, completion in found.items():
      attempt, right = completion.attempt, expected[ticket].attempt
      size = min(len(attempt.tokens), len(right.tokens))
      differs = attempt.tokens[:size] != right.tokens[:size]
      if np.any(differs):
        # Sums over devices round differently, and so do products of fewer
        # rows on some processors. A number drawn from the very edge between
        # two tokens may so fall on the other one.
        edges, size = edges + 1, np.argmax(differs)
        step = int(attempt.tokens[size]) - int(right.tokens[size])
        self.assertEqual(abs(step), 1)
      else:
        np.testing.assert_array_equal(attempt.tokens, right.tokens)
        self.assertEqual(attempt.finish, right.finish)
      np.testing.assert_allclose(
        attempt.logprobs[:size], right.logprobs[:size], atol=1e-4
      )
    self.assertLessEqual(edges, 1)

  @parameterized.parameters((4, 1), (1, 2), (2, 2))
  def test_every_device_holds_its_part(self, data, tensor):
    under = toy.make(slots=8, mesh=make_mesh(data, tensor))
    state, params = under._sampler._state, under._sampler.weights.of()
    share = lambda x: x.addressable_shards[0].data.nbytes  # noqa: E731
    self.assertEqual(share(state.length) * data, state.length.nbytes)
    keys = state.cache.keys[0]  # Its one head cannot be split.
    self.assertEqual(share(keys) * data, keys.nbytes)
    up = params["layers"][0]["mlp"]["up"]["kernel"]
    self.assertEqual(share(up) * tensor, up.nbytes)
    table = params["embed"]["table"]
    self.assertEqual(share(table) * tensor, table.nbytes)

  def test_a_turn_stays_where_its_cache_is(self):
    under = toy.make(slots=8, mesh=make_mesh(4, 1))
    prompts = [np.full(20, 97 + i) for i in range(8)]
    toy.serve(under, [toy.request(i, p) for i, p in enumerate(prompts)])
    computed = under.counters["prompt_tokens_computed"]
    again = [np.append(p, [98, 99]) for p in prompts[::-1]]
    toy.serve(under, [toy.request(10 + i, p) for i, p in enumerate(again)])
    # Its twenty tokens are there, and the last starts the decoding.
    self.assertEqual(
      under.counters["prompt_tokens_computed"] - computed, len(prompts)
    )

  def test_shards_share_no_cache_rows(self):
    under = toy.make(slots=8, mesh=make_mesh(4, 1))
    with self.assertRaisesRegex(ValueError, "inside a shard"):
      under._sampler.fork([(0, 2)])
    with self.assertRaisesRegex(ValueError, "multiple of 4"):
      toy.make(slots=6, mesh=make_mesh(4, 1))

  def test_parameters_of_another_mesh_are_taken(self):
    _, params = toy.tiny_policy()
    axes = decoder.logical_axes(params)
    mesh = sharding.create_mesh(fsdp=4, tensor=2)
    placed = sharding.put(params, sharding.params_sharding(mesh, params, axes))
    under = toy.make(slots=4, mesh=make_mesh(2, 2))
    expected = jax.device_get(under._sampler.weights.of())
    under._sampler.load(placed)
    found = jax.device_get(under._sampler.weights.of())
    jax.tree.map(np.testing.assert_array_equal, found, expected)


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters((16, 1, 8, 1), (6, 1, 2, 1), (12, 2, 4, 2))
  def test_as_many_devices_as_divide_the_slots(
    self, slots, split, data, tensor
  ):
    config = smoke.get_config()
    config.rollout.slots, config.rollout.tensor = slots, split
    mesh = build.sampling_mesh(config)
    self.assertEqual(dict(mesh.shape), dict(data=data, fsdp=1, tensor=tensor))

  def test_devices_that_cannot_be_grouped_are_refused(self):
    config = smoke.get_config()
    config.rollout.tensor = 3
    with self.assertRaisesRegex(ValueError, "rollout.tensor: found 3"):
      build.sampling_mesh(config)


if __name__ == "__main__":
  absltest.main()
