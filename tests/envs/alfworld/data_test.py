"""The reader of game files: folders, archives, and what can go wrong."""

import json
import os
import pathlib
import tarfile
import tempfile
from unittest import mock
import zipfile

from absl.testing import absltest, parameterized

from t2po_jax import envs
from t2po_jax.envs.alfworld import data, problem, scenes
from tests import places

DATA = places.DATA
COUNTS = {"train": 7, "valid": 6, "test": 2}


class TreeTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.base = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    self.cache = str(self.base / "cache")
    self.root = self.base / "data" / "json_2.1.1"
    self.source = scenes.Scenes(3, "small", problem.TASK_TYPES, COUNTS)
    scenes.write_tree(self.source, str(self.root))

  def _tree(self, data_dir):
    return data.Tree(str(data_dir), self.cache)

  def test_reads_what_was_written(self):
    tree = self._tree(self.root)
    for split, count in COUNTS.items():
      ids = tree.splits[split]
      self.assertLen(ids, count)
      self.assertEqual(list(ids), sorted(ids))
      written = {self.source.read(i) for i in self.source.splits[split]}
      self.assertEqual({tree.read(i) for i in ids}, written)
      for task_id in ids:
        goal = problem.parse(tree.read(task_id), task_id).goal
        self.assertEqual(tree.task_type(task_id), goal.task_type)
    self.assertStartsWith(tree.splits["valid"][0], "valid_seen/look_at_obj")
    self.assertStartsWith(tree.splits["test"][0], "valid_unseen/")

  def test_traj_data_beside_each_game(self):
    (path,) = self.root.glob("train/pick_heat*/*/traj_data.json")
    data = json.loads(path.read_text())
    self.assertEqual(data["task_type"], problem.HEAT)
    parameters = data["pddl_params"]
    self.assertEqual(
      path.parts[-3].split("-")[:4],
      [
        problem.HEAT,
        parameters["object_target"],
        "None",
        parameters["parent_target"],
      ],
    )

  @parameterized.parameters("", "..")
  def test_folder_or_its_parent(self, above):
    tree = self._tree(self.root / above)
    self.assertLen(tree.splits["train"], COUNTS["train"])

  def test_variable_in_the_path(self):
    with mock.patch.dict(os.environ, {"ALFWORLD_DATA": str(self.root.parent)}):
      tree = self._tree("$ALFWORLD_DATA")
    self.assertLen(tree.splits["train"], COUNTS["train"])
    with mock.patch.dict(os.environ):
      os.environ.pop("ALFWORLD_DATA", None)
      with self.assertRaisesRegex(ValueError, "env.data_dir: the variable"):
        self._tree("$ALFWORLD_DATA")

  @parameterized.parameters(".tar.gz", ".tar", ".zip")
  def test_archive_equals_folder(self, ending):
    archive = self.base / f"json_2.1.1{ending}"
    if ending == ".zip":
      with zipfile.ZipFile(archive, "w") as bundle:
        for path in sorted(self.root.rglob("*.*")):
          if path.is_file():
            bundle.write(path, path.relative_to(self.root.parent))
    else:
      mode = "w:gz" if ending == ".tar.gz" else "w"
      with tarfile.open(archive, mode) as tar:
        tar.add(self.root, self.root.name)
    folder, packed = self._tree(self.root), self._tree(archive)
    self.assertEqual(folder.splits, packed.splits)
    task_id = packed.splits["valid"][0]
    self.assertEqual(folder.read(task_id), packed.read(task_id))
    before = sorted(pathlib.Path(self.cache).rglob("*"))
    self._tree(archive)  # Comes from the cache now.
    self.assertEqual(sorted(pathlib.Path(self.cache).rglob("*")), before)

  def test_folder_that_holds_the_archive(self):
    folder = self.base / "packed"
    folder.mkdir()
    with tarfile.open(folder / "json_2.1.1.tar.gz", "w:gz") as tar:
      tar.add(self.root, self.root.name)
    self.assertLen(self._tree(folder).splits["train"], COUNTS["train"])

  def test_names_out_of_the_archive_stay_inside(self):
    archive = self.base / "json_2.1.1.zip"
    with zipfile.ZipFile(archive, "w") as bundle:
      bundle.writestr("train/../../game.tw-pddl", "{}")
    with self.assertRaisesRegex(ValueError, "holds no json_2.1.1/<split>"):
      self._tree(archive)
    self.assertEqual(list(pathlib.Path(self.cache).iterdir()), [])

  def test_unsolvable_sliced_and_movable_games_are_left_out(self):
    first, second, third, *_ = sorted(self.root.glob("train/*"))
    first.rename(first.with_name("pick_and_place_with_movable_recep-A-B-C-1"))
    second.rename(second.with_name("pick_and_place_simple-AppleSliced-B-C-1"))
    (path,) = third.glob("*/game.tw-pddl")
    text = path.read_text()
    path.write_text(text.replace('"solvable": true', '"solvable": false'))
    self.assertLen(self._tree(self.root).splits["train"], COUNTS["train"] - 3)

  def test_flag_before_a_long_field(self):
    (path, *_) = sorted(self.root.glob("train/*/*/game.tw-pddl"))
    data = json.loads(path.read_text())
    data["tail"] = "x" * 10_000
    path.write_text(json.dumps(data))
    self.assertLen(self._tree(self.root).splits["train"], COUNTS["train"])

  def test_unknown_task_type(self):
    (self.root / "train").mkdir(exist_ok=True)
    first, *_ = sorted(self.root.glob("train/*"))
    first.rename(first.with_name("wash_the_dog-Dog-None-Bath-1"))
    with self.assertRaisesRegex(ValueError, "wash_the_dog.* no known task"):
      self._tree(self.root)

  def test_missing_and_empty_places(self):
    with self.assertRaisesRegex(ValueError, "env.data_dir: .*nowhere does not"):
      self._tree(self.base / "nowhere")
    empty = self.base / "empty"
    empty.mkdir()
    with self.assertRaisesRegex(ValueError, "env.data_dir: .*empty holds no"):
      self._tree(empty)
    (empty / "train").mkdir()
    with self.assertRaisesRegex(ValueError, "no solvable game in train or"):
      self._tree(empty)

  def test_broken_archive(self):
    archive = self.base / "json_2.1.1.tar.gz"
    archive.write_bytes(b"no archive")
    with self.assertRaisesRegex(ValueError, "tar.gz cannot be unpacked"):
      self._tree(archive)

  @parameterized.parameters(
    ("{", "not a JSON game file"),
    ("{}", "no field pddl_problem"),
    ('{"pddl_problem": "p", "grammar": ""}', "states no task"),
  )
  def test_broken_game(self, text, message):
    tree = self._tree(self.root)
    task_id = tree.splits["train"][0]
    (self.root / task_id / "game.tw-pddl").write_text(text)
    with self.assertRaisesRegex(ValueError, f"game.tw-pddl: .*{message}"):
      tree.read(task_id)

  def test_unknown_task(self):
    with self.assertRaisesRegex(KeyError, "no game file"):
      self._tree(self.root).read("train/none/none")

  def test_a_part_is_a_fixed_draw_of_all_types(self):
    def splits(**counts):
      benchmark = envs.make(
        "alfworld", data_dir=str(self.root), cache_dir=self.cache, **counts
      )
      return benchmark.splits

    whole, part = splits(), splits(valid_tasks=3)
    self.assertEqual(whole["train"], part["train"])
    self.assertLen(part["valid"], 3)
    self.assertContainsSubset(part["valid"], whole["valid"])
    self.assertEqual(list(part["valid"]), sorted(part["valid"]))
    self.assertEqual(part, splits(valid_tasks=3))
    looks = splits(task_types=(problem.LOOK, problem.HEAT))
    self.assertEqual(
      {i.split("/")[1].split("-")[0] for i in looks["train"]},
      {problem.LOOK, problem.HEAT},
    )


