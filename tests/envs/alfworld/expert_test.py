"""The scripted agent: what it does, and what its two knobs spoil."""

import statistics

from absl.testing import absltest, parameterized

from t2po_jax import envs
from t2po_jax.envs import prompts
from t2po_jax.envs.alfworld import expert, problem
from t2po_jax.envs.alfworld.wordings import compact

ADMISSIBLE = (
  "examine desk 1",
  "go to bed 1",
  "go to drawer 1",
  "go to drawer 2",
  "inventory",
  "look",
)
RECEPTACLES = ("bed 1", "desk 1", "drawer 2", "drawer 1")


def _goal(task_type, kind="mug", target="drawer"):
  return problem.Goal(task_type, kind, target)


def _decide(goal, admissible, trace=()):
  decider = expert.Decider(goal, RECEPTACLES, None)
  return decider.decide(admissible, list(trace))


class DeciderTest(parameterized.TestCase):
  @parameterized.parameters(
    ((), "go to bed 1"),
    (("go to desk 1",), "go to drawer 1"),
    (("go to bed 1", "go to drawer 1"), "go to drawer 2"),
    (("go to drawer 2", "look"), "go to bed 1"),
  )
  def test_visits_in_order_from_where_it_stands(self, trace, command):
    found = _decide(_goal(problem.PLACE), ADMISSIBLE, trace)
    self.assertEqual(found, expert.Intention("find", "mug", command))

  def test_opens_what_is_closed(self):
    found = _decide(
      _goal(problem.PLACE), ("open drawer 1", *ADMISSIBLE), ("go to desk 1",)
    )
    self.assertEqual(found.command, "open drawer 1")

  def test_takes_the_right_kind(self):
    admissible = (
      *ADMISSIBLE,
      "take mugrack 1 from desk 1",
      "take mug 3 from desk 1",
    )
    found = _decide(_goal(problem.PLACE), admissible)
    self.assertEqual(found.command, "take mug 3 from desk 1")

  def test_leaves_the_first_of_two_where_it_belongs(self):
    goal = _goal(problem.TWO)
    admissible = (*ADMISSIBLE, "take mug 1 from drawer 1")
    self.assertStartsWith(_decide(goal, admissible).command, "go to ")
    admissible = (*ADMISSIBLE, "take mug 1 from drawer 2")
    self.assertStartsWith(_decide(goal, admissible).command, "take ")

  @parameterized.parameters("move mug 1 to {}", "put mug 1 in/on {}")
  def test_delivers_to_the_lowest_number(self, form):
    held = ("examine mug 1", *ADMISSIBLE)
    goal = _goal(problem.PLACE)
    self.assertEqual(
      _decide(goal, held), expert.Intention("put", "mug 1", "go to drawer 1")
    )
    closed = (*held, "open drawer 1")
    self.assertEqual(_decide(goal, closed).command, "open drawer 1")
    here = (form.format("desk 1"), *closed, form.format("drawer 1"))
    self.assertEqual(_decide(goal, here).command, form.format("drawer 1"))

  def test_treats_before_it_delivers(self):
    goal = _goal(problem.HEAT)
    far = ("examine mug 1", *ADMISSIBLE, "go to microwave 1")
    trace = ["take mug 1 from desk 1"]
    self.assertEqual(
      _decide(goal, far, trace),
      expert.Intention("heat", "mug 1", "go to microwave 1"),
    )
    near = ("examine mug 1", *ADMISSIBLE, "heat mug 1 with microwave 1")
    self.assertEqual(
      _decide(goal, near, trace).command, "heat mug 1 with microwave 1"
    )
    trace += ["heat mug 1 with microwave 1", "open microwave 1"]
    self.assertEqual(_decide(goal, near, trace).command, "go to drawer 1")
    # Somebody who puts it away and takes it again starts over.
    trace += ["move mug 1 to desk 1", "take mug 1 from desk 1"]
    self.assertEqual(_decide(goal, near, trace).aim, "heat")

  def test_drops_what_nobody_asked_for(self):
    held = ("examine pen 1", *ADMISSIBLE)
    goal = _goal(problem.PLACE)
    found = _decide(goal, (*held, "move pen 1 to desk 1"))
    self.assertEqual(
      found, expert.Intention("drop", "pen 1", "move pen 1 to desk 1")
    )
    self.assertStartsWith(_decide(goal, held).command, "go to ")

  def test_looks_for_the_lamp_with_the_object_in_hand(self):
    goal = _goal(problem.LOOK, target="desklamp")
    held = ("examine mug 1", *ADMISSIBLE)
    self.assertEqual(_decide(goal, held).command, "go to bed 1")
    found = _decide(goal, (*held, "use desklamp 1"))
    self.assertEqual(
      found, expert.Intention("light", "mug 1", "use desklamp 1")
    )
    # Without the object it does not touch the lamp.
    found = _decide(goal, (*ADMISSIBLE, "use desklamp 1"))
    self.assertEqual(found.aim, "find")


def _play(benchmark, task_id, seed):
  """Responses and success of one episode of the expert."""
  env = benchmark.env()
  env.reset(task_id)
  player = env.expert(seed)
  responses, done = [], False
  while not done:
    responses.append(player.respond())
    result = env.step(responses[-1])
    assert result.format_valid and result.action_valid, responses[-1]
    done = result.done
  return responses, result.success


