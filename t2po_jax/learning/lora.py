"""Low-rank adapters over projections of a frozen policy (arXiv 2106.09685).

W' = W + s A B with A [inputs, r], B [r, outputs] and s = alpha / r. Only A and
B are trained. B starts at zero, so the adapted policy starts as the base; the
base never changes and serves as the reference policy. During training the
adapter runs beside its projection, x W + s (x A) B, so that the gradient of W,
as large as W, is never formed. For sampling and export it is merged.

`save` writes the files of the PEFT library, which stores both factors
transposed: lora_A [r, inputs], lora_B [outputs, r].
"""

from collections.abc import Iterator
import dataclasses
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from t2po_jax import types
from t2po_jax.distributed import sharding
from t2po_jax.models import decoder, families

# Projection -> its path in the parameters.
TARGETS = {
  "query": "layers/attention/query",
  "key": "layers/attention/key",
  "value": "layers/attention/value",
  "out": "layers/attention/out",
  "gate": "layers/mlp/gate",
  "up": "layers/mlp/up",
  "down": "layers/mlp/down",
  "head": "head",
}
IN_LAYERS = tuple(name for name in TARGETS if name != "head")

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


def parse_targets(text: str) -> tuple[str, ...]:
  """The projections that a setting names.

  Args:
    text: names from `TARGETS` joined by commas, or `all` for every projection
      of the layers.

  Returns:
    The names, in the order of `TARGETS`.

  Raises:
    ValueError: if a name is unknown, or there is none.
  """
  if text == "all":
    return IN_LAYERS
  names = [name.strip() for name in text.split(",")]
  if unknown := [name for name in names if name not in TARGETS]:
    raise ValueError(
      f"lora.targets: found {unknown[0]!r}, expected 'all' or some of "
      f"{', '.join(TARGETS)}"
    )
  return tuple(name for name in TARGETS if name in names)


@dataclasses.dataclass(frozen=True)
class Adapters:
  """The adapted projections of a policy, and their settings.

  Adapter parameters mirror those of the policy, with `lora_a` and `lora_b`
  where the policy has a kernel, stacked over layers like the kernels.

  Attributes:
    policy: the adapted network.
    rank: r, >= 1.
    alpha: strength; the product of the factors is scaled by alpha / r.
    targets: names from `TARGETS`.
    seed: of the initial values of A.
  """

  policy: decoder.Policy
  rank: int
  alpha: float
  targets: tuple[str, ...] = IN_LAYERS
  seed: int = 0

  def __post_init__(self) -> None:
    if self.rank < 1:
      raise ValueError(f"lora.rank: found {self.rank}, expected at least 1")
    lacking = [
      name for name in self.targets if name not in ("head", *self._present)
    ]
    if lacking and self.targets != IN_LAYERS:
      raise ValueError(
        f"lora.targets: found {lacking[0]!r}, expected 'all' or some of "
        f"{', '.join(self._present)}: this model has experts instead"
      )
    if "head" in self.targets and self.policy.config.tied_embeddings:
      raise ValueError(
        "lora.targets: found 'head', expected none: this model's vocabulary "
        "projection is its embedding table"
      )

  @property
  def _present(self) -> tuple[str, ...]:
    """The projections in the policy's layers."""
    lacking = ("gate", "up", "down") if self.policy.config.experts else ()
    return tuple(name for name in IN_LAYERS if name not in lacking)

  @property
  def adapted(self) -> tuple[str, ...]:
    """The targets present in the policy: `all` does not include experts."""
    return tuple(
      name for name in self.targets if name in ("head", *self._present)
    )

  @property
  def scale(self) -> float:
    """s, the scale of the product of the factors."""
    return self.alpha / self.rank

  def init(self) -> types.Params:
    """Adapters that change nothing: A uniform within 1/sqrt(inputs), B 0."""
    shapes = decoder.shapes(self.policy.config)
    keys = jax.random.split(jax.random.key(self.seed), len(self.adapted))
    adapters = {}
    for name, key in zip(self.adapted, keys, strict=True):
      *lead, inputs, outputs = _at(shapes, TARGETS[name])["kernel"].shape
      a, bound = (*lead, inputs, self.rank), inputs**-0.5
      linear = {
        "lora_a": jax.random.uniform(key, a, minval=-bound, maxval=bound),
        "lora_b": jnp.zeros((*lead, self.rank, outputs)),
      }
      adapters = _set(adapters, TARGETS[name], linear)
    return adapters

  def logical_axes(self) -> sharding.Axes:
    """Names of the axes of the adapters' parameters."""
    return decoder.logical_axes(jax.eval_shape(self.init))

  def freeze(self, params: types.Params) -> types.Params:
    """The base in its stored form: matrices in the dtype of the computation."""
    return self.policy.cast_matrices(params)

  def attach(self, base: types.Params, adapters: types.Params) -> types.Params:
    """The parameters for training; differentiable in the adapters.

    Args:
      base: parameters of the policy.
      adapters: as from `init`.

    Returns:
      The base with the factors beside its kernels; `lora_b` includes s.
    """
    for path, linear in self._linears(adapters):
      scaled = {**linear, "lora_b": self.scale * linear["lora_b"]}
      base = _set(base, path, {**_at(base, path), **scaled})
    return base

  def merge(self, base: types.Params, adapters: types.Params) -> types.Params:
    """W + s A B for every adapted kernel W, in the dtype of W.

    Args:
      base: parameters of the policy, numpy or jax arrays.
      adapters: as from `init`, of the same kind of arrays.

    Returns:
      Parameters of a plain policy; those not adapted are not copied.
    """
    for path, linear in self._linears(adapters):
      kernel = _at(base, path)["kernel"]
      change = self.scale * (linear["lora_a"] @ linear["lora_b"])
      merged = (kernel.astype(np.float32) + change).astype(kernel.dtype)
      base = _set(base, path, {**_at(base, path), "kernel": merged})
    return base

  def _linears(
    self, adapters: types.Params
  ) -> Iterator[tuple[str, types.Params]]:
    """Path and factors of every adapted projection."""
    for name in self.adapted:
      yield TARGETS[name], _at(adapters, TARGETS[name])


