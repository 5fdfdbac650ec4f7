"""Packs trajectories into rows of a fixed shape.

A turn is one training sequence, prompt | response; here it is called a segment.
Several segments share a row (first-fit decreasing), kept apart by segment ids,
so that little of a row is padding. A turn whose prompt starts with the whole
previous turn (a growing dialogue) extends the previous segment instead of
repeating it: attention is causal, so only the amount of work changes.

Shapes come from a few buckets, and all optimizer steps of a rollout have the
same shape, so the number of compiled programs is bounded. Unused rows are
empty, have mask 0 and come last, where the learner skips them: all of them on
one device, whole micro-batches of them on several. Rows are never repeated to
fill a batch: that would count some turns twice.
"""

from collections.abc import Iterable, Sequence
import dataclasses

import numpy as np

from t2po_jax import types

# The response positions R of a row are a multiple of 1/16 of its length.
RESPONSE_STEPS = 16
# Response room per row above the average need, so that rows can fill up.
RESPONSE_SLACK = 1.125
# Padding above which rows of another length are tried, and by how much less of
# it one must have: every length that is used is compiled once.
MUCH_PADDING = 0.1
WORTH_A_PROGRAM = 0.05

# Of one turn: one value for all response tokens, or one per token.
TurnAdvantage = float | np.ndarray
# The segments of every row.
_Rows = list[list["Segment"]]


@dataclasses.dataclass(frozen=True)
class Segment:
  """Tokens that attend to each other, and their training targets.

  Attributes:
    tokens: [T] int32.
    index: [R] int32 into T; position `index[r]` predicts `targets[r]`.
    targets: [R] int32 token ids.
    mask: [R] float32, 1 for sampled tokens, 0 for forced ones.
    turn: [R] int32, index of the turn in the rollout.
    advantages: [R] float32.
    logprobs: [R] float32, as recorded while sampling.
  """

  tokens: np.ndarray
  index: np.ndarray
  targets: np.ndarray
  mask: np.ndarray
  turn: np.ndarray
  advantages: np.ndarray
  logprobs: np.ndarray


@dataclasses.dataclass(frozen=True)
class Packed:
  """One rollout, ready for the learner.

  Attributes:
    batches: one batch of NumPy arrays per optimizer step, all of one shape.
    stats: `rows`, `row_length`, `tokens` (not padding), `segments`, `padding`
      (fraction of the computed token positions), and `response_padding` (the
      same for response positions).
  """

  batches: tuple[types.Batch, ...]
  stats: dict[str, float]


@dataclasses.dataclass(frozen=True)
class _Shape:
  """Row length T and response positions R of one packing."""

  length: int
  responses: int


def trajectory_segments(
  trajectories: Sequence[types.Trajectory],
  advantages: Sequence[Sequence[TurnAdvantage]] | None = None,
  *,
  max_length: int,
  drop_void: bool = False,
  drop_overlong: bool = False,
  discarded: float = 0.0,
) -> list[Segment]:
  """The segments to train on.

  Aborted trajectories and responses without tokens are left out.

  Args:
    trajectories: the rollout.
    advantages: per trajectory one entry per turn: one value, or [T] values for
      the tokens of the response. None: 0, to be filled in later.
    max_length: tokens of the longest row; a growing dialogue is split there.
    drop_void: whether to leave out trajectories with any turn that has no
      valid action (void turn filtering, a baseline).
    drop_overlong: whether to leave out responses truncated at the length limit
      (overlong filtering, arXiv 2503.14476).
    discarded: advantage of attempts discarded by resampling; 0 leaves them out.

  Returns:
    Segments in the order of the rollout, then the discarded attempts. Turns are
    numbered over the whole rollout, including those left out, and the discarded
    attempts continue that numbering.

  Raises:
    ValueError: if trajectories and advantages do not match, or a prompt is
      empty.
  """
  if advantages is None:
    advantages = [[0.0] * len(t.turns) for t in trajectories]
  if len(trajectories) != len(advantages):
    raise ValueError(
      f"found advantages of {len(advantages)} trajectories; there are "
      f"{len(trajectories)}"
    )
  segments, first = [], 0
  thrown, next_number = [], sum(len(t.turns) for t in trajectories)
  for trajectory, values in zip(trajectories, advantages, strict=True):
    if len(values) != len(trajectory.turns):
      raise ValueError(
        f"found {len(values)} advantages for the {len(trajectory.turns)} turns "
        f"of task {trajectory.task_id!r}; each turn needs one"
      )
    void = any(not turn.action_valid for turn in trajectory.turns)
    if not trajectory.aborted and not (drop_void and void):
      kept = [
        (first + place, turn, value)
        for place, (turn, value) in enumerate(
          zip(trajectory.turns, values, strict=True)
        )
        if not (drop_overlong and turn.response.finish == "length")
      ]
      segments += _chain(kept, max_length)
      if discarded:
        thrown += _discarded_segments(trajectory, next_number, discarded)
    first += len(trajectory.turns)
    next_number += sum(len(turn.discarded) for turn in trajectory.turns)
  return segments + thrown


