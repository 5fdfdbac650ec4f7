"""The trace viewer: its answers, its manners, and the page in a browser."""

import functools
import html
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import unittest

from absl.testing import absltest, parameterized
import httpx
import numpy as np

from t2po_jax import records, types
from t2po_jax.viewing import runs, site
from tests import places

CHROMIUM = os.environ.get("CHROMIUM") or next(
  filter(None, map(shutil.which, ("chromium", "chromium-browser"))), ""
)
EVIL = "<script>document.title='hacked'</script><img src=x onerror=alert(1)>"
BYTES = [w.encode() for w in ("<think>", "find", " it", "</think>", "<a>", "x")]


def attempt(tokens, *, phi, forced=(), fired_at=-1):
  size = len(tokens)
  return types.Attempt(
    tokens=np.asarray(tokens, np.int32),
    logprobs=np.full(size, -0.5, np.float32),
    uncertainty=np.linspace(0.1, 1.0, size, dtype=np.float32),
    entropy=np.linspace(2.0, 0.0, size, dtype=np.float32),
    confidence=np.linspace(3.0, 5.0, size, dtype=np.float32),
    forced=np.isin(np.arange(size), forced),
    text=b"".join(BYTES[t] for t in tokens).decode(),
    finish="stop",
    fired_at=fired_at,
    thinking_tokens=2,
    phi=phi,
  )


def trajectory(number, *, task, success, resampled=False):
  turns = [
    types.Turn(
      prompt=np.asarray([0, 1], np.int32),
      response=attempt([0, 1, 2, 3, 4], phi=0.4 + 0.1 * k, forced=(3,)),
      anchor=f"{EVIL} you see turn {k}",
      action="take <b>it</b>",
      reward=float(k),
      penalty=0.1,
      format_valid=True,
      action_valid=k > 0,
      phi_change=float("nan") if not k else 0.1,
      prompt_shortened=False,
      discarded=(attempt([0, 5], phi=0.39),) if resampled and k else (),
    )
    for k in range(2)
  ]
  return types.Trajectory(task, "pick", number, 0, tuple(turns), success)


def record(number, **options):
  return records.to_record(
    trajectory(number, **options),
    lambda ids: "".join(BYTES[i].decode() for i in ids),
    BYTES,
    advantages=[0.25, -1.5],
  )


def make_run(folder, *, updates=3):
  """A run with four episodes per update and its metrics."""
  writer = records.Writer(folder / records.FOLDER)
  lines = []
  for update in range(1, updates + 1):
    writer.write(
      "train",
      update,
      [
        record(
          i,
          task=f"task-{i}",
          success=i % 2 == 0,
          resampled=i == 3,
        )
        for i in range(4)
      ],
    )
    line = {"step": update, "time": 1.0, "elapsed": 1.0}
    lines.append(line | {"eval/success": update / 4, "learn/entropy": None})
  (folder / "metrics.jsonl").write_text(
    "".join(json.dumps(line) + "\n" for line in lines)
  )
  return folder