class RecordedGamesTest(absltest.TestCase):
  """The benchmark's own files."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    if not (DATA / "alfworld").is_dir():
      raise absltest.SkipTest(f"no ALFWorld games at {DATA / 'alfworld'}")
    cls.cache = tempfile.TemporaryDirectory()
    cls.addClassCleanup(cls.cache.cleanup)
    cls.benchmark = envs.make(
      "alfworld",
      data_dir=str(DATA / "alfworld"),
      cache_dir=cls.cache.name,
      expert_mode="walkthrough",
      expert_hesitation=0.0,
      max_turns=50,
    )

  def test_sizes(self):
    sizes = {name: len(ids) for name, ids in self.benchmark.splits.items()}
    self.assertEqual(sizes, {"train": 200, "valid": 140, "test": 0})
    self.assertEqual(
      {self.benchmark.category(i) for i in self.benchmark.splits["valid"]},
      set(problem.TASK_TYPES),
    )

  def test_expert_solves_games_of_every_type(self):
    for split in ("train", "valid"):
      for task_id in self.benchmark.splits[split][::9]:
        env = self.benchmark.env()
        env.reset(task_id)
        player = env.expert(0)
        done = False
        while not done:
          result = env.step(player.respond())
          done = result.done
          self.assertTrue(result.format_valid and result.action_valid)
        self.assertTrue(result.success, task_id)


if __name__ == "__main__":
  absltest.main()
