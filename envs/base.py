"""The interface between the rollout loop and an environment.

An environment only handles strings: it knows nothing about tokens, models or
JAX. A `Benchmark` owns the data that all its environments share (catalogue,
search index, game files) and the fixed task splits; an `Env` plays one task at
a time. The rollout loop needs nothing else.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import os
import random
from typing import Any, ClassVar, Protocol

from t2po_jax import keys
from t2po_jax.envs import prompts

# Seed of all task splits, so that they are the same on every machine.
SPLIT_SEED = 233

# Number of episodes in a corpus.
_CORPUS_TASKS = 200

# Types of settings, in words.
_WORDS = {
  bool: "True or False",
  float: "a number",
  int: "an integer",
  str: "a text",
  tuple: "a list",
}


class EnvError(RuntimeError):
  """The infrastructure failed: a worker died, a server did not answer.

  The rollout loop marks the trajectory as `aborted`: it is excluded from the
  loss and counted, never treated as a reward of zero.
  """


@dataclasses.dataclass(frozen=True)
class Settings:
  """The settings of an environment; every field is a key of `config.env`.

  A subclass defines its fields with `keys.key`. A value of the wrong type or
  out of bounds is rejected on construction.
  """

  grammar: str = keys.key(
    "tags",
    "The format of an action: `tags`, or `tool_call`, the way in which "
    "instruction-tuned models call tools.",
    choices=("tags", "tool_call"),
  )

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      fitting = _fit(value, field.default)
      if fitting is None:
        raise ValueError(
          f"env.{field.name}: found {value!r}, expected "
          f"{_WORDS[type(field.default)]}"
        )
      object.__setattr__(self, field.name, fitting)
    keys.check(type(self), vars(self), name="env")


@dataclasses.dataclass(frozen=True)
class PromptSettings(Settings):
  """Settings shared by the benchmarks of the published experiments."""

  prompt_file: str = keys.key(
    "",
    "File with prompt templates, see `envs/templates.py`; empty: the wording's "
    "own prompts.",
  )
  tags: str = keys.key(
    "exact",
    "Whether the tags of a response must match exactly or in any case.",
    choices=("exact", "any case"),
  )
  refuse_chinese: bool = keys.key(
    False, "Whether a response with a Chinese character counts as malformed."
  )

  def adapt(self, grammar: prompts.Grammar) -> prompts.Grammar:
    """The grammar with these options applied."""
    return dataclasses.replace(
      grammar,
      any_case=self.tags == "any case",
      refuse_chinese=self.refuse_chinese,
    )


_WORDINGS = {
  "compact": "`compact` for tiny models",
  "full": "`full` for language models",
  "reference": "`reference` in the format of the published experiments",
}


def wording_key(*names: str, default: str = "compact") -> Any:
  """The key `wording`, a choice of some names."""
  known = ", ".join(_WORDINGS[name] for name in names)
  return keys.key(default, f"How prompts are worded: {known}.", choices=names)


def hesitation_key(default: float, *, per: str = "thought") -> Any:
  """The key `expert_hesitation`."""
  meaning = f"Mean number of needless rounds per {per} of the expert."
  return keys.key(default, meaning, least=0.0)


def doubt_key(default: float, event: str) -> Any:
  """The key `expert_doubt`: the probability of an event in each such round."""
  meaning = f"Probability per such round {event}."
  return keys.key(default, meaning, least=0.0, most=1.0)


def split_sizes(settings: Any) -> dict[str, int]:
  """Number of tasks per split, for settings with keys for all three."""
  return {
    "train": settings.train_tasks,
    "valid": settings.valid_tasks,
    "test": settings.test_tasks,
  }


def _fit(value: Any, default: Any) -> Any:
  """Converts a value to the type of its default; None if it does not fit."""
  if isinstance(default, str) and isinstance(value, os.PathLike):
    return os.fspath(value)
  if isinstance(default, tuple):
    is_sequence = isinstance(value, Sequence) and not isinstance(value, str)
    return tuple(value) if is_sequence else None
  if isinstance(value, bool) != isinstance(default, bool):
    return None
  if isinstance(default, float) and isinstance(value, int):
    return float(value)
  return value if isinstance(value, type(default)) else None


@dataclasses.dataclass(frozen=True)
class Observation:
  """What the agent sees before it acts.

  Attributes:
    task: the task in words; constant over an episode, never truncated.
    text: the raw current observation, before any prompt wording; it is also
      the anchor that groups equal states (GiGPO).
    admissible: the admissible actions, if the environment lists them, else
      empty.
  """

  task: str
  text: str
  admissible: tuple[str, ...] = ()

  def view(
    self, past: Sequence[tuple[str, str]], *, memory: int, max_turns: int
  ) -> prompts.View:
    """The contents of the prompt for the turn that starts here.

    Args:
      past: (observation, action) of all earlier turns of the episode.
      memory: how many of these to show, counted from the latest.
      max_turns: the benchmark's turn limit.
    """
    return prompts.View(
      task=self.task,
      memory=tuple(past[-memory:]) if memory else (),
      observation=self.text,
      admissible=self.admissible,
      turn=len(past) + 1,
      max_turns=max_turns,
    )


@dataclasses.dataclass(frozen=True)
class StepResult:
  """The environment's answer to one response.

  Attributes:
    observation: the next observation (after `done`, the final one).
    action: the executed action, for the memory window; empty for a turn without
      an action.
    reward: the environment's own reward, without penalties.
    done: whether the episode has ended.
    format_valid: whether the response follows the grammar strictly.
    action_valid: whether the action was well formed and possible.
    success: whether the task is solved (meaningful when `done`).
    info: further metrics by name, e.g. `task_score`; averaged in the logs.
  """

  observation: Observation
  action: str
  reward: float
  done: bool
  format_valid: bool
  action_valid: bool
  success: bool = False
  info: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Expert(Protocol):
  """A scripted policy bound to one environment."""

  def respond(self) -> str:
    """The response to the environment's current state."""
    ...


