"""The device mesh, and the table that maps logical axes to mesh axes.

The mesh has three axes: `data` holds copies of the weights, `fsdp` splits
weights and optimizer state and, like `data`, the rows of a batch, `tensor`
splits heads, feed-forward width and vocabulary. One device is the mesh (1, 1,
1) and runs the same code.

This is the successor of `jax.pmap`: functions are compiled once with `jax.jit`
for the whole mesh, `NamedSharding` lays out arguments and results, and XLA
inserts the collectives that pmap left to the user. The same program runs on one
core and on a pod.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t2po_jax import keys, types

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. A dimension not divisible by the mesh axes is
# replicated: 3 key/value heads on 2 devices are kept by both.
RULES: Mapping[str, tuple[str, ...]] = {
  # Axes of batches and activations.
  "rows": ("data", "fsdp"),
  "length": (),
  "activation_width": (),
  "activation_heads": ("tensor",),
  "activation_mlp": ("tensor",),
  "activation_vocab": ("tensor",),
  # Axes of weights.
  "layers": (),
  "vocab": ("tensor",),
  "width": ("fsdp",),
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "head_width": (),
  "mlp": ("tensor",),
  # Whole experts are distributed: each device computes its own for all tokens.
  "experts": ("tensor",),
  "expert_mlp": (),
  "rank": (),
}

Axes = Any  # A pytree like the parameters, of tuples of logical axis names.


def create_mesh(
  *,
  data: int = 1,
  fsdp: int = -1,
  tensor: int = 1,
  devices: Sequence[types.Device] | None = None,
) -> jax.sharding.Mesh:
  """Builds the device mesh.

  Args:
    data: devices with copies of the weights, >= 1; -1: the remaining devices.
    fsdp: devices that split weights and rows, >= 1; -1: the remaining devices.
    tensor: devices that split each matrix product, >= 1; -1: the rest.
    devices: the devices to use; by default all devices of all processes.

  Returns:
    A mesh with the axes `data`, `fsdp` and `tensor`.

  Raises:
    ValueError: if the three sizes do not multiply to the device count.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes: dict[str, int] = dict(
    zip(MESH_AXES, (data, fsdp, tensor), strict=True)
  )
  for name, size in sizes.items():
    if size < 1 and size != -1:
      raise ValueError(
        f"mesh.{name} is {size}; it must be at least 1, or -1 to take the "
        "remaining devices"
      )
  free = [name for name, size in sizes.items() if size == -1]
  if len(free) > 1:
    raise ValueError(
      f"mesh.{free[0]} and mesh.{free[1]} are both -1; only one axis can take "
      "the remaining devices"
    )
  fixed = math.prod(size for size in sizes.values() if size != -1)
  shown = " x ".join(f"{name} {size}" for name, size in sizes.items())
  if free and len(devices) % fixed == 0:
    sizes[free[0]] = len(devices) // fixed
  elif math.prod(sizes.values()) != len(devices):
    raise ValueError(
      f"mesh {shown} does not fit {len(devices)} devices; the axes must "
      f"multiply to {len(devices)}, and one of them may be -1"
    )
  # The partitioner, not the type system, decides the layout of intermediates.
  auto = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
  return jax.make_mesh(
    tuple(sizes.values()), MESH_AXES, axis_types=auto, devices=devices
  )


def row_shards(
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
) -> int:
  """The number of parts that the rows of a batch are split into."""
  return math.prod(mesh.shape[axis] for axis in RULES["rows"])


def partition_spec(
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
  axes: Sequence[str | None],
  shape: Sequence[int],
) -> jax.sharding.PartitionSpec:
  """Looks up the mesh axes of each dimension of an array.

  Args:
    mesh: the mesh.
    axes: the logical name of each dimension; None is not split.
    shape: the array's shape.

  Returns:
    One entry per dimension; a dimension that is not divisible is not split.

  Raises:
    ValueError: if a name is not in `RULES` or the ranks differ.
  """
  if len(axes) != len(shape):
    raise ValueError(
      f"logical axes {tuple(axes)} name {len(axes)} dimensions, but the array "
      f"has shape {tuple(shape)}"
    )
  entries = []
  for name, size in zip(axes, shape, strict=True):
    if name is not None and name not in RULES:
      raise ValueError(
        f"logical axis {name!r} has no rule{keys.nearest(name, RULES)}"
      )
    split = RULES[name] if name is not None else ()
    split = tuple(axis for axis in split if mesh.shape[axis] > 1)
    parts = math.prod(mesh.shape[axis] for axis in split)
    entries.append(split if split and size % parts == 0 else None)
  return jax.sharding.PartitionSpec(*entries)


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """The sharding of replicated arrays."""
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def row_sharding(
  mesh: jax.sharding.Mesh, *, dimension: int = 0
) -> jax.sharding.NamedSharding:
  """The sharding that splits one dimension: the rows of a batch.

  Args:
    mesh: the mesh.
    dimension: the dimension of the rows; those before it are not split.

  Returns:
    A sharding for arrays of any rank above `dimension`.
  """
  spec = jax.sharding.PartitionSpec(*[None] * dimension, RULES["rows"])
  return jax.sharding.NamedSharding(mesh, spec)


