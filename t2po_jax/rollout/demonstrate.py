"""Episodes of an environment's scripted expert, as prompts and responses.

The prompts are exactly those that the policy will see, so that supervised
fine-tuning on the pairs is a cold start for the rollout loop.
"""

from collections.abc import Callable, Sequence

import numpy as np

from t2po_jax.envs import base
from t2po_jax.models import tokenizer as tokenizer_lib
from t2po_jax.rollout import collect

Pair = tuple[np.ndarray, np.ndarray]


def demonstrate(
  benchmark: base.Benchmark,
  tokenizer: tokenizer_lib.Tokenizer,
  rules: collect.Rules,
  tasks: Sequence[str],
  *,
  seed: int,
  only_successes: bool = False,
  progress: Callable[[int], None] = lambda count: None,
) -> tuple[list[Pair], float]:
  """Plays the expert once on every task.

  Args:
    benchmark: what is played.
    tokenizer: of the policy to be trained.
    rules: memory, lengths and the prefix of responses.
    tasks: task ids; repetitions are played with different seeds.
    seed: of the expert's choices.
    only_successes: whether to leave out episodes in which the expert failed.
    progress: called with the number of finished episodes.

  Returns:
    (prompt ids [T], response ids [T]) of every turn in order, and the expert's
    success rate. Responses longer than `rules.max_response` are truncated, as
    the policy's would be.
  """
  env, pairs, solved = benchmark.env(), [], 0
  for number, task_id in enumerate(tasks):
    observation, memory, done = env.reset(task_id), [], False
    episode = []
    expert = env.expert(seed * len(tasks) + number)
    while not done:
      view = observation.view(
        memory, memory=rules.memory, max_turns=benchmark.max_turns
      )
      prompt, _ = collect.next_prompt(
        benchmark,
        tokenizer,
        view,
        rules,
        before=episode[-1] if episode else None,
      )
      text = expert.respond()
      response = tokenizer.encode(text.removeprefix(rules.prefix))
      response = np.asarray(response[: rules.max_response], np.int32)
      episode.append((prompt, response))
      result = env.step(rules.prefix + tokenizer.decode(response.tolist()))
      memory.append((observation.text, result.action))
      observation, done = result.observation, result.done
    solved += result.success
    if result.success or not only_successes:
      pairs += episode
    progress(number + 1)
  env.close()
  return pairs, solved / max(len(tasks), 1)
