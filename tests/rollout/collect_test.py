"""The multi-turn loop on the toy bandit, with a policy that is an array.

The scheduler is replaced by one that answers from a script, so that every
branch of the loop is reached on purpose and without a model.
"""

import functools

from absl.testing import absltest, parameterized
import numpy as np

from t2po_jax import envs, types
from t2po_jax.envs import prompts, toy
from t2po_jax.rollout import (
  actor,
  collect,
  draw,
  environments,
  penalties,
  sampler,
  statistics,
  workers,
)


class Letters:
  """A tokenizer of Unicode code points; `$` ends a response."""

  eos_ids = (ord("$"),)

  def encode(self, text):
    return [ord(letter) for letter in text]

  def decode(self, ids):
    return "".join(map(chr, ids))

  def render_chat(self, messages, prefix=""):
    return self.encode(messages[-1]["content"] + prefix)

  def render_reply(self, messages, prefix="", *, ended):
    return self.encode("$" * (not ended)) + self.render_chat(messages, prefix)


class ScriptedScheduler:
  """Answers each request with the text and score that a function gives."""

  def __init__(self, answer, slots=1000):
    self._answer, self._slots = answer, slots
    self.longest = 0
    self.queue, self.log = [], []
    self.retries, self.released = [], []

  @property
  def spare(self):
    return self._slots - len(self.queue)

  def forget(self):
    pass

  def submit(self, request):
    self.queue.append(request)
    self.longest = max(self.longest, len(self.queue))

  def release(self, ticket):
    self.released.append(ticket)

  def retry(self, ticket, request):
    self.retries.append((ticket, request.ticket))
    self.queue.append(request)

  def poll(self, sampling, epsilon, **_):
    del sampling, epsilon
    # The newest first: the loop must not rely on an order.
    queue, self.queue = self.queue[::-1], []
    return [self._complete(request) for request in queue]

  def _complete(self, request):
    prompt = "".join(map(chr, request.prompt))
    self.log.append((prompt, tuple(request.key.tolist())))
    text, phi = self._answer(prompt, len(self.log))
    size = len(text)
    attempt = types.Attempt(
      tokens=np.asarray([ord(x) for x in text], np.int32),
      logprobs=np.full(size, -0.5, np.float32),
      uncertainty=np.full(size, phi, np.float32),
      entropy=np.ones(size, np.float32),
      confidence=np.ones(size, np.float32),
      forced=np.zeros(size, bool),
      text="",
      finish="stop",
      fired_at=-1,
      thinking_tokens=2,
      phi=phi,
    )
    return sampler.Completion(
      request.ticket, attempt, request.signal, np.full(1, phi, np.float32)
    )


def scripted(benchmark, pool, under):
  """An actor whose scheduler needs no sampler."""
  return actor.Actor(benchmark, pool, Letters(), None, under)


def play(answer, benchmark=None, *, tasks=2, group_size=2, **changes):
  """Runs the loop; returns the rollout and the scheduler."""
  benchmark = benchmark or toy.ToyBenchmark()
  under = ScriptedScheduler(answer)
  options = {"memory": 2, "max_prompt": 200, "max_response": 50} | changes
  pool = environments.EnvironmentPool(benchmark.env, threads=0)
  rollout = scripted(benchmark, pool, under).play(
    benchmark.splits["train"][:tasks],
    group_size=group_size,
    rules=collect.Rules(**options),
    seed=(3, 1),
  )
  return rollout, under


ANSWER = "<think> x</think><action> red</action>"


def wrong(prompt, number):
  del prompt, number
  return ANSWER, 0.5


