"""Embedded scenes: solvable, balanced, disjoint, the same everywhere."""

import hashlib
import re

from absl.testing import absltest, parameterized

from t2po_jax.envs.alfworld import engine, original, problem, rooms, scenes

COUNTS = {"train": 60, "valid": 12, "test": 12}


def _init_facts(text):
  init = text[text.index("(:init") + 6 : text.index("(:goal")]
  return [tuple(atom.split()) for atom in re.findall(r"\(([^()]+)\)", init)]


class SceneTest(parameterized.TestCase):
  @parameterized.product(task_type=problem.TASK_TYPES, size=tuple(rooms.SIZES))
  def test_walkthrough_solves_and_nothing_is_solved_before(
    self, task_type, size
  ):
    for index in range(4):
      scene = scenes.draw_scene(f"{task_type}/{index}", task_type, size)
      game = problem.parse(scene.file, "scene")
      self.assertEqual(game.goal.task_type, task_type)
      player = engine.Twin(engine.Board(game))
      for command in scene.file.walkthrough:
        self.assertFalse(player.won)
        self.assertIn(command, player.admissible)
        player.step(command)
      self.assertTrue(player.won)
      self.assertContainsSubset(
        re.findall(r"[a-z]+", game.goal.object), scene.file.task.split()
      )

  @parameterized.parameters(*rooms.SIZES)
  def test_facts_are_consistent(self, size):
    for index in range(12):
      task_type = problem.TASK_TYPES[index % 6]
      scene = scenes.draw_scene(f"facts/{index}", task_type, size)
      facts = _init_facts(scene.file.problem)
      by = {}
      for predicate, *arguments in facts:
        by.setdefault(predicate, []).append(tuple(arguments))
      kinds = dict(by["objectType"])
      types = dict(by["receptacleType"])
      places = dict(by["receptacleAtLocation"])
      fits = set(by["canContain"])
      # Each thing is in one receptacle that may hold it, at its location.
      homes = dict(by["inReceptacle"])
      self.assertLen(by["inReceptacle"], len(homes))
      self.assertEqual(set(homes), set(kinds))
      self.assertEqual(set(places), set(types))
      for thing, home in homes.items():
        self.assertIn((types[home], kinds[thing]), fits)
        self.assertIn((thing, places[home]), by["objectAtLocation"])
      self.assertLen(facts, len(set(facts)))
      ((_, start),) = by["atLocation"]
      self.assertNotIn(start, places.values())
      counts = [list(homes.values()).count(home) for home in types]
      self.assertLessEqual(max(counts), rooms.SIZES[size].capacity)
      shared = [p for p in places if list(places.values()).count(places[p]) > 1]
      self.assertTrue(
        all(types[p].removesuffix("Type") in rooms.SHARED_POSE for p in shared)
      )

  def test_two_instances_outside_the_target(self):
    for index in range(8):
      scene = scenes.draw_scene(f"two/{index}", problem.TWO, "full")
      player = engine.Twin(engine.Board(problem.parse(scene.file, "scene")))
      goal = problem.parse(scene.file, "scene").goal
      found = player.locate(goal.object)
      self.assertGreaterEqual(len(found), 2)
      self.assertFalse(
        any(receptacle.startswith(goal.target + " ") for _, receptacle in found)
      )

  def test_same_key_same_scene_on_every_machine(self):
    scene = scenes.draw_scene("key", problem.HEAT, "small")
    self.assertEqual(scene, scenes.draw_scene("key", problem.HEAT, "small"))
    digest = hashlib.sha256(repr(scene).encode()).hexdigest()[:16]
    self.assertEqual(digest, "03dea2ed5c9d4c25")

  @parameterized.parameters(("tiny", 3, 4), ("small", 4, 6))
  def test_small_rooms_are_small(self, size, least, most):
    for index in range(24):
      task_type = problem.TASK_TYPES[index % 6]
      scene = scenes.draw_scene(f"s/{index}", task_type, size)
      board = engine.Board(problem.parse(scene.file, "scene"))
      self.assertBetween(len(board.receptacles), least, most)

  def test_tiny_rooms_hold_few_classes_of_objects(self):
    for room, homes in rooms.HOMES.items():
      self.assertLen(rooms.SIZES["tiny"].homes(room), 8)
      self.assertEqual(rooms.SIZES["full"].homes(room), homes)
    known = {
      kind.lower()
      for room in rooms.HOMES
      for kind in [*rooms.HOMES[room]][:8] + [rooms.LAMP]
    }
    for index in range(24):
      task_type = problem.TASK_TYPES[index % 6]
      scene = scenes.draw_scene(f"t/{index}", task_type, "tiny")
      game = problem.parse(scene.file, "scene")
      names = engine.Board(game).names.values()
      kinds = {name.rpartition(" ")[0] for name in names}
      places = {
        kind.lower()
        for r in rooms.SIZES["tiny"].receptacles.values()
        for kind in r
      }
      self.assertContainsSubset(kinds - places - {"loc"}, known)

  def test_sizes_of_full_rooms_are_the_benchmarks(self):
    counts = []
    for index in range(36):
      task_type = problem.TASK_TYPES[index % 6]
      scene = scenes.draw_scene(f"f/{index}", task_type, "full")
      board = engine.Board(problem.parse(scene.file, "scene"))
      counts.append(len(board.receptacles))
    self.assertBetween(sum(counts) / len(counts), 12, 26)


