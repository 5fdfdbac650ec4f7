"""Tunix's agentic GRPO learner on the slow toy, for `whole_loop.py`.

Started as `whole_loop_tunix.py SETTINGS` by an interpreter that has Tunix, it
trains and answers with one line: the seconds of every update. The model has the
same sizes as ours. Episodes have the same tasks, turns and response tokens, and
all of them are in progress at once. Tunix's learner takes the whole dialogue as
one sequence; a tokenizer of words keeps it as short as it can be.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import itertools
import json
import os
import sys
import time
from typing import Any

import jax
import numpy as np
import optax

from t2po_jax.envs import toy
from t2po_jax.experiments.benchmarks import slow_toy

# Tokens of an observation: a category and a word.
SHOWN = 2
# Responses whose step never answers.
HUNG: list[Any] = []
_WORDS = (*toy.CATEGORIES, *toy.COLOURS, "over")


class Words:
  """A tokenizer with one token per word, as Tunix asks for one."""

  def encode(self, text: str, **kwargs: Any) -> list[int]:
    """Ids; those of sampled words stand in their names."""
    del kwargs
    return [
      _WORDS.index(word) + 1 if word in _WORDS else int(word[1:])
      for word in text.split()
    ]

  def decode(self, ids: Sequence[int], **kwargs: Any) -> str:
    """One word per id."""
    del kwargs
    return " ".join(f"w{i}" for i in ids)

  def bos_id(self) -> int:
    """0: there is none."""
    return 0

  def eos_id(self) -> int:
    """Never sampled: every response has all its tokens."""
    return -1

  def pad_id(self) -> int:
    """0."""
    return 0


class Plain:
  """A chat template that adds nothing."""

  def parse(
    self,
    messages: Sequence[dict[str, str]],
    add_generation_prompt: bool = False,
    is_first_msg: bool = False,
  ) -> str:
    """The messages' words."""
    del add_generation_prompt, is_first_msg
    return " ".join(message["content"] for message in messages)


def game() -> Any:
  """Tunix's environment of the slow toy."""
  from tunix.rl.agentic.environments import base_environment

  class Game(base_environment.BaseTaskEnv):
    """The slow toy as Tunix plays it."""

    def __init__(
      self,
      single_example: dict[str, Any],
      *,
      benchmark: slow_toy.SlowToy,
      turns: int,
      **kwargs: Any,
    ) -> None:
      super().__init__(single_example, max_steps=turns, **kwargs)
      self._env = benchmark.env()

    def _initial_observation(self) -> str:
      seen = self._env.reset(str(np.ravel(self.task["prompts"])[0]))
      return f"{seen.task} {seen.text}"

    def _step_impl(self, action: Any) -> base_environment.EnvStepResult:
      if self._env.seconds(str(action)) == float("inf"):
        HUNG.append(action)
      result = self._env.step(str(action))
      seen = result.observation
      return base_environment.EnvStepResult(
        f"{seen.task} {seen.text}", result.reward, result.done, {}
      )

  return Game


def rollout() -> Any:
  """Tunix's sampler as its learner asks for one."""
  from tunix.rl.rollout import base_rollout, vanilla_rollout

  class Rollout(vanilla_rollout.VanillaRollout):
    """Tunix's sampler with a new seed per response: else all are alike."""

    def __init__(
      self, rollout_actor: Any, tokenizer: Any, mesh: Any, rollout_config: Any
    ) -> None:
      del mesh
      shape = rollout_actor.config
      super().__init__(
        rollout_actor,
        tokenizer,
        base_rollout.CacheConfig(
          cache_size=rollout_config.kv_cache_size,
          num_layers=shape.num_layers,
          num_kv_heads=shape.num_kv_heads,
          head_dim=shape.head_dim,
        ),
      )
      self._seeds = itertools.count()

    def generate(
      self,
      prompts: list[str],
      rollout_config: base_rollout.RolloutConfig,
      **kwargs: Any,
    ) -> base_rollout.RolloutOutput:
      """Responses to some prompts."""
      seed: Any = next(self._seeds)
      config = dataclasses.replace(rollout_config, seed=seed)
      return super().generate(prompts, config, **kwargs)

  return Rollout


