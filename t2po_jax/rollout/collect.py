"""The multi-turn loop: prompt, act, maybe resample, step, record.

There is one loop for every algorithm. Plain multi-turn sampling is this loop
with neither the thinking intervention nor resampling; T2PO turns both on. All
episodes of a rollout are in progress at once: while some responses are being
decoded, environments step, and prompts of the next turns wait for free slots.

Turn-level resampling (T2PO, arXiv 2605.02178) discards a response whose turn
score moved by less than eta and samples it again from the same state. Ours
takes the score from what the decode loop recorded, acts only on running
episodes and on responses of any length; discarded attempts stay in the
trajectory for analysis, and are trained on only as negative examples, if
`control.resampling.negative` is above 0.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
import dataclasses
import itertools
import types as python_types

from absl import logging
import numpy as np

from t2po_jax import types
from t2po_jax.control import resampling
from t2po_jax.envs import base, prompts
from t2po_jax.models import tokenizer as tokenizer_lib
from t2po_jax.rollout import draw, environments, handover
from t2po_jax.rollout import penalties as prices
from t2po_jax.rollout import sampler as samplers
from t2po_jax.rollout import scheduler as schedulers

CONTEXTS = ("window", "append")


@dataclasses.dataclass(frozen=True)
class Rules:
  """The rules of episodes.

  Attributes:
    memory: (observation, action) pairs in a windowed prompt.
    max_prompt: the most tokens of a prompt, including the prefix.
    max_response: the most tokens of a response.
    prefix: text prepended to every response.
    penalties: subtracted from a turn's reward for its response.
    max_tries: how often a turn may be resampled; 0 turns resampling off.
    eta: turns whose score changes by less are resampled.
    resample_on: what triggers resampling; see `resampling.SIGNS`.
    epsilon: threshold of the thinking intervention.
    sampling: sampling settings.
    context: how prompts are built; see `next_prompt`.
    env_calls: decode calls after which an environment's answer is awaited; 0
      takes it as soon as it arrives.
    max_turns: turns after which an episode ends, if the environment does not
      end it before; 0 leaves that to the environment.
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
  max_turns: int = 0


@dataclasses.dataclass(frozen=True)
class Rollout:
  """All episodes of some tasks, with measurements.

  Attributes:
    trajectories: all episodes, by group and member.
    deltas: [n] float32, windowed mean |dM| at steps where the thinking
      intervention was allowed to fire; calibrates epsilon.
    phi_changes: [n] float32, |Phi^k - Phi^{k-1}| of every first attempt at a
      turn after the first, or its confidence with the sign `unsure`; calibrates
      eta.
    aborted: number of episodes aborted by infrastructure failures.
    handed_on: episodes of the next rollouts that have been started.
  """

  trajectories: list[types.Trajectory]
  deltas: np.ndarray
  phi_changes: np.ndarray
  aborted: int
  handed_on: tuple[handover.Handed, ...] = ()


