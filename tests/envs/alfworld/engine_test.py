"""The twin engine: quirks by hand, an independent simulator, recordings."""

import itertools
import json
import random
import re
import tarfile

from absl.testing import absltest, parameterized

from t2po_jax.envs.alfworld import engine, problem, rooms, scenes
from tests import places

DATA = places.DATA

_FACTS = """
  (atLocation agent1 loc_bar_0) (openable Drawer_bar_a)
  (receptacleType Desk_bar_a DeskType)
  (receptacleAtLocation Desk_bar_a loc_bar_1)
  (receptacleType Drawer_bar_a DrawerType)
  (receptacleAtLocation Drawer_bar_a loc_bar_1)
  (receptacleType Shelf_bar_a ShelfType)
  (receptacleAtLocation Shelf_bar_a loc_bar_2)
  (receptacleType Shelf_bar_b ShelfType)
  (receptacleAtLocation Shelf_bar_b loc_bar_1)
  (receptacleType Microwave_bar_a MicrowaveType)
  (receptacleAtLocation Microwave_bar_a loc_bar_3) (openable Microwave_bar_a)
  (receptacleType Fridge_bar_a FridgeType)
  (receptacleAtLocation Fridge_bar_a loc_bar_4)
  (receptacleType Sink_bar_a_bar_SinkBasin SinkBasinType)
  (receptacleAtLocation Sink_bar_a_bar_SinkBasin loc_bar_5)
  (canContain DeskType AppleType) (canContain DrawerType AppleType)
  (canContain ShelfType AppleType) (canContain DeskType KnifeType)
  (objectType Apple_bar_a AppleType) (objectType Apple_bar_b AppleType)
  (objectType Knife_bar_a KnifeType) (objectType DeskLamp_bar_a DeskLampType)
  (objectType Bowl_bar_a BowlType)
  (inReceptacle Apple_bar_a Desk_bar_a) (inReceptacle Apple_bar_b Desk_bar_a)
  (inReceptacle Knife_bar_a Shelf_bar_a) (inReceptacle Bowl_bar_a Shelf_bar_a)
  (inReceptacle DeskLamp_bar_a Desk_bar_a) (toggleable DeskLamp_bar_a)
  (inReceptacleObject Bowl_bar_a Bowl_bar_a)
  (isReceptacleObject Bowl_bar_a)
  (objectAtLocation Apple_bar_a loc_bar_1)
  (objectAtLocation Apple_bar_b loc_bar_1)
  (pickupable Apple_bar_a) (pickupable Apple_bar_b) (pickupable Knife_bar_a)
  (pickupable Bowl_bar_a) (cleanable Apple_bar_a) (heatable Apple_bar_a)
  (coolable Apple_bar_a) (sliceable Apple_bar_a) (sliceable Apple_bar_b)
"""


def _goal(task_type=problem.PLACE, kind="Apple", target="Drawer"):
  goal = problem.Goal(task_type, kind.lower(), target.lower())
  return problem.write_goal(goal, {kind.lower(): kind, target.lower(): target})


def _file(facts=_FACTS, goal=None, **changes):
  return problem.GameFile(
    problem=f"(define (problem p)\n(:init {facts})\n{goal or _goal()})",
    task="put a apple in drawer",
    **changes,
  )


def _twin(**changes):
  return engine.Twin(engine.Board(problem.parse(_file(**changes), "test")))


class HandTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.player = _twin()

  def _play(self, *commands):
    """Executes commands, all possible; returns the last observation."""
    for command in commands:
      self.assertIn(command, self.player.admissible)
      text = self.player.step(command)
    return text

  def test_first_observation_numbers_backwards_along_ids(self):
    self.assertEqual(
      self.player.reset(),
      "-= Welcome to TextWorld, ALFRED! =-\n\n"
      "You are in the middle of a room. Looking quickly around you, you see a "
      "desk 1, a drawer 1, a fridge 1, a microwave 1, a shelf 2, a shelf 1, "
      "and a sinkbasin 1.\n\nYour task is to: put a apple in drawer.",
    )
    # shelf 2 is Shelf_a, because numbers fall along the sorted ids.
    self.assertIn("knife 1", self._play("go to shelf 2"))

  def test_start_in_front_of_something(self):
    facts = _FACTS.replace("agent1 loc_bar_0", "agent1 loc_bar_3")
    player = _twin(facts=facts)
    self.assertIn("You are facing the microwave 1. Next", player.reset())
    self.assertNotIn("go to microwave 1", player.admissible)

  def test_look_before_the_first_step_sees_nothing(self):
    self.assertEndsWith(self._play("look"), "around you, you see nothing.")

  def test_shared_pose(self):
    text = self._play("go to desk 1")
    self.assertEqual(
      text,
      "You arrive at desk 1. On the desk 1, you see a apple 2, a apple 1, "
      "and a desklamp 1.",
    )
    self.assertNotIn("go to drawer 1", self.player.admissible)
    self.assertIn("open drawer 1", self.player.admissible)
    self.assertEqual(
      self._play("look"),
      "You are facing the desk 1, drawer 1, and shelf 1. Next to it, you see "
      "nothing.",
    )

  def test_moved_at_one_pose_lies_beside(self):
    self._play(
      "go to desk 1", "take apple 2 from desk 1", "move apple 2 to shelf 1"
    )
    self.assertEndsWith(self._play("look"), "you see a apple 2.")
    self._play("take apple 2 from shelf 1", "move apple 2 to desk 1")
    # Now it is out of the shelf, which is at this pose as well.
    self.assertEndsWith(self._play("look"), "you see a apple 2.")

  def test_doors(self):
    self._play("go to drawer 1", "take apple 1 from desk 1")
    self.assertNotIn("move apple 1 to drawer 1", self.player.admissible)
    self.assertEqual(self._play("examine drawer 1"), "The drawer 1 is closed.")
    self.assertEqual(
      self._play("open drawer 1"),
      "You open the drawer 1. The drawer 1 is open. In it, you see nothing.",
    )
    self.assertEqual(self._play("close drawer 1"), "You close the drawer 1.")
    self._play("open drawer 1")
    self.assertFalse(self.player.won)
    self.assertEqual(
      self._play("move apple 1 to drawer 1"),
      "You move the apple 1 to the drawer 1.",
    )
    self.assertTrue(self.player.won)

  def test_examines_only_what_is_held(self):
    self._play("go to desk 1")
    self.assertNotIn("examine apple 2", self.player.admissible)
    self._play("take apple 2 from desk 1")
    self.assertEqual(
      self._play("examine apple 2"), "There's nothing special about apple 2."
    )
    self.assertEqual(self._play("inventory"), "You are carrying: a apple 2.")

  def test_states(self):
    self._play("go to desk 1", "take apple 2 from desk 1")
    for place, command, shown in (
      ("fridge 1", "cool apple 2 with fridge 1", "a cold apple 2"),
      ("microwave 1", "heat apple 2 with microwave 1", "a hot apple 2"),
      ("sinkbasin 1", "clean apple 2 with sinkbasin 1", "a hot and clean"),
      ("fridge 1", "cool apple 2 with fridge 1", "a cool and clean"),
    ):
      self._play(f"go to {place}", command)
      self.assertIn(f"This is {shown}", self._play("examine apple 2"))

  def test_slices_what_lies_at_the_pose(self):
    self._play("go to shelf 2", "take knife 1 from shelf 2", "go to desk 1")
    self.assertEqual(
      self._play("slice apple 1 with knife 1"),
      "You sliced the apple 1 with the knife 1.",
    )
    self._play("move knife 1 to desk 1", "take apple 1 from desk 1")
    self.assertEqual(self._play("examine apple 1"), "This is a sliced apple 1.")

  def test_lamp_always_turns_on(self):
    self._play("go to desk 1")
    for _ in range(2):
      self.assertEqual(
        self._play("use desklamp 1"), "You turn on the desklamp 1."
      )

  def test_bowl_inside_itself_is_empty(self):
    self._play("go to shelf 2", "take bowl 1 from shelf 2")
    self.assertEqual(
      self._play("examine bowl 1"),
      "This is a normal bowl 1. In it, you see nothing.",
    )

  def test_object_in_two_receptacles_leaves_one(self):
    facts = _FACTS + "(inReceptacle Apple_bar_a Shelf_bar_b)"
    self.player = _twin(facts=facts)
    self._play("go to desk 1", "take apple 2 from desk 1")
    self.assertIn("apple 2", self._play("examine shelf 1"))
    self.assertEqual(
      self.player.locate("apple"),
      [("apple 1", "desk 1"), ("apple 2", "shelf 1")],
    )

  @parameterized.parameters("foo", "go to desk 1 now", "GO TO DESK 1", "")
  def test_impossible_command_changes_nothing(self, command):
    before = self.player.admissible
    self.assertEqual(self.player.step(command), "Nothing happens.")
    self.assertEqual(self.player.admissible, before)

  def test_spaces_around_a_command_do_not_matter(self):
    self.assertStartsWith(self.player.step(" go to desk 1 \n"), "You arrive")

  def test_old_dialect(self):
    game = problem.parse(_file(), "test")
    board = engine.Board(
      problem.Game(
        game.task, game.goal, game.facts, game.names, problem.OLD_DIALECT
      )
    )
    player = engine.Twin(board)
    self.assertNotIn("help", player.admissible)
    # Six locations occur in facts; loc_bar_1 is the second.
    self.assertStartsWith(player.step("go to desk 1"), "You arrive at loc 5. ")
    player.step("take apple 1 from desk 1")
    self.assertEqual(
      player.step("put apple 1 in/on desk 1"),
      "You put the apple 1 in/on the desk 1.",
    )


