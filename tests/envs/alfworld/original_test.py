"""The original engine and the twin, side by side; needs the extra."""

import dataclasses
import functools
import json
import random
import sys
import tarfile

from absl.testing import absltest, parameterized

from t2po_jax import envs
from t2po_jax.envs.alfworld import engine, original, problem, scenes
from t2po_jax.rollout import environments, workers
from tests import places

DATA = places.DATA


def _age(domain, grammar):
  """The rules as they were before the dialect changed."""
  head, _, _ = grammar.partition("\naction help {")
  for new, old in (
    ("You arrive at {r.name}.", "You arrive at {lend.name}."),
    ("move {o} to {r}", "put {o} in/on {r}"),
    ("You move the {o.name} to the", "You put the {o.name} in/on the"),
  ):
    head = head.replace(new, old)
  return domain[: domain.index("(:action help")] + ")", head


class OriginalTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    try:
      cls.engine = original.Original(cached=True)
    except ValueError as error:
      raise absltest.SkipTest(str(error)) from None

  def _compare(self, file, steps, seed):
    """Walks at random through a game on both engines; returns the commands."""
    player = engine.Twin(engine.Board(problem.parse(file, "game")))
    self.engine.load(file)
    self.assertEqual(self.engine.reset(), player.reset())
    draw, trace = random.Random(seed), []
    for _ in range(steps):
      self.assertEqual(self.engine.admissible, player.admissible)
      self.assertEqual(self.engine.won, player.won)
      plain = ("go to", "look", "help", "inventory")
      special = [c for c in player.admissible if not c.startswith(plain)]
      pool = special if special and draw.random() < 0.6 else player.admissible
      command = "foo" if draw.random() < 0.05 else draw.choice(pool)
      self.assertEqual(self.engine.step(command), player.step(command))
      trace.append(command)
    self.assertEqual(self.engine.admissible, player.admissible)
    return trace

  @parameterized.parameters(*problem.TASK_TYPES)
  def test_generated_games(self, task_type):
    scene = scenes.draw_scene("original", task_type, "small")
    self._compare(scene.file, 25, 0)
    self.engine.reset()
    for command in scene.file.walkthrough:
      self.assertFalse(self.engine.won)
      self.engine.step(command)
    self.assertTrue(self.engine.won)

  def test_old_dialect(self):
    scene = scenes.draw_scene("old", problem.PLACE, "small")
    domain, grammar = original.read_rules()
    domain, grammar = _age(domain, grammar)
    file = dataclasses.replace(
      scene.file,
      domain=domain,
      grammar=grammar.replace("UNKNOWN GOAL", scene.file.task),
    )
    trace = self._compare(file, 40, 1)
    self.assertTrue(any(command.startswith("put ") for command in trace))

  def test_stock_engine_agrees(self):
    scene = scenes.draw_scene("stock", problem.HEAT, "small")
    stock = original.Original(cached=False)
    stock.load(scene.file)
    player = engine.Twin(engine.Board(problem.parse(scene.file, "game")))
    self.assertEqual(stock.reset(), player.reset())
    for command in scene.file.walkthrough:
      self.assertEqual(stock.step(command), player.step(command))
      self.assertEqual(stock.admissible, player.admissible)
    self.assertTrue(stock.won)

  def test_arguments_of_the_process_survive(self):
    before = list(sys.argv)
    scene = scenes.draw_scene("argv", problem.PLACE, "small")
    self.engine.load(scene.file)
    self.engine.reset()
    self.assertEqual(sys.argv, before)

  def test_episodes_through_the_benchmark(self):
    for mode in ("explore", "walkthrough"):
      results = []
      for name in ("twin", "cached"):
        benchmark = envs.make(
          "alfworld", engine=name, expert_mode=mode, train_tasks=6
        )
        env = benchmark.env()
        task_id = benchmark.splits["train"][3]
        steps = [env.reset(task_id)]
        player, done = env.expert(0), False
        while not done:
          steps.append(env.step(player.respond()))
          done = steps[-1].done
        results.append(steps)
        env.close()
      self.assertEqual(*results)

  def test_worker_processes_play_side_by_side(self):
    settings = {"train_tasks": 6, "max_turns": 8}
    expected = self._play_side_by_side(
      environments.EnvironmentPool(
        envs.make("alfworld", **settings).env, threads=0
      )
    )
    pool = workers.WorkerPool(
      functools.partial(envs.make, "alfworld", engine="cached", **settings),
      workers=2,
      timeout=60.0,
    )
    self.addCleanup(pool.close)
    pool.prepare(envs.make("alfworld", **settings).splits["train"][:4])
    self.assertEqual(self._play_side_by_side(pool), expected)
    # Once more, with a process that is lost on the way.
    self.assertEqual(self._play_side_by_side(pool, lose_at=3), expected)
    self.assertEqual(pool.restarts, 1)

  def _play_side_by_side(self, pool, lose_at=None):
    """Random commands in four games at once; returns all answers."""
    tasks = envs.make("alfworld", train_tasks=6).splits["train"][:4]
    draw = random.Random(0)
    seats, pending = zip(*[pool.start(task) for task in tasks], strict=True)
    found = [[future.result()] for future in pending]
    for turn in range(8):
      commands = [
        draw.choice(getattr(answers[-1], "observation", answers[-1]).admissible)
        for answers in found
      ]
      if turn == lose_at:
        seats[0].child.kill()
      pending = [
        pool.step(seat, f"<think>x</think><action>{command}</action>")
        for seat, command in zip(seats, commands, strict=True)
      ]
      for answers, future in zip(found, pending, strict=True):
        answers.append(future.result())
    for seat in seats:
      pool.give_back(seat)
    return found

  def test_recorded_games(self):
    archive = DATA / "alfworld" / "json_2.1.1.tar.gz"
    if not archive.exists():
      self.skipTest(f"no ALFWorld games at {archive}")
    path = DATA / "alfworld" / "golden" / "transcripts.jsonl"
    transcript = json.loads(path.read_text().splitlines()[0])
    wanted = f"json_2.1.1/{transcript['game']}/game.tw-pddl"
    with tarfile.open(archive) as tar:
      text = tar.extractfile(wanted).read().decode()
    file = problem.load(text, wanted)
    self._compare(file, 30, 2)
    self.assertEqual(self.engine.reset(), transcript["reset"]["obs"])
    for step in transcript["steps"]:
      self.assertEqual(self.engine.step(step["action"]), step["obs"])
    self.assertTrue(self.engine.won)


if __name__ == "__main__":
  absltest.main()
