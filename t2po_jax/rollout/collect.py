"""The multi-turn loop: prompt, act, maybe resample, step, record.

There is one loop for every algorithm. Plain multi-turn sampling is this loop
with the thinking intervention off and no second tries; T2PO turns both on.
All episodes of a rollout are under way at once: while some responses are being
decoded, environments step, and prompts of the next turns wait for free slots.

Turn-level resampling (T2PO, arXiv 2605.02178) discards a response whose turn
score moved by less than eta and samples it again from the same state. Ours
takes the score from what the decode loop recorded, acts only on running
episodes and on responses of any length; discarded attempts stay in the
trajectory for analysis and are never trained on.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import dataclasses
import itertools
from typing import Any

from absl import logging
import numpy as np

from t2po_jax import types
from t2po_jax.control import resampling
from t2po_jax.envs import base, prompts
from t2po_jax.models import tokenizer as tokenizer_lib
from t2po_jax.rollout import draw, environments
from t2po_jax.rollout import penalties as prices
from t2po_jax.rollout import sampler as samplers
from t2po_jax.rollout import scheduler as schedulers

CONTEXTS = ("window", "append")


@dataclasses.dataclass(frozen=True)
class Rules:
  """How episodes are played.

  Attributes:
    memory: (observation, action) pairs that a windowed prompt shows.
    max_prompt: most tokens of a prompt, the prefix included.
    max_response: most tokens of a response.
    prefix: text that every response begins with, given to the model.
    penalties: subtracted from a turn's reward for its response.
    max_tries: how often a turn may be sampled again; 0 turns resampling off.
    eta: turns whose score moves by less are sampled again.
    resample_on: what asks for another try; see `resampling.SIGNS`.
    epsilon: threshold of the thinking intervention.
    sampling: how tokens are drawn.
    context: what a prompt is; see `next_prompt`.
    env_calls: decode calls after which an environment's answer is taken; 0
      takes it once it is there.
  """

  memory: int
  max_prompt: int
  max_response: int
  prefix: str = ""
  penalties: prices.Penalties = prices.Penalties()
  max_tries: int = 0
  eta: float = 0.0
  resample_on: str = "phi"
  epsilon: float = 0.0
  sampling: draw.Sampling = draw.Sampling()
  context: str = "window"
  env_calls: int = 0


@dataclasses.dataclass(frozen=True)
class Rollout:
  """All episodes of some tasks, and what was measured on the way.

  Attributes:
    trajectories: all episodes, by group and member.
    deltas: [n] float32, windowed mean |dM| at steps where the thinking
      intervention was allowed to fire; calibrates epsilon.
    phi_changes: [n] float32, |Phi^k - Phi^{k-1}| of every first attempt at
      a turn after the first, or how sure it is where that is the sign;
      calibrates eta.
    aborted: number of episodes that the infrastructure ended.
  """

  trajectories: list[types.Trajectory]
  deltas: np.ndarray
  phi_changes: np.ndarray
  aborted: int


@dataclasses.dataclass
class _Episode:
  """An episode under way."""

  task_id: str
  group: int
  member: int
  seat: Any
  due: int  # Decode calls until its environment's answer is taken.
  observation: base.Observation | None = None
  memory: list[tuple[str, str]] = dataclasses.field(default_factory=list)
  turns: list[types.Turn] = dataclasses.field(default_factory=list)
  prompt: np.ndarray | None = None
  shortened: bool = False
  discarded: list[types.Attempt] = dataclasses.field(default_factory=list)
  attempt: types.Attempt | None = None
  phi_change: float = float("nan")
  signal: np.ndarray | None = None
  success: bool = False


class Loop:
  """One rollout; `run` plays it to the end.

  Attributes:
    scheduler: samples the responses.
    rules: how episodes are played.
    waiting: episodes whose environment has been asked, by its answer.
    deltas: see `Rollout`, one array per response.
    phi_changes: see `Rollout`.
  """

  def __init__(
    self,
    benchmark: base.Benchmark,
    pool: environments.Pool,
    tokenizer: tokenizer_lib.Tokenizer,
    scheduler: schedulers.Scheduler,
    rules: Rules,
    seed: tuple[int, ...],
    version: int = 0,
  ):
    self._benchmark = benchmark
    self._pool = pool
    self._tokenizer = tokenizer
    self.scheduler = scheduler
    self.rules = rules
    self._seed = seed
    self._version = version
    self._tickets = itertools.count()
    self._calls = 0  # Decode calls so far.
    self.waiting: dict[futures.Future, _Episode] = {}
    self._sampling: dict[int, _Episode] = {}
    self.deltas: list[np.ndarray] = []
    self.phi_changes: list[float] = []

  def run(
    self,
    tasks: Sequence[tuple[str, int, int]],
    progress: Callable[[int], None] = lambda count: None,
  ) -> Rollout:
    """Plays one episode of every (task id, group, member).

    Args:
      tasks: the numbers belong to the randomness, so that an episode is the
        same whoever plays it.
      progress: called with the number of finished episodes.

    Returns:
      The rollout; the same for any number of slots and any order of serving.
    """
    trajectories = []
    for trajectory in self.episodes(tasks):
      trajectories.append(trajectory)
      progress(len(trajectories))
    trajectories.sort(key=lambda t: (t.group, t.member))
    return Rollout(
      trajectories=trajectories,
      deltas=np.sort(np.concatenate([*self.deltas, np.zeros(0, np.float32)])),
      phi_changes=np.sort(np.asarray(self.phi_changes, np.float32)),
      aborted=sum(trajectory.aborted for trajectory in trajectories),
    )

  def episodes(
    self, tasks: Sequence[tuple[str, int, int]]
  ) -> Iterator[types.Trajectory]:
    """The episodes of `run` as they end."""
    for task in tasks:
      self.start(*task)
    take = self._due if self.rules.env_calls else self._done
    while self.waiting or self._sampling:
      for future in take():
        yield from self.answered(self.waiting.pop(future), future)
      completions = self.scheduler.poll(self.rules.sampling, self.rules.epsilon)
      self._calls += 1
      for completion in completions:
        self.sampled(completion)

  def _done(self) -> Iterator[futures.Future]:
    """Answers that are there, in order of asking, not of answering."""
    # With nothing to decode there is nothing to do but to wait.
    done, _ = futures.wait(
      self.waiting,
      timeout=0 if self._sampling else None,
      return_when=futures.FIRST_COMPLETED,
    )
    yield from [future for future in self.waiting if future in done]

  def _due(self) -> Iterator[futures.Future]:
    """Answers to take now, whether or not they are there yet.

    They are taken in order of asking, each when it has had its decode calls
    and a slot can use it. Nothing here depends on the clock.
    """
    if not self._sampling:
      # Nothing decodes: what was asked first has had time enough.
      oldest = next(iter(self.waiting.values())).due
      self._calls = max(self._calls, oldest)
    for future, episode in list(self.waiting.items()):
      if episode.due > self._calls or self.scheduler.spare < 1:
        return
      yield future

  def start(self, task_id: str, group: int, member: int) -> None:
    """Begins an episode."""
    seat, future = self._pool.start(task_id)
    self.waiting[future] = _Episode(
      task_id, group, member, seat, due=self._calls
    )

  def answered(
    self, episode: _Episode, future: futures.Future
  ) -> Iterator[types.Trajectory]:
    """Takes an environment's answer; yields the trajectory if it ended."""
    try:
      answer = future.result()
    except base.EnvError as error:
      logging.warning("episode %s aborted: %s", episode.task_id, error)
      yield self._finish(episode, aborted=True)
      return
    if isinstance(answer, base.StepResult):
      self._record(episode, answer)
      if answer.done:
        episode.success = answer.success
        yield self._finish(episode)
        return
      answer = answer.observation
    episode.observation = answer
    try:
      episode.prompt, episode.shortened = self._prompt(episode)
    except ValueError as error:
      logging.warning("episode %s aborted: %s", episode.task_id, error)
      yield self._finish(episode, aborted=True)
      return
    self.scheduler.submit(self._request(episode))

  def sampled(self, completion: samplers.Completion) -> None:
    """Takes a response: samples again, or lets the environment answer."""
    episode = self._sampling.pop(completion.ticket)
    attempt = dataclasses.replace(
      completion.attempt,
      text=self.rules.prefix
      + self._tokenizer.decode(completion.attempt.tokens.tolist()),
    )
    self.deltas.append(completion.deltas)
    before = episode.turns[-1].response.phi if episode.turns else float("nan")
    phi_change = float(resampling.phi_change(attempt.phi, before))
    change, measured = phi_change, bool(episode.turns)
    if self.rules.resample_on == "unsure":
      change = float(resampling.sureness(attempt.entropy, attempt.forced))
      measured = not np.isnan(change)
    if measured and not episode.discarded:
      self.phi_changes.append(change)
    again = resampling.should_resample(
      change,
      eta=self.rules.eta,
      tries=len(episode.discarded),
      max_tries=self.rules.max_tries,
      sign=self.rules.resample_on,
      repeated=self.rules.resample_on in ("action", "both")
      and self._repeats(episode, attempt.text),
    )
    if again:
      episode.discarded.append(attempt)
      self.scheduler.retry(completion.ticket, self._request(episode))
      return
    self.scheduler.release(completion.ticket)
    episode.attempt, episode.phi_change = attempt, phi_change
    episode.signal = completion.signal
    episode.due = self._calls + self.rules.env_calls
    future = self._pool.step(episode.seat, attempt.text)
    self.waiting[future] = episode

  def _repeats(self, episode: _Episode, text: str) -> bool:
    """Whether a response does what the last turn did, from where it did it."""
    if not episode.turns:
      return False
    last, grammar = episode.turns[-1], self._benchmark.grammar
    now = prompts.parse(text, grammar)
    before = prompts.parse(last.response.text, grammar)
    same = (now.kind, now.content) == (before.kind, before.content)
    seen = episode.observation
    return same and seen is not None and seen.text == last.anchor

  def _record(self, episode: _Episode, result: base.StepResult) -> None:
    """Appends the finished turn."""
    rules, observation = self.rules, episode.observation
    assert observation and episode.attempt and episode.prompt is not None
    penalty = rules.penalties.of(
      format_valid=result.format_valid,
      action_valid=result.action_valid,
      tokens=len(episode.attempt.tokens),
      longest=rules.max_response,
      repeated=rules.penalties.repeated > 0
      and self._repeats(episode, episode.attempt.text),
    )
    episode.turns.append(
      types.Turn(
        prompt=episode.prompt,
        response=episode.attempt,
        anchor=observation.text,
        action=result.action,
        reward=float(result.reward),
        penalty=penalty,
        format_valid=result.format_valid,
        action_valid=result.action_valid,
        phi_change=episode.phi_change,
        prompt_shortened=episode.shortened,
        version=self._version,
        discarded=tuple(episode.discarded),
        info=dict(result.info),
      )
    )
    episode.memory.append((observation.text, result.action))
    episode.discarded = []

  def _finish(
    self, episode: _Episode, *, aborted: bool = False
  ) -> types.Trajectory:
    self._pool.give_back(episode.seat)
    return types.Trajectory(
      task_id=episode.task_id,
      category=self._benchmark.category(episode.task_id),
      group=episode.group,
      member=episode.member,
      turns=tuple(episode.turns),
      success=episode.success and not aborted,
      aborted=aborted,
    )

  def _prompt(self, episode: _Episode) -> tuple[np.ndarray, bool]:
    """The prompt's token ids, and whether it had to be shortened."""
    assert episode.observation
    view = prompts.View(
      task=episode.observation.task,
      memory=tuple(episode.memory[-self.rules.memory :])
      if self.rules.memory
      else (),
      observation=episode.observation.text,
      admissible=episode.observation.admissible,
      turn=len(episode.turns) + 1,
      max_turns=self._benchmark.max_turns,
    )
    last = episode.turns[-1] if episode.turns else None
    return next_prompt(
      self._benchmark,
      self._tokenizer,
      view,
      self.rules,
      before=(last.prompt, last.response.tokens) if last else None,
    )

  def _request(self, episode: _Episode) -> samplers.Request:
    """A request whose randomness belongs to trajectory, turn and attempt."""
    place = (
      episode.group,
      episode.member,
      len(episode.turns),
      len(episode.discarded),
    )
    key = np.random.SeedSequence((*self._seed, *place)).generate_state(2)
    ticket = next(self._tickets)
    assert episode.prompt is not None
    self._sampling[ticket] = episode
    return samplers.Request(
      ticket=ticket,
      prompt=episode.prompt,
      key=key,
      limit=self.rules.max_response,
      signal=episode.signal,
    )