def learner() -> Any:
  """Tunix's learner."""
  from tunix.rl.agentic import agentic_grpo_learner
  from tunix.rl.rollout import base_rollout

  class Learner(agentic_grpo_learner.GRPOLearner):
    """Tunix's learner with a limit per response, not only per episode."""

    tokens = 0

    def _model_call(
      self,
      chat_lists: Any,
      env: Any = None,
      max_generation_steps: int | None = None,
    ) -> base_rollout.RolloutOutput:
      limit = min(self.tokens, max_generation_steps or self.tokens)
      return super()._model_call(chat_lists, env, limit)

  return Learner


def build(told: dict[str, Any]) -> Any:
  """The learner of some settings, see `whole_loop.time_tunix`."""
  from flax import nnx
  from tunix.models.llama3 import model as llama
  from tunix.rl import rl_cluster
  from tunix.rl.agentic import agentic_grpo_learner
  from tunix.rl.rollout import base_rollout

  shape, turns, tokens = told["model"], told["turns"], told["tokens"]
  model = llama.Llama3(
    llama.ModelConfig(
      num_layers=shape["layers"],
      vocab_size=shape["vocab_size"],
      embed_dim=shape["width"],
      hidden_dim=shape["mlp_width"],
      num_heads=shape["heads"],
      head_dim=shape["head_width"],
      num_kv_heads=shape["kv_heads"],
      rope_theta=int(shape["rope_theta"]),
      norm_eps=shape["norm_eps"],
      weight_tying=shape["tied_embeddings"],
    ),
    rngs=nnx.Rngs(0),
  )
  tasks, group = len(told["batches"][0]), told["group_size"]
  said = turns * tokens + (turns - 1) * SHOWN + 1
  roles, parts = rl_cluster.Role, np.array(jax.devices()[:1]).reshape(1, 1)
  mesh = jax.sharding.Mesh(parts, ("fsdp", "tp"))
  cluster = rl_cluster.RLCluster(
    actor=model,
    tokenizer=Words(),
    cluster_config=rl_cluster.ClusterConfig(
      role_to_mesh=dict.fromkeys(
        (roles.ACTOR, roles.ROLLOUT, roles.REFERENCE), mesh
      ),
      rollout_engine=rollout(),
      training_config=rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.chain(
          optax.clip_by_global_norm(told["clip_norm"]),
          optax.adamw(told["learning_rate"], weight_decay=0.0),
        ),
        eval_every_n_steps=1 << 30,
        mini_batch_size=tasks,
        train_micro_batch_size=tasks,
      ),
      rollout_config=base_rollout.RolloutConfig(
        max_tokens_to_generate=said,
        temperature=1.0,
        max_prompt_length=8,
        # A later prompt is padded to a power of two.
        kv_cache_size=2 * (said + SHOWN) + tokens,
        return_logprobs=True,
      ),
    ),
  )
  benchmark = slow_toy.SlowToy(slow_toy.Settings(**told["env"]))
  made = learner()(
    cluster,
    agentic_grpo_learner.GRPOConfig(
      num_generations=group,
      beta=0.0,
      max_response_length=said,
      max_concurrency=tasks * group,
      episode_timeout=turns * told["limit"] or 1e6,
    ),
    chat_parser=Plain(),
    env_class=game(),
    env_kwargs={"benchmark": benchmark, "turns": turns},
  )
  made.tokens = tokens
  return made


def main(told: dict[str, Any]) -> None:
  """Trains on all batches and prints what it took."""
  # Libraries print; the answer goes where they cannot.
  answers, sys.stdout = sys.stdout, sys.stderr
  made, taken = build(told), []

  def batches() -> Iterator[dict[str, list[str]]]:
    """One is asked for when the update before has ended."""
    for batch in told["batches"]:
      taken.append(time.perf_counter())
      yield {"prompts": batch}
    taken.append(time.perf_counter())

  made.train(batches())
  answer = {
    "seconds": np.diff(taken).tolist(),
    "aborted": len(HUNG) / len(told["batches"]),
  }
  print(json.dumps(answer), file=answers, flush=True)
  os._exit(0)  # Threads of steps that hang would keep it.


if __name__ == "__main__":
  main(json.loads(sys.argv[1]))
