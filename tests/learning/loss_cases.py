"""Turns in rows, random log-probs and a loop over sampled places."""

import numpy as np

from t2po_jax import types

# Five turns of 3, 2, 4, 1 and 0 sampled tokens; the last but one row holds
# two of them, the last row is padding.
TURN = np.array(
  [
    [0, 0, 0, 0, 1, 1, 1],
    [2, 2, 2, 2, -1, -1, -1],
    [3, 3, 4, 4, -1, -1, -1],
    [-1] * 7,
  ]
)
MASK = np.array(
  [
    [1, 1, 0, 1, 0, 1, 1],
    [1, 1, 1, 1, 0, 0, 0],
    [0, 1, 0, 0, 0, 0, 0],
    [0] * 7,
  ],
  "f4",
)
SIZES = {0: 3, 1: 2, 2: 4, 3: 1}


def batch(seed=0, spread=0.5):
  """Log-probs, old log-probs and advantages; rubbish outside the mask."""
  rng = np.random.default_rng(seed)
  logprobs = rng.uniform(-4, 0, MASK.shape).astype("f4")
  old = logprobs - rng.normal(0, spread, MASK.shape).astype("f4")
  advantages = rng.normal(size=MASK.shape).astype("f4")
  for array in (logprobs, old):
    array[MASK == 0] = rng.choice([np.nan, np.inf, -np.inf])
  advantages[MASK == 0] = 1e6
  return logprobs, old, advantages


def loop(function):
  """Fills [B, R] from a function of each sampled place."""
  result = np.zeros(MASK.shape)
  for place in zip(*np.nonzero(MASK), strict=True):
    result[place] = function(place)
  return result


def full_batch(old, advantages):
  """The fields of a batch that an objective looks at; the rest is empty."""
  zeros = np.zeros(MASK.shape, "f4")
  return types.Batch(
    tokens=zeros,
    positions=zeros,
    segments=zeros,
    index=zeros,
    targets=zeros,
    mask=MASK,
    turn=TURN,
    advantages=advantages,
    sampler_logprobs=old + np.float32(1e-3),
    old_logprobs=old,
    ref_logprobs=old,
    old_values=zeros,
    value_targets=zeros,
  )
