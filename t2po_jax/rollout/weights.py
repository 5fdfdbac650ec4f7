"""The parameters that sampling uses, on its devices and in its layout."""

from collections.abc import Collection
import functools
from typing import Any

import jax

from t2po_jax import types
from t2po_jax.distributed import sharding
from t2po_jax.models import decoder


@functools.partial(jax.jit, static_argnames=("policy",))
def decode_layout(
  params: types.Params, *, policy: decoder.Policy
) -> types.Params:
  """Converts parameters to the decoding layout, on their devices."""
  return policy.decode_params(params)


class Weights:
  """Parameters by version; usually there is only one."""

  def __init__(self, policy: decoder.Policy, mesh: jax.sharding.Mesh) -> None:
    """Loads nothing yet; `mesh` consists of the devices that sample."""
    self._policy, self._mesh = policy, mesh
    self._loaded: dict[int, types.Params | None] = {0: None}

  def abstract(self) -> types.Params:
    """The shapes, dtypes and shardings of the parameters."""
    policy = self._policy
    params = jax.eval_shape(policy.decode_params, decoder.shapes(policy.config))
    return sharding.describe(params, self._layout(params))

  def load(
    self,
    params: types.Params,
    *,
    version: int = 0,
    keep: Collection[int] = (),
  ) -> None:
    """Loads new parameters.

    Args:
      params: in the training layout, with any sharding.
      version: identifies them in requests.
      keep: versions that stay loaded; all others are dropped.
    """
    self.take(self.prepare(params), version=version, keep=keep)

  def prepare(self, params: types.Params) -> types.Params:
    """Converts parameters for `take`, on the devices that sample.

    Args:
      params: as in `load`. The programs run on their devices, so call this in
        the thread that updates them.
    """
    # There is less to move in the dtype of the computation.
    params = decode_layout(params, policy=self._policy)
    return sharding.put(params, self._layout(params))

  def take(
    self,
    prepared: types.Params,
    *,
    version: int = 0,
    keep: Collection[int] = (),
  ) -> None:
    """Loads parameters from `prepare`; arguments as in `load`."""
    self._loaded = {v: p for v, p in self._loaded.items() if v in keep}
    self._loaded[version] = prepared

  def of(self, version: int | None = None) -> types.Params | None:
    """The parameters of a version; None for the only one."""
    if version is None:
      (version,) = self._loaded
    return self._loaded[version]

  def _layout(self, params: types.Params) -> Any:
    axes = decoder.logical_axes(params)
    return sharding.params_sharding(self._mesh, params, axes)
