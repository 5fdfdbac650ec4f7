"""Records of the domain, and the legend of array axes.

Axes, used in every docstring and einsum:
  B rows of a batch, or slots of the sampler    S cache length
  G group size (trajectories of one task)       V vocabulary
  K turns of a trajectory                       L layers
  T tokens of a row                             D model width
  R response positions of a row                 N query heads
  M key/value heads                             H head width

Turns and trajectories live on the host and hold NumPy arrays; `Batch` and
`TrainState` are pytrees that live on the devices.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import numpy as np

Array = jax.Array | np.ndarray
Params = Any  # A pytree of arrays.
Device = Any  # `jax.Device`, which type checkers take for a variable.


@dataclasses.dataclass(frozen=True)
class Attempt:
  """One sampled response of a turn, kept or discarded.

  Attributes:
    tokens: [T] int32, response token ids, the stop string included.
    logprobs: [T] float32, log-probability of each token under the tempered
      model distribution, before top-k/top-p/min-p; 0 where forced.
    uncertainty: [T] float32, M_t in [0, 1] (for `released`, unbounded).
    entropy: [T] float32, nats.
    confidence: [T] float32, nats.
    forced: [T] bool, tokens forced by the thinking intervention.
    text: the decoded response.
    finish: "stop", "length" or "eos".
    fired_at: token index of the intervention, -1 if it did not fire.
    thinking_tokens: tokens until the thinking segment was closed.
    phi: turn score, the signal's mean of M_t over sampled tokens: geometric,
      or arithmetic for `released`.
  """

  tokens: np.ndarray
  logprobs: np.ndarray
  uncertainty: np.ndarray
  entropy: np.ndarray
  confidence: np.ndarray
  forced: np.ndarray
  text: str
  finish: str
  fired_at: int
  thinking_tokens: int
  phi: float


@dataclasses.dataclass(frozen=True)
class Turn:
  """One turn: prompt, response and outcome.

  Attributes:
    prompt: [T] int32, prompt token ids.
    response: the attempt that was executed.
    anchor: the raw observation that the turn started from.
    action: the action as executed; empty if there was none.
    reward: the environment's reward of this turn.
    penalty: for an invalid format or action, >= 0; subtracted for learning.
    format_valid: whether the response followed the grammar.
    action_valid: whether the action was well formed and possible.
    phi_change: |Phi^k - Phi^{k-1}|, NaN in the first turn.
    prompt_shortened: whether memory or observation had to be truncated.
    version: the update that produced the sampling parameters; 0 at the start.
    discarded: attempts discarded by turn-level resampling.
    info: metrics of the environment for this step.
  """

  prompt: np.ndarray
  response: Attempt
  anchor: str
  action: str
  reward: float
  penalty: float
  format_valid: bool
  action_valid: bool
  phi_change: float
  prompt_shortened: bool
  version: int = 0
  discarded: tuple[Attempt, ...] = ()
  info: dict[str, float] = dataclasses.field(default_factory=dict)

  @property
  def net_reward(self) -> float:
    """The reward used for learning: reward minus penalty."""
    return self.reward - self.penalty


@dataclasses.dataclass(frozen=True)
class Trajectory:
  """One episode.

  Attributes:
    task_id: the environment's task.
    category: the part of the benchmark it belongs to.
    group: index of the task group in this rollout.
    member: index inside the group, 0 to G - 1.
    turns: the K turns in order.
    success: whether the task was solved.
    aborted: whether the infrastructure failed; excluded from the loss.
  """

  task_id: str
  category: str
  group: int
  member: int
  turns: tuple[Turn, ...]
  success: bool
  aborted: bool = False

  @property
  def episode_return(self) -> float:
    """Undiscounted sum of rewards minus penalties."""
    return float(sum(turn.net_reward for turn in self.turns))


class Batch(flax.struct.PyTreeNode):
  """Packed training rows; masks are 1 = keep.

  Several turns may share a row; `segments` keeps their attention apart.
  Only R gathered response positions per row reach the vocabulary projection:
  position `index[b, r]` of row b predicts token `targets[b, r]`.

  Attributes:
    tokens: [B, T] int32.
    positions: [B, T] int32, position inside the segment, from 0.
    segments: [B, T] int32, 1, 2, ... per packed turn; 0 is padding.
    index: [B, R] int32 into T.
    targets: [B, R] int32 token ids.
    mask: [B, R] float32, 1 for sampled tokens; forced and padding are 0.
    turn: [B, R] int32, index of the turn in the rollout, for per-turn
      aggregation; -1 is padding.
    advantages: [B, R] float32.
    sampler_logprobs: [B, R] float32, as recorded while sampling.
    old_logprobs: [B, R] float32, of the policy that the ratio is against.
    ref_logprobs: [B, R] float32, of the reference policy; 0 when unused.
    old_values: [B, R] float32, by the critic before the update; 0 without one.
    value_targets: [B, R] float32, the critic's targets; NaN without one.
  """

  tokens: Array
  positions: Array
  segments: Array
  index: Array
  targets: Array
  mask: Array
  turn: Array
  advantages: Array
  sampler_logprobs: Array
  old_logprobs: Array
  ref_logprobs: Array
  old_values: Array
  value_targets: Array


class TrainState(flax.struct.PyTreeNode):
  """The learner's state, carried from update to update.

  Attributes:
    step: number of optimizer steps taken.
    params: float32 master weights of the policy, or of its adapters.
    opt_state: the optimizer's state.
    critic: float32 parameters of the critic; None without one.
  """

  step: Array
  params: Params
  opt_state: Any
  critic: Params | None = None
