"""Gymnasium's toy text games for tiny models: Taxi in words, and an expert.

Functions for `env.describe` and `env.expert`. The expert uses the transition
table of Taxi, CliffWalking or FrozenLake without slipping.
"""

import collections
import random
from typing import Any

# Taxi's actions in Gymnasium's order.
TAXI = ("south", "north", "east", "west", "pickup", "dropoff")
_STOPS = ("0 0", "0 4", "4 0", "4 3")


def describe_taxi(env: Any, observation: Any) -> str:
  """Where the taxi, its passenger and the destination are."""
  row, column, passenger, goal = env.unwrapped.decode(int(observation))
  place = "in" if passenger == len(_STOPS) else _STOPS[passenger]
  return f"taxi {row} {column} passenger {place} goal {_STOPS[goal]}"


def expert(env: Any, draw: random.Random) -> str:
  """The first action of a shortest path to a rewarded terminal state.

  Args:
    env: an environment whose table `P` gives (chance, state, reward, done) for
      every state and action.
    draw: random generator, used where there is no path.
  """
  table, names = env.unwrapped.P, _names(env)
  start = int(env.unwrapped.s)
  first: dict[int, int] = {start: -1}
  queue = collections.deque([start])
  while queue:
    here = queue.popleft()
    for action in range(len(names)):
      _, there, reward, done = table[here][action][0]
      action = action if first[here] < 0 else first[here]
      if done and reward > 0:
        return names[action]
      if not done and there not in first:
        first[there] = action
        queue.append(there)
  return draw.choice(names)


def _names(env: Any) -> tuple[str, ...]:
  """The names of the actions, in the library's order."""
  if env.action_space.n == len(TAXI):
    return TAXI
  if env.spec is not None and env.spec.id.startswith("FrozenLake"):
    return ("left", "down", "right", "up")
  return ("up", "right", "down", "left")
