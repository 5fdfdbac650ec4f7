"""A run, scored directly, through its own server, and against players."""

import contextlib
import functools
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

from absl import flags
from absl.testing import absltest, parameterized
import httpx
import openai

from t2po_jax import records
from t2po_jax.configs import smoke
from t2po_jax.experiments import evaluate as experiment
from t2po_jax.setup import validate
from t2po_jax.training import loop, metrics
from tests import places

CONFIG = f"--config={places.ROOT / 'configs' / 'smoke.py'}"


def setUpModule():
  os.environ["T2PO_CACHE"] = str(trained() / "cache")
  os.environ["OPENAI_API_KEY"] = "sesame"


@functools.cache
def trained():
  """A small run and its cache, for all tests."""
  place = pathlib.Path(tempfile.mkdtemp())
  config = smoke.get_config()
  with config.unlocked():
    config.cache_dir = str(place / "cache")
    config.log.tensorboard = False
    config.cold_start.episodes = 64
    config.train.updates = 2
    config.train.eval_every = 1
  loop.train(validate.read(config), place / "run")
  return place


def command(name, *arguments):
  return [
    sys.executable,
    "-m",
    f"t2po_jax.experiments.{name}",
    *map(str, arguments),
  ]


def environment():
  return {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(places.ROOT),
  }


def evaluate(*arguments):
  """Evaluates as the command does, in this process; gives what it says."""
  values = flags.FlagValues()
  experiment.define_flags(values)
  values(["evaluate", *map(str, arguments)])
  said = io.StringIO()
  with contextlib.redirect_stdout(said):
    experiment.evaluate(values)
  return said.getvalue()


def episodes(out, *, without=("variant", "completion_tokens")):
  lines = (out / "episodes.jsonl").read_text().splitlines()
  found = [json.loads(line) for line in lines]
  keys = set(found[0]) - {"tokens_discarded", *without}
  return sorted(tuple((k, e[k]) for k in sorted(keys)) for e in found)


class WeightsTest(absltest.TestCase):
  def test_every_checkpoint_scores_as_in_training(self):
    place = trained()
    out = place / "all"
    said = evaluate(f"--workdir={place / 'run'}", "--step=all", f"--out={out}")
    found = json.loads((out / "evaluation.json").read_text())["results"]
    logged = {
      int(line["step"]): line
      for line in metrics.read(place / "run" / metrics.FILE)
    }
    self.assertLen(found, 2)
    for update in (1, 2):
      name = f"update {update}, sampled, control on"
      self.assertEqual(found[name]["success"], logged[update]["eval/success"])
      self.assertAlmostEqual(
        found[name]["tokens"], logged[update]["eval/tokens"]
      )
      self.assertAlmostEqual(
        found[name]["return"], logged[update]["eval/return"]
      )
      self.assertIn(name, said)
    index = records.read_index(out / records.FOLDER)
    self.assertLen(index, 16)
    self.assertNotIn("Traceback", said)
    # Once more there is nothing left to do.
    evaluate(f"--workdir={place / 'run'}", "--step=all", f"--out={out}")
    self.assertLen(records.read_index(out / records.FOLDER), 16)

  def test_base_and_start_and_repeats(self):
    place = trained()
    for step in ("base", "start"):
      out = place / step
      evaluate(
        f"--workdir={place / 'run'}",
        f"--step={step}",
        "--decoding=sampled,greedy",
        "--repeats=2",
        "--tasks=3",
        "--splits=valid,test",
        f"--out={out}",
      )
      found = json.loads((out / "evaluation.json").read_text())["results"]
      self.assertLen(found, 4)
      for name, numbers in found.items():
        self.assertEqual(numbers["episodes"], 6)
        self.assertIn("pass@2", numbers)
        if "greedy" in name:
          self.assertEqual(numbers["pass@2"], numbers["success"])


