"""Reading compiled programs: kernels, groups, loops and bytes by hand."""

import types

from absl.testing import absltest
import numpy as np

from t2po_jax.distributed import collectives

PROGRAM = """HloModule made_up

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %a = f32[8,4]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %t = (s32[], f32[8,4]) tuple(%i, %a)
}

ENTRY %main (p0: bf16[4,4]) -> bf16[8,4] {
  %w = (s32[], f32[8,4]) while(%init), body=%body, condition=%cond, \
backend_config={"known_trip_count":{"n":"3"}}
  %splash_fwd.2 = bf16[4,4]{1,0:T(8,128)(2,1)} custom-call(%p0), \
custom_call_target="tpu_custom_call"
  %splash_fwd.5 = bf16[4,4]{1,0} custom-call(%p0), \
custom_call_target="tpu_custom_call"
  %g = (bf16[4,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%p0), \
replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}
  ROOT %d = bf16[8,4]{1,0} all-gather-done(%g)
}
"""


class ReadTest(absltest.TestCase):
  def test_bytes_axes_and_times(self):
    mesh = types.SimpleNamespace(
      devices=np.arange(4).reshape(2, 2),
      shape={"fsdp": 2, "tensor": 2},
      axis_names=("fsdp", "tensor"),
    )
    found = {one.kind: one for one in collectives.read(PROGRAM, mesh)}
    reduced, gathered = found["all-reduce"], found["all-gather"]
    self.assertEqual((reduced.size, reduced.times), (8 * 4 * 4, 3))
    self.assertEqual(reduced.axes, ("tensor",))
    # Of what goes in and comes out only what comes out.
    self.assertEqual((gathered.size, gathered.times), (8 * 4 * 2, 1))
    self.assertEqual(gathered.axes, ("fsdp",))

  def test_kernels_once_each(self):
    self.assertEqual(collectives.kernels(PROGRAM), ("splash_fwd",))
    self.assertEqual(collectives.kernels(""), ())


if __name__ == "__main__":
  absltest.main()
