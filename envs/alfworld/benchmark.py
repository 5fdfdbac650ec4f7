"""The ALFWorld benchmark: tasks, episodes, scores.

An agent solves one of six types of household tasks with text commands. Without
a data directory the tasks are embedded scenes; with one they are the
benchmark's own games with its splits: train, seen rooms, unseen rooms. The twin
engine plays both; the original engine is an option (`cached`, or `stock` as
published) and always the reference.

Deliberate differences from the package's environment: the task is separated
from the first observation and the banner is dropped; `help` is not an action; a
command must equal one of the listed ones (in either dialect of "move X to Y"),
otherwise nothing happens and the turn counts.
"""

import random
import re
from typing import Protocol

from t2po_jax.envs import base, prompts, templates
from t2po_jax.envs.alfworld import (
  data,
  engine,
  expert,
  original,
  problem,
  scenes,
)
from t2po_jax.envs.alfworld import settings as settings_lib
from t2po_jax.envs.alfworld.wordings import compact, full, reference


class Wording(expert.Wording, Protocol):
  """A wording of the benchmark; the modules in `wordings` implement it."""

  NO_ACTION: str
  CLOSING: str

  def render(self, view: prompts.View) -> list[prompts.Message]:
    """The prompt of a turn."""
    ...


_WORDINGS: dict[str, Wording] = {
  "compact": compact,
  "full": full,
  "reference": full,
}
_SCENE_COUNTS = {"train": 2000, "valid": 60, "test": 120}
# Number of parsed games to keep; a large one takes about 100 kB.
_BOARDS = 128
_CORPUS_TASKS = 200


class ALFWorld:
  """Household tasks in text; implements `envs.base.Benchmark`.

  Attributes:
    engine: the name of the engine.
    threadsafe: whether it may run in several threads at once.
  """

  Settings = settings_lib.Settings

  def __init__(self, settings: settings_lib.Settings | None = None) -> None:
    """Lists the games, or names the scenes.

    Raises:
      ValueError: if the data cannot be read, or the engine is not installed.
    """
    settings = settings or settings_lib.Settings()
    self.settings = settings
    if settings.engine != "twin":
      original.require(settings.engine)
    self.wording = _WORDINGS[settings.wording]
    self.grammar = settings.adapt(
      prompts.Grammar(("action",), self.wording.CLOSING)
    )
    self._prompts = templates.choose(
      settings.wording, settings.prompt_file, reference, self.wording
    )
    self.engine = settings.engine
    self.threadsafe = settings.engine == "twin"
    self.max_turns = settings.max_turns
    counts = base.split_sizes(settings)
    self.source: data.Tree | scenes.Scenes
    if settings.data_dir:
      self.source = data.Tree(settings.data_dir, settings.cache_dir)
      self.splits = _cut(self.source, settings.task_types, counts)
    else:
      self.source = scenes.Scenes(
        settings.seed,
        settings.size,
        settings.task_types,
        {name: counts[name] or _SCENE_COUNTS[name] for name in counts},
      )
      self.splits = self.source.splits
    self._ids = frozenset(i for ids in self.splits.values() for i in ids)
    self._boards: dict[str, engine.Board] = {}
    if settings.data_dir and settings.engine == "twin":
      # Unknown rules should be rejected now, not in the middle of a rollout.
      self.board(self.splits["train"][0])

  def env(self) -> "HouseEnv":
    """A new environment."""
    return HouseEnv(self)

  def render(self, view: prompts.View) -> list[prompts.Message]:
    """The prompt of a turn in the benchmark's wording."""
    return self._prompts.render(view)

  def category(self, task_id: str) -> str:
    """The task type."""
    return self.source.task_type(task_id)

  def corpus(self) -> list[str]:
    """Prompts and responses of whole expert episodes."""
    return [
      text
      for index, task_id in enumerate(self.splits["train"][:_CORPUS_TASKS])
      for text in base.transcribe(
        self, task_id, index, separator=self.wording.SEPARATOR
      )
    ]

  def read(self, task_id: str) -> problem.GameFile:
    """The game file of a task.

    Raises:
      KeyError: if the task is in no split.
    """
    if task_id not in self._ids:
      raise KeyError(f"alfworld: unknown task {task_id!r}")
    return self.source.read(task_id)

  def board(self, task_id: str) -> engine.Board:
    """The parsed game of a task; see `read`."""
    board = self._boards.get(task_id)
    if board is None:
      board = engine.Board(problem.parse(self.read(task_id), task_id))
      if len(self._boards) >= _BOARDS:
        # One atomic call, so that environments in threads need no lock.
        self._boards.clear()
      self._boards[task_id] = board
    return board


def _cut(
  tree: data.Tree, task_types: tuple[str, ...], counts: dict[str, int]
) -> dict[str, tuple[str, ...]]:
  """The games of some types; a fixed sample of them, in file order."""
  splits = {}
  for split, ids in tree.splits.items():
    kept = [i for i in ids if tree.task_type(i) in task_types]
    if 0 < counts[split] < len(kept):
      chosen = random.Random(base.SPLIT_SEED).sample(
        range(len(kept)), counts[split]
      )
      kept = [kept[index] for index in sorted(chosen)]
    splits[split] = tuple(kept)
  if not splits["train"]:
    raise ValueError(
      f"env.task_types: no game of {', '.join(task_types)} to train on"
    )
  return splits


