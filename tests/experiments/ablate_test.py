"""The comparison of runs, on metrics made by hand."""

import itertools
import json
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest, parameterized
import numpy as np

from t2po_jax.experiments import ablate, comparison
from tests import places

ROOT = places.ROOT
SCRIPT = ROOT / "experiments" / "ablate.py"


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
      "seconds/cold_start": 999.0,
    }
    if step:
      line |= {"sampler/slot_steps_used": 700.0, "guard/alarms": alarms}
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
    run = comparison.read_run("t2po", 3, self.place / "a")
    self.assertEqual((run.preset, run.seed), ("t2po", 3))
    self.assertEqual(run.scores["success"], 0.7)
    self.assertAlmostEqual(run.scores["sampled"], 1.4)
    self.assertEqual(run.scores["minutes"], 1.5)
    self.assertEqual([point[1] for point in run.curve], [0.2, 0.5, 0.7])
    self.assertTrue(run.finished)
    self.assertFalse(run.collapsed)

  def test_a_run_that_fell_has_collapsed(self):
    write_run(self.place / "a", [0.2, 0.8, 0.39])
    self.assertTrue(comparison.read_run("t2po", 0, self.place / "a").collapsed)
    write_run(self.place / "b", [0.2, 0.8, 0.41])
    self.assertFalse(comparison.read_run("t2po", 0, self.place / "b").collapsed)

  def test_what_is_not_finished(self):
    write_run(self.place / "a", [0.2, 0.8], updates=5)
    self.assertFalse(comparison.read_run("t2po", 0, self.place / "a").finished)
    write_run(self.place / "b", [0.2, 0.8], updates=5, alarms=1.0)
    stopped = comparison.read_run("t2po", 0, self.place / "b")
    self.assertTrue(stopped.finished)
    self.assertTrue(stopped.collapsed)
    self.assertIsNone(comparison.read_run("t2po", 0, self.place / "c"))


class SummaryTest(parameterized.TestCase):
  def summarise(self, *groups):
    place, results = pathlib.Path(tempfile.mkdtemp()), []
    for preset, tokens, successes in groups:
      for seed, success in enumerate(successes):
        write_run(place / f"{preset}{seed}", [0.1, success], tokens=tokens)
        folder = place / f"{preset}{seed}"
        results.append(comparison.read_run(preset, seed, folder))
    return results, comparison.summarise(results)

  def test_by_hand(self):
    _, summary = self.summarise(
      ("t2po", 8.0, (0.8, 0.9, 1.0)), ("gigpo", 10.0, (0.5,))
    )
    success = summary["t2po"]["success"]
    self.assertAlmostEqual(success["mean"], 0.9)
    self.assertAlmostEqual(success["std"], 0.1)
    one = summary["gigpo"]["success"]
    self.assertEqual((one["std"], one["low"], one["high"]), (0.0, 0.5, 0.5))
    text = comparison.table(summary, "gigpo")
    self.assertIn("| t2po | 0.900 ± 0.100 [", text)
    self.assertIn("| -20 % | 0 of 3 | 0 |", text)
    self.assertIn("| +0 % | 0 of 1 | 0 |", text)

  def test_interval_is_that_of_all_resamplings(self):
    values = (0.1, 0.4, 0.8)
    means = [np.mean(drawn) for drawn in itertools.product(values, repeat=3)]
    wanted = np.quantile(means, (0.025, 0.975), method="inverted_cdf")
    np.testing.assert_allclose(comparison.interval(values), wanted, atol=1e-9)

  def test_savings_by_hand(self):
    def run(preset, seed, *curve):
      points = tuple((step, 0.5, tokens) for step, tokens in curve)
      return comparison.Result(preset, seed, {}, points, False, 0, True)

    results = [
      run("t2po", 0, (0, 10.0), (5, 6.0), (10, 5.0)),
      run("t2po", 1, (0, 10.0), (5, 10.0)),
      run("gigpo", 0, (0, 10.0), (5, 9.0), (10, 8.0)),
      run("gigpo", 1, (0, 20.0), (5, 11.0), (10, 8.0)),
    ]
    saved = comparison.savings(results, "gigpo")
    self.assertEqual(list(saved), ["t2po"])
    # Update 10 lacks a run; 1 - (10 + 10) / (10 + 20), 1 - (6 + 10) / 20.
    np.testing.assert_array_equal(saved["t2po"][0], [0, 5])
    np.testing.assert_allclose(saved["t2po"][1], [1 / 3, 0.2])
    self.assertEmpty(comparison.savings(results, "grpo"))

  def test_the_picture_names_every_preset(self):
    results, _ = self.summarise(("t2po", 8.0, (0.8, 0.9)), ("ppo", 9.0, (0.5,)))
    picture = pathlib.Path(tempfile.mkdtemp()) / "ablation.svg"
    comparison.draw(results, picture, "ppo")
    drawn = picture.read_text()
    for text in ("<!-- t2po -->", "<!-- ppo -->", "tokens saved against ppo"):
      self.assertIn(text, drawn)

  def test_the_report_holds_everything(self):
    results, _ = self.summarise(("t2po", 8.0, (0.8, 0.9)))
    place = pathlib.Path(tempfile.mkdtemp())
    comparison.report(place, results, "t2po")
    record = json.loads((place / "ablation.json").read_text())
    self.assertLen(record["runs"], 2)
    self.assertEqual(record["runs"][1]["curve"][-1], [1, 0.9, 8.0])
    self.assertEqual(record["summary"]["t2po"]["runs"]["seeds"], 2)


class PlanTest(absltest.TestCase):
  def test_a_folder_belongs_to_one_command(self):
    folder = pathlib.Path(tempfile.mkdtemp()) / "t2po-seed0"
    command = ablate.plan_command("c.py:tiny", "rft+t2po", 0, folder, ["--x"])
    self.assertIn("--config=c.py:tiny,rft,t2po", command)
    ablate.check_commands([(folder, command)])
    ablate.check_commands([(folder, command)])
    with self.assertRaisesRegex(ValueError, "name another folder"):
      ablate.check_commands([(folder, [*command, "--config.seed=1"])])

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
    ((f"--config={ROOT}/configs/smoke.py", "--presets=t2po,grop"), "'grop'"),
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


if __name__ == "__main__":
  absltest.main()
