"""Sampling on eight devices; `mesh_test.py` runs this in a process whose CPU
poses as eight. Any mesh must sample what one device samples."""

from absl.testing import absltest, parameterized
import jax
import numpy as np
import sampler_test as toy

from t2po_jax import sharding
from t2po_jax.rollout import draw, sampler


def make_mesh(data, tensor):
  devices = jax.devices()[: data * tensor]
  return sharding.create_mesh(data=data, tensor=tensor, devices=devices)


def serve_twice(mesh):
  """Responses, then those to prompts that partly lie in the cache."""
  prompts = toy.random_prompts(6, seed=4)
  under = toy.make(slots=4, mesh=mesh)
  under._sampler.warm_up([draw.Sampling()])
  programs = sampler._decode._cache_size(), sampler._prefill._cache_size()
  found = toy.serve(
    under, [toy.request(i, p) for i, p in enumerate(prompts + prompts[:2])]
  )
  again = [p[: len(p) // 2 + 1] for p in prompts]
  found |= toy.serve(
    under, [toy.request(10 + i, p) for i, p in enumerate(again)]
  )
  compiled = sampler._decode._cache_size(), sampler._prefill._cache_size()
  return under, found, np.subtract(compiled, programs)


class SamplingMeshTest(parameterized.TestCase):
  @parameterized.parameters((4, 1), (1, 2), (2, 2))
  def test_every_mesh_samples_the_same(self, data, tensor):
    _, expected, _ = serve_twice(None)
    under, found, compiled = serve_twice(make_mesh(data, tensor))
    self.assertEqual(compiled.tolist(), [0, 0])
    self.assertGreater(under.counters["prompt_tokens_reused"], 0)
    self.assertSameElements(found, expected)
    for ticket, completion in found.items():
      attempt, right = completion.attempt, expected[ticket].attempt
      np.testing.assert_array_equal(attempt.tokens, right.tokens)
      np.testing.assert_allclose(attempt.logprobs, right.logprobs, atol=1e-4)
    slots = under._sampler._state
    self.assertEqual(
      slots.length.addressable_shards[0].data.shape, (4 // data,)
    )
    keys = slots.cache.keys[0]
    self.assertEqual(
      keys.addressable_shards[0].data.nbytes, keys.nbytes // data
    )
    up = under._sampler._params["layers"][0]["mlp"]["up"]["kernel"]
    self.assertEqual(
      up.addressable_shards[0].data.shape, (up.shape[0] // tensor, up.shape[1])
    )

  def test_parameters_of_another_mesh_are_taken(self):
    policy, params = toy.tiny_policy()
    mesh = sharding.create_mesh(fsdp=4, tensor=2)
    from t2po_jax.models import decoder

    placed = sharding.put(
      params,
      sharding.params_sharding(mesh, params, decoder.logical_axes(params)),
    )
    del policy
    under = toy.make(slots=4, mesh=make_mesh(2, 2))
    expected = jax.device_get(under._sampler._params)
    under._sampler.load(placed)
    found = jax.device_get(under._sampler._params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


if __name__ == "__main__":
  absltest.main()
