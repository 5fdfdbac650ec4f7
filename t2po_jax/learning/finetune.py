"""Supervised fine-tuning for the cold start.

`expert` learns from demonstrations (`batching.pair_segments`), `rft`
(rejection-sampling fine-tuning) from the policy's own successful trajectories
(`successful_segments`). Both share the machinery of the policy update: packed
rows and a `Learner`, here with a `LikelihoodObjective`. Only response tokens
are learned, and of those only the ones that were sampled or demonstrated.
"""

from collections.abc import Callable, Sequence
import dataclasses

import numpy as np

from t2po_jax import types
from t2po_jax.learning import batching, learner

# Called after every step with its number (from 1), the total, and metrics.
Progress = Callable[[int, int, dict[str, float]], None]


def successful_segments(
  trajectories: Sequence[types.Trajectory], *, max_length: int
) -> list[batching.Segment]:
  """The turns to imitate: those of solved trajectories, with a valid format.

  Args:
    trajectories: a rollout.
    max_length: tokens of the longest row, see `batching.trajectory_segments`.

  Returns:
    Segments of those turns, in order; forced tokens are masked.
  """
  chosen = [
    dataclasses.replace(
      trajectory,
      turns=tuple(turn for turn in trajectory.turns if turn.format_valid),
    )
    for trajectory in trajectories
    if trajectory.success
  ]
  ones = [[1.0] * len(trajectory.turns) for trajectory in chosen]
  return batching.trajectory_segments(chosen, ones, max_length=max_length)


def count_steps(segments: int, *, batch_size: int, epochs: int) -> int:
  """The number of optimizer steps of `finetune`, for the schedule."""
  return epochs * -(-segments // batch_size)


def finetune(
  trainer: learner.Learner,
  state: types.TrainState,
  segments: Sequence[batching.Segment],
  *,
  lengths: Sequence[int],
  batch_size: int,
  epochs: int = 1,
  seed: int = 0,
  progress: Progress | None = None,
) -> tuple[types.TrainState, list[dict[str, float]]]:
  """Trains on the segments, reshuffled in every epoch.

  Args:
    trainer: a learner with a `LikelihoodObjective`.
    state: donated.
    segments: the training examples.
    lengths: allowed row lengths in tokens, see `batching.pack`.
    batch_size: segments per optimizer step, >= 1.
    epochs: passes over the segments, >= 1.
    seed: of the shuffling; equal seeds give equal steps.
    progress: called after every step.

  Returns:
    The new state and the metrics of each epoch: means over its steps.

  Raises:
    ValueError: if there are no segments, or one is too long.
  """
  if not segments:
    raise ValueError(
      "found nothing to fine-tune on; at least one response is needed"
    )
  total = count_steps(len(segments), batch_size=batch_size, epochs=epochs)
  done, history = 0, []
  for epoch in range(epochs):
    packed = batching.pack(
      segments,
      lengths=lengths,
      rows=trainer.rows,
      minibatches=-(-len(segments) // batch_size),
      by_row=trainer.skips_rows,
      seed=(seed, epoch),
    )
    steps = []
    for batch in packed.batches:
      state, metrics = trainer.update(state, [batch])
      steps.append({name: float(value) for name, value in metrics.items()})
      done += 1
      if progress is not None:
        progress(done, total, steps[-1])
    history.append(
      {name: float(np.mean([m[name] for m in steps])) for name in steps[0]}
    )
  return state, history
