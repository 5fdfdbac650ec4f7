"""Turn-level dynamical sampling (TDS, arXiv 2605.02178): when to resample.

A turn whose score Phi hardly differs from the turn before explores nothing
new: its response is discarded and sampled again from the same state, up to
B_max times. After the last attempt the last response is kept.

A small change of Phi is the paper's sign of a turn that explores nothing new.
Two signs of our own are there for comparison (`SIGNS`): the same action from
the same observation as in the previous turn, and the confidence of a response,
exp(-H) with H its mean token entropy, where the least confident responses are
resampled (docs/study.md compares how well each sign detects useless turns).

Works on floats as well as on NumPy or JAX arrays. Differences from the paper's
released code: the score comes from the decode state, never from a table that
goes stale; responses may have any length; and only trajectories that are still
running are resampled.
"""

import numpy as np

from t2po_jax import types

Scalars = float | types.Array
# What triggers resampling: a small change of Phi, a repeated action, both of
# them, or an uncertain response.
SIGNS = ("phi", "action", "both", "unsure")


def phi_change(phi: Scalars, previous_phi: Scalars) -> Scalars:
  """Gamma^k = |Phi^k - Phi^{k-1}|.

  Args:
    phi: score of the response in question.
    previous_phi: score of the response kept in the previous turn; NaN in the
      first turn.

  Returns:
    The change; NaN in the first turn.
  """
  return abs(phi - previous_phi)


def confidence(entropy: np.ndarray, forced: np.ndarray) -> float:
  """The confidence of a response: exp(-H), H its mean token entropy.

  Args:
    entropy: [T] nats.
    forced: [T] bool, tokens that were not sampled and do not count.

  Returns:
    In (0, 1]; NaN without a sampled token.
  """
  sampled = entropy[~forced]
  return float(np.exp(-np.mean(sampled))) if sampled.size else float("nan")


def should_resample(
  change: Scalars,
  *,
  eta: Scalars,
  tries: int | types.Array,
  max_tries: int,
  sign: str = "phi",
  repeated: bool | types.Array = False,
) -> bool | types.Array:
  """Whether a response is discarded: 0 < Gamma^k < eta, and tries remain.

  A change of exactly 0 (the same response again) does not trigger resampling,
  nor does NaN (the first turn).

  Args:
    change: Gamma^k, from `phi_change`; with the sign `unsure`, `confidence`.
    eta: threshold; 0 turns resampling off.
    tries: responses of this turn discarded so far.
    max_tries: B_max, how many responses of a turn may be discarded; 0 turns
      resampling off.
    sign: one of `SIGNS`; `action` only considers `repeated` and needs no turn
      score.
    repeated: whether the response repeats the action of the previous turn from
      the same observation.

  Returns:
    Bool, or an array of bool.
  """
  still = (change > 0) & (change < eta)
  detected = {"action": repeated, "both": still & repeated}.get(sign, still)
  return detected & (tries < max_tries)
