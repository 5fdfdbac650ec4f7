"""Turn-level dynamical sampling (TDS, arXiv 2605.02178): when to try again.

A turn whose score Phi hardly differs from the turn before explores nothing
new: its response is discarded and sampled again from the same state, up to
B_max times. After the last try the last response stands.

A small change of Phi is the paper's sign of a turn that explores nothing new.
Ours, for comparison, is the plain one: the same action from the same
observation as at the turn before (`SIGNS`).

Works on numbers as well as on numpy or JAX arrays. Differences from the
paper's released code: the score is read from the decode state, never from a
table that goes stale, for responses of any length, and the caller asks only
for trajectories that are still running.
"""

from t2po_jax import types

Scalars = float | types.Array
# What asks for another try: a small change of Phi, a repeated action, or both.
SIGNS = ("phi", "action", "both")


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
    change: Gamma^k, from `phi_change`.
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
  asked = {"phi": still, "action": repeated, "both": still & repeated}[sign]
  return asked & (tries < max_tries)