class LoopTest(parameterized.TestCase):
  def test_every_episode_is_played_to_its_end_in_order(self):
    rollout, under = play(wrong)
    places = [(t.group, t.member) for t in rollout.trajectories]
    self.assertEqual(places, [(0, 0), (0, 1), (1, 0), (1, 1)])
    for trajectory in rollout.trajectories:
      self.assertLen(trajectory.turns, toy.TURNS)
    self.assertLen(under.released, 4 * toy.TURNS)
    self.assertEmpty(under.retries)

  def test_right_answers_solve_the_task(self):
    benchmark = toy.ToyBenchmark()
    env = benchmark.env()
    answers = {}
    for task in benchmark.splits["train"][:2]:
      observation = env.reset(task)
      expert, done = env.expert(0), False
      while not done:
        view = prompts.View(
          observation.task, (), observation.text, observation.admissible, 1, 3
        )
        prompt = benchmark.render(view)[-1]["content"]
        answers[prompt] = expert.respond()
        result = env.step(answers[prompt])
        observation, done = result.observation, result.done
    rollout, _ = play(lambda p, _: (answers[p], 0.5), benchmark, memory=0)
    described = statistics.describe(rollout.trajectories)
    self.assertEqual(described["success"], 1.0)
    self.assertEqual(described["format_valid"], 1.0)

  @parameterized.parameters((0, 3), (1, 1), (2, 2), (9, 3))
  def test_a_horizon_ends_episodes_early(self, horizon, turns):
    views = []

    class Noting(toy.ToyBenchmark):
      def render(self, view):
        views.append(view.max_turns)
        return super().render(view)

    rollout, under = play(wrong, Noting(), max_turns=horizon)
    self.assertEqual({len(t.turns) for t in rollout.trajectories}, {turns})
    self.assertFalse(any(t.success or t.aborted for t in rollout.trajectories))
    self.assertLen(under.log, 4 * turns)
    self.assertEqual(set(views), {turns})  # The prompt says the same.

  def test_randomness_belongs_to_trajectory_turn_and_attempt(self):
    _, under = play(wrong)
    keys = {key for _, key in under.log}
    self.assertLen(keys, 4 * toy.TURNS)
    _, again = play(wrong)
    self.assertEqual(sorted(under.log), sorted(again.log))

  def test_penalties_are_kept_apart_from_the_reward(self):
    rollout, _ = play(
      lambda *_: ("no tags at all", 0.5),
      penalties=penalties.Penalties(0.1, 0.25),
    )
    for trajectory in rollout.trajectories:
      for turn in trajectory.turns:
        self.assertAlmostEqual(turn.penalty, 0.35)
        self.assertEqual(turn.reward, 0.0)
        self.assertEqual(turn.action, "")
      self.assertAlmostEqual(trajectory.episode_return, -3 * 0.35)

  def test_the_prefix_belongs_to_prompt_and_text(self):
    rollout, under = play(
      lambda *_: (" x</think><action> red</action>", 0.5), prefix="<think>"
    )
    self.assertTrue(all(p.endswith("<think>") for p, _ in under.log))
    turn = rollout.trajectories[0].turns[0]
    self.assertTrue(turn.format_valid)
    self.assertStartsWith(turn.response.text, "<think> x")


class ContextTest(parameterized.TestCase):
  @parameterized.parameters("", "$")
  def test_a_dialogue_goes_on_word_for_word(self, end):
    rollout, _ = play(
      lambda *_: (ANSWER + end, 0.5),
      context="append",
      prefix="<",
      max_prompt=500,
    )
    env = toy.ToyBenchmark().env()
    for trajectory in rollout.trajectories:
      env.reset(trajectory.task_id)
      said = ""
      for turn in trajectory.turns:
        prompt = "".join(map(chr, turn.prompt))
        self.assertStartsWith(prompt, said)
        new = prompt.removeprefix(said)
        if said:
          self.assertEqual(new, f"${turn.anchor}<"[len(end) :])
        self.assertFalse(turn.prompt_shortened)
        said = prompt + ANSWER + end
      self.assertLen(trajectory.turns, toy.TURNS)

  def test_admissible_actions_are_told_again(self):
    view = prompts.View("t", (), "see", ("go", "stay"), 2, 3)
    self.assertEqual(
      prompts.follow_up(view), {"role": "user", "content": "see\ngo\nstay"}
    )

  def test_a_dialogue_that_is_too_long_starts_over(self):
    windowed, _ = play(wrong)
    longest = max(len(t.prompt) for t in windowed.trajectories[0].turns)
    rollout, _ = play(wrong, context="append", max_prompt=longest)
    for one, other in zip(
      rollout.trajectories[0].turns, windowed.trajectories[0].turns, strict=True
    ):
      np.testing.assert_array_equal(one.prompt, other.prompt)
    self.assertEqual(
      [turn.prompt_shortened for turn in rollout.trajectories[0].turns],
      [False, True, True],
    )


