"""Sokoban: rules by hand, the solver against breadth first, levels, play."""

import collections
import itertools

from absl.testing import absltest, parameterized

from t2po_jax import envs
from t2po_jax.envs import prompts
from t2po_jax.envs.sokoban import data, engine, expert

SMALL = dict(train_tasks=20, valid_tasks=5, test_tasks=5)
LEVEL = "######/#@...#/#.x..#/#...o#/######"


def breadth_first(text):
  """Length of a shortest solution, by brute force; None if there is none."""
  level, start = engine.parse(text)
  queue, seen = collections.deque([(start, 0)]), {start}
  while queue:
    state, moves = queue.popleft()
    if engine.solved(level, state):
      return moves
    for direction in engine.MOVES:
      there = engine.move(level, state, direction)
      if there not in seen:
        seen.add(there)
        queue.append((there, moves + 1))
  return None


class EngineTest(parameterized.TestCase):
  def test_draw_is_the_inverse_of_parse(self):
    for text in (LEVEL, "#####/#+x*#/#####"):
      level, state = engine.parse(text)
      self.assertEqual("/".join(engine.draw(level, state)), text)

  @parameterized.parameters(
    ("####/#.x#/####", "no level with one player"),
    ("####/#@x#/####", "1 boxes and 0 goals"),
    ("####/#@?#/####", "is no level"),
  )
  def test_what_is_no_level_is_refused(self, text, message):
    with self.assertRaisesRegex(ValueError, message):
      engine.parse(text)

  @parameterized.parameters(
    ("right", "#.@x.o#"),  # Walks.
    ("right right", "#..@xo#"),  # Pushes.
    ("right right right", "#...@*#"),  # Onto the goal.
    ("right right right right", "#...@*#"),  # Against the wall.
    ("left", "#@.x.o#"),  # Into the wall.
    ("up", "#@.x.o#"),
    ("right right left", "#.@.xo#"),  # Never pulls.
  )
  def test_moves(self, moves, row):
    level, state = engine.parse("#######/#@.x.o#/#######")
    for direction in moves.split():
      state = engine.move(level, state, direction)
    self.assertEqual(engine.draw(level, state)[1], row)

  def test_two_boxes_in_a_row_do_not_move(self):
    level, state = engine.parse("########/#@xx.oo#/########")
    self.assertEqual(engine.move(level, state, "right"), state)
    self.assertEmpty(engine.possible(level, state))

  def test_corners(self):
    level, _ = engine.parse(LEVEL)
    cornered = [
      cell
      for cell in itertools.product(range(1, 4), range(1, 5))
      if engine.cornered(level, cell)
    ]
    self.assertEqual(cornered, [(1, 1), (1, 4), (3, 1)])  # (3, 4) is the goal.


class SolverTest(parameterized.TestCase):
  @parameterized.parameters((6, 1, 3), (6, 2, 2))
  def test_as_short_as_by_brute_force(self, size, boxes, walls):
    drawn = data.draw_levels(
      1, size=size, boxes=boxes, walls=walls, moves=(1, 99)
    )
    levels = filter(None, itertools.islice(drawn, 500))
    compared = 0
    for text in itertools.islice(levels, 4):
      solution = expert.solve(*engine.parse(text))
      self.assertLen(solution, breadth_first(text))
      compared += 1
    self.assertEqual(compared, 4)

  def test_unsolvable(self):
    for text in ("#####/#x.@#/#..o#/#####", "######/#@.x.#/#..o.#/######"):
      self.assertIsNone(breadth_first(text))
      self.assertIsNone(expert.solve(*engine.parse(text)))

  def test_next_push(self):
    level, state = engine.parse(LEVEL)
    path = expert.solve(level, state)
    self.assertLen(path, 6)
    cell, direction = expert.next_push(level, state, path)
    self.assertIn((cell, direction), [((2, 1), "right"), ((1, 2), "down")])
    self.assertIsNone(expert.next_push(level, state, ("right",)))


