"""What eight devices exchange in one optimizer step: what theory asks, no more.

`mesh_test.py` runs this where one CPU poses as eight devices. Bytes are those
of results, per device. The compiler of CPUs reduces a gradient to every device
and lets each take its part, where those of accelerators scatter while they
reduce (half the traffic); both count as one reduction here.
"""

import collections
import functools

from absl.testing import absltest
import chex
import jax
import jax.numpy as jnp

from t2po_jax import types
from t2po_jax.distributed import collectives, sharding
from t2po_jax.learning import learner, objectives, optimizers
from t2po_jax.models import config as config_lib
from t2po_jax.models import decoder

ROWS, T, R, CHUNK = 8, 48, 24, 8
CONFIG = config_lib.ModelConfig(
  "qwen3", 64, 16, 2, 8, 8, 8, 32, qk_norm=True, tied_embeddings=True
)
FLOAT = 4
# Counts, losses, norms and other numbers, all together.
NUMBERS = 1024


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)


def size(tree) -> int:
  """Bytes of all arrays in float32."""
  return sum(FLOAT * leaf.size for leaf in jax.tree.leaves(tree))


PARAMS = decoder.shapes(CONFIG)
TABLE = size(PARAMS["embed"])
# No rule splits scales of a head's width.
WHOLE = 2 * FLOAT * CONFIG.layers * CONFIG.head_width
MATRICES = sum(
  size(leaf) for leaf in jax.tree.leaves(PARAMS["layers"]) if leaf.ndim == 3
)
# Of all rows: hidden states at tokens and at response positions, token ids.
HIDDEN = FLOAT * ROWS * T * CONFIG.width
RESPONSES = FLOAT * ROWS * R * CONFIG.width
TOKENS = FLOAT * ROWS * T


def abstract_batch(mesh, parts):
  """Shapes and layout of a batch of `parts` micro-batches."""
  place = sharding.row_sharding(mesh, dimension=1)

  def array(width, dtype):
    return jax.ShapeDtypeStruct((parts, ROWS, width), dtype, sharding=place)

  by_token = dict.fromkeys(("tokens", "positions", "segments"), T)
  numbers = {"index", "targets", "turn", *by_token}
  return types.Batch(
    **{
      name: array(
        by_token.get(name, R), jnp.int32 if name in numbers else jnp.float32
      )
      for name in types.Batch.__dataclass_fields__
    }
  )


@functools.cache
def exchanged(parts=1, **sizes):
  """(kind, axes) -> bytes of one optimizer step."""
  mesh = sharding.create_mesh(**sizes)
  trainer = learner.Learner(
    decoder.Policy(CONFIG),
    decoder.logical_axes(PARAMS),
    mesh,
    optimizer=optimizers.OptimizerConfig(learning_rate=1e-3),
    objective=objectives.PolicyObjective(),
    rows=ROWS,
    chunk=CHUNK,
  )
  text = trainer.lower_update(abstract_batch(mesh, parts)).compile().as_text()
  return count(text, mesh)


def count(text, mesh):
  """(kind, axes) -> bytes of one call of a program."""
  total = collections.Counter()
  for found in collectives.read(text, mesh):
    if found.times == 0:
      raise AssertionError(f"no trip count: {found}")
    kind = found.kind.replace("reduce-scatter", "all-reduce")
    total[kind, found.axes] += found.times * found.size
  return total


class StepTest(chex.TestCase):
  def assert_exchanges(self, found, wanted):
    """Bytes by kind and axes, up to single numbers, and nothing else."""
    for key in [*wanted, *found]:
      self.assertBetween(
        found[key] - wanted.get(key, 0), 0, NUMBERS, f"{key}: {found}"
      )

  def test_data_reduces_the_gradient_once(self):
    found = exchanged(data=8, fsdp=1)
    # A tied table has two uses, and its gradient is reduced after each.
    self.assert_exchanges(
      found, {("all-reduce", ("data",)): size(PARAMS) + TABLE}
    )

  def test_fsdp_gathers_weights_twice_and_reduces_the_gradient_once(self):
    found = exchanged(data=1, fsdp=8)
    axes = ("fsdp",)
    rest = size(PARAMS) - TABLE - WHOLE
    self.assert_exchanges(
      found,
      {
        # Layers forward and backward; the table for the vocabulary, which is
        # kept from one to the other. For the lookup it stays where it is:
        # there the tokens travel, and the hidden states to their rows.
        ("all-gather", axes): 2 * rest + TABLE + TOKENS,
        ("all-to-all", axes): 2 * HIDDEN // 8,
        ("all-reduce", axes): size(PARAMS),
      },
    )

  def test_all_axes_together(self):
    found = exchanged(data=2, fsdp=2, tensor=2)
    hidden = HIDDEN // 4  # Rows are split over data and fsdp.
    self.assert_exchanges(
      found,
      {
        # Matrices are split by tensor already, scales are not.
        ("all-gather", ("fsdp",)): 2 * (MATRICES // 2)
        + 2 * (size(PARAMS) - TABLE - WHOLE - MATRICES)
        + TABLE // 2
        + TOKENS // 2,
        ("all-to-all", ("fsdp",)): 2 * hidden,
        # One after the lookup, in every layer two forward (attention, MLP) and
        # five backward: one for each of the projections that share an input.
        # Their results are added at once; XLA's compiler of GPUs then adds
        # before it reduces (all-reduce-reassociate), which makes two of them.
        # Then the gradient at response positions, and of each of their
        # softmaxes the maximum, three sums.
        ("all-reduce", ("tensor",)): hidden * (1 + 7 * CONFIG.layers)
        + RESPONSES // 4
        + 4 * FLOAT * ROWS * R // 4,
        # Gradients: of the split matrices first within fsdp, then of each part
        # between the copies; the table's from lookup and projection.
        ("all-reduce", ("fsdp",)): MATRICES // 2,
        ("all-reduce", ("data",)): MATRICES // 4 + TABLE // 4,
        ("all-reduce", ("data", "fsdp")): TABLE // 2,
      },
    )


if __name__ == "__main__":
  absltest.main()