class ResamplingTest(parameterized.TestCase):
  def test_a_turn_that_did_not_move_is_sampled_again(self):
    scores = {1: 0.5, 2: 0.51, 3: 0.54, 4: 0.66}

    def answer(prompt, number):
      del prompt
      text = f"<think> {number}</think><action> red</action>"
      return text, scores.get(number, 0.1)

    rollout, under = play(answer, tasks=1, group_size=1, max_tries=3, eta=0.1)
    first, second, _ = rollout.trajectories[0].turns
    self.assertEmpty(first.discarded)
    self.assertTrue(np.isnan(first.phi_change))
    # Gaps 0.01 and 0.04 are discarded, 0.16 stands.
    self.assertLen(second.discarded, 2)
    self.assertAlmostEqual(second.phi_change, 0.16, delta=1e-6)
    self.assertStartsWith(second.response.text, "<think> 4")
    self.assertNotEmpty(under.retries)

  def test_the_last_try_stands(self):
    seen = []

    def answer(prompt, number):
      seen.append(prompt)
      return wrong(prompt, number)[0], 0.5 + 1e-3 * number

    rollout, under = play(answer, tasks=1, group_size=1, max_tries=2, eta=9.0)
    turns = rollout.trajectories[0].turns
    self.assertEqual([len(t.discarded) for t in turns], [0, 2, 2])
    self.assertLen(under.retries, 4)
    # Only first attempts calibrate eta.
    self.assertLen(rollout.phi_changes, 2)

  def test_an_unsure_response_is_sampled_again(self):
    # The scripted scheduler says one nat per token: exp(-1) = 0.37.
    changes = dict(tasks=1, group_size=1, max_tries=1, resample_on="unsure")
    rollout, under = play(wrong, eta=0.4, **changes)
    self.assertLen(under.retries, toy.TURNS)  # The first turn too.
    np.testing.assert_allclose(rollout.phi_changes, [np.exp(-1)] * toy.TURNS)
    _, under = play(wrong, eta=0.3, **changes)
    self.assertEmpty(under.retries)

  def test_a_repeated_action_is_sampled_again(self):
    # Red on display twice, then another word: "red" again is a repeat once.
    task = "echo-red-red-blue"
    benchmark = toy.ToyBenchmark()
    benchmark.splits["train"] = (task,)
    said = iter(["red", "red", "green", "green", "green"])

    def answer(prompt, number):
      del prompt
      text = f"<think> {number}</think><action> {next(said)}</action>"
      return text, 0.5

    rollout, under = play(
      answer, benchmark, tasks=1, group_size=1, max_tries=2,
      resample_on="action",
    )  # fmt: skip
    turns = rollout.trajectories[0].turns
    self.assertEqual([turn.action for turn in turns], ["red", "green", "green"])
    # Scores are all the same, and "green" before "blue" is no repeat.
    self.assertEqual([len(turn.discarded) for turn in turns], [0, 1, 0])
    self.assertLen(under.retries, 1)

  def test_a_repeated_action_costs(self):
    # Shown are red, red, blue: only the second turn repeats the one before.
    benchmark = toy.ToyBenchmark()
    benchmark.splits["train"] = ("echo-red-red-blue",)
    rollout, _ = play(
      lambda *_: ("<think> .</think><action> pink</action>", 0.5),
      benchmark, tasks=1, group_size=1,
      penalties=penalties.Penalties(0.1, 0.2, repeated=0.25),
    )  # fmt: skip
    turns = rollout.trajectories[0].turns
    self.assertEqual([turn.penalty for turn in turns], [0.0, 0.25, 0.0])

  @parameterized.parameters((0, 9.0), (2, 0.0))
  def test_off_means_off(self, max_tries, eta):
    _, under = play(wrong, max_tries=max_tries, eta=eta)
    self.assertEmpty(under.retries)

  def test_an_equal_score_is_not_a_reason(self):
    _, under = play(wrong, max_tries=2, eta=9.0)
    self.assertEmpty(under.retries)


