"""Generalised advantage estimation with a critic (arXiv 1506.02438)."""

import dataclasses

import numpy as np

from t2po_jax import keys
from t2po_jax.learning.estimators import episodes


@dataclasses.dataclass(frozen=True)
class TurnOptions(episodes.Discounted):
  """Options of `gae_turn`."""

  gae_lambda: float = keys.key(
    0.95, "lambda from one turn to the next.", least=0, most=1
  )
  whiten: bool = keys.key(True, "Whiten the advantages.")


@dataclasses.dataclass(frozen=True)
class TokenOptions(TurnOptions):
  """Options of `gae`."""

  token_discount: float = keys.key(
    1.0, "gamma from a token of a turn to the next.", least=0, most=1
  )
  token_gae_lambda: float = keys.key(
    1.0, "lambda from a token of a turn to the next.", least=0, most=1
  )


def gae(
  data: episodes.Episodes,
  *,
  discount: float = 1.0,
  gae_lambda: float = 0.95,
  token_discount: float = 1.0,
  token_gae_lambda: float = 1.0,
  whiten: bool = True,
) -> episodes.Advantages:
  """Generalised advantage of every token, across turns (arXiv 1506.02438).

  A_t = delta_t + gamma lambda A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t over
  the response tokens of the whole episode in order. A turn's reward arrives at
  its last token; the step from there to the next turn has its own gamma and
  lambda. The value after the last turn is 0.

  Args:
    data: the episodes, with values.
    discount: gamma from one turn to the next.
    gae_lambda: lambda from one turn to the next.
    token_discount: gamma inside a turn.
    token_gae_lambda: lambda inside a turn.
    whiten: whether to whiten the advantages over all sampled tokens; the
      targets are not affected.

  Returns:
    One value per token, and the critic's targets A + V.

  Raises:
    ValueError: if the values are missing.
  """
  values = episodes.required(data.values, "values", "gae")
  tokens, targets = [], []
  for e, kept in enumerate(data.counted):
    lengths = [len(v) for v in values[e]]
    border = np.cumsum(lengths, dtype=int)
    flat = np.concatenate([np.zeros(0), *values[e]])
    rewards = np.zeros(len(flat))
    gamma = np.full(len(flat), token_discount, float)
    decay = np.full(len(flat), token_gae_lambda, float)
    rewards[border - 1] = data.rewards[e]
    gamma[border - 1] = discount
    decay[border - 1] = gae_lambda
    advantages = _accumulate(rewards, flat, gamma, decay)
    tokens.append(_split(advantages if kept else np.zeros(len(flat)), border))
    targets.append(_split(advantages + flat, border))
  tokens = tuple(tokens)
  if whiten:
    tokens = episodes.whiten_tokens(tokens, data)
  turns = tuple(
    np.array([np.mean(turn) for turn in of_turns]) for of_turns in tokens
  )
  return episodes.Advantages(
    turns, episodes.group_metrics(data), tokens, tuple(targets)
  )


def gae_turn(
  data: episodes.Episodes,
  *,
  discount: float = 0.95,
  gae_lambda: float = 0.95,
  whiten: bool = True,
) -> episodes.Advantages:
  """Generalised advantage with a whole turn as one action.

  The value of a turn is the critic's value at its first response token;
  discount and lambda are per turn.

  Args:
    data: the episodes, with values.
    discount: gamma, per turn.
    gae_lambda: lambda, per turn.
    whiten: whether to whiten the advantages.

  Returns:
    One value per turn, and a target at the first token of each turn.

  Raises:
    ValueError: if the values are missing.
  """
  values = episodes.required(data.values, "values", "gae_turn")
  turns, targets = [], []
  for e, kept in enumerate(data.counted):
    first = np.array([turn[0] for turn in values[e]], float)
    same = np.ones(len(first))
    advantages = _accumulate(
      data.rewards[e], first, discount * same, gae_lambda * same
    )
    turns.append(advantages if kept else np.zeros(len(first)))
    of_turns = [np.full(len(turn), np.nan) for turn in values[e]]
    for k, target in enumerate(advantages + first):
      of_turns[k][0] = target
    targets.append(tuple(of_turns))
  turns = tuple(turns)
  if whiten:
    turns = episodes.whiten_turns(turns, data, data.counted)
  return episodes.Advantages(
    turns, episodes.group_metrics(data), targets=tuple(targets)
  )


ESTIMATORS = {
  "gae": episodes.Estimator(gae, TokenOptions, frozenset({"values"})),
  "gae_turn": episodes.Estimator(gae_turn, TurnOptions, frozenset({"values"})),
}


def _accumulate(
  rewards: np.ndarray, values: np.ndarray, gamma: np.ndarray, decay: np.ndarray
) -> np.ndarray:
  """A_t = r_t + g_t V_{t+1} - V_t + g_t l_t A_{t+1}, with V, A 0 at the end."""
  result = np.zeros(len(values))
  next_value = future = 0.0
  for t in reversed(range(len(values))):
    delta = rewards[t] + gamma[t] * next_value - values[t]
    future = delta + gamma[t] * decay[t] * future
    result[t], next_value = future, values[t]
  return result


def _split(flat: np.ndarray, border: np.ndarray) -> tuple[np.ndarray, ...]:
  """Splits the tokens of an episode into its turns."""
  return tuple(np.split(flat, border[:-1])) if len(border) else ()