class GoalTest(parameterized.TestCase):
  def test_two_in_one_receptacle(self):
    player = _twin(goal=_goal(problem.TWO, "Apple", "Shelf"))
    moves = (
      "go to desk 1",
      "take apple 1 from desk 1",
      "move apple 1 to shelf 1",
      "take apple 2 from desk 1",
      "go to shelf 2",
      "move apple 2 to shelf 2",
    )
    for command in moves:
      player.step(command)
      self.assertFalse(player.won)
    for command in (
      "take apple 2 from shelf 2",
      "go to shelf 1",
      "move apple 2 to shelf 1",
    ):
      player.step(command)
    self.assertTrue(player.won)

  def test_light_must_be_where_the_agent_is(self):
    player = _twin(goal=_goal(problem.LOOK, "Apple", "DeskLamp"))
    for command, won in (
      ("go to desk 1", False),
      ("use desklamp 1", False),
      ("take apple 1 from desk 1", True),
      ("go to fridge 1", False),
      ("go to desk 1", True),
    ):
      player.step(command)
      self.assertEqual(player.won, won, command)

  @parameterized.parameters(
    (problem.HEAT, "go to microwave 1", "heat apple 2 with microwave 1"),
    (problem.COOL, "go to fridge 1", "cool apple 2 with fridge 1"),
    (problem.CLEAN, "go to sinkbasin 1", "clean apple 2 with sinkbasin 1"),
  )
  def test_state_comes_first(self, task_type, go, treat):
    player = _twin(goal=_goal(task_type, "Apple", "Shelf"))
    for command in (
      "go to desk 1",
      "take apple 2 from desk 1",
      "move apple 2 to shelf 1",
      "take apple 2 from shelf 1",
      go,
      treat,
      "go to shelf 2",
    ):
      player.step(command)
      self.assertFalse(player.won)
    player.step("move apple 2 to shelf 2")
    self.assertTrue(player.won)

  @parameterized.parameters((problem.COOL, False), (problem.HEAT, True))
  def test_heating_undoes_cooling(self, task_type, won):
    player = _twin(goal=_goal(task_type, "Apple", "Shelf"))
    for command in (
      "go to desk 1",
      "take apple 2 from desk 1",
      "go to fridge 1",
      "cool apple 2 with fridge 1",
      "go to microwave 1",
      "heat apple 2 with microwave 1",
      "go to shelf 2",
      "move apple 2 to shelf 2",
    ):
      player.step(command)
    self.assertEqual(player.won, won)


class BadGameTest(parameterized.TestCase):
  @parameterized.parameters(
    ("(holds agent1 Apple_bar_a)", "cannot start from the fact"),
    ("(atLocation agent2 loc_bar_1)", "exactly one agent, found 2"),
    ("(receptacleAtLocation Desk_bar_a loc_bar_9)", "at two locations"),
  )
  def test_facts(self, fact, message):
    with self.assertRaisesRegex(ValueError, f"^a game: .*{message}"):
      problem.parse(_file(facts=_FACTS + fact), "a game")

  def test_goal(self):
    text = _file().problem.replace("(:goal (and", "(:goal (or")
    with self.assertRaisesRegex(ValueError, "none of the six task types"):
      problem.parse(problem.GameFile(text, "t"), "a game")

  def test_sections(self):
    with self.assertRaisesRegex(ValueError, "must have an .:init"):
      problem.parse(problem.GameFile("(define)", "t"), "a game")

  @parameterized.parameters(
    ({"domain": "(define (domain other))"}, "pddl_domain is not"),
    ({"grammar": 'grammar :: "x";'}, "grammar is not"),
  )
  def test_unknown_rules(self, rules, message):
    with self.assertRaisesRegex(ValueError, message):
      problem.parse(_file(**rules), "a game")


