"""Turn-level dynamical sampling (TDS, arXiv 2605.02178): when to try again.

A turn whose score Phi hardly differs from the turn before explores nothing
new: its response is discarded and sampled again from the same state, up to
B_max times. After the last try the last response stands.

A small change of Phi is the paper's sign of a turn that explores nothing new.
Two of ours, for comparison (`SIGNS`): the plain one, the same action from the
same observation as at the turn before; and how sure a response is, exp(-H) with
H its mean token entropy, where the least sure ones are sampled again
(docs/study.md compares how well the signs tell useless turns from the others).

Works on numbers as well as on numpy or JAX arrays. Differences from the
paper's released code: the score is read from the decode state, never from a
table that goes stale, for responses of any length, and the caller asks only
for trajectories that are still running.
"""

import numpy as np

from t2po_jax import types

Scalars = float | types.Array
# What asks for another try: a small change of Phi, a repeated action, both of
# them, or an unsure response.
SIGNS = ("phi", "action", "both", "unsure")


def phi_change(phi: Scalars, previous_phi: Scalars) -> Scalars:
  """Gamma^k = |Phi^k - Phi^{k-1}|.

  Args:
    phi: score of the response under judgement.
    previous_phi: score of the response that stood at the turn before; NaN at
      the first turn.

  Returns:
    The change; NaN at the first turn.
  """
  return abs(phi - previous_phi)


def sureness(entropy: np.ndarray, forced: np.ndarray) -> float:
  """How sure a response is: exp of minus its mean token entropy.

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
  """Whether a response is discarded: 0 < Gamma^k < eta and a try is left.

  A change of exactly 0 (the same response again) does not ask for another try,
  and NaN (the first turn) never does.

  Args:
    change: Gamma^k, from `phi_change`; with the sign `unsure`, `sureness`.
    eta: threshold; 0 turns resampling off.
    tries: responses of this turn discarded so far.
    max_tries: B_max, discarded responses a turn may have; 0 turns it off.
    sign: one of `SIGNS`; `action` looks at `repeated` alone, and needs no
      turn score.
    repeated: whether the response does what the turn before did, from the
      same observation.

  Returns:
    Bool, or an array of bool.
  """
  still = (change > 0) & (change < eta)
  asked = {"action": repeated, "both": still & repeated}.get(sign, still)
  return asked & (tries < max_tries)
