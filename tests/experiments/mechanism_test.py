"""Signs of useless turns, on recorded episodes made by hand."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest
import numpy as np

from t2po_jax import records, types
from t2po_jax.envs import gridworld
from t2po_jax.experiments import mechanism
from tests import places

SMOKE = places.ROOT / "configs" / "smoke.py"
SCRIPT = places.ROOT / "experiments" / "mechanism.py"


def attempt(tokens, phi):
  measured = np.linspace(0.1, 0.4, len(tokens), dtype=np.float32)
  return types.Attempt(
    tokens=np.array(tokens, np.int32),
    logprobs=-measured,
    uncertainty=measured,
    entropy=2 * measured,
    confidence=3 * measured,
    forced=np.arange(len(tokens)) == 1,
    text="<think>x</think> go",
    finish="stop",
    fired_at=1,
    thinking_tokens=2,
    phi=phi,
  )


def walk(*steps, success=False):
  """An episode of (anchor, action, phi) per turn."""
  turns, before = [], math.nan
  for anchor, action, phi in steps:
    turns.append(
      types.Turn(
        np.zeros(3, np.int32),
        attempt([1, 2, 3, 4], phi),
        anchor,
        action,
        0.5,
        0.1,
        True,
        True,
        abs(phi - before),
        False,
        discarded=(attempt([5, 6], 0.3),),
      )
    )
    before = phi
  task = "echo-red-red-blue"
  return types.Trajectory(task, "all", 1, 2, tuple(turns), success)


LOOPING = walk(("a", "e", 0.5), ("a", "e", 0.501), ("a", "e", 0.502))
MOVING = walk(("a", "e", 0.5), ("b", "n", 0.7), ("c", "e", 0.2), success=True)


class DetectTest(absltest.TestCase):
  def test_a_record_comes_back_whole(self):
    record = records.to_record(MOVING, lambda ids: "p", [b"x"] * 9)
    found = mechanism.restore(json.loads(json.dumps(record)))
    self.assertEqual(found.success, MOVING.success)
    self.assertAlmostEqual(found.episode_return, MOVING.episode_return)
    for one, other in zip(found.turns, MOVING.turns, strict=True):
      self.assertEqual(one.anchor, other.anchor)
      np.testing.assert_allclose(
        one.phi_change, other.phi_change, atol=1e-6, equal_nan=True
      )
      for name in ("tokens", "forced", *records.MEASURES):
        np.testing.assert_allclose(
          getattr(one.response, name),
          getattr(other.response, name),
          atol=1e-5,
        )
      self.assertLen(one.discarded, 1)

  def test_areas_by_hand(self):
    found = mechanism.detect([LOOPING, MOVING])
    # Four turns after a first one: two repeat and lose, two do neither.
    self.assertEqual(found["share"]["repeated"], 0.5)
    self.assertEqual(found["share"]["losing"], 0.5)
    for sign in ("small change of Phi", "same action", "same observation"):
      self.assertEqual(found[sign]["repeated"], 1.0, msg=sign)
    # Responses are all the same: this sign knows nothing.
    self.assertEqual(found["alike responses"]["useless"], 0.5)
    # Phi 0.501 and 0.502 against 0.7 and 0.2.
    self.assertEqual(found["large Phi"]["losing"], 0.5)

  def test_second_tries_are_played(self):
    benchmark = gridworld.Gridworld(
      gridworld.Settings(train_tasks=1, valid_tasks=1, test_tasks=1)
    )
    # . . G
    # S # .
    benchmark.maps["own"] = gridworld.Map(
      3, frozenset({(1, 1)}), frozenset(), (1, 0), (0, 2)
    )

    def said(direction):
      text = f"<think> x</think><action> go {direction}</action>"
      return dataclasses.replace(attempt([1, 2], 0.5), text=text)

    def turn(kept, *discarded):
      return types.Turn(
        np.zeros(0, np.int32),
        said(kept),
        "",
        f"go {kept}",
        0.0,
        0.0,
        True,
        True,
        0.1,
        False,
        discarded=tuple(map(said, discarded)),
      )

    walked = types.Trajectory(
      "own",
      "",
      0,
      0,
      (
        turn("north", "east"),  # The wall was discarded: better.
        turn("south", "east"),  # Back to the start instead of on: worse.
        turn("north"),
        turn("east", "east", "north"),  # The first one did the same: equal.
        turn("east", "north"),  # The goal instead of the edge: better.
      ),
      True,
    )
    found = mechanism.second_tries(benchmark, [walked])
    self.assertEqual(
      found, {"turns": 4.0, "better": 0.5, "equal": 0.25, "worse": 0.25}
    )
    nothing = mechanism.second_tries(benchmark, [])
    self.assertTrue(math.isnan(nothing["better"]))

  def test_from_the_command_line(self):
    place = pathlib.Path(tempfile.mkdtemp())
    writer = records.Writer(place / "run" / records.FOLDER)
    for update, episodes in ((0, [LOOPING]), (5, [LOOPING, MOVING])):
      writer.write(
        "eval",
        update,
        [records.to_record(t, lambda ids: "p", [b"x"] * 9) for t in episodes],
      )
    out = place / "found.json"
    command = [sys.executable, str(SCRIPT), str(place / "run"), "--bins=1"]
    found = subprocess.run(
      [*command, "--update=5", f"--out={out}", f"--replay={SMOKE}"],
      capture_output=True,
      text=True,
    )
    self.assertEqual(found.returncode, 0, found.stderr)
    self.assertIn("2 episodes, 6 turns", found.stdout)
    # Neither response holds an action.
    again = "sampled again: turns 6.00 better 0.00 equal 1.00 worse 0.00"
    self.assertIn(again, found.stdout)
    self.assertIn("| small change of Phi |", found.stdout)
    (record,) = json.loads(out.read_text()).values()
    self.assertEqual(record["roc"]["small change of Phi"]["repeated"], 1.0)
    # Of a thought of two tokens the second one was forced.
    self.assertAlmostEqual(record["thought_curve"][0], 0.1, places=5)
    wrong = subprocess.run(
      [*command, "--update=7"], capture_output=True, text=True
    )
    self.assertIn("no episodes of update 7", wrong.stderr)
    self.assertNotIn("Traceback", wrong.stderr)


if __name__ == "__main__":
  absltest.main()
