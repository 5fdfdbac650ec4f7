"""Environments in worker processes: kills, hangs, leaks, equal results."""

import functools
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time

from absl.testing import absltest, parameterized

from t2po_jax import envs
from t2po_jax.envs import base, toy
from t2po_jax.rollout import environments, workers
from tests import places

RIGHT, WRONG = "red", "nothing"
ROOT = places.ROOT


def recipe(**settings):
  return functools.partial(envs.make, "toy", **settings)


def respond(word):
  return f"<think> x</think><action> {word}</action>"


def play(pool, tasks, words=("red", "green", "pink")):
  """Plays tasks side by side; answers per task, an error in its place."""
  started = [pool.start(task) for task in tasks]
  found = [[future.result(30)] for _, future in started]
  for word in words:
    futures = [pool.step(seat, respond(word)) for seat, _ in started]
    for answers, future in zip(found, futures, strict=True):
      if not isinstance(answers[-1], base.EnvError):
        error = future.exception(30)
        answers.append(error if error else future.result())
  for seat, _ in started:
    pool.give_back(seat)
  return found


def child_ids():
  """The worker processes of this process."""
  listing = subprocess.run(
    ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(os.getpid())],
    capture_output=True,
    text=True,
  ).stdout
  return [
    int(line.split()[0])
    for line in listing.splitlines()
    if "worker.main()" in line
  ]


class WorkersTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.tasks = toy.ToyBenchmark().splits["train"][:6]

  def pool(self, *, workers_count=1, timeout=0.0, memory=0.0, **settings):
    pool = workers.WorkerPool(
      recipe(**settings),
      workers=workers_count,
      timeout=timeout,
      memory=memory,
    )
    self.addCleanup(pool.close)
    return pool

  def start(self, pool, tasks):
    """Seats with an episode under way."""
    seats = []
    for task in tasks:
      seat, future = pool.start(task)
      future.result(30)
      seats.append(seat)
    return seats

  @parameterized.parameters(1, 2)
  def test_the_same_as_on_the_spot(self, count):
    pool = self.pool(workers_count=count)
    spot = environments.EnvironmentPool(toy.ToyBenchmark().env, threads=0)
    for _ in range(2):
      self.assertEqual(play(pool, self.tasks), play(spot, self.tasks))
    self.assertLen(child_ids(), count)
    self.assertEqual(pool.restarts, 0)

  def test_processes_do_not_import_jax(self):
    import jaxlib  # noqa: F401

    self.start(self.pool(), self.tasks[:1])
    loaded = pathlib.Path(f"/proc/{child_ids()[0]}/maps")
    if not loaded.exists():
      self.skipTest("no /proc to look at")
    self.assertIn("python", loaded.read_text())
    self.assertNotIn("jax", loaded.read_text())

  def test_a_kill_between_calls_costs_nothing(self):
    pool = self.pool()
    seats = self.start(pool, self.tasks[:3])
    for seat in seats:
      pool.step(seat, respond("red")).result(30)
    os.kill(*child_ids(), signal.SIGKILL)
    time.sleep(0.1)
    after = [pool.step(seat, respond("green")).result(30) for seat in seats]
    spot = environments.EnvironmentPool(toy.ToyBenchmark().env, threads=0)
    for task, result in zip(self.tasks, after, strict=False):
      (expected,) = play(spot, [task], ("red", "green"))
      self.assertEqual(result, expected[-1])
    self.assertEqual(pool.restarts, 1)

  def test_a_kill_inside_a_call_costs_this_episode_only(self):
    slow = self.tasks[1]
    settings = dict(sleep_turn=2, sleep_seconds=20.0, faulty_tasks=[slow])
    pool = self.pool(**settings)
    seats = self.start(pool, self.tasks[:3])
    for seat in seats:
      pool.step(seat, respond("red")).result(30)
    answers = [pool.step(seat, respond("green")) for seat in seats]
    answers[0].result(30)
    time.sleep(0.2)  # The second call sleeps, the third waits for it.
    os.kill(*child_ids(), signal.SIGKILL)
    with self.assertRaisesRegex(base.EnvError, "died.*-9"):
      answers[1].result(30)
    spot = environments.EnvironmentPool(toy.ToyBenchmark().env, threads=0)
    (expected,) = play(spot, [self.tasks[2]], ("red", "green"))
    self.assertEqual(answers[2].result(30), expected[-1])
    # The lost episode's seat plays on.
    pool.give_back(seats[1])
    (again,) = self.start(pool, [self.tasks[3]])
    self.assertEqual(pool.step(again, respond("red")).result(30).done, False)

  def test_a_call_that_hangs_is_given_up(self):
    slow = self.tasks[0]
    pool = self.pool(
      timeout=0.5, sleep_turn=1, sleep_seconds=60.0, faulty_tasks=[slow]
    )
    seats = self.start(pool, self.tasks[:2])
    begin = time.monotonic()
    hanging = pool.step(seats[0], respond("red"))
    other = pool.step(seats[1], respond("red"))
    with self.assertRaisesRegex(base.EnvError, "longer than 0.5 s"):
      hanging.result(30)
    self.assertIsInstance(other.result(30), base.StepResult)
    self.assertLess(time.monotonic() - begin, 20)
    self.assertLen(child_ids(), 1)

  def test_an_episode_that_reads_differently_is_given_up(self):
    pool = self.pool()
    (seat,) = self.start(pool, self.tasks[:1])
    pool.step(seat, respond("red")).result(30)
    seat.answers[0] = base.Observation("another task", "red")
    os.kill(*child_ids(), signal.SIGKILL)
    time.sleep(0.1)
    with self.assertRaisesRegex(base.EnvError, "answered differently"):
      pool.step(seat, respond("green")).result(30)

  def test_a_leak_is_stopped(self):
    pool = self.pool(memory=50.0, leak=20.0)
    seats = self.start(pool, self.tasks[:1])
    pool.step(seats[0], respond("red")).result(30)
    for _ in range(3):
      for task in self.tasks[:3]:
        (seat,) = self.start(pool, [task])
        pool.give_back(seat)
    # 20 MB a reset: each process lasts for three.
    self.assertBetween(pool.restarts, 2, 4)
    # The first episode has survived all of them.
    self.assertIsInstance(
      pool.step(seats[0], respond("red")).result(30), base.StepResult
    )

  def test_what_was_prepared_is_used(self):
    pool = self.pool(workers_count=2)
    pool.prepare(self.tasks[:2] * 2)
    pool.prepare(self.tasks[2:4] * 2)
    seats = {id(seat) for w in pool._prepared.values() for seat, _ in w}
    started = [pool.start(task) for task in self.tasks[2:4] * 2]
    self.assertEqual({id(seat) for seat, _ in started}, seats)
    for (_, future), task in zip(started, self.tasks[2:4] * 2, strict=True):
      self.assertEqual(future.result(30).text, task.split("-")[1])
    seat, _ = pool.start(self.tasks[2])
    self.assertNotIn(id(seat), seats)

  def test_one_task_plays_in_one_process(self):
    pool = self.pool(workers_count=2)
    seats = [pool.start(t)[0] for t in self.tasks[:2] for _ in range(3)]
    homes = [seat.worker.name for seat in seats]
    self.assertEqual(homes[:3], [homes[0]] * 3)
    self.assertEqual(homes[3:], [homes[3]] * 3)
    self.assertNotEqual(homes[0], homes[3])

  def test_errors_of_the_environment_pass(self):
    pool = self.pool(error_turn=1)
    (seat,) = self.start(pool, self.tasks[:1])
    with self.assertRaisesRegex(base.EnvError, "ordered failure"):
      pool.step(seat, respond("red")).result(30)
    with self.assertRaisesRegex(KeyError, "unknown task"):
      pool.start("nothing")[1].result(30)
    self.assertEqual(pool.restarts, 0)

  def test_a_benchmark_that_cannot_be_made_is_no_abort(self):
    pool = self.pool(error_turn=7)
    for _ in range(2):
      with self.assertRaisesRegex(RuntimeError, "env.error_turn") as caught:
        pool.start(self.tasks[0])[1].result(30)
      self.assertNotIsInstance(caught.exception, base.EnvError)

  def test_a_recipe_must_be_picklable(self):
    with self.assertRaises((AttributeError, pickle.PicklingError)):
      workers.WorkerPool(lambda: None, workers=1)

  def test_processes_end_with_the_pool(self):
    pool = self.pool(workers_count=2, sleep_turn=1, sleep_seconds=60.0)
    (seat,) = self.start(pool, self.tasks[:1])
    future = pool.step(seat, respond("red"))
    time.sleep(0.1)
    pool.close()
    with self.assertRaises(base.EnvError):
      future.result(30)
    self.assertEmpty(child_ids())

  @parameterized.parameters("red", "sleep")
  def test_processes_end_after_their_parent(self, mood):
    code = (
      "import functools, os, signal, time\n"
      "from t2po_jax import envs\n"
      "from t2po_jax.rollout import workers\n"
      "recipe = functools.partial(envs.make, 'toy', "
      f"sleep_turn={int(mood == 'sleep')}, sleep_seconds=60.0)\n"
      "pool = workers.WorkerPool(recipe, workers=1)\n"
      "seat, future = pool.start('echo-red-red-red')\n"
      "future.result(30)\n"
      "child = seat.child\n"
      "print(child._process.pid, child._folder, flush=True)\n"
      "pool.step(seat, '<action>red</action>'); time.sleep(0.2)\n"
      "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    output = subprocess.run(
      [sys.executable, "-c", code],
      env=os.environ | {"PYTHONPATH": str(ROOT)},
      stdout=subprocess.PIPE,
      text=True,
    ).stdout
    number, folder = output.split()
    deadline = time.monotonic() + 10
    while pathlib.Path(f"/proc/{number}").exists():
      self.assertLess(time.monotonic(), deadline)
      time.sleep(0.05)
    self.assertFalse(pathlib.Path(folder).exists())


if __name__ == "__main__":
  absltest.main()