class FailureTest(parameterized.TestCase):
  def test_a_failing_environment_aborts_its_episode_only(self):
    faulty = toy.ToyBenchmark().splits["train"][0]
    benchmark = envs.make("toy", error_turn=2, faulty_tasks=(faulty,))
    rollout, _ = play(wrong, benchmark)
    self.assertEqual(
      [t.aborted for t in rollout.trajectories], [True, True, False, False]
    )
    self.assertEqual(rollout.aborted, 2)
    self.assertEqual(statistics.describe(rollout.trajectories)["aborted"], 2)

  def test_a_prompt_that_cannot_fit_aborts(self):
    rollout, _ = play(wrong, max_prompt=3)
    self.assertTrue(all(t.aborted for t in rollout.trajectories))

  def test_with_decode_calls_to_think_latency_changes_nothing(self):
    def order(seconds, **changes):
      slow = toy.ToyBenchmark().splits["train"][:2]
      benchmark = envs.make(
        "toy", sleep_turn=1, sleep_seconds=seconds, faulty_tasks=slow
      )
      pool = environments.EnvironmentPool(benchmark.env, threads=3)
      under = ScriptedScheduler(lambda prompt, number: (ANSWER, 0.5), slots=2)
      rollout = scripted(benchmark, pool, under).play(
        benchmark.splits["train"][:4],
        group_size=2,
        rules=collect.Rules(
          memory=2, max_prompt=200, max_response=50, **changes
        ),
        seed=(3, 1),
      )
      pool.close()
      self.assertLen(rollout.trajectories, 8)
      return under.log

    for calls in (1, 3):
      self.assertEqual(
        order(0.0, env_calls=calls), order(0.02, env_calls=calls)
      )
    self.assertNotEqual(order(0.0), order(0.02))

  def test_answers_wait_until_a_slot_can_use_them(self):
    under = ScriptedScheduler(wrong, slots=1)
    benchmark = toy.ToyBenchmark()
    pool = environments.EnvironmentPool(benchmark.env, threads=0)
    scripted(benchmark, pool, under).play(
      benchmark.splits["train"][:3],
      group_size=1,
      rules=collect.Rules(
        memory=2, max_prompt=200, max_response=50, env_calls=2
      ),
      seed=(3, 1),
    )
    self.assertEqual(under.longest, 1)

  def test_a_slow_environment_is_given_up(self):
    benchmark = envs.make("toy", sleep_turn=1, sleep_seconds=5.0)
    pool = environments.EnvironmentPool(benchmark.env, threads=2, timeout=0.05)
    rollout = scripted(benchmark, pool, ScriptedScheduler(wrong)).play(
      benchmark.splits["train"][:1],
      group_size=1,
      rules=collect.Rules(memory=2, max_prompt=200, max_response=50),
      seed=(0,),
    )
    self.assertTrue(rollout.trajectories[0].aborted)
    pool.close()

  def test_a_worker_that_is_lost_costs_one_masked_trajectory(self):
    tasks = toy.ToyBenchmark().splits["train"][:3]
    settings = {
      "sleep_turn": 2,
      "sleep_seconds": 20.0,
      "faulty_tasks": tasks[1:2],
    }
    pool = workers.WorkerPool(
      functools.partial(envs.make, "toy", **settings), workers=2, timeout=1.0
    )
    self.addCleanup(pool.close)
    rollout, expected = (
      scripted(
        toy.ToyBenchmark(),
        which,
        ScriptedScheduler(lambda *_: (ANSWER, 0.5)),
      ).play(
        tasks,
        group_size=2,
        rules=collect.Rules(memory=2, max_prompt=200, max_response=50),
        seed=(0,),
      )
      for which in (
        pool,
        environments.EnvironmentPool(toy.ToyBenchmark().env, threads=0),
      )
    )
    self.assertEqual(
      [t.aborted for t in rollout.trajectories],
      [False, False, True, True, False, False],
    )
    for found, right in zip(
      rollout.trajectories, expected.trajectories, strict=True
    ):
      if not found.aborted:
        self.assertEqual(found.episode_return, right.episode_return)
        self.assertEqual(
          [turn.action for turn in found.turns],
          [turn.action for turn in right.turns],
        )
    self.assertGreater(pool.restarts, 0)

  def test_a_bug_in_an_environment_is_not_hidden(self):
    class Broken:
      def reset(self, task_id):
        raise KeyError(task_id)

    pool = environments.EnvironmentPool(Broken, threads=1)
    with self.assertRaises(KeyError):
      pool.start("x")[1].result()


class DescriptionTest(parameterized.TestCase):
  def test_hand_case(self):
    rollout, _ = play(wrong, tasks=1, group_size=1)
    described = statistics.describe(rollout.trajectories)
    size = len(wrong("", 0)[0])
    self.assertEqual(described["tokens"], 3 * size)
    self.assertEqual(described["turns"], 3)
    self.assertEqual(described["intervention_rate"], 0)
    self.assertAlmostEqual(described["phi_mean"], 0.5)
    self.assertAlmostEqual(described["entropy"], 1.0)

  def test_table_of_categories(self):
    first = {"eval/success": 0.25, "eval/success/b": 0.5, "eval/success/a": 0}
    last = {
      "eval/episodes": 4.0,
      "eval/episodes/a": 3.0,
      "eval/episodes/b": 1.0,
      "eval/success": 0.5,
      "eval/success/a": 1 / 3,
      "eval/success/b": 1.0,
      "step": 7.0,
    }
    table = statistics.score_table({"step": 0.0} | first, last)
    self.assertEqual(
      table.splitlines(),
      [
        "held-out success  episodes   update 0   update 7",
        "a                        3       0.00       0.33",
        "b                        1       0.50       1.00",
        "all                      4       0.25       0.50",
      ],
    )

  def test_nothing_played(self):
    described = statistics.describe([])
    self.assertTrue(np.isnan(described["success"]))
    self.assertEqual(draw.Sampling().temperature, 1.0)


if __name__ == "__main__":
  absltest.main()
