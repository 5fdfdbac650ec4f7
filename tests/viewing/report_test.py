"""Reports: what is in them, by hand, and from the command line."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from absl.testing import absltest

from t2po_jax import records
from t2po_jax.configs import base as settings
from t2po_jax.judging import tables
from t2po_jax.viewing import report, runs
from tests import places


def turn(*, fired_at=-1, phi=0.5, discarded=()):
  return {
    "tokens": [1, 2],
    "fired_at": fired_at,
    "finish": "stop",
    "phi": phi,
    "discarded": [
      {"tokens": [3], "fired_at": -1, "phi": phi} for phi in discarded
    ],
  }


def episode(turns, *, success):
  known = {"task_id": "t", "category": "<c>", "group": 0, "member": 0}
  known |= {"success": success, "aborted": False, "return": 1.0}
  return known | {"turns": turns}


def make_run(folder, *, seed, last):
  """A run of two updates with numbers that can be added up by hand."""
  folder.mkdir(parents=True)
  config = settings.flatten(settings.to_dict(settings.Config()))
  config |= {"seed": seed, "rollout.tasks": 5, "env.data_dir": "<b>x</b>"}
  (folder / "config.json").write_text(json.dumps(config))
  (folder / "machine.json").write_text(json.dumps({"commit": "abc123"}))
  lines = [
    {"eval/success": 0.25, "eval/success/<c>": 0.25, "seconds/evaluate": 2.0},
    {
      "train/success": 0.5,
      "train/tokens": 100.0,
      "train/tokens_discarded": 10.0,
      "train/episodes": 20.0,
      "sampler/slot_steps": 4000.0,
      "sampler/slot_steps_used": 3000.0,
      "sampler/prompt_tokens": 8000.0,
      "sampler/prompt_tokens_reused": 6000.0,
      "pack/tokens": 2500.0,
      "seconds/collect": 6.0,
      "seconds/rollout": 5.0,
      "guard/alarms": 1.0,
    },
    {
      "eval/success": last,
      "eval/success/<c>": last,
      "eval/return": 0.75,
      "seconds/collect": 2.0,
    },
  ]
  (folder / "metrics.jsonl").write_text(
    "".join(
      json.dumps({"step": i, "time": 0.0, "elapsed": 0.0, **line}) + "\n"
      for i, line in enumerate(lines)
    )
  )
  records.Writer(folder / records.FOLDER).write(
    "train",
    1,
    [
      episode([turn(fired_at=3), turn(fired_at=14, phi=0.7)], success=True),
      episode([turn(discarded=(0.1, 0.2), phi=0.6)], success=False),
    ],
  )
  return folder


class ReportTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    place = tempfile.TemporaryDirectory()
    self.addCleanup(place.cleanup)
    self.place = pathlib.Path(place.name)
    for seed, last in enumerate((0.5, 1.0)):
      make_run(self.place / f"mine-seed{seed}", seed=seed, last=last)

  def build(self):
    names = [f"mine={self.place / f'mine-seed{seed}'}" for seed in (0, 1)]
    return report.build(runs.open_runs(names))

  def table(self, title):
    (found,) = [
      block
      for block in self.build()
      if isinstance(block, tables.Table) and block.title == title
    ]
    return [dict(zip(found.head, row, strict=True)) for row in found.rows]

  def test_results_are_means_over_seeds(self):
    (row,) = self.table("held-out success")
    self.assertEqual(
      [row[k] for k in ("seeds", "first", "best", "last", "return")],
      ["2", "0.250", "0.750", "0.750", "0.750"],
    )
    self.assertEqual(row["95 % interval"], "[0.500, 1.000]")

  def test_settings_that_differ(self):
    rows = {row["key"]: row for row in self.table("settings")}
    self.assertEqual(set(rows), {"seed", "rollout.tasks", "env.data_dir"})
    self.assertEqual(rows["seed"]["mine"], "0, 1")
    self.assertEqual(rows["rollout.tasks"]["mine"], "5")

  def test_tokens_and_time_add_up(self):
    (row,) = self.table("thousands of tokens in training")
    self.assertEqual(
      list(row.values()),
      ["mine", "3.0", "2.0", "0.2", "8.0", "6.0", "2.5", "75 %"],
    )
    (row,) = self.table("seconds by stage")
    self.assertEqual(row["collect"], "8.0 s (80 %)")
    self.assertEqual(row["all"], "10.0 s")

  def test_exploration(self):
    (row,) = self.table("token at which thinking was ended")
    # 15 positions in bins of two: 3 lies in 2-3, 14 in the last; two runs.
    self.assertEqual(row["2-3"], "2")
    self.assertEqual(row["14-15"], "2")
    self.assertEqual(row["of responses"], "67 %")
    (row,) = self.table("turns sampled again")
    self.assertEqual(
      list(row.values())[1:],
      ["6", "2", "0.150", "0.600", "0.000", "1.000"],
    )

  def test_both_forms_hold_everything_and_escape(self):
    blocks = self.build()
    markdown, page = report.to_markdown(blocks), report.to_html(blocks)
    for text in (markdown, page):
      for said in ("commit abc123", "updates 1", "rollout.tasks", "75 %"):
        self.assertIn(said, text)
    self.assertNotIn("<b>x</b>", page)
    self.assertIn("&lt;c&gt;", page)
    self.assertNotRegex(page, r"(src|href)=")
    self.assertEqual(page.count("<svg"), 2)
    # A band between the seeds.
    self.assertLen(re.findall("<polygon", page), 2)

  def test_from_the_command_line_of_an_ablation(self):
    def run(*arguments):
      return subprocess.run(
        [sys.executable, "-m", "t2po_jax.experiments.report", *arguments],
        env={**os.environ, "PYTHONPATH": str(places.ROOT)},
        capture_output=True,
        text=True,
      )

    out = self.place / "report.md"
    found = run(str(self.place), f"--out={out}")
    self.assertEqual(found.returncode, 0, found.stderr)
    self.assertIn("# Report of mine\n", out.read_text())
    wrong = run(str(self.place), "--out=report.pdf")
    self.assertEqual(wrong.returncode, 1)
    self.assertIn("expected .md or .html", wrong.stderr)


if __name__ == "__main__":
  absltest.main()