class Simulator:
  """The rules once more: a set of facts, and loops over all objects.

  It shares nothing with the twin and takes no short cuts. Facts are tuples
  with the predicate first; commands are found by trying every combination.
  """

  def __init__(self, text):
    init = text[text.index("(:init") + 6 : text.index("(:goal")]
    self.facts = {
      tuple(atom.lower().split()) for atom in re.findall(r"\(([^()]+)\)", init)
    }
    ids = sorted({word for fact in self.facts for word in fact[1:]})
    self.names = {}
    for word in ids:
      kind = word.split("_bar_")[0] + ("basin" if "basin" in word else "")
      same = [
        other
        for other in ids
        if other.split("_bar_")[0] + ("basin" if "basin" in other else "")
        == kind
      ]
      self.names[word] = f"{kind} {len(same) - same.index(word)}"
    self.receptacles = [w for w in ids if self._kind("receptacletype", w)]
    self.objects = [w for w in ids if self._kind("objecttype", w)]
    self.goal = problem.parse(problem.GameFile(text, "t"), "s").goal

  def _kind(self, predicate, word):
    for fact in self.facts:
      if fact[:2] == (predicate, word):
        return fact[2]
    return None

  def _is(self, *fact):
    return fact in self.facts

  def _here(self, receptacle):
    place = next(f[2] for f in self.facts if f[0] == "atlocation")
    return self._is("receptacleatlocation", receptacle, place)

  def _accessible(self, receptacle):
    return not self._is("openable", receptacle) or self._is(
      "opened", receptacle
    )

  def list_commands(self):
    """command -> (facts to delete, facts to add)."""
    place = next(f[2] for f in self.facts if f[0] == "atlocation")
    held = [o for o in self.objects if self._is("holds", "agent1", o)]
    found = {"look": ((), ()), "inventory": ((), ()), "help": ((), ())}
    for r in self.receptacles:
      name = self.names[r]
      target = next(
        f[2] for f in self.facts if f[:2] == ("receptacleatlocation", r)
      )
      if target != place:
        found[f"go to {name}"] = (
          (("atlocation", "agent1", place),),
          (("atlocation", "agent1", target),),
        )
      if not self._here(r):
        continue
      found[f"examine {name}"] = ((), ())
      if self._is("openable", r):
        verb = "close" if self._is("opened", r) else "open"
        fact = (("opened", r),)
        found[f"{verb} {name}"] = (fact, ()) if verb == "close" else ((), fact)
    for o, r in itertools.product(self.objects, self.receptacles):
      if not self._here(r):
        continue
      pair, where = ("inreceptacle", o, r), ("objectatlocation", o, place)
      grasp = ("holds", "agent1", o)
      thing, name = self.names[o], self.names[r]
      if self._is(*pair) and self._is("toggleable", o):
        found[f"use {thing}"] = ((), (("istoggled", o),))
      if (
        self._is(*pair)
        and self._accessible(r)
        and self._is("pickupable", o)
        and not held
      ):
        found[f"take {thing} from {name}"] = ((pair, where), (grasp,))
      if o not in held:
        continue
      kinds = self._kind("receptacletype", r), self._kind("objecttype", o)
      if self._accessible(r) and self._is("cancontain", *kinds):
        found[f"move {thing} to {name}"] = ((grasp,), (pair, where))
      for verb, able, tool, add, drop in (
        ("clean", "cleanable", "sinkbasintype", "isclean", None),
        ("heat", "heatable", "microwavetype", "ishot", "iscool"),
        ("cool", "coolable", "fridgetype", "iscool", "ishot"),
      ):
        if self._is(able, o) and kinds[0] == tool:
          found[f"{verb} {thing} with {name}"] = (
            ((drop, o),) if drop else (),
            ((add, o),),
          )
    for o in held:
      found[f"examine {self.names[o]}"] = ((), ())
    return found

  def step(self, command):
    delete, add = self.list_commands()[command]
    self.facts = (self.facts - set(delete)) | set(add)

  def won(self):
    """The goal in words, over all objects."""
    goal = self.goal
    things = [
      o
      for o in self.objects
      if self._kind("objecttype", o) == f"{goal.object}type"
    ]
    if goal.task_type == problem.LOOK:
      holding = any(self._is("holds", "agent1", o) for o in things)
      return holding and any(
        self._is("istoggled", lamp) and self._is("inreceptacle", lamp, r)
        for lamp in self.objects
        if self._kind("objecttype", lamp) == f"{goal.target}type"
        for r in self.receptacles
        if self._here(r)
      )
    state = {
      problem.CLEAN: "isclean",
      problem.HEAT: "ishot",
      problem.COOL: "iscool",
    }.get(goal.task_type)
    for r in self.receptacles:
      if self._kind("receptacletype", r) == f"{goal.target}type":
        inside = [
          o
          for o in things
          if self._is("inreceptacle", o, r)
          and (state is None or self._is(state, o))
        ]
        if len(inside) >= (2 if goal.task_type == problem.TWO else 1):
          return True
    return False