def params_sharding(
  mesh: jax.sharding.Mesh, params: types.Params, axes: Axes
) -> Any:
  """The sharding of every parameter.

  Args:
    mesh: the mesh.
    params: the parameters, or anything with their structure and shapes.
    axes: the same structure with a tuple of logical axis names per array.

  Returns:
    The same structure with a `NamedSharding` per array.

  Raises:
    ValueError: if a name has no rule, or names and shape disagree in rank.
  """

  def layout(
    array: Any, names: tuple[str | None, ...]
  ) -> jax.sharding.NamedSharding:
    # Spelled as compiled programs spell it; otherwise feeding a result back in
    # would count as a different layout and recompile.
    spec = list(partition_spec(mesh, names, array.shape))
    while spec and spec[-1] is None:
      spec.pop()
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

  return jax.tree.map(layout, params, axes)


def describe(tree: Any, layout: Any) -> Any:
  """Shapes with layouts, as `jax.ShapeDtypeStruct`.

  Args:
    tree: arrays, or anything with shapes and dtypes.
    layout: the same structure with a sharding per array.

  Returns:
    The same structure; nothing is allocated.
  """
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    tree,
    layout,
  )


def put(tree: Any, shardings: Any, *, alias: bool = True) -> Any:
  """Places a tree of arrays on the devices.

  Every process must hold the same values; each keeps only its own part and
  nothing is sent, unless the arrays are already spread over processes: then all
  of those processes must call this.

  Args:
    tree: arrays on the host or on devices.
    shardings: one sharding, or a tree of shardings that is a prefix of `tree`;
      over the devices of all processes or of this one.
    alias: whether arrays that already have the right layout may be returned as
      they are; False if the result will be donated while the original is still
      needed.

  Returns:
    The tree of device arrays.
  """
  if all(x.is_fully_addressable for x in jax.tree.leaves(shardings)):
    tree = jax.tree.map(_reachable, tree)
    return jax.device_put(tree, shardings, may_alias=None if alias else False)

  def place(x: Any, sharding: jax.sharding.NamedSharding) -> jax.Array:
    if _spans_processes(x):
      return _copy(sharding)(x)
    host = np.array(x, copy=None if alias else True)
    return jax.make_array_from_callback(
      host.shape, sharding, lambda part: host[part]
    )

  return jax.tree.map(place, tree, jax.tree.broadcast(shardings, tree))


def gather(tree: Any) -> Any:
  """Gathers a tree of device arrays on every host as whole NumPy arrays."""
  return jax.tree.map(lambda x: np.asarray(_whole(x)), tree)


def _spans_processes(x: Any) -> bool:
  """Whether an array has parts that this process cannot reach."""
  return isinstance(x, jax.Array) and not x.is_fully_addressable


def _reachable(x: Any) -> Any:
  """The array in a form that this process can use alone."""
  if not _spans_processes(x):
    return x
  return _whole(x).addressable_shards[0].data


def _whole(x: Any) -> Any:
  """Replicates an array over its mesh if it spans processes.

  One array at a time, so that no device ever holds a second model.
  """
  if not _spans_processes(x) or x.is_fully_replicated:
    return x
  return _copy(replicated(x.sharding.mesh))(x)


@functools.cache
def _copy(sharding: jax.sharding.Sharding) -> Callable[[Any], jax.Array]:
  """A compiled copy into a layout; it never aliases its input."""
  return jax.jit(jnp.copy, out_shardings=sharding)


def over_rows(
  function: Callable[..., Any], mesh: jax.sharding.Mesh
) -> Callable[..., Any]:
  """Lets every device compute its own rows, with the shared arrays replicated.

  Inside, nothing is exchanged along the axes of the rows, not even in a loop or
  when differentiated: the shared arrays are gathered once before, and their
  gradients are summed once after. On its own the partitioner would do both in
  every iteration of a loop. The `tensor` axis is left to the partitioner.

  Args:
    function: takes a tree of shared arrays, then arrays with rows first.
    mesh: the mesh.

  Returns:
    The function with the same arguments and results, rows first.
  """
  if row_shards(mesh) == 1:
    return function
  axes = RULES["rows"]
  rows = jax.sharding.PartitionSpec(axes)

  def local(shared: Any, *arrays: types.Array) -> Any:
    # Its derivative sums the gradients: here, and not further inside.
    shared = jax.lax.pcast(shared, axes, to="varying")
    return function(shared, *arrays)

  def call(shared: Any, *arrays: types.Array) -> Any:
    whole = jax.sharding.PartitionSpec()
    return jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(whole, *[rows] * len(arrays)),
      out_specs=rows,
      axis_names=set(axes),
    )(shared, *arrays)

  return call


