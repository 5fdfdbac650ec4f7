"""Mesh sizes, the axis table, and layouts on the trivial mesh.

What needs several devices is in `eight_devices.py`.
"""

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from t2po_jax.distributed import sharding


class MeshTest(chex.TestCase):
  def test_one_device_is_the_trivial_mesh(self):
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    self.assertEqual(dict(mesh.shape), {"data": 1, "fsdp": 1, "tensor": 1})
    self.assertEqual(sharding.row_shards(mesh), 1)

  @parameterized.parameters(
    (dict(data=2), "mesh data 2 x fsdp -1 x tensor 1 does not fit 1 devices"),
    (dict(data=1, fsdp=3), "fsdp 3 x tensor 1 does not fit 1 devices"),
    (dict(data=-1), "mesh.data and mesh.fsdp are both -1"),
    (dict(tensor=0), "mesh.tensor is 0; it must be at least 1"),
  )
  def test_sizes_that_do_not_fit_are_refused(self, sizes, message):
    with self.assertRaisesRegex(ValueError, message) as raised:
      sharding.create_mesh(**sizes, devices=jax.devices()[:1])
    self.assertNotIn("\n", str(raised.exception))


class TableTest(chex.TestCase):
  def setUp(self):
    super().setUp()
    self.mesh = jax.sharding.AbstractMesh((2, 2, 2), sharding.MESH_AXES)

  def test_names_map_to_mesh_axes(self):
    spec = sharding.partition_spec(self.mesh, ("vocab", "width"), (6, 8))
    self.assertEqual(spec, jax.sharding.PartitionSpec("tensor", "fsdp"))
    spec = sharding.partition_spec(self.mesh, ("rows", None), (8, 5))
    self.assertEqual(spec, jax.sharding.PartitionSpec(("data", "fsdp"), None))

  def test_what_cannot_be_divided_stays_whole(self):
    axes = ("width", "kv_heads", "head_width")
    spec = sharding.partition_spec(self.mesh, axes, (8, 3, 4))
    self.assertEqual(spec, jax.sharding.PartitionSpec("fsdp", None, None))

  def test_unknown_name_is_refused_with_the_nearest(self):
    with self.assertRaisesRegex(ValueError, "'widht' has no rule.*'width'"):
      sharding.partition_spec(self.mesh, ("widht",), (8,))

  def test_wrong_rank_is_refused(self):
    with self.assertRaisesRegex(ValueError, "name 1 dimensions"):
      sharding.partition_spec(self.mesh, ("width",), (8, 8))

  def test_every_rule_names_mesh_axes(self):
    used = {axis for axes in sharding.RULES.values() for axis in axes}
    self.assertLessEqual(used, set(sharding.MESH_AXES))


class LayoutTest(chex.TestCase):
  def test_put_and_gather_are_inverse(self):
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    params = {"a": np.arange(6.0).reshape(2, 3), "b": [np.ones(4)]}
    axes = {"a": ("vocab", "width"), "b": [("width",)]}
    placed = sharding.put(params, sharding.params_sharding(mesh, params, axes))
    chex.assert_trees_all_equal(sharding.gather(placed), params)
    self.assertIsInstance(sharding.gather(placed)["a"], np.ndarray)

  def test_put_without_alias_leaves_the_original(self):
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    whole = sharding.replicated(mesh)
    first = sharding.put(np.ones(3), whole)
    second = sharding.put(first, whole, alias=False)
    second.delete()
    np.testing.assert_array_equal(first, np.ones(3))

  def test_over_rows_of_one_device_is_the_function(self):
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    self.assertIs(sharding.over_rows(np.add, mesh), np.add)

  def test_constrain_changes_no_value(self):
    x = jnp.arange(8.0).reshape(2, 4)
    np.testing.assert_array_equal(sharding.constrain(x, "rows", None), x)
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
      y = jax.jit(lambda x: sharding.constrain(x, "rows", "length") * 2)(x)
      with self.assertRaisesRegex(ValueError, "no rule"):
        sharding.constrain(x, "rowz", None)
    np.testing.assert_array_equal(y, 2 * x)


if __name__ == "__main__":
  absltest.main()
