"""Each check finds its fault, and nothing in a sound environment."""

import dataclasses
import itertools
import re
import subprocess
import sys
import tempfile
import time
from unittest import mock

from absl.testing import absltest, parameterized

from t2po_jax import envs
from t2po_jax.envs import base, checks, games, prompts, toy
from tests import places

PAGE = places.ROOT / "docs" / "environments.md"
TASKS = ("1-3", "2-1")


class Walk(games.Game):
  """To a goal, by `left` and `right`; can be spoilt."""

  def begin(self, task_id):
    self.room, self.goal = map(int, task_id.split("-"))
    return self.see()

  def see(self):
    actions = ("left", "right", *self.table.more)
    return base.Observation("go", f"{self.room} {self.goal}", actions)

  def act(self, action):
    if self.table.slow:
      time.sleep(0.001)
    way = {"left": -1, "right": 1}.get(action, 0)
    self.room += way + next(self.table.noise)
    won = self.room == self.goal
    return games.Move(self.see(), float(won), won, way != 0, won)


class Endless(Walk):
  """Never says that it is done."""

  def step(self, response):
    result = super().step(response)
    self.over = False
    return dataclasses.replace(result, done=False)


class Careless(Walk):
  """Goes on after the end."""

  def step(self, response):
    self.over = False
    return super().step(response)


class Welcoming(Walk):
  """Plays whatever it is asked for."""

  def reset(self, task_id):
    return super().reset(task_id if task_id in TASKS else TASKS[0])


class Corridor(games.Table):
  game = Walk

  def __init__(self):
    self.max_turns, self.more, self.slow = 4, (), False
    self.noise = itertools.repeat(0)
    self.splits = {"train": ("1-3",), "valid": ("2-1",), "test": ("3-1",)}


def episodes(benchmark, tasks=TASKS):
  return [checks.explore(benchmark, task, 0) for task in tasks]


class ChecksTest(parameterized.TestCase):
  def fault(self, finding, detail):
    self.assertEqual(finding.verdict, "fault", finding)
    self.assertRegex(finding.detail, detail)

  def test_a_sound_environment_has_no_fault(self):
    table = Corridor()
    played = episodes(table)
    for finding in (
      checks.check_splits(table, Corridor),
      checks.check_determinism(table, played),
      checks.check_answers(table, played),
      checks.check_admissible(table, played),
      checks.check_refusals(table, played),
      checks.check_threads(table, played),
      checks.check_speed(table, played),
      checks.check_memory(table, list(TASKS), 100),
    ):
      self.assertEqual(finding.verdict, "ok", finding)
    self.assertEqual(checks.check_expert(table, ["1-3"]).verdict, "note")

  @parameterized.parameters(
    ({"train": ("a",), "valid": ("b",)}, "'test' is missing"),
    ({"train": ("a", "a"), "valid": ("b",), "test": ("c",)}, "more than once"),
    ({"train": ("a",), "valid": ("a",), "test": ("c",)}, "train and valid"),
    ({"train": ("a",), "valid": ("b",), "test": ("c",)}, "others"),
  )
  def test_splits(self, splits, detail):
    table = Corridor()
    table.splits = splits
    self.fault(checks.check_splits(table, Corridor), detail)

  def test_determinism(self):
    table = Corridor()
    played = episodes(table)
    table.noise = itertools.cycle((0, 1))
    finding = checks.check_determinism(table, played)
    self.fault(finding, "answered differently the second time")

  def test_an_episode_that_does_not_end(self):
    table = Corridor()
    table.game = Endless
    with self.assertRaisesRegex(RuntimeError, "max_turns = 4"):
      checks.explore(table, "1-3", 0)

  @parameterized.parameters(
    ({"reward": float("nan")}, "not finite"),
    ({"format_valid": True, "action_valid": True}, "format_valid is True for"),
    ({"format_valid": False, "action_valid": True}, "without format_valid"),
    ({"observation": base.Observation("stay", "x")}, "the task changes"),
  )
  def test_answers(self, changes, detail):
    table = Corridor()
    played = episodes(table)[0]
    played.responses = ["hello"] * len(played.responses)
    plain = dict(
      observation=base.Observation("go", "x"),
      action="",
      reward=0.0,
      done=False,
      format_valid=False,
      action_valid=False,
    )
    played.results = [base.StepResult(**plain)] * len(played.responses)
    self.assertEqual(checks.check_answers(table, [played]).verdict, "ok")
    spoilt = base.StepResult(**plain | changes)
    played.results = [spoilt] * len(played.responses)
    played.observations.append(spoilt.observation)
    self.fault(checks.check_answers(table, [played]), detail)

  def test_admissible(self):
    table = Corridor()
    table.more = ("jump", "leap <how far>")
    finding = checks.check_admissible(table, episodes(table))
    self.fault(finding, "'jump' is listed but not possible")

  def test_refusals(self):
    table = Corridor()
    played = episodes(table)
    table.game = Careless
    self.fault(checks.check_refusals(table, played), "is executed")
    table.game = Welcoming
    self.fault(checks.check_refusals(table, played), "unknown task is played")

  def test_threads(self):
    table = Corridor()
    played = episodes(table)
    table.slow, one = True, Walk(table)
    table.env = lambda: one
    self.fault(checks.check_threads(table, played * 8), "in 8 threads")
    table.threadsafe = False
    self.assertEqual(checks.check_threads(table, played).verdict, "note")

  def test_experts(self):
    sound = envs.make("toy")
    tasks = list(sound.splits["test"][:4])
    self.assertEqual(checks.check_expert(sound, tasks).verdict, "ok")
    lost = envs.make("toy", expert_slip=1.0)
    self.fault(checks.check_expert(lost, tasks), "solves 0 of 4")
    with mock.patch.object(toy.ToyExpert, "respond", return_value="red"):
      self.fault(checks.check_expert(sound, tasks), "badly formed: 'red'")

  def test_prompts(self):
    table = Corridor()
    played = episodes(table)

    def judge(most):
      return checks.check_prompts(
        table,
        played,
        memory=1,
        count_tokens=lambda messages: len(messages[0]["content"].split()),
        max_prompt=most,
      )

    self.assertEqual(judge(9).verdict, "ok")
    self.assertEqual(judge(3).verdict, "note")
    self.assertIn("are shortened", judge(3).detail)
    self.fault(judge(0), "prompt too long")

  def test_memory(self):
    leaky = envs.make("toy", leak=1.0)
    tasks = list(leaky.splits["train"])
    self.fault(checks.check_memory(leaky, tasks, 100), r"\+5\d.* it leaks")


