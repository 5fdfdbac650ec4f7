"""Bytes of a program's memory traffic, counted by hand."""

from absl.testing import absltest

from t2po_jax.distributed import traffic

PROGRAM = """HloModule made_up

%taken (p0: f32[100,8], p1: s32[]) -> f32[1,8] {
  %p0 = f32[100,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %s = f32[1,8]{1,0} dynamic-slice(%p0, %p1, %p1)
}

%put (p0: f32[100,8], p1: f32[1,8]) -> f32[100,8] {
  %p0 = f32[100,8]{1,0} parameter(0)
  %b = f32[100,8]{1,0} bitcast(%p0)
  %p1 = f32[1,8]{1,0} parameter(1)
  ROOT %u = f32[100,8]{1,0} dynamic-update-slice(%b, %p1, %z, %z)
}

%body (t: (f32[100,8])) -> (f32[100,8]) {
  %x = f32[100,8]{1,0} get-tuple-element(%t), index=0
  %row = f32[1,8]{1,0} fusion(%x, %i), kind=kLoop, calls=%taken
  %y = f32[100,8]{1,0} fusion(%x, %row), kind=kLoop, calls=%put
  ROOT %r = (f32[100,8]) tuple(%y)
}

ENTRY %main (a: f32[100,8], w: bf16[16,16]) -> f32[100,8] {
  %a = f32[100,8]{1,0} parameter(0)
  %w = bf16[16,16]{1,0:T(8,128)(2,1)} parameter(1)
  %start = (bf16[16,16]{1,0}, bf16[16,16]{1,0:S(1)}, u32[]) copy-start(%w)
  %near = bf16[16,16]{1,0:T(8,128)(2,1)S(1)} copy-done(%start)
  %sum = bf16[16,16]{1,0:T(8,128)S(1)} add(%near, %near)
  %k = (f32[4]{0}, f32[100,8]{1,0}) custom-call(%sum, %a), \
custom_call_target="tpu_custom_call", output_to_operand_aliasing=\
{{1}: (1, {})}
  %loop = (f32[100,8]) while(%init), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  ROOT %out = f32[100,8]{1,0} get-tuple-element(%loop), index=0
}
"""


class CountTest(absltest.TestCase):
  def test_by_hand(self):
    copied = 16 * 16 * 2  # Into fast memory, where the addition stays.
    kernel = 4 * 4 + 100 * 8 * 4  # Its second result lies where `a` does.
    # A row read and written, then read again and put in its place.
    turn = 2 * 8 * 4 + 2 * 8 * 4
    self.assertEqual(traffic.count(PROGRAM), copied + kernel + 5 * turn)

  def test_a_loop_of_unknown_length_turns_once(self):
    once = PROGRAM.replace('"known_trip_count":{"n":"5"}', "")
    turn = 2 * 8 * 4 + 2 * 8 * 4
    self.assertEqual(traffic.count(PROGRAM) - traffic.count(once), 4 * turn)


if __name__ == "__main__":
  absltest.main()
