"""Tests of the metrics: encoding, resuming, sinks, timing, progress."""

import io
import json
import math
import os
import pathlib
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
import types as python_types
from unittest import mock

from absl.testing import parameterized
import chex
import jax.numpy as jnp
import numpy as np
import rich
import rich.console
from tensorboardX.proto import event_pb2

from t2po_jax.training import metrics
from tests import places


class MetricsCase(chex.TestCase):
  """A fresh workdir, and the console captured."""

  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.workdir = pathlib.Path(folder.name) / "run"
    self.file = self.workdir / metrics.FILE
    self.screen = self.capture(terminal=False)

  def capture(self, *, terminal):
    screen = io.StringIO()
    console = rich.console.Console(
      file=screen, force_terminal=terminal, width=40
    )
    patch = mock.patch.object(rich, "get_console", lambda: console)
    patch.start()
    self.addCleanup(patch.stop)
    return screen

  def writer(self, **settings):
    settings = {"tensorboard": False} | settings
    writer = metrics.Writer(self.workdir, **settings)
    self.addCleanup(writer.close)
    return writer

  def records(self):
    """The file by the strictest reading of JSON."""

    def refuse(name):
      raise AssertionError(f"{name} is not JSON")

    text = self.file.read_text()
    self.assertEndsWith(text, "\n")
    return [
      json.loads(line, parse_constant=refuse) for line in text.splitlines()
    ]


class FloatsTest(MetricsCase):
  @parameterized.parameters(
    (3, 3.0),
    (True, 1.0),
    (np.float32(0.1), 0.10000000149011612),
    (np.array([[7]]), 7.0),
    (jnp.asarray(1.5, jnp.bfloat16), 1.5),
    (jnp.asarray(-2), -2.0),
  )
  def test_scalars_keep_their_value(self, value, expected):
    floats = metrics.to_floats({"x": value})
    self.assertEqual(floats, {"x": expected})
    self.assertIs(type(floats["x"]), float)

  @parameterized.parameters("3", None, [[np.arange(3)]], [()], [{"a": 1}])
  def test_anything_else_is_refused_by_name(self, value):
    if isinstance(value, list):
      (value,) = value
    with self.assertRaisesRegex(ValueError, "^metric 'bad/x': found .*$"):
      metrics.to_floats({"good": 1.0, "bad/x": value})


class SummaryTest(MetricsCase):
  def test_by_hand(self):
    found = metrics.summary([4, [1, 2], 3, 5], "x", quantiles=(0.25, 0.995))
    self.assertEqual(found["x/mean"], 3.0)
    self.assertEqual(found["x/min"], 1.0)
    self.assertEqual(found["x/max"], 5.0)
    self.assertEqual(found["x/p25"], 2.0)
    self.assertAlmostEqual(found["x/p99.5"], 4.98)
    self.assertEqual(found["x/count"], 5.0)
    self.assertLen(found, 6)

  def test_ragged_pieces_equal_a_loop(self):
    draws = np.random.default_rng(0)
    pieces = [draws.normal(size=n) for n in (3, 0, 17, 1)]
    flat = []
    for piece in pieces:
      for x in piece:
        flat.append(float(x))
    flat.sort()
    found = metrics.summary(pieces, "t", quantiles=(0.3,))
    place = 0.3 * (len(flat) - 1)
    low = flat[int(place)]
    high = flat[int(place) + 1]
    self.assertAlmostEqual(found["t/mean"], sum(flat) / len(flat))
    self.assertEqual(found["t/min"], flat[0])
    self.assertEqual(found["t/max"], flat[-1])
    self.assertAlmostEqual(
      found["t/p30"], low + (place - int(place)) * (high - low)
    )

  def test_nan_counts_as_absent(self):
    with_nan = metrics.summary([math.nan, 1.0, [3.0, math.nan]], "g")
    self.assertEqual(with_nan, metrics.summary([1.0, 3.0], "g"))

  @parameterized.parameters([[]], [[math.nan]], [[np.zeros(0)]])
  def test_without_values_the_names_stay(self, values):
    found = metrics.summary(values, "g")
    self.assertEqual(found.pop("g/count"), 0.0)
    self.assertEqual(set(found), set(metrics.summary([1], "g")) - {"g/count"})
    self.assertTrue(all(math.isnan(x) for x in found.values()))

  def test_a_quantile_in_percent_is_refused(self):
    with self.assertRaisesRegex(ValueError, "quantile 90 not in"):
      metrics.summary([1.0], "g", quantiles=(90,))


