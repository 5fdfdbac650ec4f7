"""Turns in rows, random log-probs and a loop over sampled places."""

import numpy as np

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
