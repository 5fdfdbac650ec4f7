"""The host side of sampling: requests in, completions out.

The scheduler owns the sampler's slots. A request waits until a slot is free;
its prompt is then compared with the contents of every slot's cache, and only
the part not found in any slot is computed: members of a group share one
prefill, a trajectory's next turn reuses the common prefix with its last prompt,
and a resampled turn rewinds its slot and computes nothing. Random keys belong
to requests, so that the order of serving does not matter.
"""

import collections
from collections.abc import Sequence
import dataclasses

import numpy as np

from t2po_jax.rollout import draw
from t2po_jax.rollout import sampler as samplers


@dataclasses.dataclass
class _Slot:
  """The host's record of one slot."""

  content: np.ndarray  # Tokens whose keys and values the cache holds.
  request: samplers.Request | None = None  # Set from serving until release.
  served: int = 0  # When it was last filled, for least-recently-used.
  version: int = 0  # Of the parameters that computed the content.


def common_prefix(left: np.ndarray, right: np.ndarray) -> int:
  """Number of equal leading tokens."""
  size = min(len(left), len(right))
  differ = np.flatnonzero(left[:size] != right[:size])
  return int(differ[0]) if differ.size else size


class Scheduler:
  """Serves requests on the slots of one sampler.

  Attributes:
    counters: totals so far: prompt tokens requested, computed and reused;
      rewinds; decode steps; slot-steps run and used.
  """

  def __init__(self, sampler: samplers.Sampler, *, exact: bool = False) -> None:
    """Starts without requests.

    Args:
      sampler: the device side.
      exact: reuse only what a prompt's own computation has put into a cache,
        not what decoding has: that rounds differently, so that a result would
        depend on whether a slot still held it.
    """
    self._sampler, self._exact = sampler, exact
    self._slots = [
      _Slot(content=np.zeros(0, np.int32)) for _ in range(sampler.slots)
    ]
    size = sampler.slots // sampler.shards
    self._shards = [range(i, i + size) for i in range(0, sampler.slots, size)]
    self._queue: collections.deque[samplers.Request] = collections.deque()
    self._where: dict[int, int] = {}
    self._clock = 0
    self.counters: collections.Counter[str] = collections.Counter()

  @property
  def busy(self) -> bool:
    """Whether anything is waiting or being sampled."""
    return bool(self._queue or self._running())

  @property
  def held(self) -> int:
    """Number of slots that are not free."""
    return sum(slot.request is not None for slot in self._slots)

  @property
  def spare(self) -> int:
    """Free slots minus waiting requests."""
    held = sum(slot.request is not None for slot in self._slots)
    return len(self._slots) - held - len(self._queue)

  def submit(self, request: samplers.Request) -> None:
    """Queues a request.

    Raises:
      ValueError: if the prompt and its response do not fit the cache.
    """
    room = self._sampler.max_prompt
    if not 1 <= len(request.prompt) <= room:
      raise ValueError(
        f"prompt of {len(request.prompt)} tokens does not fit: the sampler "
        f"was built for 1 to {room} (rollout.max_prompt)"
      )
    if not 1 <= request.limit <= self._sampler.max_response:
      raise ValueError(
        f"response limit {request.limit} must lie in 1 to "
        f"{self._sampler.max_response} (rollout.max_response)"
      )
    self._queue.append(request)

  def release(self, ticket: int) -> None:
    """Releases the slot of a completed request."""
    self._slots[self._where.pop(ticket)].request = None

  def cancel(self, ticket: int) -> None:
    """Drops a waiting or running request; its slot is free at once.

    Raises:
      KeyError: if there is no such request.
    """
    for request in self._queue:
      if request.ticket == ticket:
        self._queue.remove(request)
        return
    index = self._where.pop(ticket)
    self._sampler.stop(index)
    self._slots[index].request = None

  def so_far(self, tickets: Sequence[int]) -> dict[int, samplers.Completion]:
    """The responses of running requests so far; waiting ones are left out."""
    rows = [self._where[ticket] for ticket in tickets if ticket in self._where]
    completions = self._sampler.fetch(rows) if rows else []
    return {completion.ticket: completion for completion in completions}

  def retry(self, ticket: int, request: samplers.Request) -> None:
    """Resamples from the same prompt: rewinds, without a prefill."""
    index = self._where.pop(ticket)
    self._slots[index].request = request
    self._slots[index].content = request.prompt[:-1]
    self._where[request.ticket] = index
    self.counters["rewinds"] += 1
    self._sampler.assign([index], [request])

  def poll(
    self,
    sampling: draw.Sampling,
    epsilon: float,
    *,
    version: int | None = None,
    refill: bool = True,
  ) -> list[samplers.Completion]:
    """Fills free slots, decodes one chunk and returns finished responses.

    Args:
      sampling: how tokens are drawn.
      epsilon: threshold of the thinking intervention.
      version: of the parameters whose responses are decoded; None if there
        are no others.
      refill: whether new responses may be started.

    Returns:
      Finished responses; the caller releases or retries each of them.
    """
    if refill:
      self._refill()
    if not self._running(version):
      return []
    steps, used, finished = self._sampler.decode(
      sampling, epsilon, version=version
    )
    self.counters["decode_steps"] += steps
    self.counters["slot_steps"] += steps * len(self._slots)
    self.counters["slot_steps_used"] += used
    completions = self._sampler.fetch(finished) if finished else []
    for index, completion in zip(finished, completions, strict=True):
      slot = self._slots[index]
      assert slot.request is not None
      if not self._exact:
        # The last token was drawn but never entered the cache.
        slot.content = np.concatenate(
          [slot.request.prompt, completion.attempt.tokens[:-1]]
        )
    return completions

  def _running(self, version: int | None = None) -> list[int]:
    return np.flatnonzero(self._sampler.running(version)).tolist()

  def _next(self) -> samplers.Request:
    """Takes the oldest request of the smallest priority from the queue."""
    first = min(self._queue, key=lambda request: request.priority)
    self._queue.remove(first)
    return first

  def _refill(self) -> None:
    """Moves requests from the queue into free slots."""
    free = [i for i, slot in enumerate(self._slots) if slot.request is None]
    served: list[tuple[int, samplers.Request]] = []
    forks, copies = [], []
    prefills: dict[int, list[tuple[int, np.ndarray, int]]] = (
      collections.defaultdict(list)
    )
    # Equal prompts of a version -> by shard, the slot that gets the first.
    twins: dict[tuple[int, bytes], dict[int, int]] = collections.defaultdict(
      dict
    )
    contents = [slot.content for slot in self._slots]
    while free and self._queue:
      request = self._next()
      need = request.prompt[:-1]  # The last token starts the decoding.
      twin = twins[request.version, need.tobytes()]
      shared = [
        common_prefix(content, need) if slot.version == request.version else 0
        for slot, content in zip(self._slots, contents, strict=True)
      ]
      held = [max(shared[i] for i in shard) for shard in self._shards]
      held = [len(need) if n in twin else most for n, most in enumerate(held)]
      room = [[i for i in shard if i in free] for shard in self._shards]
      # Where the longest prefix is cached, or else where most slots are free.
      shard = max(
        (n for n, slots in enumerate(room) if slots),
        key=lambda n: (held[n], len(room[n])),
      )
      reused = held[shard]
      if shard in twin:
        target = self._least_recent(room[shard])
        copies.append((twin[shard], target))
      else:
        # A free slot with an equally long prefix needs no copy.
        own = [i for i in room[shard] if shared[i] == reused]
        target = self._least_recent(own or room[shard])
        if reused and not own:
          source = next(i for i in self._shards[shard] if shared[i] == reused)
          forks.append((source, target))
        if reused < len(need):
          prefills[request.version].append((target, need, reused))
        twin[shard] = target
      # From here on the slot's old contents are reserved.
      contents[target] = contents[target][:0]
      free.remove(target)
      served.append((target, request))
      self.counters["prompt_tokens"] += len(need)
      self.counters["prompt_tokens_reused"] += reused
      self.counters["prompt_tokens_computed"] += len(need) - reused
    if not served:
      return
    self._sampler.fork(forks)
    for version, parts in prefills.items():
      self._sampler.prefill(parts, version=version)
    self._sampler.fork(copies)
    self._sampler.assign([t for t, _ in served], [r for _, r in served])
    for target, request in served:
      self._clock += 1
      self._slots[target] = _Slot(
        request.prompt[:-1], request, self._clock, request.version
      )
      self._where[request.ticket] = target

  def _least_recent(self, candidates: Sequence[int]) -> int:
    return min(candidates, key=lambda index: self._slots[index].served)

  def forget(self) -> None:
    """Drops all cached contents, because the parameters have changed.

    After this it behaves exactly like a new scheduler, slot by slot.
    """
    held = [s.request.ticket for s in self._slots if s.request is not None]
    if held or self._queue:
      raise RuntimeError(f"requests still under way: {held or 'queued'}")
    self._slots = [_Slot(content=np.zeros(0, np.int32)) for _ in self._slots]
    self._clock = 0