def _at(tree: types.Params, path: str) -> types.Params:
  """The subtree at a path of parts joined by `/`."""
  for key in path.split("/"):
    tree = tree[key]
  return tree


def _set(tree: types.Params, path: str, value: types.Params) -> types.Params:
  """A copy of the tree with the subtree at a path replaced."""
  key, _, rest = path.partition("/")
  return {**tree, key: _set(tree.get(key, {}), rest, value) if rest else value}


def _module_names(policy: decoder.Policy) -> dict[str, str]:
  """Path of a projection -> name of its module in a checkpoint."""
  return {
    tensor.path.removesuffix("/kernel"): tensor.name.removesuffix(".weight")
    for tensor in families.of(policy.config).tensors
    if tensor.path.endswith("/kernel")
  }


def save(
  spec: Adapters,
  adapters: types.Params,
  directory: str | os.PathLike,
  *,
  base: str,
) -> None:
  """Writes adapters in the format of the PEFT library.

  Args:
    spec: describes the adapters.
    adapters: as from `spec.init`.
    directory: for `adapter_config.json` and `adapter_model.safetensors`.
    base: directory or hub id of the model they belong to.
  """
  names, tensors = _module_names(spec.policy), {}
  for path, linear in spec._linears(adapters):
    for part, factor in (("lora_A", "lora_a"), ("lora_B", "lora_b")):
      factor = np.asarray(linear[factor])
      layers = factor if path.startswith("layers/") else factor[None]
      for i, matrix in enumerate(layers):
        name = f"base_model.model.{names[path].format(layer=i)}.{part}.weight"
        tensors[name] = np.ascontiguousarray(matrix.T)
  described = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "inference_mode": True,
    "r": spec.rank,
    "lora_alpha": spec.alpha,
    "lora_dropout": 0.0,
    "target_modules": [
      names[TARGETS[name]].rpartition(".")[2] for name in spec.adapted
    ],
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
  }
  place = pathlib.Path(directory)
  place.mkdir(parents=True, exist_ok=True)
  safetensors.numpy.save_file(tensors, place / ADAPTER_FILE, {"format": "pt"})
  text = json.dumps(described, indent=2) + "\n"
  (place / CONFIG_FILE).write_text(text)