def backend() -> str:
  """The platform that a function is compiled for, as JAX names it.

  That of the surrounding mesh, whose devices may not be present (see
  `setup.compile_plan`); outside a mesh, that of the default device.
  """
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  return device.platform if device else jax.default_backend()


def current_size(axis: str) -> int:
  """The size of a mesh axis inside a compiled function; 1 outside a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape[axis]


def sum_over_rows(x: jax.Array) -> jax.Array:
  """The sum of an array, [] int; inside `over_rows`, over all devices."""
  axes = set(RULES["rows"])
  total = jnp.sum(x)
  if axes <= set(jax.sharding.get_abstract_mesh().manual_axes):
    total = jax.lax.psum(total, RULES["rows"])
  return total


def on_each_device(
  function: Callable[..., Any],
  axes: Sequence[Sequence[str | None]],
  like: int | tuple[int, ...],
) -> Callable[..., Any]:
  """Lets every device apply a function to its own part of each array.

  For kernels, which the partitioner cannot split: their rows and heads must be
  independent. Axes already split by an enclosing `over_rows` stay split.

  Args:
    function: takes arrays.
    axes: for each array, the logical names of its dimensions.
    like: the index of the array whose layout the result has; a tuple of indices
      for a tuple of results.

  Returns:
    The function with the same arguments and results; unchanged outside a mesh.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or set(mesh.axis_names) == set(mesh.manual_axes):
    return function
  free = set(mesh.axis_names) - set(mesh.manual_axes)

  def call(*arrays: types.Array) -> Any:
    def spec(
      names: Sequence[str | None], array: types.Array
    ) -> jax.sharding.PartitionSpec:
      whole = partition_spec(mesh, names, array.shape)
      entries = [(e,) if isinstance(e, str) else e for e in whole]
      return jax.sharding.PartitionSpec(
        *(e if e and free.issuperset(e) else None for e in entries)
      )

    specs = tuple(map(spec, axes, arrays))
    return jax.shard_map(
      function,
      in_specs=specs,
      out_specs=jax.tree.map(lambda i: specs[i], like),
      axis_names=free,
      check_vma=False,
    )(*arrays)

  return call


def lookup(table: types.Array, tokens: types.Array, dtype: Any) -> types.Array:
  """Looks up rows of a table that stays split along `vocab` and `width`.

  Each device looks up its part of the width for all rows of its `fsdp` group,
  with zeros for tokens in other parts of the vocabulary; these are summed, and
  each row gathers its full width. On its own the partitioner would copy the
  table to every device.

  Args:
    table: [V, D].
    tokens: [B, T] int32, laid out by `rows`.
    dtype: of the result.

  Returns:
    [B, T, D], laid out by `rows`. Outside a mesh, or where the sizes are not
    divisible, this is plain indexing.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return table[tokens].astype(dtype)
  spec = partition_spec(mesh, ("vocab", "width"), table.shape)
  rows = jax.sharding.PartitionSpec(RULES["rows"])
  if not any(spec) or tokens.shape[0] % row_shards(mesh):
    return table[tokens].astype(dtype)

  def local(table: types.Array, tokens: types.Array) -> jax.Array:
    if spec[1]:
      tokens = jax.lax.all_gather(tokens, spec[1], axis=0, tiled=True)
    if spec[0]:
      tokens -= table.shape[0] * jax.lax.axis_index(spec[0])
    here = (tokens >= 0) & (tokens < table.shape[0])
    vectors = table[jnp.where(here, tokens, 0)].astype(dtype)
    vectors = jnp.where(here[..., None], vectors, 0)
    if spec[0]:
      vectors = jax.lax.psum(vectors, spec[0])
    if spec[1]:
      vectors = jax.lax.all_to_all(vectors, spec[1], 0, 2, tiled=True)
    return vectors

  return jax.shard_map(local, in_specs=(spec, rows), out_specs=rows)(
    table, tokens
  )


def constrain(x: types.Array, *axes: str | None) -> types.Array:
  """Fixes the layout of an activation inside a compiled function.

  Args:
    x: the activation.
    *axes: the logical name of each dimension; None: not split.

  Returns:
    The same values. Outside a mesh (`jax.set_mesh`) this does nothing.

  Raises:
    ValueError: if a name has no rule, or names and shape disagree in rank.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(
    x, partition_spec(mesh, axes, x.shape)
  )
