"""Peaks and bounds, computed by hand."""

import types

from absl.testing import absltest, parameterized
import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from t2po_jax.distributed import collectives
from t2po_jax.setup import roofline


def flops(function, *shapes):
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return roofline.count_flops(jax.make_jaxpr(function)(*arrays).jaxpr)


class FlopsTest(absltest.TestCase):
  def test_products_by_hand(self):
    self.assertEqual(flops(jnp.dot, (3, 5), (5, 7)), 2 * 3 * 5 * 7)
    batched = flops(
      lambda x, y: jnp.einsum("bij,bkj->bik", x, y), (2, 3, 5), (2, 7, 5)
    )
    self.assertEqual(batched, 2 * 2 * 3 * 5 * 7)

  def test_loops_count_their_length_and_branches_the_costliest(self):
    def loop(x, w):
      return jax.lax.scan(lambda c, _: (c @ w, None), x, length=4)[0]

    self.assertEqual(flops(loop, (3, 5), (5, 5)), 4 * 2 * 3 * 5 * 5)

    def branch(x, w):
      return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w)

    self.assertEqual(flops(branch, (3, 5), (5, 5)), 2 * 2 * 3 * 5 * 5)

  def test_gradients_and_remat_count_what_is_done(self):
    def loss(w, x):
      return jnp.sum(jax.checkpoint(lambda w: jnp.sin(x @ w))(w))

    # Forward, again, and the gradient by the weights.
    found = flops(jax.grad(loss), (5, 7), (3, 5))
    self.assertEqual(found, 3 * 2 * 3 * 5 * 7)

  def test_parts_of_all_devices_are_added_up(self):
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("a",), axis_types=auto)
    rows = jax.sharding.PartitionSpec("a")
    part = jax.shard_map(
      jnp.dot,
      mesh=mesh,
      in_specs=(rows, jax.sharding.PartitionSpec()),
      out_specs=rows,
    )
    self.assertEqual(flops(part, (4, 5), (5, 7)), 2 * 4 * 5 * 7)

  def test_a_kernel_counts_what_it_says(self):
    def copy(x):
      return pl.pallas_call(
        lambda source, target: target.__setitem__(..., source[...]),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        cost_estimate=pl.CostEstimate(
          flops=77, transcendentals=0, bytes_accessed=0
        ),
        interpret=True,
      )(x)

    self.assertEqual(flops(copy, (8, 8)), 77)


class BoundTest(parameterized.TestCase):
  @parameterized.parameters(
    ("all-gather", 3 / 4 * 100),
    ("all-reduce", 2 * 3 / 4 * 100),
    ("reduce-scatter", 3 * 100),
  )
  def test_what_leaves_a_device(self, kind, expected):
    mesh = types.SimpleNamespace(shape={"fsdp": 4, "tensor": 2})
    one = collectives.Collective(kind, ("fsdp",), (), 100, 1, "")
    self.assertAlmostEqual(roofline.sent_bytes(one, mesh), expected)

  def test_the_largest_part_bounds(self):
    chip = roofline.Chip("x", "X", 1.0, bandwidth=10, flops=5, interconnect=2)
    found = roofline.bound(chip, flops=5, read=20, sent=[1, 5])
    self.assertEqual(
      (found.compute, found.memory, found.exchange), (1.0, 2.0, 3.0)
    )
    self.assertEqual((found.seconds, found.by), (3.0, "exchange"))

  def test_chips_by_what_devices_are_called(self):
    def name(kind):
      device = types.SimpleNamespace(device_kind=kind)
      chip = roofline.of_device(device)
      return chip and chip.name

    self.assertEqual(name("TPU v5 lite"), "v5e")
    self.assertEqual(name("TPU v5"), "v5p")
    self.assertEqual(name("NVIDIA H200"), "H200")
    self.assertEqual(name("NVIDIA H100 80GB HBM3"), "H100")
    self.assertIsNone(name("cpu"))


if __name__ == "__main__":
  absltest.main()
