"""The comparison of runs, on metrics made by hand."""

import itertools
import json
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest, parameterized
import numpy as np

from t2po_jax.experiments import ablate, comparison, drawing, results
from tests import places

ROOT = places.ROOT
SCRIPT = ROOT / "experiments" / "ablate.py"
SMOKE = ROOT / "configs" / "smoke.py"


def write_run(folder, successes, *, tokens=10.0, updates=None, alarms=0.0):
  """A run with an evaluation at every update."""
  folder.mkdir(parents=True)
  lines = []
  for step, success in enumerate(successes):
    line = {
      "step": step,
      "time": 0.0,
      "elapsed": 0.0,
      "eval/success": success,
      "eval/return": success,
      "eval/tokens": tokens,
      "eval/turns": 2.0,
      "seconds/collect": 30.0,
      "seconds/rollout": 29.0,
      "seconds/cold_start": 999.0,
    }
    if step:
      line |= {"sampler/slot_steps_used": 700.0, "guard/alarms": alarms}
      line |= {"train/success": success, "train/episodes": 12.0}
      line["train/aborted"] = 2.0
      line["guard/stopped"] = float(alarms > 0)
    lines.append(json.dumps(line))
  (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
  settings = {
    "train.updates": len(successes) - 1 if updates is None else updates
  }
  (folder / "config.json").write_text(json.dumps(settings))


class ReadTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.place = pathlib.Path(tempfile.mkdtemp())

  def test_scores_of_the_last_evaluation(self):
    write_run(self.place / "a", [0.2, 0.5, 0.7])
    run = results.read_run("t2po", 3, self.place / "a")
    self.assertEqual((run.preset, run.seed), ("t2po", 3))
    self.assertEqual(run.scores["success"], 0.7)
    self.assertAlmostEqual(run.scores["sampled"], 1.4)
    self.assertEqual(run.scores["minutes"], 1.5)
    self.assertEqual([point.success for point in run.curve], [0.2, 0.5, 0.7])
    self.assertEqual([point.sampled for point in run.curve], [0.0, 0.7, 1.4])
    self.assertEqual(run.scores["best"], 0.7)
    # Ten episodes an update, of which 0.5 and 0.7 succeed, by 1,400 tokens.
    self.assertAlmostEqual(run.scores["yield"], 12.0 / 1.4)
    self.assertTrue(run.finished)
    self.assertFalse(run.collapsed)

  def test_a_run_that_fell_has_collapsed(self):
    write_run(self.place / "a", [0.2, 0.8, 0.39])
    self.assertTrue(results.read_run("t2po", 0, self.place / "a").collapsed)
    write_run(self.place / "b", [0.2, 0.8, 0.41])
    self.assertFalse(results.read_run("t2po", 0, self.place / "b").collapsed)

  def test_what_is_not_finished(self):
    write_run(self.place / "a", [0.2, 0.8], updates=5)
    self.assertFalse(results.read_run("t2po", 0, self.place / "a").finished)
    write_run(self.place / "b", [0.2, 0.8], updates=5, alarms=1.0)
    stopped = results.read_run("t2po", 0, self.place / "b")
    self.assertTrue(stopped.finished)
    # Told apart: the guard stopped it, although its score did not fall.
    self.assertTrue(stopped.collapsed)
    self.assertTrue(stopped.stopped)
    self.assertFalse(stopped.fell)
    self.assertIsNone(results.read_run("t2po", 0, self.place / "c"))


def run_of(preset, seed, *curve, setting=(), sampled=1.0, **known):
  """A run with (update, success, tokens) per evaluation."""
  points = tuple(
    results.Point(update, success, tokens, update * sampled)
    for update, success, tokens in curve
  )
  scores = dict.fromkeys(results.COLUMNS, 1.0)
  scores |= {"success": curve[-1][1], "tokens": curve[-1][2]}
  scores["sampled"] = points[-1].sampled
  return results.Result(preset, seed, scores, points, setting=setting, **known)


class CollapseTest(parameterized.TestCase):
  @parameterized.parameters(
    ((0.4, 0.8, 0.39), True),
    ((0.4, 0.8, 0.4), False),
    ((0.4,), False),
    ((0.0, 0.0), False),
    ((0.8, 0.1, 0.7), False),
  )
  def test_below_half_of_its_own_best(self, successes, fallen):
    self.assertEqual(results.has_fallen(successes), fallen)

  def test_an_alarm_is_no_collapse(self):
    curve = ((0, 0.4, 9.0), (5, 0.8, 9.0))
    rescued = run_of("t2po", 0, *curve, alarms=2, rollbacks=1)
    self.assertFalse(rescued.collapsed)
    (cell,) = comparison.cells([rescued, run_of("t2po", 1, *curve[::-1])])
    self.assertEqual(
      [cell.count(n) for n in ("alarms", "fell", "stopped", "collapsed")],
      [1, 0, 0, 0],
    )


class TokenBudgetTest(absltest.TestCase):
  def test_by_hand(self):
    # 0.2 -> 0.6 -> 0.6 after 0, 10 and 20 thousand tokens.
    run = run_of("t2po", 0, (0, 0.2, 9.0), (10, 0.6, 9.0), (20, 0.6, 9.0))
    self.assertAlmostEqual(results.mean_over_tokens(run, 10.0), 0.4)
    self.assertAlmostEqual(results.mean_over_tokens(run, 20.0), 0.5)
    # Half of the first leg: from 0.2 to 0.4.
    self.assertAlmostEqual(results.mean_over_tokens(run, 5.0), 0.3)
    self.assertAlmostEqual(results.success_at(run, 5.0), 0.4)
    self.assertEqual(results.mean_over_tokens(run, 0.0), 0.2)
    # Beyond its end the last score is held.
    self.assertAlmostEqual(results.mean_over_tokens(run, 40.0), 0.55)

  def test_is_the_area_of_a_fine_sum(self):
    rng = np.random.default_rng(0)
    curve = [(i, s, 1.0) for i, s in enumerate(rng.uniform(size=9))]
    run = run_of("t2po", 0, *curve)
    middles = (np.arange(70_000) + 0.5) * 1e-4
    wanted = np.mean([results.success_at(run, x) for x in middles[::50]])
    self.assertAlmostEqual(results.mean_over_tokens(run, 7.0), wanted, places=3)

  def test_a_setting_is_cut_to_its_cheapest_run(self):
    flat = ((0, 0.5, 9.0), (10, 0.5, 9.0))
    rising = ((0, 0.0, 9.0), (10, 1.0, 9.0))
    short, long = comparison.cells(
      [run_of("a", 0, *flat), run_of("b", 0, *rising, sampled=2.0)]
    )
    self.assertEqual((short.budget, long.budget), (10.0, 10.0))
    # b reaches 1.0 after 20 thousand tokens, of which the first 10 count.
    self.assertAlmostEqual(long.columns["success_at_budget"]["mean"], 0.5)
    self.assertAlmostEqual(long.columns["area"]["mean"], 0.25)
    self.assertAlmostEqual(short.columns["area"]["mean"], 0.5)


class SummaryTest(parameterized.TestCase):
  def read(self, *groups):
    place, found = pathlib.Path(tempfile.mkdtemp()), []
    for preset, tokens, successes in groups:
      for seed, success in enumerate(successes):
        write_run(place / f"{preset}{seed}", [0.1, success], tokens=tokens)
        folder = place / f"{preset}{seed}"
        found.append(results.read_run(preset, seed, folder))
    return found

  def test_by_hand(self):
    found = comparison.cells(
      self.read(("t2po", 8.0, (0.8, 0.9, 1.0)), ("gigpo", 10.0, (0.5,)))
    )
    success = found[0].columns["success"]
    self.assertAlmostEqual(success["mean"], 0.9)
    self.assertAlmostEqual(success["std"], 0.1)
    one = found[1].columns["success"]
    self.assertEqual((one["std"], one["low"], one["high"]), (0.0, 0.5, 0.5))
    text = comparison.table(found, "gigpo")
    self.assertIn("| t2po | 0.900 ± 0.100 [", text)
    self.assertIn("| -20 % | 0 of 3 | 0 of 3 |", text)
    self.assertIn("| +0 % | 0 of 1 | 0 of 1 |", text)

  def test_cells_of_a_grid(self):
    curve = ((0, 0.4, 9.0), (5, 0.8, 9.0))
    low, high = (("a.rate", "1"),), (("a.rate", "3"),)
    found = comparison.cells(
      [
        run_of("t2po", 0, *curve, setting=low),
        run_of("t2po", 1, *curve, setting=low),
        run_of("gigpo", 0, *curve, setting=low),
        run_of("t2po", 0, *curve, setting=high, stopped=True),
      ]
    )
    self.assertEqual([len(cell.runs) for cell in found], [2, 1, 1])
    text = comparison.table(found, "gigpo").splitlines()
    self.assertStartsWith(text[0], "| preset | rate | success |")
    self.assertStartsWith(text[4], "| t2po | 3 |")
    self.assertEndsWith(text[4], "| 1 of 1 (fell 0, stopped 1) | 0 of 1 |")

  def test_interval_is_that_of_all_resamplings(self):
    values = (0.1, 0.4, 0.8)
    means = [np.mean(drawn) for drawn in itertools.product(values, repeat=3)]
    wanted = np.quantile(means, (0.025, 0.975), method="inverted_cdf")
    np.testing.assert_allclose(comparison.interval(values), wanted, atol=1e-9)

  def test_difference_is_that_of_all_resamplings(self):
    one, two = (0.2, 0.9), (0.1, 0.3)
    means = [
      np.mean(a) - np.mean(b)
      for a in itertools.product(one, repeat=2)
      for b in itertools.product(two, repeat=2)
    ]
    wanted = np.quantile(means, (0.025, 0.975), method="inverted_cdf")
    mean, *ends = comparison.difference(one, two)
    self.assertAlmostEqual(mean, 0.35)
    np.testing.assert_allclose(ends, wanted, atol=1e-9)

  def test_differences_are_within_a_setting(self):
    low, high = (("rate", "1"),), (("rate", "3"),)
    cells = comparison.cells(
      [
        run_of("t2po", 0, (0, 0.1, 9.0), (5, 0.9, 9.0), setting=low),
        run_of("gigpo", 0, (0, 0.1, 9.0), (5, 0.5, 9.0), setting=low),
        run_of("t2po", 0, (0, 0.1, 9.0), (5, 0.2, 9.0), setting=high),
      ]
    )
    (only,) = comparison.differences(cells, "gigpo")
    self.assertEqual((only["preset"], only["setting"]), ("t2po", {"rate": "1"}))
    self.assertAlmostEqual(only["success"]["mean"], 0.4)
    self.assertAlmostEqual(only["area"]["mean"], 0.2)

  def test_savings_by_hand(self):
    found = [
      run_of("t2po", 0, (0, 0.5, 10.0), (5, 0.5, 6.0), (10, 0.5, 5.0)),
      run_of("t2po", 1, (0, 0.5, 10.0), (5, 0.5, 10.0)),
      run_of("gigpo", 0, (0, 0.5, 10.0), (5, 0.5, 9.0), (10, 0.5, 8.0)),
      run_of("gigpo", 1, (0, 0.5, 20.0), (5, 0.5, 11.0), (10, 0.5, 8.0)),
    ]
    saved = drawing.savings(found, "gigpo")
    self.assertEqual(list(saved), ["t2po"])
    # Update 10 lacks a run; 1 - (10 + 10) / (10 + 20), 1 - (6 + 10) / 20.
    np.testing.assert_array_equal(saved["t2po"][0], [0, 5])
    np.testing.assert_allclose(saved["t2po"][1], [1 / 3, 0.2])
    self.assertEmpty(drawing.savings(found, "grpo"))

  def test_the_picture_names_every_preset(self):
    found = self.read(("t2po", 8.0, (0.8, 0.9)), ("ppo", 9.0, (0.5,)))
    picture = pathlib.Path(tempfile.mkdtemp()) / "ablation.svg"
    drawing.curves(found, picture, "ppo")
    drawn = picture.read_text()
    for text in ("<!-- t2po -->", "<!-- ppo -->", "tokens saved against ppo"):
      self.assertIn(text, drawn)

  def test_the_map_counts_collapses_per_setting(self):
    curve = ((0, 0.4, 9.0), (5, 0.75, 9.0))
    one, two, three = (
      (("m.batches", b), ("o.rate", r)) for b, r in ("11", "13", "43")
    )
    found = [
      run_of("gigpo", 0, *curve, setting=one),
      run_of("gigpo", 1, *curve, setting=one, stopped=True),
      run_of("gigpo", 0, *curve, setting=two),
      run_of("gigpo", 0, *curve, setting=three),
    ]
    picture = pathlib.Path(tempfile.mkdtemp()) / "stability.svg"
    drawing.stability(found, picture)
    drawn = picture.read_text()
    for text in ("0.75", "1/2", "0/1", "batches=4", "<!-- rate -->"):
      self.assertIn(text, drawn)

  def test_the_report_holds_everything(self):
    place = pathlib.Path(tempfile.mkdtemp())
    comparison.report(place, self.read(("t2po", 8.0, (0.8, 0.9))), "t2po")
    record = json.loads((place / "ablation.json").read_text())
    self.assertLen(record["runs"], 2)
    self.assertEqual(record["runs"][1]["curve"][-1]["success"], 0.9)
    self.assertEqual(record["cells"][0]["seeds"], [0, 1])
    self.assertEqual(record["cells"][0]["collapsed"], 0)
    self.assertFalse((place / "stability.svg").exists())


class PlanTest(absltest.TestCase):
  def test_a_folder_belongs_to_one_command(self):
    folder = pathlib.Path(tempfile.mkdtemp()) / "t2po-seed0"
    entry = ablate.Entry("rft+t2po", (("a.b", "2"),), 0, folder)
    command = ablate.plan_command("c.py:tiny", entry, ["--x"])
    self.assertIn("--config=c.py:tiny,rft,t2po", command)
    self.assertEqual(command[-2:], ["--x", "--config.a.b=2"])
    ablate.check_commands([(folder, command)])
    ablate.check_commands([(folder, command)])
    with self.assertRaisesRegex(ValueError, "name another folder"):
      ablate.check_commands([(folder, [*command, "--config.seed=1"])])

  def test_grid(self):
    self.assertEqual(ablate.parse_grid([]), [()])
    settings = ablate.parse_grid(["config.a.b=1,2", "c=x"])
    self.assertEqual(
      settings, [(("a.b", "1"), ("c", "x")), (("a.b", "2"), ("c", "x"))]
    )
    place = pathlib.Path("w")
    plan = ablate.plan_runs(place, ["p"], [(), *settings], [0, 1])
    self.assertLen({entry.folder for entry in plan}, 6)
    self.assertEqual(plan[0].folder, place / "p-seed0")
    self.assertEqual(plan[3].folder, place / "p-a.b=1-c=x-seed1")

  def test_runs_of_a_grid_keep_their_own_notes(self):
    place = pathlib.Path(tempfile.mkdtemp())
    settings = ablate.parse_grid(["a.b=0.1,0.3"])
    plan = ablate.plan_runs(place, ["p"], settings, [0, 1])
    commands = [
      (entry.folder, ablate.plan_command("c.py", entry, [])) for entry in plan
    ]
    ablate.check_commands(commands)
    ablate.check_commands(commands)
    self.assertLen(list(place.glob("*.json")), 4)

  def test_mistakes_in_a_grid(self):
    for axes, named in (
      (["seed"], "--grid: found 'seed'"),
      (["seed=1,"], "--grid: found"),
      (["seed=1", "seed=2"], "no key and no value twice"),
      (["seed=1,1"], "no key and no value twice"),
      (["model.sizes=tiny"], "model.sizes.*did you mean 'size'"),
      (["models.size=tiny"], "no key 'models.size'"),
      (["train.updates=1,x"], "train.updates: found 'x', .* whole number"),
      (["loss.clip_low=-3"], "loss.clip_low"),
      (["control.tempered=1"], "control.tempered: .*true or false"),
    ):
      with self.assertRaisesRegex(ValueError, named):
        ablate.check_plan(str(SMOKE), ["t2po"], ablate.parse_grid(axes))
    ablate.check_plan(str(SMOKE), ["t2po"], ablate.parse_grid(["seed=1,2"]))
    with self.assertRaisesRegex(ValueError, "--config: there is no key 'x'"):
      ablate.check_plan(str(SMOKE), ["t2po"], [()], ["--config.x=1"])

  def test_runs_what_is_left_and_reports_failures(self):
    place = pathlib.Path(tempfile.mkdtemp())
    write = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('x')"
    commands = [
      (place / f"run{i}", [sys.executable, "-c", write, str(place / f"{i}")])
      for i in range(3)
    ]
    commands.append((place / "bad", [sys.executable, "-c", "sys.exit(3)"]))
    failed = ablate.run_all(commands, jobs=2)
    self.assertEqual(failed, [place / "bad"])
    self.assertTrue(all((place / f"{i}").is_file() for i in range(3)))


class CommandLineTest(parameterized.TestCase):
  @parameterized.parameters(
    (("--presets=a",), "config"),
    (("--config=c.py", "--presets=a", "--seeds=x"), "--seeds: found"),
    (("--config=c.py", "--presets=a", "--jbos=2"), "--jbos=2"),
    (("--config=c.py", "--presets=a", "--baseline=b"), "--baseline: found 'b'"),
    (("--config=c.py", "--presets=a", "--jobs=0"), "is finished"),
    (("--config=c.py", "--presets=a", "--jobs=-1"), "jobs"),
    (("--config=c.py", "--presets=a", "--seeds=0,0"), "no value twice"),
    (("--config=c.py", "--presets=a"), "there is no file c.py"),
    ((f"--config={SMOKE}", "--presets=t2po,grop"), "'grop'"),
    (
      (f"--config={SMOKE}", "--presets=t2po", "--grid=train.updatse=1,2"),
      "did you mean 'updates'",
    ),
  )
  def test_mistakes_get_one_line(self, arguments, named):
    with tempfile.TemporaryDirectory() as place:
      found = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, f"--workdir={place}/w"],
        capture_output=True,
        text=True,
      )
    self.assertNotEqual(found.returncode, 0)
    self.assertNotIn("Traceback", found.stderr)
    self.assertIn(named, found.stderr)

  def test_reports_a_grid_of_finished_runs(self):
    place = pathlib.Path(tempfile.mkdtemp())
    for preset in ("t2po", "gigpo"):
      for rate, last in (("0.1", 0.8), ("0.3", 0.1)):
        folder = place / f"{preset}-optimizer.learning_rate={rate}-seed0"
        write_run(folder, [0.2, 0.7, last])
    found = subprocess.run(
      [
        sys.executable,
        str(SCRIPT),
        f"--config={SMOKE}",
        "--presets=t2po,gigpo",
        "--grid=config.optimizer.learning_rate=0.1,0.3",
        "--seeds=0",
        "--jobs=0",
        f"--workdir={place}",
      ],
      capture_output=True,
      text=True,
    )
    self.assertEqual(found.returncode, 0, found.stderr)
    self.assertIn("| 1 of 1 (fell 1, stopped 0) |", found.stdout)
    record = json.loads((place / "ablation.json").read_text())
    self.assertEqual(
      [cell["collapsed"] for cell in record["cells"]], [0, 0, 1, 1]
    )
    self.assertTrue((place / "stability.svg").is_file())


if __name__ == "__main__":
  absltest.main()