class GamesTest(parameterized.TestCase):
  def test_an_episode(self):
    table = Corridor()
    game = table.env()
    with self.assertRaisesRegex(RuntimeError, "call reset"):
      game.step("")
    with self.assertRaisesRegex(KeyError, "unknown task '9-9'"):
      game.reset("9-9")
    self.assertEqual(game.reset("1-3").text, "1 3")
    first = game.step("<think>a</think><action>right</action>")
    self.assertEqual(
      (first.reward, first.done, first.action), (0, False, "right")
    )
    second = game.step("<action>right</action>")
    self.assertEqual((second.reward, second.done), (1.0, True))
    self.assertTrue(second.success)
    self.assertFalse(second.format_valid or second.action_valid)

  def test_the_turn_limit_ends_it(self):
    game = Corridor().env()
    game.reset("1-3")
    done = [game.step("").done for _ in range(4)]
    self.assertEqual(done, [False, False, False, True])

  @parameterized.parameters(
    (prompts.Grammar(), "<think>up</think>\n<action>up</action>"),
    (
      prompts.Grammar(closing="</think><action>"),
      "<think> up</think><action> up</action>",
    ),
  )
  def test_a_scripted_response(self, grammar, text):
    self.assertEqual(games.Scripted(lambda: "up", grammar).respond(), text)
    self.assertTrue(prompts.parse(text, grammar).format_valid)
    self.assertIn(grammar.closing, text.replace("> ", ">"))

  def test_splits(self):
    tasks = [str(n) for n in range(30)]
    splits = games.cut_splits(tasks)
    sizes = {name: len(ids) for name, ids in splits.items()}
    self.assertEqual(sizes, {"valid": 3, "test": 6, "train": 21})
    self.assertCountEqual(itertools.chain(*splits.values()), tasks)
    self.assertEqual(games.cut_splits(tasks), splits)
    with self.assertRaisesRegex(ValueError, "40 tasks asked for, there are 30"):
      games.cut_splits(tasks, {"train": 40})


class PageTest(absltest.TestCase):
  """The environment on the documentation's page, as a reader would try it."""

  def run_script(self, script, *arguments):
    done = subprocess.run(
      [sys.executable, str(places.ROOT / "experiments" / script), *arguments],
      cwd=self.folder,
      capture_output=True,
      text=True,
      timeout=600,
    )
    return done.returncode, done.stdout + done.stderr

  def setUp(self):
    super().setUp()
    self.folder = self.enter_context(tempfile.TemporaryDirectory())
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    self.code = code
    with open(f"{self.folder}/corridor.py", "w") as file:
      file.write(code)
    own = places.ROOT / "configs" / "own.py"
    self.config = f"--config={own}:corridor:Corridor"

  def test_it_is_short(self):
    lines = [line for line in self.code.splitlines() if line.strip()]
    self.assertLessEqual(len(lines), 40)
    self.assertLessEqual(max(map(len, lines)), 80)

  def test_it_is_judged_sound(self):
    arguments = ("--tasks=2", "--resets=100", "--config.env.rooms=9")
    code, output = self.run_script("check_env.py", self.config, *arguments)
    self.assertEqual(code, 0, output)
    self.assertIn("0 faults", output)
    self.assertIn("valid 7, test 14, train 51", output)
    for name in ("determinism", "prompts", "workers", "threads", "memory"):
      self.assertRegex(output, rf"(?m)^ok +{name} ")

  def test_a_leak_fails_from_the_command_line(self):
    code, output = self.run_script(
      "check_env.py",
      f"--config={places.ROOT / 'configs' / 'smoke.py'}",
      *("--config.env.leak=1.0", "--resets=100", "--tasks=1"),
    )
    self.assertEqual(code, 1, output)
    self.assertRegex(output, r"(?m)^fault memory .*it leaks")
    self.assertIn("1 faults", output)

  def test_it_trains(self):
    code, output = self.run_script(
      "main.py",
      self.config,
      *("--config.model.size=nano", "--config.cold_start.episodes=16"),
      *("--config.train.updates=1", f"--workdir={self.folder}/run"),
    )
    self.assertEqual(code, 0, output)
    self.assertRegex(output, "step 1 .*eval/success")


if __name__ == "__main__":
  absltest.main()
