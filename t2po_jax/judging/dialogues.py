"""Plays policies that answer in text: experts, random policies, endpoints.

They get the prompts of training: the same wording, memory window and truncation
to `rollout.max_prompt`, measured with the configuration's tokenizer. Their
responses are parsed and executed by the same environments. Episodes run
concurrently in threads; environments that are not thread-safe take turns.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import contextlib
import dataclasses
import threading
from typing import Protocol

import numpy as np

from t2po_jax import types
from t2po_jax.envs import base, prompts
from t2po_jax.models import tokenizer as tokenizer_lib
from t2po_jax.rollout import collect


@dataclasses.dataclass(frozen=True)
class Place:
  """Identifies an episode.

  Attributes:
    split: of the task.
    task_id: the task.
    number: index of the task in its panel.
    repeat: index of the episode among those of the task, from 0.
  """

  split: str
  task_id: str
  number: int
  repeat: int


@dataclasses.dataclass(frozen=True)
class Reply:
  """One response.

  Attributes:
    text: the whole response, the prefix included.
    finish: "stop" or "length".
    usage: prompt and completion tokens as billed; None if not counted.
    state: passed to the next call of this episode.
    attempt: the measurements of the tokens, if there are any.
  """

  text: str
  finish: str = "stop"
  usage: tuple[int, int] | None = None
  state: object = None
  attempt: types.Attempt | None = None


# Messages of the turn, the observation, the last reply's state -> a reply.
Respond = Callable[[list[prompts.Message], base.Observation, object], Reply]


class Player(Protocol):
  """A policy that answers in text."""

  def begin(self, env: base.Env, place: Place) -> Respond:
    """Returns what answers the prompts of an episode just reset."""
    ...


@dataclasses.dataclass(frozen=True)
class Played:
  """A finished episode.

  Attributes:
    place: identifies it.
    trajectory: the episode.
    usage: prompt and completion tokens as billed; None if nobody counted.
  """

  place: Place
  trajectory: types.Trajectory
  usage: tuple[int, int] | None


def measured(
  text: str,
  rules: collect.Rules,
  tokenizer: tokenizer_lib.Tokenizer,
  finish: str,
) -> types.Attempt:
  """An attempt of which only the text is known."""
  tokens = tokenizer.encode(text.removeprefix(rules.prefix))
  nothing = np.zeros(0, np.float32)
  return types.Attempt(
    tokens=np.asarray(tokens, np.int32),
    logprobs=nothing,
    uncertainty=nothing,
    entropy=nothing,
    confidence=nothing,
    forced=np.zeros(len(tokens), bool),
    text=text,
    finish=finish,
    fired_at=-1,
    thinking_tokens=0,
    phi=float("nan"),
  )


class Table:
  """Plays episodes of one benchmark with one player."""

  def __init__(
    self,
    benchmark: base.Benchmark,
    tokenizer: tokenizer_lib.Tokenizer,
    rules: collect.Rules,
    player: Player,
  ) -> None:
    """Binds the parts.

    Args:
      benchmark: what is played.
      tokenizer: measures the lengths of prompts and responses.
      rules: memory, lengths, context and penalties.
      player: the policy.
    """
    self._benchmark = benchmark
    self._tokenizer = tokenizer
    self._rules = rules
    self._player = player
    self._turns = (
      contextlib.nullcontext() if benchmark.threadsafe else threading.Lock()
    )

  def play(
    self, places: Sequence[Place], *, concurrency: int = 1
  ) -> Iterator[Played]:
    """Plays episodes and yields them as they end.

    Args:
      places: the episodes.
      concurrency: the number of simultaneous episodes.

    Raises:
      ValueError: if the player cannot continue; episodes already yielded stay
        valid.
    """
    if concurrency == 1:
      yield from map(self._episode, places)
      return
    with futures.ThreadPoolExecutor(concurrency, "episode") as executor:
      waiting = [executor.submit(self._episode, place) for place in places]
      try:
        for future in futures.as_completed(waiting):
          yield future.result()
      finally:
        for future in waiting:
          future.cancel()

  def _episode(self, place: Place) -> Played:
    with self._turns:
      env = self._benchmark.env()
    turns: list[types.Turn] = []
    usage: list[tuple[int, int]] = []
    success = aborted = False
    try:
      success = self._drive(env, place, turns, usage)
    except base.EnvError:
      aborted = True
    finally:
      with self._turns:
        env.close()
    billed = None
    if usage:
      billed = sum(u[0] for u in usage), sum(u[1] for u in usage)
    trajectory = types.Trajectory(
      task_id=place.task_id,
      category=self._benchmark.category(place.task_id),
      group=place.number,
      member=place.repeat,
      turns=tuple(turns),
      success=success,
      aborted=aborted,
    )
    return Played(place, trajectory, billed)

  def _drive(
    self,
    env: base.Env,
    place: Place,
    turns: list[types.Turn],
    usage: list[tuple[int, int]],
  ) -> bool:
    """Plays to the end, filling in turns and usage; returns the success."""
    rules = self._rules
    with self._turns:
      observation = env.reset(place.task_id)
      respond = self._player.begin(env, place)
    memory: list[tuple[str, str]] = []
    dialogue: list[prompts.Message] = []
    state: object = None
    while True:
      messages, prompt, cut = self._ask(observation, memory, dialogue)
      reply = respond(messages, observation, state)
      state = reply.state
      if reply.usage:
        usage.append(reply.usage)
      with self._turns:
        result = env.step(reply.text)
      response = reply.attempt or measured(
        reply.text, rules, self._tokenizer, reply.finish
      )
      penalty = rules.penalties.of(
        format_valid=result.format_valid,
        action_valid=result.action_valid,
        tokens=len(response.tokens),
        longest=rules.max_response,
      )
      turns.append(
        types.Turn(
          prompt=prompt,
          response=response,
          anchor=observation.text,
          action=result.action,
          reward=float(result.reward),
          penalty=penalty,
          format_valid=result.format_valid,
          action_valid=result.action_valid,
          phi_change=float("nan"),
          prompt_shortened=cut,
          info=dict(result.info),
        )
      )
      memory.append((observation.text, result.action))
      message = {"role": "assistant", "content": reply.text}
      dialogue[:] = [*messages, message]
      observation = result.observation
      if result.done:
        return result.success

  def _ask(
    self,
    observation: base.Observation,
    memory: Sequence[tuple[str, str]],
    dialogue: list[prompts.Message],
  ) -> tuple[list[prompts.Message], np.ndarray, bool]:
    """Messages of a turn, their token ids, and whether they were truncated."""
    rules, benchmark = self._rules, self._benchmark
    view = observation.view(
      memory, memory=rules.memory, max_turns=benchmark.max_turns
    )

    def encode(messages: list[prompts.Message]) -> list[int]:
      return self._tokenizer.render_chat(messages, rules.prefix)

    if rules.context == "append" and dialogue:
      messages = [*dialogue, prompts.follow_up(view)]
      ids = encode(messages)
      if len(ids) <= rules.max_prompt:
        return messages, np.asarray(ids, np.int32), False
    view, cut = prompts.fit(
      view, lambda v: len(encode(benchmark.render(v))) <= rules.max_prompt
    )
    messages = benchmark.render(view)
    cut = cut or (rules.context == "append" and bool(dialogue))
    return messages, np.asarray(encode(messages), np.int32), cut
