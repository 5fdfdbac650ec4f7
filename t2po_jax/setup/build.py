"""Builds the parts of a run from its configuration.

The only place that translates config keys into plain arguments; `validate.py`
has checked them before.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import types as python_types
from typing import Any

import jax
import jax.numpy as jnp

from t2po_jax import envs, files, keys, types
from t2po_jax.configs import base as settings
from t2po_jax.control import thinking, thresholds, uncertainty
from t2po_jax.distributed import sharding
from t2po_jax.envs import base
from t2po_jax.learning import (
  collapse_guard,
  estimators,
  kl_control,
  learner,
  lora,
  objectives,
  optimizers,
  policy_losses,
)
from t2po_jax.learning.estimators import episodes, modulation
from t2po_jax.models import agent as agents
from t2po_jax.models import config as model_config
from t2po_jax.models import critic as critics
from t2po_jax.models import decoder, tokenizer, weights
from t2po_jax.rollout import actor as actors
from t2po_jax.rollout import (
  collect,
  draw,
  environments,
  penalties,
  sampler,
  scheduler,
  slots,
  workers,
)

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# How an estimator's baseline episodes are sampled.
GREEDY = draw.Sampling(temperature=0.0)


def cache_dir(config: settings.Config) -> pathlib.Path:
  """The folder of cold starts, indexes and compiled programs."""
  given = config.cache_dir or os.environ.get("T2PO_CACHE", "")
  place = pathlib.Path(given or "~/.cache/t2po_jax").expanduser()
  try:
    place.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(
      f"cache_dir: {place} cannot be created ({error.strerror}); name a "
      "folder that can be written"
    ) from None
  return place


def keep_programs(config: settings.Config) -> None:
  """Turns on JAX's persistent compilation cache, inside `cache_dir`."""
  place = str(cache_dir(config) / "compiled")
  jax.config.update("jax_compilation_cache_dir", place)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def fingerprint(*parts: Any) -> str:
  """A short hash of settings."""

  def plain(part: Any) -> Any:
    return settings.to_dict(part) if dataclasses.is_dataclass(part) else part

  text = json.dumps([plain(part) for part in parts], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def benchmark(config: settings.Config) -> base.Benchmark:
  """Makes the benchmark that `config.env` describes.

  Files that the benchmark creates go to the run's cache, unless `env.cache_dir`
  is set.

  Raises:
    ValueError: if a split is missing or empty.
  """
  made = recipe(config)()
  chosen = {"train.split": config.train.split, "eval.split": config.eval.split}
  for key, split in chosen.items():
    if not made.splits.get(split):
      raise ValueError(
        f"{key}: split {split!r} is missing or empty, expected one of "
        f"{', '.join(s for s, tasks in made.splits.items() if tasks)}"
      )
  return made


def agent(config: settings.Config, made: base.Benchmark | None) -> agents.Agent:
  """Makes the policy that `config.model` describes, before any training.

  A model from scratch gets a tokenizer trained on the benchmark's own text;
  both are determined by the configuration.

  Args:
    config: the run's configuration.
    made: the benchmark; only a model from scratch needs it, for its text.
  """
  model, params = config.model, None
  tokens = tokenizer_of(config, made)
  if model.source == "scratch":
    shape = dataclasses.replace(
      model_config.named(model.size), vocab_size=tokens.vocab_size
    )
  else:
    shape, params = weights.load(model.source)
  policy = decoder.Policy(
    shape,
    dtype=DTYPES[model.dtype],
    remat=model.remat,
    scan_layers=model.scan_layers,
  )
  if params is None:
    params = jax.jit(policy.init)(jax.random.key(config.seed))
  return agents.Agent(policy, params, tokens)


def tokenizer_of(
  config: settings.Config, made: base.Benchmark | None
) -> tokenizer.Tokenizer:
  """Makes only the policy's tokenizer; arguments as in `agent`."""
  model = config.model
  if model.source != "scratch":
    return tokenizer.load(model.source, template_arguments(config, made))
  if made is None:
    raise TypeError("a model from scratch needs the benchmark's text")
  symbols = ["<think>", "</think>", "\n"]
  for tag in made.grammar.actions:
    symbols += [f"<{tag}>", f"</{tag}>"]
  corpus = made.corpus()
  place = cache_dir(config) / "tokenizers"
  place /= fingerprint(corpus, symbols, model.vocab_size)
  with files.writing(place):
    return tokenizer.train_sentencepiece(
      corpus, model.vocab_size, symbols, place
    )


def template_arguments(
  config: settings.Config, made: base.Benchmark | None
) -> dict[str, Any]:
  """Arguments of the chat template: `model.template_arguments`, and tools.

  Raises:
    ValueError: if the key is not a JSON object.
  """
  text = config.model.template_arguments
  try:
    arguments = json.loads(text)
  except ValueError:
    arguments = None
  if not isinstance(arguments, dict):
    raise ValueError(
      f"model.template_arguments: found {text!r}, expected a JSON object such "
      'as {"enable_thinking": false}'
    )
  tools = made.grammar.schemas() if made is not None else []
  return {"tools": tools, **arguments} if tools else arguments


def control(config: settings.Config) -> slots.Control:
  """The exploration control's settings for the decode loop."""
  c = config.control
  signal = uncertainty.SIGNALS[c.signal]
  return slots.Control(
    signal=c.signal,
    settings=keys.select(signal.options, c),
    top_j=c.top_j,
    tempered=c.tempered,
    intervention=thinking.ThinkingConfig(
      enabled=c.thinking.enabled,
      rule=signal.rule,
      window=c.thinking.window,
      min_tokens=c.thinking.min_tokens,
      max_tokens=c.thinking.max_tokens,
      require_past_peak=c.thinking.require_past_peak,
    ),
  )


def actor(
  config: settings.Config, made: base.Benchmark, which: agents.Agent
) -> actors.Actor:
  """Makes sampler and environments; the sampler has no parameters yet."""
  tokens = which.tokenizer
  text = config.control.thinking.closing or made.grammar.closing
  closing = tuple(tokens.encode(text))
  if tokens.decode(closing) != text:
    raise ValueError(
      f"tokenizer of {config.model.source!r}: {text!r} decodes "
      f"as {tokens.decode(closing)!r}; the thinking intervention needs it exact"
    )
  device = device_sampler(
    config,
    which.policy,
    sampler.Vocabulary(
      token_bytes=tokens.token_bytes(),
      eos=tokens.eos_ids,
      closing=closing,
      stops=made.grammar.stops,
    ),
    sampling_mesh(config),
  )
  pool = environment_pool(config, made)
  host = scheduler.Scheduler(device, exact=config.rollout.one_size)
  return actors.Actor(made, pool, tokens, device, host)


def device_sampler(
  config: settings.Config,
  policy: decoder.Policy,
  vocabulary: sampler.Vocabulary,
  where: jax.sharding.Mesh,
  *,
  abstract: bool = False,
) -> sampler.Sampler:
  """Makes the sampler; with `abstract` nothing is allocated."""
  rollout = config.rollout
  return sampler.Sampler(
    policy,
    vocabulary,
    control(config),
    slots=rollout.slots,
    max_prompt=rollout.max_prompt,
    max_response=rollout.max_response,
    chunk=rollout.chunk,
    prefill_tokens=(
      rollout.max_prompt if rollout.one_size else rollout.prefill_tokens
    ),
    prefill_rows=1 if rollout.one_size else rollout.prefill_rows,
    live_tokens=(
      rollout.max_prompt + rollout.max_response
      if rollout.one_size
      else rollout.live_tokens
    ),
    mesh=where,
    abstract=abstract,
  )


def abstract_sampler(
  config: settings.Config, policy: decoder.Policy, where: jax.sharding.Mesh
) -> sampler.Sampler:
  """The sampler of a run for describing its programs: allocates nothing.

  Its vocabulary is made up, with tags as long as real ones.
  """
  size = policy.config.vocab_size
  vocabulary = sampler.Vocabulary(
    token_bytes=[bytes([number % 256]) for number in range(size)],
    eos=(0,),
    closing=(1, 2, 3),
    stops=("</action>",),
  )
  return device_sampler(config, policy, vocabulary, where, abstract=True)


def sampling_mesh(
  config: settings.Config, devices: Sequence[types.Device] | None = None
) -> jax.sharding.Mesh:
  """The sampler's mesh: as many of the process's devices as can be used.

  Groups of `rollout.tensor` devices divide the slots evenly. With
  `mesh.rollout_devices` these are the last of the process.

  Args:
    config: the run's.
    devices: of the process; by default of this one.

  Raises:
    ValueError: if the devices cannot be grouped.
  """
  rollout = config.rollout
  devices = jax.local_devices() if devices is None else list(devices)
  # The last ones, all if there is no split.
  devices = devices[-config.mesh.rollout_devices :]
  groups, rest = divmod(len(devices), rollout.tensor)
  if rest:
    raise ValueError(
      f"rollout.tensor: found {rollout.tensor}, expected a divisor of "
      f"{len(devices)}, the devices of this process"
    )
  data = math.gcd(groups, rollout.slots)
  return sharding.create_mesh(
    data=data,
    fsdp=1,
    tensor=rollout.tensor,
    devices=devices[: data * rollout.tensor],
  )


def environment_pool(
  config: settings.Config, made: base.Benchmark
) -> environments.Pool:
  """Makes the environments: in this thread, in threads or worker processes.

  Raises:
    ValueError: if threads were requested and the environment is not
      thread-safe.
  """
  rollout = config.rollout
  if rollout.env_workers:
    return workers.WorkerPool(
      recipe(config),
      workers=rollout.env_workers,
      timeout=rollout.env_timeout,
      memory=rollout.env_memory,
    )
  for name, value in (
    ("env_threads", rollout.env_threads),
    ("env_timeout", rollout.env_timeout),
  ):
    if value and not made.threadsafe:
      raise ValueError(
        f"rollout.{name}: found {value}, but {config.env.name} with "
        "these settings is not safe between threads; expected 0, or "
        "rollout.env_workers of at least 1"
      )
  return environments.EnvironmentPool(
    made.env, threads=rollout.env_threads, timeout=rollout.env_timeout
  )


def recipe(config: settings.Config) -> Callable[[], base.Benchmark]:
  """A picklable function that makes the benchmark, here or in a worker."""
  arguments = dict(config.env.arguments)
  if arguments.get("cache_dir") == "":
    arguments["cache_dir"] = str(cache_dir(config))
  return functools.partial(envs.make, config.env.name, **arguments)


def train_sampling(config: settings.Config) -> draw.Sampling:
  """Sampling settings of training."""
  r = config.rollout
  return draw.Sampling(r.temperature, r.top_k, r.top_p, r.min_p)


def eval_sampling(config: settings.Config) -> draw.Sampling:
  """Sampling settings of evaluation."""
  e = config.eval
  return draw.Sampling(e.temperature, e.top_k, e.top_p)


def samplings(config: settings.Config) -> list[draw.Sampling]:
  """All sampling settings that a run uses, to compile them in advance."""
  used = [train_sampling(config), eval_sampling(config)]
  if "baselines" in estimator(config).needs:
    used.append(GREEDY)
  return used


def rules(
  config: settings.Config,
  sampling: draw.Sampling,
  *,
  epsilon: float = 0.0,
  eta: float = 0.0,
) -> collect.Rules:
  """The rules of episodes, with the given thresholds."""
  return collect.Rules(
    context=config.rollout.context,
    env_calls=config.rollout.env_calls,
    memory=config.rollout.memory,
    max_prompt=config.rollout.max_prompt,
    max_response=config.rollout.max_response,
    prefix=config.rollout.prefix,
    penalties=penalties.Penalties(
      malformed=config.reward.format_penalty,
      impossible=config.reward.invalid_penalty,
      combine=config.reward.penalties,
      overlong=config.reward.overlong_penalty,
      buffer=config.reward.overlong_buffer,
      repeated=config.reward.repeat_penalty,
    ),
    max_tries=config.control.resampling.max_tries,
    epsilon=epsilon,
    eta=eta,
    resample_on=config.control.resampling.sign,
    sampling=sampling,
  )


def calibrators(config: settings.Config) -> Mapping[str, thresholds.Quantile]:
  """The thresholds by name: `epsilon` and `eta`."""
  schedule = config.control.calibration

  def quantile(setting: str, key: str) -> thresholds.Quantile:
    return thresholds.Quantile(
      setting,
      key=key,
      calibrate_after=schedule.rollouts,
      recalibrate_every=schedule.every,
    )

  return python_types.MappingProxyType(
    {
      "epsilon": quantile(
        config.control.thinking.epsilon, "control.thinking.epsilon"
      ),
      "eta": quantile(config.control.resampling.eta, "control.resampling.eta"),
    }
  )


def mesh(
  config: settings.Config, devices: Sequence[types.Device] | None = None
) -> jax.sharding.Mesh:
  """The mesh of the update, over all devices that do not only roll out.

  Raises:
    ValueError: if none is left, or the axes do not fit.
  """
  devices = jax.devices() if devices is None else list(devices)
  apart = config.mesh.rollout_devices
  if apart >= len(devices):
    raise ValueError(
      f"mesh.rollout_devices: found {apart}, expected less than "
      f"{len(devices)}, all devices, so that some are left for updates"
    )
  devices = devices[: len(devices) - apart]
  return sharding.create_mesh(
    data=config.mesh.data,
    fsdp=config.mesh.fsdp,
    tensor=config.mesh.tensor,
    devices=devices,
  )


def _optimizer(
  config: settings.Config, learning_rate: float
) -> optimizers.OptimizerConfig:
  o = config.optimizer
  steps = config.train.updates * config.train.mini_batches * config.train.epochs
  return optimizers.OptimizerConfig(
    learning_rate=learning_rate,
    schedule=o.schedule,
    warmup_steps=o.warmup,
    total_steps=max(steps, 1),
    b1=o.b1,
    b2=o.b2,
    weight_decay=o.weight_decay,
    max_grad_norm=o.clip_norm or float("inf"),
  )


def adapters(
  config: settings.Config, policy: decoder.Policy
) -> lora.Adapters | None:
  """The low-rank adapters to train; None to train all weights."""
  if not config.lora.rank:
    return None
  return lora.Adapters(
    policy,
    rank=config.lora.rank,
    alpha=config.lora.alpha,
    targets=lora.parse_targets(config.lora.targets),
    seed=config.seed,
  )


def objective(config: settings.Config) -> objectives.PolicyObjective:
  """The objective of the policy-gradient update."""
  loss = config.loss
  return objectives.PolicyObjective(
    kind=loss.kind,
    settings=keys.select(policy_losses.POLICY_LOSSES[loss.kind].options, loss),
    aggregation=loss.aggregation,
    horizon=config.rollout.max_response,
    kl=loss.kl,
    kl_coefficient=loss.kl_coefficient,
    entropy_coefficient=loss.entropy_coefficient,
    old_logprobs=loss.old_logprobs,
    importance=loss.importance,
    importance_cap=loss.importance_cap,
    importance_low=loss.importance_low,
    rejection=loss.rejection,
    rejection_low=loss.rejection_low,
    rejection_high=loss.rejection_high,
    temperature=config.rollout.temperature,
    value_coefficient=(
      config.critic.coefficient if config.critic.kind == "trunk" else 1.0
    ),
    value_clip=config.critic.clip or None,
  )


def policy_learner(
  config: settings.Config,
  which: agents.Agent,
  where: jax.sharding.Mesh | None = None,
) -> learner.Learner:
  """The learner of the policy-gradient update; by default on all devices."""
  critic = critic_optimizer = None
  if "values" in estimator(config).needs:
    critic = critics.Critic(which.policy, config.critic.kind)
    critic_optimizer = _optimizer(
      config, config.critic.rate * config.optimizer.learning_rate
    )
  return learner.Learner(
    which.policy,
    decoder.logical_axes(which.params),
    where or mesh(config),
    optimizer=_optimizer(config, config.optimizer.learning_rate),
    objective=objective(config),
    rows=config.train.micro_rows,
    max_kl=config.optimizer.max_kl,
    critic=critic,
    critic_optimizer=critic_optimizer,
    adapters=adapters(config, which.policy),
  )


def kl_controller(config: settings.Config) -> kl_control.KLController:
  """The coefficient of the KL penalty in the reward."""
  return kl_control.KLController(
    config.reward.kl_coefficient,
    target=config.reward.kl_target,
    horizon=config.reward.kl_horizon,
  )


def rate_controller(config: settings.Config) -> kl_control.RateController:
  """Reduces the learning rate when updates move the policy too far."""
  return kl_control.RateController(config.optimizer.target_kl)


def watch(config: settings.Config) -> collapse_guard.Guard:
  """The collapse guard with the configured limits."""
  values = settings.to_dict(config.guard)
  names = [*collapse_guard.LIMITS, *collapse_guard.FALLS]
  return collapse_guard.Guard(
    {name: values[name] for name in names},
    patience=config.guard.patience,
    window=config.guard.window,
  )


def caution(config: settings.Config, rollbacks: int) -> collapse_guard.Caution:
  """How cautiously a run continues after a number of rollbacks."""
  return collapse_guard.escalate(
    rollbacks,
    rate_factor=config.guard.rate_factor,
    reuse_factor=config.guard.reuse_factor,
    kl=config.guard.kl_coefficient,
  )


def estimator(config: settings.Config) -> episodes.Estimator:
  """The configured advantage estimator."""
  return estimators.find(config.advantage.estimator)


def turn_discount(config: settings.Config) -> float:
  """The configured estimator's discount from turn to turn."""
  if "discount" in estimator(config).keys:
    return getattr(config.advantage, "discount")  # noqa: B009
  return 1.0


def estimate(
  config: settings.Config, data: episodes.Episodes
) -> episodes.Advantages:
  """Advantages of a rollout, from the configured estimator."""
  advantages = estimator(config).estimate(data, config.advantage)
  return modulation.apply(
    config.advantage.modulation, data, advantages, config.advantage
  )