class ScenesTest(parameterized.TestCase):
  def test_task_types_take_turns(self):
    source = scenes.Scenes(0, "small", problem.TASK_TYPES, COUNTS)
    for split, count in COUNTS.items():
      ids = source.splits[split]
      self.assertLen(ids, count)
      types = [source.task_type(i) for i in ids]
      self.assertEqual(types[:6], list(problem.TASK_TYPES))
      for task_type in problem.TASK_TYPES:
        self.assertEqual(types.count(task_type), count // 6)

  def test_splits_share_no_scene(self):
    source = scenes.Scenes(0, "small", problem.TASK_TYPES, COUNTS)

    def contents(task_id):
      # What the player can tell apart: names and contents, not coordinates.
      game = problem.parse(source.read(task_id), task_id)
      inside = sorted(
        (game.names[thing], game.names[home])
        for thing, home in game.facts["inreceptacle"]
      )
      return game.goal, tuple(inside)

    seen = {
      split: {contents(i) for i in ids} for split, ids in source.splits.items()
    }
    self.assertFalse(seen["train"] & seen["valid"])
    self.assertFalse(seen["train"] & seen["test"])
    self.assertFalse(seen["valid"] & seen["test"])

  def test_seed_and_size_change_the_scenes(self):
    task_id = "train/pick_and_place_simple/0"
    files = {
      scenes.Scenes(seed, size, (problem.PLACE,), COUNTS).read(task_id).problem
      for seed, size in ((0, "small"), (1, "small"), (0, "full"))
    }
    self.assertLen(files, 3)

  @parameterized.parameters("train/pick_and_place_simple/999", "nonsense", "")
  def test_unknown_task(self, task_id):
    source = scenes.Scenes(0, "small", problem.TASK_TYPES, COUNTS)
    with self.assertRaisesRegex(KeyError, "unknown task"):
      source.read(task_id)


class TablesTest(absltest.TestCase):
  def test_tools_stand_in_the_rooms_of_their_tasks(self):
    for size in rooms.SIZES.values():
      for task_type, (tool, _) in rooms.TREATABLE.items():
        for room in rooms.TASK_ROOMS[task_type]:
          self.assertEqual(size.receptacles[room][tool], (1, 1)) if (
            size is rooms.SIZES["small"]
          ) else self.assertGreaterEqual(size.receptacles[room][tool][0], 1)

  def test_against_the_dataset_where_it_is_installed(self):
    try:
      original.require("cached")
    except ValueError as error:
      self.skipTest(str(error))
    from alfworld.gen import constants

    allowed = constants.VAL_RECEPTACLE_OBJECTS
    for homes in rooms.HOMES.values():
      for kind, receptacles in homes.items():
        for receptacle in receptacles:
          self.assertIn(kind, allowed[receptacle], (kind, receptacle))
    for name, kinds in (
      ("Cleanable", rooms.CLEANABLE),
      ("Heatable", rooms.HEATABLE),
      ("Coolable", rooms.COOLABLE),
    ):
      self.assertContainsSubset(kinds, constants.VAL_ACTION_OBJECTS[name])


if __name__ == "__main__":
  absltest.main()