class RecordTest(MetricsCase):
  def test_lines_are_json_and_read_back(self):
    values = {
      "train/return": jnp.float32(0.1),
      "phi_change": math.nan,
      "up": math.inf,
      "down": -math.inf,
    }
    self.writer().write(7, values)
    (record,) = self.records()
    self.assertEqual(record["step"], 7)
    self.assertAlmostEqual(record["time"], time.time(), delta=60)
    self.assertBetween(record["elapsed"], 0, 60)
    self.assertIsNone(record["phi_change"])
    self.assertEqual((record["up"], record["down"]), ("inf", "-inf"))
    (line,) = metrics.read(self.file)
    self.assertEqual(line["train/return"], float(np.float32(0.1)))
    self.assertTrue(math.isnan(line["phi_change"]))
    self.assertEqual((line["up"], line["down"]), (math.inf, -math.inf))

  def test_a_resumed_file_reads_like_an_uninterrupted_one(self):
    with self.writer() as whole:
      for step in range(6):
        whole.write(step, {"x": step * step})
    expected = [(r["step"], r["x"]) for r in self.records()]
    self.file.unlink()
    with self.writer() as first:
      for step in range(5):
        first.write(step, {"x": step * step})
    with self.writer(resume_step=3) as second:
      self.assertLen(self.records(), 3)
      for step in range(3, 6):
        second.write(step, {"x": step * step})
    self.assertEqual([(r["step"], r["x"]) for r in self.records()], expected)
    elapsed = [r["elapsed"] for r in self.records()]
    self.assertEqual(elapsed, sorted(elapsed))

  def test_elapsed_goes_on_where_the_kept_lines_end(self):
    self.workdir.mkdir()
    self.file.write_text(
      '{"step": 0, "elapsed": 100.0}\n{"step": 1, "elapsed": 200.0}\n'
    )
    self.writer(resume_step=1).write(1, {})
    self.assertBetween(self.records()[1]["elapsed"], 100, 160)

  def test_a_fresh_start_begins_an_empty_file(self):
    self.writer().write(0, {"x": 1})
    self.writer().write(0, {"x": 2})
    self.assertEqual([r["x"] for r in self.records()], [2.0])

  @parameterized.parameters(
    ('{"step": 1, "x', [0]),
    ('{"step": 1, "x": 4}', [0, 1]),
    ("\x00\x00\x00", [0]),
    ("", [0]),
  )
  def test_a_torn_tail_is_mended(self, tail, steps):
    self.workdir.mkdir()
    self.file.write_text('{"step": 0, "x": 3}\n' + tail)
    self.assertEqual([r["step"] for r in metrics.read(self.file)], steps)
    self.writer(resume_step=2).write(2, {"x": 5})
    self.assertEqual([r["step"] for r in self.records()], [*steps, 2])

  @parameterized.parameters(
    '{"step": 1, "x', "[1]", '{"x": 1}', '{"step": "1"}', ""
  )
  def test_damage_inside_is_named_and_nothing_is_lost(self, line):
    self.workdir.mkdir()
    text = '{"step": 0}\n' + line + '\n{"step": 2}\n'
    self.file.write_text(text)
    with self.assertRaisesRegex(ValueError, r"metrics\.jsonl:2: found .*$"):
      self.writer()
    self.assertEqual(self.file.read_text(), text)

  def test_kill_leaves_whole_lines(self):
    program = textwrap.dedent("""
      import sys
      from t2po_jax.training import metrics
      writer = metrics.Writer(sys.argv[1], tensorboard=False)
      for step in range(10**9):
        writer.write(step, {"x": step})
        print(step, flush=True)
    """)
    process = subprocess.Popen(
      [sys.executable, "-c", program, str(self.workdir)],
      stdout=subprocess.PIPE,
      text=True,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      cwd=places.ROOT,
    )
    for _ in range(20):
      process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    seen = process.communicate()[0].split()
    lines = metrics.read(self.file)
    # What a caller saw written is there.
    self.assertGreaterEqual(len(lines), max([20, *map(int, seen[:-1])]))
    self.writer(resume_step=10).write(10, {"x": 10})
    self.assertEqual([r["x"] for r in self.records()], list(range(11)))

  @parameterized.parameters("step", "time", "elapsed")
  def test_own_names_are_refused(self, name):
    with self.assertRaisesRegex(ValueError, f"metric '{name}'"):
      self.writer().write(0, {name: 1.0})
    self.assertEqual(self.file.read_text(), "")

  def test_a_file_as_workdir_is_refused(self):
    self.workdir.write_text("")
    with self.assertRaisesRegex(ValueError, "^workdir: .* is a file"):
      self.writer()