class Fixture(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    place = tempfile.TemporaryDirectory()
    self.addCleanup(place.cleanup)
    self.place = pathlib.Path(place.name)
    for name in ("first", "second"):
      (self.place / name).mkdir()
      make_run(self.place / name)
    self.site = site.Site(
      runs.open_runs([str(self.place / "first"), f"b={self.place / 'second'}"])
    )

  def serve(self):
    server = site.make_server(self.site, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    self.addCleanup(server.server_close)
    self.addCleanup(server.shutdown)
    return f"http://127.0.0.1:{server.server_port}"


class AnswerTest(Fixture):
  def test_runs_and_rows(self):
    first, second = self.site.answer("/api/runs", {})
    self.assertEqual([first["label"], second["label"]], ["first", "b"])
    self.assertEqual(first["episodes"], 12)
    self.assertEqual(first["updates"], [1, 2, 3])
    found = self.site.answer("/api/episodes", {"run": "1", "offset": "1"})
    self.assertEqual(found["total"], 12)
    self.assertEqual(found["rows"][0]["id"], "train-00003-2")
    self.assertLen(found["rows"], 11)

  @parameterized.parameters(
    ({"success": "no"}, 6),
    ({"resampled": "yes"}, 3),
    ({"resampled": "yes", "success": "yes"}, 0),
    ({"update": "2"}, 4),
    ({"update": "2-3", "task_id": "task-1"}, 2),
    ({"kind": "eval"}, 0),
    ({"intervened": "no", "aborted": "no", "cut_off": "no"}, 12),
  )
  def test_filters(self, wanted, count):
    self.assertEqual(self.site.answer("/api/episodes", wanted)["total"], count)

  @parameterized.parameters(
    ("/api/episodes", {"success": "maybe"}),
    ("/api/episodes", {"update": "x"}),
    ("/api/episodes", {"run": "7"}),
    ("/api/episodes", {"offset": "-1"}),
    ("/api/episode", {"id": "../../etc/passwd"}),
  )
  def test_nonsense_is_refused(self, path, query):
    with self.assertRaises(ValueError):
      self.site.answer(path, query)

  def test_one_episode_and_its_like(self):
    found = self.site.answer("/api/episode", {"id": "train-00002-3"})
    self.assertEqual(found["update"], 2)
    self.assertLen(found["episode"]["turns"][1]["discarded"], 1)
    same = self.site.answer("/api/same", {"task_id": "task-3"})
    self.assertEqual([e["run"] for e in same], [0, 0, 0, 1, 1, 1])

  def test_a_running_run_is_followed(self):
    run = self.site.runs[0]
    self.assertLen(run.entries(), 12)
    writer = records.Writer(run.folder / records.FOLDER, resume_update=99)
    writer.write("eval", 3, [record(0, task="new", success=True)])
    with (run.folder / records.FOLDER / records.INDEX).open("a") as file:
      file.write('{"id": "half')
    self.assertLen(run.entries(), 13)
    # A resumed run writes its index anew, shorter.
    records.Writer(run.folder / records.FOLDER, resume_update=2)
    self.assertLen(run.entries(), 4)

  def test_an_evaluation_without_metrics_is_shown(self):
    (self.place / "second" / "metrics.jsonl").unlink()
    self.assertEqual(self.site.answer("/api/metrics", {"run": "1"}), [])

  def test_no_run(self):
    with self.assertRaisesRegex(ValueError, "holds neither"):
      runs.open_runs([str(self.place)])


class ServerTest(Fixture):
  def test_pages_and_refusals(self):
    url = self.serve()
    page = httpx.get(url)
    self.assertIn("default-src 'none'", page.headers["content-security-policy"])
    self.assertEqual(httpx.get(f"{url}/view.js").status_code, 200)
    self.assertEqual(httpx.get(f"{url}/../runs.py").status_code, 404)
    self.assertEqual(httpx.get(f"{url}/api/nothing").status_code, 404)
    bad = httpx.get(f"{url}/api/episodes?success=maybe")
    self.assertEqual(bad.status_code, 400)
    self.assertIn("yes or no", bad.text)
    other = httpx.get(url, headers={"Host": "evil.example"})
    self.assertEqual(other.status_code, 403)
    self.assertLen(httpx.get(f"{url}/api/metrics?run=0").json(), 3)

  def test_ten_thousand_episodes(self):
    folder = self.place / "large"
    writer = records.Writer(folder / records.FOLDER)
    one = record(0, task="t", success=True)
    for update in range(10):
      writer.write("train", update, [one] * 1000)
    self.site = site.Site(runs.open_runs([str(folder)]))
    url = self.serve()
    start = time.process_time()
    for path in ("/", "/view.js", "/style.css", "/api/runs", "/api/episodes"):
      self.assertEqual(httpx.get(url + path).status_code, 200)
    # Of the processor, which a busy machine does not stretch.
    self.assertLess(time.process_time() - start, 3.0)
    found = httpx.get(f"{url}/api/episodes?offset=9900").json()
    self.assertLen(found["rows"], 100)
    newest = httpx.get(f"{url}/api/episode?id=train-00009-999").json()
    self.assertEqual(newest["episode"], one)


class ExportTest(Fixture):
  def test_is_one_file_in_which_nothing_is_markup(self):
    path = self.place / "out.html"
    count = site.export(self.site, path, {"success": "no"}, 2)
    self.assertEqual(count, 4)
    text = path.read_text()
    self.assertNotIn("document.title='hacked'</script>", text)
    self.assertNotIn("<img", text)
    self.assertNotRegex(text, r'(src|href)="(?!data:)')
    data = text.split('id="data">')[1].split("</script>")[0]
    self.assertEqual(data, html.unescape(data))
    run = json.loads(data)[0]
    self.assertLen(run["rows"], 2)
    turn = next(iter(run["episodes"].values()))["episode"]["turns"][0]
    self.assertStartsWith(turn["observation"], EVIL)

  def test_from_the_command_line(self):
    def view(*arguments):
      return subprocess.run(
        [sys.executable, "-m", "t2po_jax.experiments.view", *arguments],
        env={**os.environ, "PYTHONPATH": str(places.ROOT)},
        capture_output=True,
        text=True,
      )

    out = self.place / "cli.html"
    found = view(
      f"--workdir={self.place / 'first'}",
      f"--export={out}",
      "--filter=update=2,success=yes",
    )
    self.assertIn("2 episodes written", found.stdout, found.stderr)
    wrong = view(f"--workdir={self.place}", f"--export={out}")
    self.assertEqual(wrong.returncode, 1)
    self.assertLen(wrong.stderr.strip().splitlines(), 1)
    wrong = view(
      f"--workdir={self.place / 'first'}", f"--export={out}", "--filter=a=b"
    )
    self.assertIn("--filter: found 'a'", wrong.stderr)


@functools.cache
def browser_reason():
  """Why there is no browser; empty if there is one."""
  if not CHROMIUM:
    return "no chromium (apt-get install chromium, or set CHROMIUM)"
  try:
    import playwright.sync_api  # noqa: F401
  except ImportError:
    return "no playwright (pip install playwright)"
  return ""


class BrowserTest(Fixture):
  def setUp(self):
    super().setUp()
    if browser_reason():
      raise unittest.SkipTest(browser_reason())
    from playwright import sync_api

    self.expect = sync_api.expect
    driver = sync_api.sync_playwright().start()
    self.addCleanup(driver.stop)
    browser = driver.chromium.launch(
      executable_path=CHROMIUM,
      args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
    )
    self.addCleanup(browser.close)
    self.page = browser.new_page(viewport={"width": 1300, "height": 800})
    self.page.set_default_timeout(60_000)
    self.errors = []
    self.page.on("pageerror", lambda error: self.errors.append(str(error)))
    self.page.on(
      "console",
      lambda m: self.errors.append(m.text) if m.type == "error" else None,
    )

  def open(self, address):
    self.page.goto(address)
    self.page.wait_for_selector("body[data-ready=yes]")

  def check_page(self):
    """What the live page and the exported file must both do."""
    page = self.page
    self.assertEqual(page.locator("#list li").count(), 12)
    page.select_option("[name=resampled]", "yes")
    self.expect(page.locator("#list li")).to_have_count(3)
    page.click("#list li:first-child button")
    page.wait_for_selector(".tok")
    # Sampled tokens are tinted by how uncertain they were; forced ones not.
    colours = page.eval_on_selector_all(
      ".turn:first-of-type .tok",
      "all => all.map(t => [t.textContent, t.style.backgroundColor, "
      "t.classList.contains('forced')])",
    )
    self.assertEqual(
      [c[0] for c in colours], ["<think>", "find", " it", "</think>", "<a>"]
    )
    self.assertEqual([c[2] for c in colours], [False] * 3 + [True, False])
    tints = [float(c[1].rsplit(",", 1)[1].strip(" )")) for c in colours if c[1]]
    self.assertEqual(tints, sorted(tints))
    self.assertLen(tints, 4)
    page.keyboard.press("2")  # By entropy, which falls.
    tints = page.eval_on_selector_all(
      ".turn:first-of-type .tok:not(.forced)",
      "all => all.map(t => t.style.backgroundColor)",
    )
    values = [float(t.rsplit(",", 1)[1].strip(" )")) for t in tints]
    self.assertEqual(values, sorted(values, reverse=True))
    page.hover(".turn:first-of-type .tok >> nth=1")
    self.assertIn("M 0.325", page.text_content("#token"))
    # Discarded and kept attempt stand side by side.
    boxes = [
      page.locator(".turn >> nth=1").locator(".attempt").nth(i).bounding_box()
      for i in range(2)
    ]
    self.assertAlmostEqual(boxes[0]["y"], boxes[1]["y"], delta=1)
    self.assertLess(boxes[0]["x"] + boxes[0]["width"], boxes[1]["x"] + 1)
    text = page.text_content("#shown")
    for said in ("advantage -1.500", "penalty 0.100", "Φ 0.500", EVIL):
      self.assertIn(said, text)
    # What was written by others is text.
    self.assertEqual(page.locator("#shown script, #shown img").count(), 0)
    self.assertNotEqual(page.title(), "hacked")
    # Another update, and another run, of the same task beside it.
    options = page.locator(".compare option").all_text_contents()
    self.assertLen(options, 6)
    page.select_option(".compare", index=5)
    self.expect(page.locator("#shown article")).to_have_count(2)
    self.assertIn("run b", page.locator("article >> nth=1").text_content())
    page.keyboard.press("x")
    self.expect(page.locator("#shown article")).to_have_count(1)
    page.keyboard.press("j")
    page.wait_for_selector("#list li:nth-child(2) button[aria-current=true]")
    page.keyboard.press("g")
    page.wait_for_selector("#charts polyline")
    self.assertEqual(page.locator("#charts .chart").count(), 1)
    self.assertEqual(page.locator("#charts polyline").count(), 2)
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    after = page.evaluate("getComputedStyle(document.body).backgroundColor")
    self.assertNotEqual(before, after)
    self.assertEmpty(self.errors)

  def test_the_page(self):
    self.open(self.serve())
    self.check_page()

  def test_the_exported_file(self):
    path = self.place / "out.html"
    site.export(self.site, path, {}, 100)
    self.open(path.as_uri())
    self.check_page()

  def test_new_episodes_appear(self):
    self.open(self.serve())
    folder = self.site.runs[0].folder / records.FOLDER
    writer = records.Writer(folder, resume_update=99)
    writer.write("eval", 3, [record(0, task="brand-new", success=True)])
    self.page.wait_for_selector("#list li >> text=brand-new")


if __name__ == "__main__":
  absltest.main()