class KnobTest(parameterized.TestCase):
  @parameterized.product(
    mode=expert.MODES,
    wording=("compact", "full"),
    size=("tiny", "small", "full"),
  )
  def test_without_noise_it_solves_every_type(self, mode, wording, size):
    benchmark = envs.make(
      "alfworld",
      wording=wording,
      size=size,
      expert_mode=mode,
      max_turns=50,
      expert_hesitation=0.0,
      train_tasks=12,
    )
    for task_id in benchmark.splits["train"]:
      responses, success = _play(benchmark, task_id, 0)
      self.assertTrue(success, task_id)
      again = benchmark.wording.AGAIN
      self.assertFalse(any(f" {again} " in line for line in responses))

  def test_walkthrough_is_the_solution_of_the_file(self):
    benchmark = envs.make(
      "alfworld", expert_mode="walkthrough", expert_hesitation=0.0
    )
    for task_id in benchmark.splits["valid"][:6]:
      responses, _ = _play(benchmark, task_id, 0)
      commands = [
        prompts.parse(line, benchmark.grammar).content for line in responses
      ]
      self.assertEqual(tuple(commands), benchmark.read(task_id).walkthrough)

  def test_hesitation_repeats_the_thought_and_keeps_the_action(self):
    plain = envs.make("alfworld", expert_hesitation=0.0)
    noisy = envs.make("alfworld", expert_hesitation=1.5, expert_doubt=0.0)
    rounds = []
    for index, task_id in enumerate(plain.splits["train"][:60]):
      first, _ = _play(plain, task_id, index)
      second, success = _play(noisy, task_id, index)
      self.assertLen(second, len(first))
      self.assertTrue(success)
      for short, long in zip(first, second, strict=True):
        thought = prompts.parse(short, plain.grammar).thought
        parsed = prompts.parse(long, plain.grammar)
        count = parsed.thought.count(compact.AGAIN)
        # What is here is said once, the plan in every round.
        plan = thought.partition(" . ")[2]
        self.assertEqual(
          parsed.thought,
          f" {compact.AGAIN} ".join([thought, *[plan] * count]),
        )
        rounds.append(count)
    # Geometric with mean h, cut off at M: the sum of c^k, c = h / (1 + h).
    c = 1.5 / 2.5
    mean = sum(c**k for k in range(1, expert.MAX_ROUNDS + 1))
    self.assertAlmostEqual(statistics.mean(rounds), mean, delta=0.15)
    self.assertEqual(max(rounds), expert.MAX_ROUNDS)

  def test_says_what_can_be_taken_or_used(self):
    benchmark = envs.make("alfworld", expert_hesitation=0.0)
    shown = set()
    for task_id in benchmark.splits["train"][:40]:
      env = benchmark.env()
      observation, done = env.reset(task_id), False
      player = env.expert(0)
      while not done:
        response = player.respond()
        said = prompts.parse(response, benchmark.grammar).thought
        wanted = [
          command.partition(" from ")[0].removeprefix(f"{verb} ")
          for command in observation.admissible
          for verb in ("take", "use")
          if command.startswith(f"{verb} ")
        ]
        self.assertStartsWith(said, f"{' '.join(wanted) or 'nothing'} . ")
        shown.add(len(wanted))
        result = env.step(response)
        observation, done = result.observation, result.done
    self.assertGreater(len(shown), 2)

  def test_doubt_changes_mind_in_the_last_round_only(self):
    benchmark = envs.make(
      "alfworld", expert_hesitation=1.0, expert_doubt=1.0, max_turns=12
    )
    changed = 0
    for index, task_id in enumerate(benchmark.splits["train"][:30]):
      for line in _play(benchmark, task_id, index)[0]:
        parsed = prompts.parse(line, benchmark.grammar)
        rounds = parsed.thought.split(f" {compact.AGAIN} ")
        self.assertLessEqual(len(rounds), 2)
        # The last round names what is then done.
        verb, *_, number = parsed.content.split()
        self.assertIn(verb, rounds[-1].split())
        self.assertEndsWith(rounds[-1], f" {number} .")
        if len(rounds) == 2:
          self.assertNotEqual(*rounds)
          changed += 1
    self.assertGreater(changed, 50)

  def test_doubt_costs_success(self):
    scores = []
    for doubt in (0.0, 0.45, 0.9):
      benchmark = envs.make("alfworld", expert_doubt=doubt)
      scores.append(
        statistics.mean(
          _play(benchmark, task_id, index)[1]
          for index, task_id in enumerate(benchmark.splits["train"][:72])
        )
      )
    self.assertGreater(scores[0], 0.95)
    self.assertBetween(scores[1], 0.35, 0.75)
    self.assertLess(scores[2], 0.4)

  def test_same_seed_same_episode(self):
    benchmark = envs.make("alfworld")
    task_id = benchmark.splits["train"][1]
    first = _play(benchmark, task_id, 3)
    self.assertEqual(first, _play(benchmark, task_id, 3))
    others = [_play(benchmark, task_id, seed) for seed in range(4, 8)]
    self.assertFalse(all(other == first for other in others))


class MarkovTest(absltest.TestCase):
  def test_the_prompt_of_two_turns_tells_the_action(self):
    """Equal prompts of the noiseless explorer lead to equal responses."""
    benchmark = envs.make(
      "alfworld", expert_hesitation=0.0, train_tasks=180, max_turns=30
    )
    seen, repeated = {}, 0
    for index, task_id in enumerate(benchmark.splits["train"]):
      env = benchmark.env()
      observation = env.reset(task_id)
      player = env.expert(index)
      memory, done = [], False
      while not done:
        view = prompts.View(
          observation.task,
          tuple(memory[-2:]),
          observation.text,
          observation.admissible,
          1,
          30,
        )
        prompt = benchmark.render(view)[0]["content"]
        response = player.respond()
        repeated += prompt in seen
        self.assertEqual(seen.setdefault(prompt, response), response, prompt)
        result = env.step(response)
        memory.append((observation.text, result.action))
        observation, done = result.observation, result.done
    self.assertGreater(repeated, 2)


if __name__ == "__main__":
  absltest.main()