class Loop:
  """One rollout; `run` plays it to the end.

  Attributes:
    scheduler: samples the responses.
    rules: how episodes are played.
    waiting: episodes waiting for their environment, by the future of its
      answer.
    deltas: see `Rollout`, one array per response.
    phi_changes: see `Rollout`.
    ended_early: episodes of the next rollouts that have ended.
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
    older: Mapping[int, Rules] = python_types.MappingProxyType({}),
  ) -> None:
    """Starts without episodes.

    Args:
      benchmark: tasks and wording.
      pool: the environments.
      tokenizer: the policy's tokenizer.
      scheduler: samples the responses.
      rules: how episodes are played.
      seed: identifies the rollout.
      version: the version of the parameters that plays it.
      older: rules of the earlier versions that continue their episodes, by
        version; they differ only in their thresholds.
    """
    self._benchmark = benchmark
    self._pool = pool
    self._tokenizer = tokenizer
    self.scheduler = scheduler
    self.rules = rules
    self._seed = seed
    self._version = version
    self._versions = {version: rules, **older}
    self._closing = False
    self._tickets = itertools.count()
    self._calls = 0  # Decode calls so far.
    self.waiting: dict[futures.Future, handover.Episode] = {}
    self._sampling: dict[int, handover.Episode] = {}
    self.deltas: list[np.ndarray] = []
    self.phi_changes: list[float] = []
    self.ended_early: list[handover.Episode] = []

  def run(
    self,
    tasks: Sequence[tuple[str, int, int]],
    progress: Callable[[int], None] = lambda count: None,
    *,
    early: Sequence[handover.Early] = (),
    handed: Sequence[handover.Handed] = (),
  ) -> Rollout:
    """Plays one episode of every (task id, group, member).

    Args:
      tasks: the random keys are derived from the numbers, so that an episode
        does not depend on where it is played.
      progress: called with the number of finished episodes.
      early: episodes to start as well, in slots that `tasks` leave free: those
        of the next rollout, of the one after it and so on.
      handed: episodes that earlier rollouts have started, of this one and of
        later ones.

    Returns:
      The rollout; independent of the number of slots and the order of serving.
    """
    later = bool(early) or any(one.episode.early > 1 for one in handed)
    trajectories = []
    for trajectory in self.episodes(tasks, early=early, handed=handed):
      trajectories.append(trajectory)
      progress(len(trajectories))
    handed_on = self._suspend() if later else ()
    trajectories.sort(key=lambda t: (t.group, t.member))
    return Rollout(
      trajectories=trajectories,
      deltas=np.sort(np.concatenate([*self.deltas, np.zeros(0, np.float32)])),
      phi_changes=np.sort(np.asarray(self.phi_changes, np.float32)),
      aborted=sum(trajectory.aborted for trajectory in trajectories),
      handed_on=handed_on,
    )

  def episodes(
    self,
    tasks: Sequence[tuple[str, int, int]],
    *,
    early: Sequence[handover.Early] = (),
    handed: Sequence[handover.Handed] = (),
  ) -> Iterator[types.Trajectory]:
    """The episodes of `run` as they end, those of `early` left out."""
    for one in handed:
      yield from self._take_over(one)
    for task in tasks:
      self.start(*task)
    for later, part in enumerate(early, 1):
      for task in part.tasks:
        self.start(*task, seed=part.seed, early=later)
    take = self._due if self.rules.env_calls else self._done
    while self._unfinished():
      for future in take():
        yield from self.answered(self.waiting.pop(future), future)
      completions = self._decode()
      self._calls += 1
      for completion in completions:
        self.sampled(completion)

  def _unfinished(self) -> bool:
    """Whether episodes of this rollout, not of later ones, are in progress."""
    under_way = itertools.chain(self.waiting.values(), self._sampling.values())
    return any(not episode.early for episode in under_way)

  def _decode(self, *, refill: bool = True) -> list[samplers.Completion]:
    """Decodes a chunk for every version; returns the finished responses."""
    versions: list[tuple[int | None, Rules]] = [(None, self.rules)]
    if len(self._versions) > 1:
      versions = list(self._versions.items())
    return [
      completion
      for version, rules in versions
      for completion in self.scheduler.poll(
        self.rules.sampling, rules.epsilon, version=version, refill=refill
      )
    ]

  def _take_over(self, handed: handover.Handed) -> Iterator[types.Trajectory]:
    """Continues an episode of the last rollout, or counts it as ended."""
    episode = handed.episode
    episode.early, episode.due = episode.early - 1, 0
    if episode.version not in self._versions:
      episode.version = self._version
    if handed.answer is None:
      yield from self._ended(episode)
      return
    if episode.attempt is not None and episode.prompt is None:
      episode.prompt, episode.shortened = self._prompt(episode)
    self.waiting[handed.answer] = episode

  def _suspend(self) -> tuple[handover.Handed, ...]:
    """Ends the rollout for the episodes that continue in the next one.

    Responses in progress are finished and none is started, so every episode is
    left between two turns: in the next rollout, other parameters may play it.
    """
    self._closing = True
    while self.scheduler.held:
      for completion in self._decode(refill=False):
        self.sampled(completion)
    handed = [handover.Handed(episode, None) for episode in self.ended_early]
    handed += [
      handover.Handed(episode, answer)
      for answer, episode in self.waiting.items()
    ]
    for ticket, episode in self._sampling.items():
      self.scheduler.cancel(ticket)
      answer = futures.Future()
      answer.set_result(episode.observation)
      handed.append(handover.Handed(episode, answer))
    return tuple(sorted(handed, key=_place))

  def _done(self) -> Iterator[futures.Future]:
    """Answers that have arrived, in order of the requests."""
    # With nothing to decode, wait.
    done, _ = futures.wait(
      self.waiting,
      timeout=0 if self._sampling else None,
      return_when=futures.FIRST_COMPLETED,
    )
    yield from [future for future in self.waiting if future in done]

  def _due(self) -> Iterator[futures.Future]:
    """Answers to take now, whether or not they have arrived.

    They are taken in order of the requests, each after its number of decode
    calls and when a slot is free. Nothing here depends on the clock.
    """
    if not self._sampling:
      # Nothing is decoding: the first request has had enough time.
      oldest = next(iter(self.waiting.values())).due
      self._calls = max(self._calls, oldest)
    for future, episode in list(self.waiting.items()):
      if episode.due > self._calls or self.scheduler.spare < 1:
        return
      yield future

  def start(
    self,
    task_id: str,
    group: int,
    member: int,
    *,
    seed: tuple[int, ...] | None = None,
    early: int = 0,
  ) -> None:
    """Begins an episode of this rollout, or of one so many later."""
    seat, future = self._pool.start(task_id)
    self.waiting[future] = handover.Episode(
      task_id,
      group,
      member,
      seat,
      due=self._calls,
      seed=self._seed if seed is None else seed,
      version=self._version,
      early=early,
    )

  def answered(
    self, episode: handover.Episode, future: futures.Future
  ) -> Iterator[types.Trajectory]:
    """Handles an environment's answer; yields the trajectory if it ended."""
    try:
      answer = future.result()
    except base.EnvError as error:
      logging.warning("episode %s aborted: %s", episode.task_id, error)
      yield from self._finish(episode, aborted=True)
      return
    if isinstance(answer, base.StepResult):
      self._record(episode, answer)
      if answer.done or len(episode.turns) == self.rules.max_turns:
        episode.success = answer.success
        yield from self._finish(episode)
        return
      answer = answer.observation
    episode.observation = answer
    try:
      episode.prompt, episode.shortened = self._prompt(episode)
    except ValueError as error:
      logging.warning("episode %s aborted: %s", episode.task_id, error)
      yield from self._finish(episode, aborted=True)
      return
    self.scheduler.submit(self._request(episode))

  def sampled(self, completion: samplers.Completion) -> None:
    """Handles a response: resamples it, or steps the environment."""
    episode = self._sampling.pop(completion.ticket)
    attempt = dataclasses.replace(
      completion.attempt,
      text=self.rules.prefix
      + self._tokenizer.decode(completion.attempt.tokens.tolist()),
    )
    episode.deltas.append(completion.deltas)
    before = episode.turns[-1].response.phi if episode.turns else float("nan")
    phi_change = float(resampling.phi_change(attempt.phi, before))
    change, measured = phi_change, bool(episode.turns)
    if self.rules.resample_on == "unsure":
      change = float(resampling.confidence(attempt.entropy, attempt.forced))
      measured = not np.isnan(change)
    if measured and not episode.discarded:
      episode.phi_changes.append(change)
    again = resampling.should_resample(
      change,
      eta=self._versions[episode.version].eta,
      tries=len(episode.discarded),
      max_tries=self.rules.max_tries,
      sign=self.rules.resample_on,
      repeated=self.rules.resample_on in ("action", "both")
      and self._repeats(episode, attempt.text),
    )
    if again:
      episode.discarded.append(attempt)
      request = self._request(episode)
      if self._closing:
        self.scheduler.release(completion.ticket)
        self.scheduler.submit(request)
      else:
        self.scheduler.retry(completion.ticket, request)
      return
    self.scheduler.release(completion.ticket)
    episode.attempt, episode.phi_change = attempt, phi_change
    episode.signal, episode.spoken_by = completion.signal, episode.version
    episode.due = self._calls + self.rules.env_calls
    future = self._pool.step(episode.seat, attempt.text)
    self.waiting[future] = episode

  def _repeats(self, episode: handover.Episode, text: str) -> bool:
    """Whether a response repeats the last turn's action and observation."""
    if not episode.turns:
      return False
    last, grammar = episode.turns[-1], self._benchmark.grammar
    now = prompts.parse(text, grammar)
    before = prompts.parse(last.response.text, grammar)
    same = (now.kind, now.content) == (before.kind, before.content)
    seen = episode.observation
    return same and seen is not None and seen.text == last.anchor

  def _record(self, episode: handover.Episode, result: base.StepResult) -> None:
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
        version=episode.spoken_by,
        discarded=tuple(episode.discarded),
        info=dict(result.info),
      )
    )
    episode.memory.append((observation.text, result.action))
    episode.discarded, episode.attempt = [], None

  def _finish(
    self, episode: handover.Episode, *, aborted: bool = False
  ) -> Iterator[types.Trajectory]:
    """Ends an episode; yields it unless it belongs to a later rollout."""
    self._pool.give_back(episode.seat)
    episode.result = types.Trajectory(
      task_id=episode.task_id,
      category=self._benchmark.category(episode.task_id),
      group=episode.group,
      member=episode.member,
      turns=tuple(episode.turns),
      success=episode.success and not aborted,
      aborted=aborted,
    )
    yield from self._ended(episode)

  def _ended(self, episode: handover.Episode) -> Iterator[types.Trajectory]:
    """Yields an episode with what was measured, unless it is of a later one."""
    if episode.early:
      self.ended_early.append(episode)
      return
    assert episode.result is not None
    self.deltas += episode.deltas
    self.phi_changes += episode.phi_changes
    yield episode.result

  def _prompt(self, episode: handover.Episode) -> tuple[np.ndarray, bool]:
    """The prompt's token ids, and whether it was truncated."""
    assert episode.observation
    limit = self._benchmark.max_turns
    view = episode.observation.view(
      episode.memory,
      memory=self.rules.memory,
      max_turns=min(limit, self.rules.max_turns or limit),
    )
    last = episode.turns[-1] if episode.turns else None
    return next_prompt(
      self._benchmark,
      self._tokenizer,
      view,
      self.rules,
      before=(last.prompt, last.response.tokens) if last else None,
    )

  def _request(self, episode: handover.Episode) -> samplers.Request:
    """A request, its random key derived from trajectory, turn and attempt."""
    place = (
      episode.group,
      episode.member,
      len(episode.turns),
      len(episode.discarded),
    )
    key = np.random.SeedSequence((*episode.seed, *place)).generate_state(2)
    ticket = next(self._tickets)
    assert episode.prompt is not None
    self._sampling[ticket] = episode
    return samplers.Request(
      ticket=ticket,
      prompt=episode.prompt,
      key=key,
      limit=self.rules.max_response,
      signal=episode.signal,
      version=episode.version,
      priority=episode.early,
    )


def _place(handed: handover.Handed) -> tuple[int, int, int]:
  """Where an episode belongs: in which rollout, group and member."""
  episode = handed.episode
  return episode.early, episode.group, episode.member


def next_prompt(
  benchmark: base.Benchmark,
  tokenizer: tokenizer_lib.Tokenizer,
  view: prompts.View,
  rules: Rules,
  *,
  before: tuple[np.ndarray, np.ndarray] | None,
) -> tuple[np.ndarray, bool]:
  """The prompt of a turn.

  With `context` "window" it is rendered from the memory window. With "append"
  it is the last prompt, the sampled response and the new observation, token for
  token: the slot that still holds the dialogue only computes the new part, and
  each turn remains a separate training sequence. A dialogue that no longer fits
  restarts from the memory window.

  Args:
    benchmark: renders the prompts.
    tokenizer: the policy's tokenizer.
    view: the contents of the prompt.
    rules: how episodes are played.
    before: prompt and response ids of the last turn; None in the first turn.

  Returns:
    [T] int32 token ids, and whether anything was truncated.

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
    [T] int32 token ids, and whether memory or observation was truncated.

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