class SinksTest(MetricsCase):
  def test_other_processes_write_nothing(self):
    with mock.patch.object(metrics.processes, "index", return_value=1):
      metrics.print_line("unheard")
      writer = self.writer(tensorboard=True, console=["x"])
      self.assertEqual(writer.write(0, {"x": jnp.ones(())}), {"x": 1.0})
      writer.close()
    self.assertFalse(self.workdir.exists())
    self.assertEmpty(self.screen.getvalue())

  def test_console_prints_one_line_in_order(self):
    names = ["b/[red]", "absent", *(f"long_name_{i}" for i in range(9))]
    values = {"a": 1, "b/[red]": 0.123456, **dict.fromkeys(names[2:], 2)}
    self.writer(console=names).write(12, values)
    (line,) = self.screen.getvalue().splitlines()
    self.assertStartsWith(line, "step 12  b/[red] 0.1235  long_name_0 2  ")
    self.assertEndsWith(line, "long_name_8 2")
    self.assertNotIn("absent", line)
    self.assertNotIn("\x1b", line)

  def test_console_is_silent_without_its_numbers(self):
    self.writer(console=["train/return"]).write(0, {"seconds/eval": 1})
    self.assertEmpty(self.screen.getvalue())

  def test_tensorboard_holds_finite_values_and_the_purge(self):
    with self.writer(tensorboard=True) as first:
      for step in range(3):
        first.write(step, {"train/x": step, "nan": math.nan})
    with self.writer(tensorboard=True, resume_step=2) as second:
      second.write(2, {"train/x": 20})
    points, starts = [], []
    for event in _events(self.workdir / "tensorboard"):
      points += [
        (event.step, v.tag, v.simple_value) for v in event.summary.value
      ]
      if event.HasField("session_log"):
        starts.append(event.step)
    self.assertCountEqual(
      points,
      [
        (0, "train/x", 0.0),
        (1, "train/x", 1.0),
        (2, "train/x", 2.0),
        (2, "train/x", 20.0),
      ],
    )
    self.assertIn(2, starts)

  def test_close_twice(self):
    writer = self.writer(tensorboard=True)
    writer.write(1, {"train/x": 1.0})
    writer.close()
    files = {path: path.read_bytes() for path in self.workdir.rglob("*.*")}
    writer.close()
    self.assertNotEmpty(files)
    for path, content in files.items():
      self.assertEqual(path.read_bytes(), content)
    (line,) = metrics.read(self.workdir / metrics.FILE)
    self.assertEqual(line["train/x"], 1.0)

  @parameterized.parameters(
    ("wandb", "wandb_project"), ("mlflow", "mlflow_experiment")
  )
  def test_a_missing_package_gets_one_clear_line(self, package, setting):
    # A folder of that name, as these packages leave behind, is no package.
    folder = self.workdir.parent / "elsewhere" / package
    folder.mkdir(parents=True)
    hidden = [p for p in sys.path if not (pathlib.Path(p) / package).exists()]
    with (
      mock.patch.object(sys, "path", [str(folder.parent), *hidden]),
      self.assertRaisesRegex(ValueError, f"pip install {package}.*$") as caught,
    ):
      self.writer(**{setting: "agents"})
    self.assertNotIn("\n", str(caught.exception))
    self.assertFalse(self.workdir.exists())

  def test_wandb_resumes_its_run(self):
    wandb = _fake_package("wandb")
    with mock.patch.dict(sys.modules, {"wandb": wandb}):
      for resume_step in (0, 5, 0):
        with self.writer(
          wandb_project="agents", settings={"a": 1}, resume_step=resume_step
        ) as writer:
          writer.write(5, {"x": 2, "nan": math.nan})
    calls = [call.kwargs for call in wandb.init.call_args_list]
    self.assertEqual(calls[0]["id"], calls[1]["id"])
    self.assertNotEqual(calls[0]["id"], calls[2]["id"])
    self.assertEqual(calls[0]["project"], "agents")
    self.assertEqual(calls[0]["config"], {"a": 1})
    run = wandb.init.return_value
    run.log.assert_called_with({"x": 2.0}, step=5)
    self.assertEqual(run.finish.call_count, 3)

  def test_mlflow_resumes_its_run(self):
    mlflow = _fake_package("mlflow")
    mlflow.start_run.return_value.info.run_id = "abc"
    with mock.patch.dict(sys.modules, {"mlflow": mlflow}):
      for resume_step in (0, 5):
        with self.writer(
          mlflow_experiment="agents",
          settings={"a": 1},
          resume_step=resume_step,
        ) as writer:
          writer.write(5, {"x": 2})
    ids = [call.kwargs["run_id"] for call in mlflow.start_run.call_args_list]
    self.assertEqual(ids, [None, "abc"])
    mlflow.log_params.assert_called_once_with({"a": 1})
    mlflow.log_metrics.assert_called_with({"x": 2.0}, step=5)
    self.assertEqual(mlflow.end_run.call_count, 2)

  def test_dashboards_carry_episodes_and_the_report(self):
    page = self.workdir.parent / "report.html"
    page.write_text("<p>fine</p>")
    rows = [{"task": "a", "return": 1.0}, {"task": "b", "return": None}]
    packages = {name: _fake_package(name) for name in ("wandb", "mlflow")}
    wandb, mlflow = packages["wandb"], packages["mlflow"]
    mlflow.start_run.return_value.info.run_id = "abc"
    with mock.patch.dict(sys.modules, packages):
      with self.writer(wandb_project="p", mlflow_experiment="e") as writer:
        writer.write_episodes(3, rows)
        writer.write_episodes(4, [])
        writer.write_report(page)
    wandb.Table.assert_called_once_with(
      columns=["task", "return"], data=[["a", 1.0], ["b", None]]
    )
    wandb.Html.assert_called_once_with("<p>fine</p>")
    mlflow.log_table.assert_called_once_with(
      {"task": ["a", "b"], "return": [1.0, None]},
      "episodes/update-00003.json",
    )
    mlflow.log_artifact.assert_called_once_with(str(page))

  def test_a_failing_dashboard_is_left_behind(self):
    wandb = _fake_package("wandb")
    run = wandb.init.return_value
    run.log.side_effect = ConnectionError("server away\nand more")
    with mock.patch.dict(sys.modules, {"wandb": wandb}):
      writer = self.writer(wandb_project="agents")
      with self.assertLogs(level="WARNING") as logs:
        writer.write(1, {"x": 1})
      writer.write(2, {"x": 2})
      writer.close()
    self.assertLen(logs.output, 1)
    self.assertEndsWith(logs.output[0], "server away")
    self.assertEqual(run.log.call_count, 1)
    self.assertEqual([r["step"] for r in self.records()], [1, 2])

  def test_the_record_must_not_fail(self):
    writer = self.writer()
    with (
      mock.patch.object(os, "fsync", side_effect=OSError("disk full")),
      self.assertRaisesRegex(OSError, "metrics.jsonl could .*: disk full"),
    ):
      writer.write(1, {"x": 1})

  def test_a_full_disk_leaves_no_traceback_of_tensorboard(self):
    """The library writes in a thread, and once more when the process ends."""
    code = textwrap.dedent("""
      import pathlib, resource, sys
      from t2po_jax.training import metrics
      sink = metrics._TensorBoard(pathlib.Path(sys.argv[1]), 0)
      resource.setrlimit(resource.RLIMIT_FSIZE, (999, 999))
      try:
        for step in range(200):
          sink.write(step, {"a": 1.0})
      except OSError as error:
        print("refused")
    """)
    found = subprocess.run(
      [sys.executable, "-c", code, str(self.workdir)],
      cwd=places.ROOT,
      capture_output=True,
      text=True,
      timeout=300,
    )
    self.assertEqual(found.stdout, "refused\n", found.stderr)
    self.assertNotIn("Traceback", found.stderr)

  def test_mlflow_gets_names_it_accepts(self):
    mlflow = _fake_package("mlflow")
    with mock.patch.dict(sys.modules, {"mlflow": mlflow}):
      mlflow.start_run.return_value.info.run_id = "abc"
      self.writer(mlflow_experiment="e").write(0, {"eval/a&b %x.5-y_z:": 1})
    mlflow.log_metrics.assert_called_with({"eval/a_b _x.5-y_z:": 1.0}, step=0)