class ServedTest(absltest.TestCase):
  def test_through_the_server_it_is_the_same(self):
    place = trained()
    run = f"--workdir={place / 'run'}"
    server = subprocess.Popen(
      command("serve", run, "--port=0", "--key_variable=OPENAI_API_KEY"),
      env=environment(),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    try:
      url = None
      for line in server.stdout:
        if line.startswith("http"):
          url = line.split()[0]
          break
      self.assertIsNotNone(url)
      with self.assertRaises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="wrong").models.list()
      for control in ("on", "off"):
        options = (run, "--decoding=greedy", f"--control={control}")
        direct = place / f"direct-{control}"
        served = place / f"served-{control}"
        evaluate(*options, f"--out={direct}")
        said = evaluate(
          *options,
          f"--endpoint={url}",
          "--model=run",
          "--concurrency=8",
          f"--out={served}",
        )
        self.assertEqual(episodes(direct), episodes(served))
        self.assertIn("completion_tokens", said)
        self.assertNotIn("sesame", said)
        settings = (served / "evaluation.json").read_text()
        self.assertNotIn("sesame", settings)
      # Part of it is gone: only that is asked for again.
      lines = (served / "episodes.jsonl").read_text().splitlines(True)
      (served / "episodes.jsonl").write_text("".join(lines[:5]) + '{"torn')
      said = evaluate(
        *options, f"--endpoint={url}", "--model=run", f"--out={served}"
      )
      self.assertEqual(episodes(direct), episodes(served))
      calls = json.loads((served / "evaluation.json").read_text())["calls"]
      (counts,) = calls.values()
      self.assertBetween(counts["calls"], 4, 12)
      health = httpx.get(url.removesuffix("/v1") + "/health").json()
      self.assertEqual(health["slots_taken"], 0)
    finally:
      server.send_signal(signal.SIGINT)
      server.wait(timeout=60)
      server.stdout.close()


class PlayerTest(absltest.TestCase):
  def test_the_expert_and_chance(self):
    place = trained()
    scores = {}
    for policy in ("expert", "random"):
      out = place / policy
      evaluate(CONFIG, f"--policy={policy}", "--repeats=2", f"--out={out}")
      found = json.loads((out / "evaluation.json").read_text())["results"]
      scores[policy] = found[policy]["success"]
      self.assertEqual(found[policy]["episodes"], 16)
    self.assertEqual(scores["expert"], 1.0)
    self.assertLess(scores["random"], 0.7)


class BadInputTest(parameterized.TestCase):
  @parameterized.parameters(
    ((), "either --workdir or --config"),
    (("--workdir=/nowhere",), "/nowhere"),
    ((CONFIG, "--step=best"), "--workdir"),
    ((CONFIG, "--splits=validd", "--policy=expert"), "validd"),
    ((CONFIG, "--decoding=beam"), "beam"),
    ((CONFIG, "--policy=expert", "--step=base"), "--policy"),
    ((CONFIG, "--endpoint=http://127.0.0.1:9/v1"), "--model"),
    (
      (CONFIG, "--endpoint=http://127.0.0.1:9/v1", "--model=m", "--retries=0"),
      "cannot be asked",
    ),
  )
  def test_is_refused(self, arguments, named):
    out = pathlib.Path(tempfile.mkdtemp()) / "out"
    with self.assertRaisesRegex(ValueError, named):
      evaluate(*arguments, f"--out={out}")

  def test_another_evaluation_is_not_mixed_in(self):
    out = trained() / "mixed"
    evaluate(CONFIG, "--policy=expert", "--tasks=2", f"--out={out}")
    with self.assertRaisesRegex(ValueError, "policy 'expert', not 'random'"):
      evaluate(CONFIG, "--policy=random", "--tasks=2", f"--out={out}")

  def test_a_mistake_gets_one_line(self):
    found = subprocess.run(
      command("evaluate", CONFIG, "--policy=expert", "--config.rollout.slot=3"),
      env=environment(),
      capture_output=True,
      text=True,
    )
    self.assertEqual(found.returncode, 1)
    self.assertNotIn("Traceback", found.stderr)
    self.assertIn("slots", found.stderr.strip().splitlines()[-1])


if __name__ == "__main__":
  absltest.main()
