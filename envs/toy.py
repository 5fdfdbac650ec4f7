"""A string bandit of three turns for tests: instant and deterministic.

Each turn shows one word and asks for one word back: the same word in the
category `echo`, its partner in the category `swap`. Turns are independent, each
right answer earns a third of the reward, and there are only eight words, so
a tiny model learns it within a few updates. Faults can be injected: an
infrastructure error or a slow step at a chosen turn, and a memory leak.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import random
import time

from t2po_jax import keys
from t2po_jax.envs import base, prompts

TURNS = 3
COLOURS = ("red", "green", "blue", "pink")
# Each colour's partner: the right answer in the category `swap`.
PARTNERS = {"red": "green", "green": "red", "blue": "pink", "pink": "blue"}
CATEGORIES = ("echo", "swap")


def right_answer(category: str, shown: str) -> str:
  """The right answer to the displayed word."""
  return shown if category == "echo" else PARTNERS[shown]


def _draw_splits(sizes: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
  """Divides the shuffled tasks of each category into splits."""
  splits: dict[str, list[str]] = {name: [] for name in sizes}
  for category in CATEGORIES:
    tasks = [
      "-".join((category, *shown))
      for shown in itertools.product(COLOURS, repeat=TURNS)
    ]
    random.Random(base.SPLIT_SEED).shuffle(tasks)
    start = 0
    for name, size in sizes.items():
      splits[name].extend(tasks[start : start + size])
      start += size
  for tasks in splits.values():
    random.Random(base.SPLIT_SEED).shuffle(tasks)
  return {name: tuple(tasks) for name, tasks in splits.items()}


@dataclasses.dataclass(frozen=True)
class Settings(base.Settings):
  """The keys of `config.env` for the string bandit."""

  reward_success: float = keys.key(
    1.0,
    "Reward of an episode without a mistake; every right answer immediately "
    "earns an equal share.",
  )
  expert_thoughts: int = keys.key(
    3,
    "Longest thought of the expert, in words; the length is uniform between 1 "
    "and this.",
    least=1,
  )
  expert_slip: float = keys.key(
    0.0,
    "Probability per turn that the expert gives a wrong colour.",
    least=0.0,
    most=1.0,
  )
  error_turn: int = keys.key(
    0,
    "Turn, counted from 1, whose step raises `EnvError`; 0: never.",
    least=0,
    most=TURNS,
  )
  sleep_turn: int = keys.key(
    0,
    "Turn, counted from 1, whose step sleeps first; 0: never.",
    least=0,
    most=TURNS,
  )
  sleep_seconds: float = keys.key(
    0.0, "Seconds for which that step sleeps.", least=0.0
  )
  faulty_tasks: tuple[str, ...] = keys.key(
    (), "Tasks in which the faults occur; empty: all of them."
  )
  leak: float = keys.key(0.0, "MB that every reset leaks.", least=0.0)


class ToyBenchmark:
  """The string bandit; implements `envs.base.Benchmark`.

  Task ids read `category-word-word-word`, the words in order of turns: 64
  tasks per category, of which 40 train, 8 valid and 16 test.
  """

  Settings = Settings
  max_turns = TURNS
  threadsafe = True
  grammar = prompts.Grammar(actions=("action",), closing="</think><action>")

  def __init__(self, settings: Settings | None = None) -> None:
    """Creates the splits."""
    self.settings = settings or Settings()
    self.splits = _draw_splits({"train": 40, "valid": 8, "test": 16})
    self.tasks = frozenset(itertools.chain(*self.splits.values()))
    self._leaked: list[bytes] = []

  def env(self) -> "ToyEnv":
    """A new environment."""
    return ToyEnv(self)

  def leak(self) -> None:
    """Leaks memory as configured."""
    if self.settings.leak:
      self._leaked.append(b"x" * int(self.settings.leak * 1e6))

  def render(self, view: prompts.View) -> list[prompts.Message]:
    """One line: the category and the word on display."""
    return [{"role": "user", "content": f"{view.task} {view.observation}"}]

  def category(self, task_id: str) -> str:
    """`echo` or `swap`."""
    return task_id.split("-")[0]

  def corpus(self) -> list[str]:
    """Every prompt with every response, thoughts of one to three words."""
    return [
      f"{category} {shown} {_response([answer] * words, answer)}"
      for category in CATEGORIES
      for shown in COLOURS
      for answer in COLOURS
      for words in range(1, 4)
    ]


def _response(thought: Sequence[str], answer: str) -> str:
  """A well-formed response; every word follows a space."""
  return f"<think> {' '.join(thought)}</think><action> {answer}</action>"


class ToyEnv:
  """One game of three turns."""

  def __init__(self, benchmark: ToyBenchmark) -> None:
    self._benchmark = benchmark
    self._task = ""
    self.category = ""
    self.shown: tuple[str, ...] = ()
    self.turn = 0
    self._right = 0
    self._done = True

  def reset(self, task_id: str) -> base.Observation:
    """Starts the game of a task; see `envs.base.Env.reset`."""
    if task_id not in self._benchmark.tasks:
      raise KeyError(f"toy: unknown task {task_id!r}")
    self._benchmark.leak()
    self._task = task_id
    self.category, *shown = task_id.split("-")
    self.shown = tuple(shown)
    self.turn, self._right, self._done = 0, 0, False
    return self._observe()

  def _observe(self) -> base.Observation:
    """The word on display, or nothing after the last turn."""
    text = self.shown[self.turn] if self.turn < TURNS else "over"
    return base.Observation(task=self.category, text=text)

  def step(self, response: str) -> base.StepResult:
    """Scores one answer; see `envs.base.Env.step`."""
    if self._done:
      raise RuntimeError("toy: the episode is over; call reset first")
    benchmark, settings = self._benchmark, self._benchmark.settings
    if not settings.faulty_tasks or self._task in settings.faulty_tasks:
      if self.turn + 1 == settings.sleep_turn:
        time.sleep(settings.sleep_seconds)
      if self.turn + 1 == settings.error_turn:
        self._done = True
        raise base.EnvError(f"toy: ordered failure at turn {self.turn + 1}")
    parsed = prompts.parse(response, benchmark.grammar)
    action = parsed.content.lower()
    right = action == right_answer(self.category, self.shown[self.turn])
    self.turn += 1
    self._right += right
    self._done = self.turn == TURNS
    return base.StepResult(
      observation=self._observe(),
      action=action,
      reward=settings.reward_success / TURNS if right else 0.0,
      done=self._done,
      format_valid=parsed.format_valid,
      action_valid=parsed.format_valid and action in COLOURS,
      success=self._done and self._right == TURNS,
      info={"right": float(right)},
    )

  def expert(self, seed: int) -> "ToyExpert":
    """An expert that knows the rule."""
    return ToyExpert(self, self._benchmark, seed)

  def close(self) -> None:
    """Nothing to release."""


class ToyExpert:
  """Repeats the answer in its thought a random number of times."""

  def __init__(self, env: ToyEnv, benchmark: ToyBenchmark, seed: int) -> None:
    self._env = env
    self._settings = benchmark.settings
    self._random = random.Random(seed)

  def respond(self) -> str:
    """The response to the word on display."""
    env = self._env
    answer = right_answer(env.category, env.shown[env.turn])
    words = self._random.randint(1, self._settings.expert_thoughts)
    if self._random.random() < self._settings.expert_slip:
      wrong = [colour for colour in COLOURS if colour != answer]
      answer = self._random.choice(wrong)
    return _response([answer] * words, answer)