def split_intro(text: str) -> tuple[str, str]:
  """The room and the task in an engine's first observation."""
  room, _, task = text.rpartition(engine.TASK_PREFIX)
  room = room.removeprefix(engine.BANNER).strip()
  return room, task.strip().removesuffix(".")


class HouseEnv:
  """Plays one episode after another; see `envs.base.Env`.

  Attributes:
    admissible: the admissible commands.
    trace: the commands executed in this episode.
  """

  def __init__(self, benchmark: ALFWorld) -> None:
    self._benchmark = benchmark
    self._engine: engine.Twin | original.Original | None = None
    self._shadow: engine.Twin | None = None
    self._task_id = ""
    self._task = ""
    self._turn = 0
    self._done = True
    self.admissible: tuple[str, ...] = ()
    self.trace: list[str] = []

  @property
  def _running(self) -> engine.Twin | original.Original:
    """The engine of the current episode.

    Raises:
      RuntimeError: if there is none.
    """
    if self._engine is None:
      raise RuntimeError("alfworld: no episode is running; call reset first")
    return self._engine

  def reset(self, task_id: str) -> base.Observation:
    """Starts the episode of a task; see `envs.base.Env.reset`."""
    benchmark = self._benchmark
    self._done, self._shadow = True, None
    if benchmark.engine == "twin":
      self._engine = engine.Twin(benchmark.board(task_id))
      intro = self._engine.intro
    else:
      intro = self._load_original(benchmark.read(task_id), task_id)
    self._task_id = task_id
    self._turn, self.trace, self._done = 0, [], False
    room, self._task = split_intro(intro)
    return self._observe(room)

  def _load_original(self, file: problem.GameFile, task_id: str) -> str:
    """Starts a game on the original engine, creating it on the first call."""
    if not isinstance(self._engine, original.Original):
      self._engine = original.Original(
        cached=self._benchmark.engine == "cached"
      )
    try:
      self._engine.load(file)
      return self._engine.reset()
    except Exception as error:
      self._engine = None
      raise base.EnvError(
        f"alfworld: the engine cannot load {task_id}: {error!r}"
      ) from error

  def _observe(self, text: str) -> base.Observation:
    self.admissible = tuple(
      command for command in self._running.admissible if command != "help"
    )
    return base.Observation(self._task, text, self.admissible)

  def step(self, response: str) -> base.StepResult:
    """Executes the action of a response; see `envs.base.Env.step`."""
    if self._done:
      raise RuntimeError("alfworld: the episode is over; call reset first")
    benchmark = self._benchmark
    parsed = prompts.parse(response, benchmark.grammar)
    command = self._match(parsed.content.lower())
    possible = command in self.admissible
    text = engine.NOTHING_HAPPENS
    if possible:
      text = self._execute(command)
    elif not command:
      text = benchmark.wording.NO_ACTION
    self._turn += 1
    success = self._running.won
    self._done = success or self._turn == benchmark.max_turns
    return base.StepResult(
      observation=self._observe(text),
      action=command,
      reward=benchmark.settings.reward_success if success else 0.0,
      done=self._done,
      format_valid=parsed.format_valid,
      action_valid=parsed.format_valid and possible,
      success=success,
    )

  def _match(self, command: str) -> str:
    """The command in the dialect of the game."""
    if command in self.admissible:
      return command
    match = re.fullmatch(r"(?:move (.+) to|put (.+) in/on) (.+)", command)
    if match:
      thing = match[1] or match[2]
      for known in (
        f"move {thing} to {match[3]}",
        f"put {thing} in/on {match[3]}",
      ):
        if known in self.admissible:
          return known
    return command

  def _execute(self, command: str) -> str:
    running = self._running
    try:
      text = running.step(command)
    except Exception as error:
      if isinstance(running, engine.Twin):
        raise
      self._done, self._engine = True, None
      raise base.EnvError(
        f"alfworld: the engine failed at {command!r}: {error!r}"
      ) from error
    self.trace.append(command)
    if self._shadow is not None and self._shadow is not self._engine:
      self._shadow.step(command)
    return text

  def expert(self, seed: int) -> expert.ScriptedExpert:
    """The scripted agent; see `envs.base.Env.expert`."""
    if self._done:
      raise RuntimeError("alfworld: no episode is running; call reset first")
    benchmark = self._benchmark
    try:
      board = benchmark.board(self._task_id)
    except ValueError as error:
      raise NotImplementedError(
        f"alfworld: no expert for {self._task_id}: {error}"
      ) from None
    if isinstance(self._engine, engine.Twin):
      self._shadow = self._engine
    else:
      # The original engine hides its state, so a twin plays along.
      self._shadow = engine.Twin(board)
      for command in self.trace:
        self._shadow.step(command)
    explore = benchmark.settings.expert_mode == "explore"
    decider = expert.Decider(
      board.game.goal,
      [board.names[receptacle] for receptacle in board.receptacles],
      None if explore else self._shadow,
    )
    return expert.ScriptedExpert(
      self,
      decider,
      benchmark.wording,
      hesitation=benchmark.settings.expert_hesitation,
      doubt=benchmark.settings.expert_doubt,
      seed=seed,
    )

  def close(self) -> None:
    """Drops the game."""
    self._engine = self._shadow = None
    self._done = True
