"""Checkpoints: round trip, retention, kill, damage, misfit, full disk."""

import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from t2po_jax import types
from t2po_jax.training import checkpoint
from tests import places

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_state(seed, *, width=4):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape).astype(np.float32))

  params = {
    "embed": draw(6, width),
    "layers": {"kernel": draw(2, width, 3)},
  }
  opt_state = jax.tree.map(
    lambda x: jnp.asarray(np.asarray(x) + seed), OPTIMIZER.init(params)
  )
  return types.TrainState(
    step=jnp.asarray(np.int32(seed)), params=params, opt_state=opt_state
  )


class CheckpointTest(chex.TestCase):
  def setUp(self):
    super().setUp()
    place = tempfile.TemporaryDirectory()
    self.addCleanup(place.cleanup)
    self.directory = pathlib.Path(place.name) / "saved"

  def open(self, **options):
    store = checkpoint.Checkpoints(self.directory, **options)
    self.addCleanup(store.close)
    return store

  def test_round_trip_is_exact(self):
    state, position = (
      make_state(3),
      {"update": 3, "eta": 0.1, "key": [1, 2**31]},
    )
    self.open().save(3, state, position, score=0.25)
    store = self.open()
    restored, found = store.restore(make_state(0))
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal_structs(restored, state)
    self.assertEqual(found, position)
    self.assertEqual(store.score(3), 0.25)
    params = store.restore_params(make_state(0).params)
    chex.assert_trees_all_equal(params, state.params)

  def test_earlier_versions_are_kept_beside_the_state(self):
    like = make_state(0).params
    earlier = {1: make_state(1).params, 2: make_state(2).params}
    self.open().save(3, make_state(3), {}, versions=earlier)
    store = self.open()
    restored, _ = store.restore(make_state(0))
    chex.assert_trees_all_equal(restored, make_state(3))
    chex.assert_trees_all_equal(
      store.restore_versions(like, [2, 1]), [earlier[2], earlier[1]]
    )
    self.assertEqual(store.restore_versions(like, []), [])
    with self.assertRaisesRegex(ValueError, "versions/7"):
      store.restore_versions(like, [1, 7])

  def test_shapes_alone_are_enough_to_restore(self):
    state = make_state(1)
    self.open().save(0, state, {})
    like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      state,
    )
    restored, _ = self.open().restore(like)
    chex.assert_trees_all_equal(restored, state)

  def test_newest_and_best_are_kept(self):
    store = self.open(keep=2)
    scores = [None, 0.5, 0.2, None, float("nan"), 0.5]
    kept = []
    for step, score in enumerate(scores):
      store.save(step, make_state(step), {}, score=score)
      on_disk = sorted(int(p.name) for p in self.directory.iterdir())
      kept.append(on_disk)
    self.assertEqual(kept, [[0], [0, 1], [1, 2], [1, 2, 3], [1, 3, 4], [4, 5]])
    self.assertEqual((store.latest(), store.best()), (5, 5))
    again = self.open(keep=2)
    self.assertEqual((again.latest(), again.best()), (5, 5))
    self.assertIsNone(again.score(4))

  def test_without_scores_there_is_no_best(self):
    store = self.open()
    self.assertIsNone(store.latest())
    store.save(0, make_state(0), {})
    self.assertIsNone(store.best())

  @parameterized.parameters(
    ("width", "params/embed is (6, 4) float32; the config asks for (6, 5)"),
    ("extra", "params/head is missing; the config asks for (3,) float32"),
    ("fewer", "params/embed is (6, 4) float32; the config asks for no such"),
    ("dtype", "params/embed is (6, 4) float32; the config asks for (6, 4) bf"),
    ("optimizer", "optimizer/opt_state/1/0/count is () int32; the config asks"),
  )
  def test_misfit_names_the_first_difference(self, kind, message):
    self.open().save(2, make_state(2), {})
    state = make_state(0)
    like = {
      "width": make_state(0, width=5),
      "extra": state.replace(params={**state.params, "head": jnp.ones(3)}),
      "fewer": state.replace(params={"layers": state.params["layers"]}),
      "dtype": state.replace(
        params=jax.tree.map(lambda x: x.astype("bfloat16"), state.params)
      ),
      "optimizer": state.replace(opt_state=optax.sgd(1.0).init(state.params)),
    }[kind]
    with self.assertRaises(ValueError) as raised:
      self.open().restore(like)
    self.assertIn(message.replace("bf", "bfloat16"), str(raised.exception))
    self.assertIn(str(self.directory / "2"), str(raised.exception))
    self.assertNotIn("\n", str(raised.exception))

  def test_missing_step_is_refused(self):
    with self.assertRaisesRegex(ValueError, "holds no checkpoint$"):
      self.open().restore(make_state(0))
    self.open().save(1, make_state(1), {})
    with self.assertRaisesRegex(ValueError, r"no checkpoint 7; found \[1\]"):
      self.open().restore(make_state(0), step=7)

  def test_step_and_position_are_checked(self):
    store = self.open()
    store.save(1, make_state(1), {})
    with self.assertRaisesRegex(ValueError, "1 exists already"):
      store.save(1, make_state(1), {})
    with self.assertRaisesRegex(ValueError, "position is not JSON"):
      store.save(2, make_state(1), {"key": np.ones(2)})
    with self.assertRaisesRegex(ValueError, "keep is 0"):
      self.open(keep=0)

  @parameterized.parameters("manifest.ocdbt", "_METADATA")
  def test_damage_is_named_and_the_older_one_is_still_there(self, name):
    store = self.open()
    for step in (1, 2):
      store.save(step, make_state(step), {"update": step})
    broken = self.directory / "2" / "params" / name
    broken.write_bytes(broken.read_bytes()[:20])
    store = self.open()
    with self.assertRaisesRegex(
      ValueError, "2 is damaged .*go on from checkpoint 1"
    ) as raised:
      store.restore(make_state(0))
    self.assertNotIn("\n", str(raised.exception))
    shutil.rmtree(self.directory / "2")
    restored, position = self.open().restore(make_state(0))
    chex.assert_trees_all_equal(restored, make_state(1))
    self.assertEqual(position, {"update": 1})

  def test_directory_without_a_position_is_no_checkpoint(self):
    store = self.open()
    for step in (1, 2):
      store.save(step, make_state(step), {})
    shutil.rmtree(self.directory / "2" / "loop")
    store = self.open()
    self.assertEqual(store.latest(), 1)
    store.save(2, make_state(9), {"update": 2})
    restored, _ = self.open().restore(make_state(0))
    chex.assert_trees_all_equal(restored, make_state(9))

  def test_full_disk_leaves_older_checkpoints(self):
    store = self.open(keep=1)
    store.save(1, make_state(1), {})
    noise = np.random.default_rng(0).integers(0, 2**31, 2**18)
    big = make_state(2).replace(params={"noise": jnp.asarray(noise)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
      with self.assertRaisesRegex(
        OSError, "2 could not be written: .*newest whole checkpoint: 1"
      ) as raised:
        store.save(2, big, {})
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    self.assertNotIn("\n", str(raised.exception))
    self.assertEqual(store.latest(), 1)
    restored, _ = store.restore(make_state(0))
    chex.assert_trees_all_equal(restored, make_state(1))
    store.save(2, make_state(2), {})
    self.assertEqual(self.open(keep=1).latest(), 2)
    self.assertEqual([p.name for p in self.directory.iterdir()], ["2"])

  def test_directory_that_cannot_exist_gets_one_line(self):
    self.directory.write_text("a file")
    with self.assertRaisesRegex(OSError, "checkpoints cannot be kept in") as e:
      self.open()
    self.assertNotIn("\n", str(e.exception))

  def test_half_written_checkpoint_is_swept_away(self):
    self.open().save(1, make_state(1), {})
    half = self.directory / "7.orbax-checkpoint-tmp"
    shutil.copytree(self.directory / "1", half)
    store = self.open()
    self.assertEqual(store.latest(), 1)
    store.save(2, make_state(2), {})
    names = sorted(path.name for path in self.directory.iterdir())
    self.assertEqual(names, ["1", "2"])

  def test_killed_while_saving(self):
    program = textwrap.dedent("""
      import sys
      import jax.numpy as jnp
      from t2po_jax import types
      from t2po_jax.training import checkpoint
      store = checkpoint.Checkpoints(sys.argv[1], keep=2)
      for step in range(1000):
        params = [jnp.full((64, 1024), step * 10.0 + i) for i in range(8)]
        state = types.TrainState(jnp.int32(step), params, ())
        store.save(step, state, {"update": step}, score=1.0 / (1 + step))
        print(step, flush=True)
    """)
    root = places.ROOT
    child = subprocess.Popen(
      [sys.executable, "-c", program, str(self.directory)],
      stdout=subprocess.PIPE,
      env={**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
      text=True,
    )
    with child:
      for line in child.stdout:
        if int(line) == 4:
          time.sleep(0.05)
          child.send_signal(signal.SIGKILL)
          break
    like = types.TrainState(
      jnp.int32(0), [jnp.zeros((64, 1024)) for _ in range(8)], ()
    )
    store = self.open(keep=2)
    self.assertGreaterEqual(store.latest(), 4)
    self.assertEqual(store.best(), 0)
    for step in (store.best(), store.latest()):
      state, position = store.restore(like, step=step)
      self.assertEqual(position, {"update": step})
      for i, array in enumerate(state.params):
        np.testing.assert_array_equal(array, step * 10.0 + i)
    store.save(store.latest() + 1, like, {})
    names = sorted(path.name for path in self.directory.iterdir())
    self.assertTrue(all(name.isdigit() for name in names), names)


if __name__ == "__main__":
  absltest.main()