class Env(Protocol):
  """One environment; plays one episode after another.

  A class that inherits from it only needs `reset` and `step`: by default there
  is no expert and nothing to close.
  """

  def reset(self, task_id: str) -> Observation:
    """Starts the episode of a task.

    Raises:
      KeyError: if the task is unknown.
      EnvError: if the infrastructure failed.
    """
    ...

  def step(self, response: str) -> StepResult:
    """Executes one response of the agent.

    Raises:
      EnvError: if the infrastructure failed.
    """
    ...

  def expert(self, seed: int) -> Expert:
    """A scripted expert for the current episode; call after `reset`.

    Raises:
      NotImplementedError: if there is none, as by default.
    """
    raise NotImplementedError(f"{type(self).__name__} has no expert")

  def close(self) -> None:
    """Releases the environment's resources."""


class Benchmark(Protocol):
  """The shared part of all environments of one benchmark.

  Constructed from its settings alone: `MyBenchmark(MyBenchmark.Settings(...))`.
  A class that inherits from it gets a single category and a corpus by default.

  Attributes:
    Settings: the dataclass of its settings.
    max_turns: turns after which an episode ends in any case.
    grammar: the required form of a response.
    splits: task ids by split: `train`, `valid`, `test`, disjoint and fixed.
    threadsafe: whether its environments may run in several threads at once.
  """

  Settings: ClassVar[type]
  max_turns: int
  grammar: prompts.Grammar
  splits: Mapping[str, tuple[str, ...]]
  threadsafe: bool

  def __init__(self, settings: Any) -> None:
    """Loads or generates the shared data."""

  def env(self) -> Env:
    """A new environment; cheap, because it shares the benchmark's data."""
    ...

  def render(self, view: prompts.View) -> list[prompts.Message]:
    """The chat messages of one turn."""
    ...

  def category(self, task_id: str) -> str:
    """The part of the benchmark a task belongs to, for the score table."""
    return "all"

  def corpus(self) -> list[str]:
    """Sentences in the benchmark's language, for training a tokenizer."""
    tasks = self.splits["train"][:_CORPUS_TASKS]
    return [
      text
      for seed, task_id in enumerate(tasks)
      for text in transcribe(self, task_id, seed)
    ]


class Playable(Protocol):
  """The part of a benchmark that is needed to play an episode."""

  max_turns: int
  grammar: prompts.Grammar

  def env(self) -> Env:
    """See `Benchmark.env`."""
    ...

  def render(self, view: prompts.View) -> list[prompts.Message]:
    """See `Benchmark.render`."""
    ...


def transcribe(
  benchmark: Playable,
  task_id: str,
  seed: int,
  *,
  memory: int = 2,
  separator: str = "",
) -> Iterator[str]:
  """Yields every prompt of an episode and the response to it.

  The expert plays, or, if there is none, random admissible actions.

  Args:
    benchmark: the benchmark.
    task_id: the task.
    seed: seed of the expert, or of the random choices.
    memory: (observation, action) pairs in a prompt.
    separator: text between a prompt and its response.
  """
  draw, env = random.Random(seed), benchmark.env()
  observation = env.reset(task_id)
  try:
    expert = env.expert(seed)
  except NotImplementedError:
    expert = None
  past: list[tuple[str, str]] = []
  for _ in range(benchmark.max_turns):
    view = observation.view(past, memory=memory, max_turns=benchmark.max_turns)
    if expert is not None:
      response = expert.respond()
    else:
      action = draw.choice(observation.admissible or ("",))
      response = f"<think>{action}</think>{benchmark.grammar.write(action)}"
    messages = benchmark.render(view)
    prompt = "".join(message["content"] for message in messages)
    yield prompt + separator + response
    result = env.step(response)
    past.append((observation.text, result.action))
    observation = result.observation
    if result.done:
      break
  env.close()
