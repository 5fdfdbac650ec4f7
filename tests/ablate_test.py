"""The comparison of runs, on metrics made by hand."""

import importlib.util
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest, parameterized
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "experiments" / "ablate.py"


def load():
  """The script as a module."""
  spec = importlib.util.spec_from_file_location("ablate", SCRIPT)
  module = importlib.util.module_from_spec(spec)
  sys.modules["ablate"] = module
  spec.loader.exec_module(module)
  return module


ablate = load()


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
      line |= {"train/tokens": 8.0, "train/tokens_discarded": 1.0}
      line["guard/alarms"] = alarms
    lines.append(json.dumps(line))
  (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
  settings = {
    "train.updates": len(successes) - 1 if updates is None else updates,
    "guard.action": "stop" if alarms else "warn",
  }
  (folder / "config.json").write_text(json.dumps(settings))


class ReadTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.place = pathlib.Path(tempfile.mkdtemp())

  def test_scores_of_the_last_evaluation(self):
    write_run(self.place / "a", [0.2, 0.5, 0.7])
    run = ablate.read_run("t2po", 3, self.place / "a")
    self.assertEqual((run.preset, run.seed), ("t2po", 3))
    self.assertEqual(run.scores["success"], 0.7)
    self.assertEqual(run.scores["train tokens"], 9.0)
    self.assertEqual(run.scores["minutes"], 1.5)
    self.assertEqual([point[1] for point in run.curve], [0.2, 0.5, 0.7])
    self.assertTrue(run.finished)
    self.assertFalse(run.collapsed)

  def test_a_run_that_fell_has_collapsed(self):
    write_run(self.place / "a", [0.2, 0.8, 0.39])
    self.assertTrue(ablate.read_run("t2po", 0, self.place / "a").collapsed)
    write_run(self.place / "b", [0.2, 0.8, 0.41])
    self.assertFalse(ablate.read_run("t2po", 0, self.place / "b").collapsed)

  def test_what_is_not_finished(self):
    write_run(self.place / "a", [0.2, 0.8], updates=5)
    self.assertFalse(ablate.read_run("t2po", 0, self.place / "a").finished)
    write_run(self.place / "b", [0.2, 0.8], updates=5, alarms=1.0)
    self.assertTrue(ablate.read_run("t2po", 0, self.place / "b").finished)
    self.assertIsNone(ablate.read_run("t2po", 0, self.place / "c"))


class SummaryTest(parameterized.TestCase):
  def summarise(self, *groups):
    place, results = pathlib.Path(tempfile.mkdtemp()), []
    for preset, tokens, successes in groups:
      for seed, success in enumerate(successes):
        write_run(place / f"{preset}{seed}", [0.1, success], tokens=tokens)
        folder = place / f"{preset}{seed}"
        results.append(ablate.read_run(preset, seed, folder))
    return results, ablate.summarise(results)

  def test_by_hand(self):
    _, summary = self.summarise(
      ("t2po", 8.0, (0.8, 0.9, 1.0)), ("gigpo", 10.0, (0.5,))
    )
    success = summary["t2po"]["success"]
    self.assertAlmostEqual(success["mean"], 0.9)
    self.assertAlmostEqual(success["std"], 0.1)
    one = summary["gigpo"]["success"]
    self.assertEqual((one["std"], one["low"], one["high"]), (0.0, 0.5, 0.5))
    text = ablate.table(summary, "gigpo")
    self.assertIn("| t2po | 0.900 ± 0.100 [", text)
    self.assertIn("| -20 % | 0 of 3 | 0 |", text)
    self.assertIn("| +0 % | 0 of 1 | 0 |", text)

  def test_interval_is_that_of_all_resamplings(self):
    values = (0.1, 0.4, 0.8)
    means = [np.mean(drawn) for drawn in itertools.product(values, repeat=3)]
    wanted = np.quantile(means, (0.025, 0.975), method="inverted_cdf")
    np.testing.assert_allclose(ablate.interval(values), wanted, atol=1e-9)

  def test_the_report_holds_everything(self):
    results, _ = self.summarise(("t2po", 8.0, (0.8, 0.9)))
    place = pathlib.Path(tempfile.mkdtemp())
    ablate.report(place, results, "t2po")
    record = json.loads((place / "ablation.json").read_text())
    self.assertLen(record["runs"], 2)
    self.assertEqual(record["runs"][1]["curve"][-1], [1, 0.9, 8.0])
    self.assertEqual(record["summary"]["t2po"]["runs"]["seeds"], 2)


class CommandLineTest(parameterized.TestCase):
  @parameterized.parameters(
    (("--presets=a",), "config"),
    (("--config=c.py", "--presets=a", "--seeds=x"), "--seeds: found"),
    (("--config=c.py", "--presets=a", "--jbos=2"), "--jbos=2"),
    (("--config=c.py", "--presets=a", "--baseline=b"), "--baseline: found 'b'"),
    (("--config=c.py", "--presets=a", "--jobs=0"), "has an evaluation"),
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