class TimerTest(MetricsCase):
  def test_stages_add_up_and_reset(self):
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 23.0])
    timer = metrics.Timer()
    with mock.patch.object(time, "perf_counter", lambda: next(clock)):
      with timer.stage("collect"):
        pass
      with timer.stage("update"):
        pass
      with self.assertRaises(KeyError), timer.stage("collect"):
        raise KeyError
    self.assertEqual(
      timer.take(), {"seconds/collect": 4.0, "seconds/update": 2.0}
    )
    self.assertEmpty(timer.take())


class ProgressTest(MetricsCase):
  def test_quiet_without_a_terminal(self):
    with metrics.progress("collect", total=3) as advance:
      advance(3)
    self.assertEmpty(self.screen.getvalue())

  def test_shown_on_a_terminal_also_inside_another(self):
    screen = self.capture(terminal=True)
    with metrics.progress("outer") as outer:
      outer(1)
      with metrics.progress("inner [3]", total=2) as inner:
        inner(1)
    self.assertIn("outer", screen.getvalue())
    self.assertIn("inner [3]", screen.getvalue())

  def test_it_is_told_how_many_are_done_not_how_many_more(self):
    screen = self.capture(terminal=True)
    with metrics.progress("collect", total=5) as advance:
      for done in range(1, 4):
        advance(done)
    self.assertIn("3/5", screen.getvalue())
    self.assertNotIn("6/5", screen.getvalue())


def _events(folder):
  """The events of all files of a folder: length, crc, bytes, crc each."""
  for path in sorted(folder.iterdir()):
    data, at = path.read_bytes(), 0
    while at < len(data):
      (length,) = struct.unpack_from("<Q", data, at)
      yield event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
      at += 12 + length + 4


def _fake_package(name):
  package = mock.MagicMock()
  package.__spec__ = python_types.SimpleNamespace(origin=f"{name}.py")
  return package