class SimulatorTest(parameterized.TestCase):
  def _compare(self, player, simulator, choose, steps):
    """Plays twin and simulator side by side."""
    for index in range(steps):
      possible = simulator.list_commands()
      self.assertEqual(player.admissible, tuple(sorted(possible)))
      command = choose(index, possible)
      player.step(command)
      simulator.step(command)
      self.assertEqual(player.won, simulator.won())

  @parameterized.product(task_type=problem.TASK_TYPES, size=tuple(rooms.SIZES))
  def test_walks(self, task_type, size):
    scene = scenes.draw_scene(f"walk/{task_type}", task_type, size)
    board = engine.Board(problem.parse(scene.file, "walk"))
    draw = random.Random(0)

    def change_something(_, possible):
      changing = [c for c, change in possible.items() if any(change)]
      return draw.choice(changing if draw.random() < 0.9 else list(possible))

    self._compare(
      engine.Twin(board),
      Simulator(scene.file.problem),
      change_something,
      40 if size == "small" else 12,
    )
    path = scene.file.walkthrough
    player = engine.Twin(board)
    self._compare(
      player,
      Simulator(scene.file.problem),
      lambda index, _: path[index],
      len(path),
    )
    self.assertTrue(player.won)


class RecordedTest(absltest.TestCase):
  """The original engine's own words, at every step of 41 episodes."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    path = DATA / "alfworld" / "golden" / "transcripts.jsonl"
    if not path.exists():
      raise absltest.SkipTest(f"no recorded transcripts at {path}")
    cls.transcripts = [
      json.loads(line) for line in path.read_text().splitlines()
    ]
    wanted = {t["game"] for t in cls.transcripts}
    cls.games = {}
    with tarfile.open(DATA / "alfworld" / "json_2.1.1.tar.gz") as tar:
      for member in tar:
        name, _, file = member.name.partition("/")[2].rpartition("/")
        if name in wanted and file == "game.tw-pddl":
          cls.games[name] = tar.extractfile(member).read().decode()

  def test_every_step(self):
    steps = 0
    for transcript in self.transcripts:
      name = transcript["game"]
      file = problem.load(self.games[name], name)
      player = engine.Twin(engine.Board(problem.parse(file, name)))
      first = transcript["reset"]
      self.assertEqual(player.reset(), first["obs"])
      self.assertEqual(list(player.admissible), first["admissible"])
      for index, step in enumerate(transcript["steps"]):
        with self.subTest(game=name, step=index, action=step["action"]):
          self.assertEqual(player.step(step["action"]), step["obs"])
          self.assertEqual(list(player.admissible), step["admissible"])
          self.assertEqual(player.won, step["won"])
          self.assertEqual(player.won, step["done"])
          self.assertEqual(int(player.won), step["reward"])
        steps += 1
    self.assertEqual((len(self.transcripts), steps), (41, 1052))

  def test_walkthroughs_win(self):
    for name, text in self.games.items():
      file = problem.load(text, name)
      player = engine.Twin(engine.Board(problem.parse(file, name)))
      for command in file.walkthrough:
        self.assertFalse(player.won)
        player.step(command)
      self.assertEqual(player.won, bool(file.walkthrough), name)


if __name__ == "__main__":
  absltest.main()