def first_view(
  benchmark: base.Benchmark, observation: base.Observation
) -> prompts.View:
  """The view of a first turn."""
  return prompts.View(
    task=observation.task,
    memory=(),
    observation=observation.text,
    admissible=observation.admissible,
    turn=1,
    max_turns=benchmark.max_turns,
  )


def next_prompt(
  benchmark: base.Benchmark,
  tokenizer: tokenizer_lib.Tokenizer,
  view: prompts.View,
  rules: Rules,
  *,
  before: tuple[np.ndarray, np.ndarray] | None,
) -> tuple[np.ndarray, bool]:
  """The prompt of a turn.

  With `context` "window" it is rendered anew from the memory window. With
  "append" it is the last prompt, the response as it was sampled and the new
  observation, token for token: the slot that still holds the dialogue only
  computes what is new, and each turn stays a training sequence of its own. A
  dialogue that does not fit any more starts over from the memory window.

  Args:
    benchmark: what words the prompts.
    tokenizer: the policy's tokenizer.
    view: what the prompt may show.
    rules: how episodes are played.
    before: prompt and response ids of the last turn; None at the first.

  Returns:
    [T] int32 token ids, and whether anything had to be cut.

  Raises:
    ValueError: if it does not fit even without memory and observation.
  """
  if rules.context == "window" or before is None:
    return fit_prompt(benchmark, tokenizer, view, rules)
  ended = len(before[1]) and int(before[1][-1]) in tokenizer.eos_ids
  more = tokenizer.render_reply(
    [prompts.follow_up(view)], rules.prefix, ended=bool(ended)
  )
  prompt = np.concatenate([*before, np.asarray(more, np.int32)])
  if len(prompt) <= rules.max_prompt:
    return prompt, False
  return fit_prompt(benchmark, tokenizer, view, rules)[0], True


def fit_prompt(
  benchmark: base.Benchmark,
  tokenizer: tokenizer_lib.Tokenizer,
  view: prompts.View,
  rules: Rules,
) -> tuple[np.ndarray, bool]:
  """Renders a view so that it fits `rules.max_prompt` tokens.

  Returns:
    [T] int32 token ids, and whether memory or observation was cut.

  Raises:
    ValueError: if it does not fit even without memory and observation.
  """

  def encode(candidate: prompts.View) -> list[int]:
    messages = benchmark.render(candidate)
    return tokenizer.render_chat(messages, rules.prefix)

  view, shortened = prompts.fit(
    view, lambda candidate: len(encode(candidate)) <= rules.max_prompt
  )
  return np.asarray(encode(view), np.int32), shortened
