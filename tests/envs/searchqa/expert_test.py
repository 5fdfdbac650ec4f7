"""The scripted searcher: optimal without noise, curable with it."""

import statistics

from absl.testing import absltest, parameterized

from t2po_jax import envs
from t2po_jax.envs import prompts
from t2po_jax.envs.searchqa import expert


def _play(benchmark, task_id, seed=0):
  """One episode: (responses, results)."""
  env = benchmark.env()
  env.reset(task_id)
  player = env.expert(seed)
  responses, results = [], []
  while not results or not results[-1].done:
    responses.append(player.respond())
    results.append(env.step(responses[-1]))
  return responses, results


def _success(benchmark, tasks):
  return statistics.mean(
    _play(benchmark, task, seed)[1][-1].success
    for seed, task in enumerate(tasks)
  )


class ExpertTest(parameterized.TestCase):
  @parameterized.product(wording=["compact", "full"], seed=[0, 5], topk=[1, 3])
  def test_without_noise_every_question_is_solved(self, wording, seed, topk):
    benchmark = envs.make(
      "searchqa",
      wording=wording,
      seed=seed,
      topk=topk,
      expert_hesitation=0.0,
      expert_doubt=1.0,
    )
    tasks = [
      task
      for name in ("train", "valid", "test")
      for task in benchmark.splits[name][:100]
    ]
    for task in tasks:
      responses, results = _play(benchmark, task)
      hops = benchmark.questions[task].hops
      self.assertTrue(results[-1].success)
      self.assertTrue(all(r.format_valid and r.action_valid for r in results))
      # One passage per search shows one hop; more may show the next one too.
      if topk == 1:
        self.assertLen(results, hops + 1)
      else:
        self.assertBetween(len(results), 2, hops + 1)

  def test_whole_default_world_is_solvable(self):
    benchmark = envs.make("searchqa", expert_hesitation=0.0)
    everything = [t for tasks in benchmark.splits.values() for t in tasks]
    self.assertEqual(_success(benchmark, everything), 1.0)

  def test_hand_case(self):
    benchmark = envs.make("searchqa", topk=1, expert_hesitation=0.0)
    task = next(
      task
      for task in benchmark.splits["train"]
      if benchmark.questions[task].hops == 2
    )
    a, b, c = benchmark.questions[task].path
    r, s = benchmark.questions[task].relations
    responses, _ = _play(benchmark, task)
    self.assertEqual(
      responses,
      [
        f"<think> {a} {r} ?</think><search> {a} {r}</search>",
        f"<think> {a} {r} {b} . {b} {s} ?</think><search> {b} {s}</search>",
        f"<think> {b} {s} {c} .</think><answer> {c}</answer>",
      ],
    )

  def test_hesitation_restates_word_for_word(self):
    calm = envs.make("searchqa", expert_hesitation=0.0)
    spoiled = envs.make("searchqa", expert_hesitation=2.0, expert_doubt=0.0)
    rounds = []
    for seed, task in enumerate(calm.splits["train"][:150]):
      pairs = zip(
        _play(calm, task)[0], _play(spoiled, task, seed)[0], strict=True
      )
      for plain, hesitant in pairs:
        wanted = prompts.parse(plain, calm.grammar)
        given = prompts.parse(hesitant, calm.grammar)
        self.assertEqual(given.content, wanted.content)
        repeated = given.thought.split(" again ")
        self.assertEqual(set(repeated), {wanted.thought})
        rounds.append(len(repeated) - 1)
    # Geometric with continuation 2/3, cut off: E = sum of P(rounds >= n).
    mean = sum((2 / 3) ** n for n in range(1, expert.MAX_ROUNDS + 1))
    self.assertAlmostEqual(statistics.mean(rounds), mean, delta=0.25)
    self.assertEqual(max(rounds), expert.MAX_ROUNDS)

  def test_doubt_costs_success(self):
    scores = []
    for doubt in (0.0, 0.3, 1.0):
      benchmark = envs.make("searchqa", expert_doubt=doubt)
      scores.append(_success(benchmark, benchmark.splits["train"][:200]))
    self.assertEqual(scores[0], 1.0)
    self.assertGreater(scores[0], scores[1] + 0.2)
    self.assertGreater(scores[1], scores[2] + 0.2)

  def test_slips_cost_success_and_no_words(self):
    scores, rounds = [], []
    for slip in (0.0, 0.3, 1.0):
      benchmark = envs.make("searchqa", expert_doubt=0.0, expert_slip=slip)
      tasks = benchmark.splits["train"][:200]
      scores.append(_success(benchmark, tasks))
      spoken = [
        response.count(" again ")
        for seed, task in enumerate(tasks)
        for response in _play(benchmark, task, seed)[0]
      ]
      rounds.append(statistics.mean(spoken))
    self.assertEqual(scores[0], 1.0)
    self.assertGreater(scores[0], scores[1] + 0.2)
    self.assertGreater(scores[1], scores[2] + 0.2)
    self.assertAlmostEqual(rounds[0], rounds[1], delta=0.2)
    self.assertAlmostEqual(rounds[0], rounds[2], delta=0.2)

  @parameterized.parameters(
    {"expert_hesitation": 9.0, "expert_doubt": 1.0},
    {"expert_hesitation": 0.0, "expert_slip": 1.0},
    {"expert_hesitation": 9.0, "expert_doubt": 0.0, "expert_slip": 1.0},
  )
  def test_derailing_acts_on_a_wrong_entity(self, **knobs):
    benchmark = envs.make("searchqa", **knobs)
    kinds = benchmark.world.kinds
    actions = set()
    for seed, task in enumerate(benchmark.splits["train"][:100]):
      env = benchmark.env()
      env.reset(task)
      response = env.expert(seed).respond()
      if "again" not in response and "expert_slip" not in knobs:
        continue
      parsed = prompts.parse(response, benchmark.grammar)
      actions.add(parsed.kind)
      question = benchmark.questions[task]
      wrong, right = parsed.content.split()[0], question.path
      index = 1 if parsed.kind == "answer" else 0
      self.assertNotIn(wrong, right)
      self.assertEqual(kinds[wrong], kinds[right[index]])
      # The last sentence of the thought announces the action.
      self.assertIn(wrong, parsed.thought.split()[-3:])
      self.assertFalse(env.step(response).success)
    self.assertEqual(actions, {"search", "answer"})

  def test_a_wasted_search_is_made_good(self):
    benchmark = envs.make("searchqa", expert_hesitation=0.0)
    task = next(
      task
      for task in benchmark.splits["train"]
      if benchmark.questions[task].hops == 2
    )
    env = benchmark.env()
    env.reset(task)
    player = env.expert(0)
    env.step("<think> x</think><search> nowhere</search>")
    results = [env.step(player.respond()) for _ in range(3)]
    self.assertTrue(results[-1].success)

  def test_same_seed_same_episode(self):
    benchmark = envs.make("searchqa", expert_hesitation=2.0, expert_doubt=0.5)
    task = benchmark.splits["valid"][0]
    self.assertEqual(_play(benchmark, task, 3), _play(benchmark, task, 3))
    episodes = {tuple(_play(benchmark, task, seed)[0]) for seed in range(9)}
    self.assertGreater(len(episodes), 1)


if __name__ == "__main__":
  absltest.main()