class SokobanTest(parameterized.TestCase):
  def test_levels_are_solvable_different_and_fixed(self):
    benchmark = envs.make("sokoban", **SMALL)
    everything = list(itertools.chain(*benchmark.splits.values()))
    self.assertLen(set(everything), 30)
    for text in everything:
      self.assertBetween(breadth_first(text), 3, 10)
    self.assertEqual(benchmark.splits, envs.make("sokoban", **SMALL).splits)
    other = envs.make("sokoban", seed=1, **SMALL).splits
    self.assertNotEqual(benchmark.splits, other)

  @parameterized.parameters("compact", "full")
  def test_the_expert_solves_every_level(self, wording):
    benchmark = envs.make(
      "sokoban", wording=wording, expert_hesitation=0.0, **SMALL
    )
    for task_id in benchmark.splits["train"]:
      env = benchmark.env()
      env.reset(task_id)
      player, result, moves = env.expert(0), None, 0
      while result is None or not result.done:
        response = player.respond()
        self.assertIn(benchmark.grammar.closing, response)
        result = env.step(response)
        self.assertTrue(result.format_valid and result.action_valid)
        moves += 1
      self.assertTrue(result.success)
      self.assertEqual(result.reward, 10.0)
      self.assertEqual(moves, breadth_first(task_id))

  def test_doubt_costs_solutions(self):
    solved = {}
    for doubt in (0.0, 1.0):
      benchmark = envs.make(
        "sokoban", expert_hesitation=3.0, expert_doubt=doubt, **SMALL
      )
      solved[doubt] = 0
      for task_id in benchmark.splits["train"]:
        env = benchmark.env()
        env.reset(task_id)
        player, result = env.expert(0), None
        while result is None or not result.done:
          result = env.step(player.respond())
        solved[doubt] += result.success
    self.assertEqual(solved[0.0], 20)
    self.assertLess(solved[1.0], 14)

  def test_rewards_and_stuck_boxes(self):
    benchmark = envs.make("sokoban", reward_box=1.0, **SMALL)
    env = benchmark.env()
    text = "######/#@xox#/#....#/#.o..#/######"
    benchmark.splits = {"train": (text,)}
    first = env.reset(text)
    self.assertEqual(first.text, "goal 1 3 , 3 2 box 1 2 , 1 4 me 1 1")
    self.assertEqual(first.admissible, ("down", "right"))
    onto = env.step("<think> go</think><action> RIGHT</action>")
    self.assertEqual((onto.reward, onto.action_valid), (1.0, True))
    self.assertEqual(onto.info["stuck"], 1.0)  # The other box, in its corner.
    wall = env.step("<think> go</think><action> up</action>")
    self.assertEqual((wall.reward, wall.action_valid), (0.0, False))
    self.assertFalse(wall.done)

  def test_pictures(self):
    benchmark = envs.make("sokoban", wording="full", **SMALL)
    benchmark.splits = {"train": (LEVEL,)}
    observation = benchmark.env().reset(LEVEL)
    self.assertIn("# @ . . . #\n# . x . . #", observation.text)
    view = prompts.View(
      observation.task,
      (("old", "left"),),
      observation.text,
      observation.admissible,
      2,
      15,
    )
    (message,) = benchmark.render(view)
    self.assertIn(observation.text, message["content"])
    self.assertIn("Move 1: left", message["content"])
    self.assertIn("move 2 of 15", message["content"])

  @parameterized.parameters(
    ({"least_moves": 9, "most_moves": 8}, "env.most_moves: found 8"),
    ({"boxes": 4}, "env.boxes: found 4.*at most 3"),
    (
      {"size": 5, "walls": 0, "least_moves": 1, "most_moves": 1},
      "env.train_tasks: 30 different levels .* found 12",
    ),
  )
  def test_bad_arguments(self, values, message):
    with self.assertRaisesRegex(ValueError, message):
      envs.make("sokoban", **SMALL | values)


if __name__ == "__main__":
  absltest.main()