def _discarded_segments(
  trajectory: types.Trajectory, first: int, advantage: float
) -> list[Segment]:
  """One segment per discarded attempt, numbered from `first`."""
  tried = [
    (turn.prompt, a) for turn in trajectory.turns for a in turn.discarded
  ]
  return [
    _attempt_segment(prompt, attempt, first + place, advantage)
    for place, (prompt, attempt) in enumerate(tried)
    if len(attempt.tokens)
  ]


def pair_segments(
  pairs: Sequence[tuple[np.ndarray, np.ndarray]],
) -> list[Segment]:
  """Segments of demonstrations: every response token counts, advantage 1.

  Args:
    pairs: prompt ids [T] and response ids [T] of each demonstration.

  Returns:
    One segment per pair, numbered in order; empty responses are left out.

  Raises:
    ValueError: if a prompt is empty.
  """
  return [
    _segment(prompt, response, number, mask=1.0, advantages=1.0, logprobs=0.0)
    for number, (prompt, response) in enumerate(pairs)
    if len(response)
  ]


def pack(
  segments: Sequence[Segment],
  *,
  lengths: Sequence[int],
  rows: int,
  minibatches: int = 1,
  max_padding: float = 0.1,
  by_row: bool = False,
  seed: int | Sequence[int] = 0,
) -> Packed:
  """Packs segments into rows, and rows into batches.

  The row length is the shortest bucket that keeps padding below `max_padding`,
  or else the one with the least padding.

  Args:
    segments: what to train on.
    lengths: allowed row lengths in tokens, each a multiple of 16.
    rows: rows of a micro-batch over the whole mesh, >= 1.
    minibatches: number of optimizer steps to split the segments over, >= 1;
      their sizes may differ by a micro-batch.
    max_padding: the acceptable fraction of padding, from 0 to 1.
    by_row: whether empty rows of a non-empty micro-batch are skipped too, see
      `Learner.skips_rows`.
    seed: one number or several; for the random assignment of segments to
      mini-batches, if there are several.

  Returns:
    The batches; fewer than `minibatches` if there are fewer segments, none
    without segments. The number of micro-batches is a power of two.

  Raises:
    ValueError: if a segment is longer than the longest row, or an argument is
      out of range.
  """
  lengths = _check(lengths, rows, minibatches)
  rng = np.random.default_rng(seed)
  parts = _split(segments, minibatches, rng)
  if not parts:
    return Packed(batches=(), stats={})
  longest = max(segments, key=lambda segment: len(segment.tokens))
  if len(longest.tokens) > lengths[-1]:
    raise ValueError(
      f"turn {longest.turn[0]} has {len(longest.tokens)} tokens, "
      f"{len(longest.index)} of them response; rows hold at most {lengths[-1]}"
    )
  fitting = [length for length in lengths if length >= len(longest.tokens)]
  best = None
  for length in fitting:
    shape = _Shape(length, _response_room(segments, length))
    bins = [_first_fit(part, shape) for part in parts]
    bins = _join_loose(bins, rows, rng)
    stats = _measure(segments, bins, shape, 1 if by_row else rows)
    if best is None or stats["padding"] < best[2]["padding"]:
      best = (shape, bins, stats)
    if stats["padding"] <= max_padding:
      break
  assert best is not None
  shape, bins, stats = best
  micro = max(-(-len(filled) // rows) for filled in bins)
  height = rows * 2 ** (micro - 1).bit_length()
  batches = tuple(_fill(filled, shape, height) for filled in bins)
  return Packed(batches=batches, stats=stats)


def row_lengths(longest: int) -> tuple[int, ...]:
  """Lengths that rows may have instead: sixteenths, from a quarter upwards.

  Args:
    longest: tokens, a multiple of 16.

  Returns:
    Multiples of 16, ascending; the last is `longest`.
  """
  step = RESPONSE_STEPS
  parts = (-(-longest * part // 16 // step) * step for part in range(4, 17))
  return tuple(dict.fromkeys(parts))


def pack_close(
  segments: Sequence[Segment],
  *,
  longest: int,
  rows: int,
  minibatches: int = 1,
  by_row: bool = False,
  seed: int | Sequence[int] = 0,
) -> Packed:
  """Packs into rows of one length, or where that wastes much, of a shorter.

  Many turns fill rows of any length. Few do not: then the length is taken that
  leaves least of them empty. Arguments and errors are those of `pack`.

  Args:
    segments: what to train on.
    longest: tokens of the longest row, and of the usual one.
    rows: rows of a micro-batch over the whole mesh.
    minibatches: optimizer steps.
    by_row: whether empty rows of a micro-batch are not computed.
    seed: draws the mini-batches.
  """

  def packed(lengths: Sequence[int]) -> Packed:
    return pack(
      segments,
      lengths=lengths,
      rows=rows,
      minibatches=minibatches,
      by_row=by_row,
      seed=seed,
    )

  usual = packed([longest])
  if not usual.batches or usual.stats["padding"] <= MUCH_PADDING:
    return usual
  close = packed(row_lengths(longest))
  saved = usual.stats["padding"] - close.stats["padding"]
  return close if saved > WORTH_A_PROGRAM else usual


def to_turns(
  batches: Sequence[types.Batch], values: Sequence[np.ndarray], *, turns: int
) -> list[np.ndarray]:
  """Splits values of packed rows into turns.

  Args:
    batches: packed batches.
    values: [B, R] per batch, e.g. of a critic.
    turns: number of turns in the rollout; discarded attempts, which are
      numbered beyond them, are left out.

  Returns:
    Per turn [T] values, one per response token, forced ones included; empty for
    turns that are in no batch.
  """
  number = np.concatenate([np.ravel(batch.turn) for batch in batches])
  flat = np.concatenate([np.ravel(value) for value in values])
  # A turn's tokens are in one row, in order.
  order = np.argsort(number, kind="stable")
  order = order[np.count_nonzero(number < 0) :]
  counts = np.bincount(number[order], minlength=turns)
  return np.split(flat[order], np.cumsum(counts)[:-1])[:turns]


def from_turns(batch: types.Batch, values: Sequence[np.ndarray]) -> np.ndarray:
  """Arranges values of turns like a packed batch; the inverse of `to_turns`.

  Args:
    batch: a packed batch.
    values: per turn of the rollout [T] values, one per response token.

  Returns:
    [B, R] float32, 0 on padding.
  """
  number = np.ravel(batch.turn)
  order = np.argsort(number, kind="stable")
  order = order[np.count_nonzero(number < 0) :]
  present = np.unique(number[order])
  flat = np.zeros(number.shape, np.float32)
  if len(present):
    flat[order] = np.concatenate([values[turn] for turn in present])
  return flat.reshape(batch.turn.shape)


def _segment(
  prompt: np.ndarray,
  response: np.ndarray,
  number: int,
  *,
  mask: TurnAdvantage,
  advantages: TurnAdvantage,
  logprobs: TurnAdvantage,
) -> Segment:
  """One turn; the last three arguments are one value or one per token."""
  if not len(prompt):
    raise ValueError(
      f"turn {number} has an empty prompt; its first response token cannot be "
      "predicted from anything"
    )
  size = (len(response),)
  return Segment(
    tokens=np.concatenate([prompt, response]).astype(np.int32),
    index=np.arange(len(response), dtype=np.int32) + len(prompt) - 1,
    targets=np.asarray(response, np.int32),
    mask=np.broadcast_to(np.asarray(mask, np.float32), size),
    turn=np.full(size, number, np.int32),
    advantages=np.broadcast_to(np.asarray(advantages, np.float32), size),
    logprobs=np.broadcast_to(np.asarray(logprobs, np.float32), size),
  )


def _attempt_segment(
  prompt: np.ndarray,
  attempt: types.Attempt,
  number: int,
  advantage: TurnAdvantage,
) -> Segment:
  """One attempt at a turn, as it was sampled."""
  return _segment(
    prompt,
    attempt.tokens,
    number,
    mask=1.0 - attempt.forced,
    advantages=advantage,
    logprobs=attempt.logprobs,
  )


def _chain(
  turns: Iterable[tuple[int, types.Turn, TurnAdvantage]], max_length: int
) -> list[Segment]:
  """Segments of (number, turn, advantage); a growing dialogue becomes one."""
  chain = []
  for number, turn, value in turns:
    response = turn.response
    if not len(response.tokens):
      continue
    segment = _attempt_segment(turn.prompt, response, number, value)
    if chain and _continues(chain[-1], segment, len(turn.prompt), max_length):
      segment = _extend(chain.pop(), segment)
    chain.append(segment)
  return chain


def _continues(
  before: Segment, after: Segment, prompt_length: int, max_length: int
) -> bool:
  """Whether a turn's prompt starts with the whole segment before it."""
  size = len(before.tokens)
  return (
    size <= prompt_length
    and len(after.tokens) <= max_length
    and np.array_equal(before.tokens, after.tokens[:size])
  )


def _extend(before: Segment, after: Segment) -> Segment:
  """One segment out of a segment and the turn that continues it."""
  joined = {
    field.name: np.concatenate(
      [getattr(before, field.name), getattr(after, field.name)]
    )
    for field in dataclasses.fields(Segment)
    if field.name != "tokens"
  }
  return Segment(tokens=after.tokens, **joined)


def _check(lengths: Sequence[int], rows: int, minibatches: int) -> list[int]:
  """Returns the row lengths in ascending order; raises if one is invalid."""
  lengths = sorted(lengths)
  if not lengths or lengths[0] < 1:
    raise ValueError(f"row lengths are {lengths}; at least one is needed")
  for length in lengths:
    if length % RESPONSE_STEPS:
      raise ValueError(
        f"row length {length} is not a multiple of {RESPONSE_STEPS}; nearest: "
        f"{max(1, round(length / RESPONSE_STEPS)) * RESPONSE_STEPS}"
      )
  for name, number in (("rows", rows), ("minibatches", minibatches)):
    if number < 1:
      raise ValueError(f"{name} is {number}; it must be at least 1")
  return lengths


def _split(
  segments: Sequence[Segment], minibatches: int, rng: np.random.Generator
) -> list[list[Segment]]:
  """Distributes the segments over at most `minibatches` parts of equal size."""
  order = np.arange(len(segments))
  if minibatches > 1:
    order = rng.permutation(len(segments))
  dealt = [order[start::minibatches] for start in range(minibatches)]
  return [[segments[i] for i in part] for part in dealt if len(part)]


def _response_room(segments: Sequence[Segment], length: int) -> int:
  """Response positions R of a row: a little above the average need."""
  tokens = sum(len(segment.tokens) for segment in segments)
  responses = sum(len(segment.index) for segment in segments)
  longest = max(len(segment.index) for segment in segments)
  need = max(longest, RESPONSE_SLACK * length * responses / tokens)
  step = length // RESPONSE_STEPS
  return min(length, step * int(np.ceil(need / step)))


def _first_fit(segments: Sequence[Segment], shape: _Shape) -> _Rows:
  """Assigns segments, longest first, to the first row with room for them."""
  order = sorted(
    range(len(segments)), key=lambda i: (-len(segments[i].tokens), i)
  )
  space = np.full(len(segments), shape.length)
  room = np.full(len(segments), shape.responses)
  bins = [[] for _ in segments]
  for i in order:
    size, responses = len(segments[i].tokens), len(segments[i].index)
    row = int(np.argmax((space >= size) & (room >= responses)))
    space[row] -= size
    room[row] -= responses
    bins[row].append(segments[i])
  return [filled for filled in bins if filled]


def _join_loose(
  bins: list[_Rows], rows: int, rng: np.random.Generator
) -> list[_Rows]:
  """Merges rows from incomplete micro-batches into complete ones.

  Every part keeps its complete micro-batches (or everything, if it has less
  than one) and gives up the remaining rows, chosen at random. These are pooled
  and returned, one micro-batch each, to the parts with the fewest rows.
  """
  if len(bins) == 1:
    return bins
  kept, loose = [], []
  for filled in bins:
    filled = [filled[row] for row in rng.permutation(len(filled))]
    whole = len(filled) // rows * rows or len(filled)
    kept.append(filled[:whole])
    loose += filled[whole:]
  emptiest = sorted(range(len(kept)), key=lambda part: len(kept[part]))
  for part, start in zip(emptiest, range(0, len(loose), rows), strict=False):
    kept[part] += loose[start : start + rows]
  return kept


def _measure(
  segments: Sequence[Segment], bins: list[_Rows], shape: _Shape, rows: int
) -> dict[str, float]:
  """Statistics of a packing; `rows` at a time are computed or skipped."""
  used = sum(-(-len(filled) // rows) for filled in bins) * rows
  tokens = sum(len(segment.tokens) for segment in segments)
  responses = sum(len(segment.index) for segment in segments)
  return {
    "rows": float(sum(len(filled) for filled in bins)),
    "row_length": float(shape.length),
    "tokens": float(tokens),
    "segments": float(len(segments)),
    "padding": 1.0 - tokens / (used * shape.length),
    "response_padding": 1.0 - responses / (used * shape.responses),
  }


def _fill(bins: _Rows, shape: _Shape, height: int) -> types.Batch:
  """Writes rows of segments into the arrays of a batch."""
  by_token = (height, shape.length)
  by_response = (height, shape.responses)
  batch = types.Batch(
    tokens=np.zeros(by_token, np.int32),
    positions=np.zeros(by_token, np.int32),
    segments=np.zeros(by_token, np.int32),
    index=np.zeros(by_response, np.int32),
    targets=np.zeros(by_response, np.int32),
    mask=np.zeros(by_response, np.float32),
    turn=np.full(by_response, -1, np.int32),
    advantages=np.zeros(by_response, np.float32),
    sampler_logprobs=np.zeros(by_response, np.float32),
    old_logprobs=np.zeros(by_response, np.float32),
    ref_logprobs=np.zeros(by_response, np.float32),
    old_values=np.zeros(by_response, np.float32),
    value_targets=np.zeros(by_response, np.float32),
  )
  for row, filled in enumerate(bins):
    start = begin = 0
    for number, segment in enumerate(filled, 1):
      stop, end = start + len(segment.tokens), begin + len(segment.index)
      batch.tokens[row, start:stop] = segment.tokens
      batch.positions[row, start:stop] = np.arange(stop - start)
      batch.segments[row, start:stop] = number
      batch.index[row, begin:end] = segment.index + start
      batch.targets[row, begin:end] = segment.targets
      batch.mask[row, begin:end] = segment.mask
      batch.turn[row, begin:end] = segment.turn
      batch.advantages[row, begin:end] = segment.advantages
      batch.sampler_logprobs[row, begin:end] = segment.logprobs
      batch.old_logprobs[row, begin:end] = segment.logprobs
      start, begin = stop, end
  return batch
