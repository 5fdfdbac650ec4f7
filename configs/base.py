"""Every key of a configuration: type, default, meaning and bounds.

A task file (`searchqa.py`, `webshop.py`, ...) starts from `get_config()` and
states only what differs. The result is locked: an unknown key is refused, with
a suggestion. `read` converts it to the frozen records below, which the library
works with.

Presets follow a colon, joined by commas; later ones take precedence:
`--config=configs/searchqa.py:smollm2,grpo`. A task defines presets of its
models, `algorithms.py` those of all tasks, and `tiny` is the task's default.
The file is long because it defines every key.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import TYPE_CHECKING, Any, TypeAlias

from ml_collections import config_dict

from t2po_jax import keys
from t2po_jax.configs import algorithms, environment
from t2po_jax.control import resampling, uncertainty
from t2po_jax.learning import (
  collapse_guard,
  estimators,
  kl_control,
  losses,
  objectives,
  optimizers,
  policy_losses,
)
from t2po_jax.learning.estimators import modulation
from t2po_jax.models import critic, decoder
from t2po_jax.rollout import collect, penalties

if TYPE_CHECKING:
  # Its attributes are known when it runs, not before.
  ConfigDict: TypeAlias = Any
else:
  ConfigDict = config_dict.ConfigDict
key = keys.key

_KL = ("off", *losses.KL_KINDS)


@dataclasses.dataclass(frozen=True)
class Environment:
  """The environment.

  Attributes:
    name: its name.
    arguments: its settings by name.
  """

  name: str = "toy"
  arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Model:
  """The policy: where it comes from and how it is computed."""

  source: str = key(
    "scratch",
    "A Hugging Face directory or hub id, a GGUF file, or `scratch` for a model "
    "of `size` trained from scratch.",
  )
  size: str = key("tiny", "Named size, for `scratch` only.")
  vocab_size: int = key(
    1024, "Largest vocabulary of the tokenizer, for `scratch` only.", least=1
  )
  dtype: str = key(
    "float32",
    "Compute type; master weights are float32.",
    choices=("float32", "bfloat16"),
  )
  template_arguments: str = key(
    "{}",
    "JSON object of further arguments of the model's chat template, e.g. "
    '`{"enable_thinking": false}`.',
  )
  scan_layers: bool = key(True, "Training: scan over layers, or unroll them.")
  remat: str = key(
    "none",
    "Training: what the backward pass recomputes: nothing (`none`), whole "
    "layers (`full`), or everything but products with weights (`dots`).",
    choices=decoder.REMATS,
  )


@dataclasses.dataclass(frozen=True)
class Lora:
  """Low-rank adapters over the policy."""

  rank: int = key(
    0, "Train only adapters of this rank; 0 = train all weights.", least=0
  )
  alpha: float = key(32.0, "Adapters are scaled by alpha / rank.", above=0)
  targets: str = key(
    "all",
    "`all` projections of the layers, or some of `query,key,value,out,gate,up,"
    "down,head`.",
  )
  cold_start: bool = key(
    False,
    "Train adapters in the cold start too, and merge them afterwards; "
    "otherwise it trains all weights.",
  )


@dataclasses.dataclass(frozen=True)
class Rollout:
  """How training episodes are played. Programs are compiled for sizes that grow
  by doubling: tokens of a prompt, prompts per call (these by factors of four),
  cache length attended to. Environments are called synchronously, or in threads
  if they wait for a server, or in processes if they are not thread-safe, crash
  or leak.
  """

  tasks: int = key(16, "Task groups per update.", least=1)
  group_size: int = key(8, "Trajectories per group, G.", least=1)
  filter_groups: bool = key(
    False, "Replace groups with equal returns by new ones (DAPO)."
  )
  filter_tries: int = key(3, "Most rounds of replacement per update.", least=1)
  variance_kept: float = key(
    1.0,
    "Train on the groups whose returns vary most, which hold this share of the "
    "sum of their variances (RAGEN-2); 1 = on all groups.",
    above=0,
    most=1,
  )
  horizon: str = key(
    "",
    "Most turns of a training episode: `4:10,8:20` is 4 until update 10, 8 "
    "until update 20, then the environment's limit; empty = always that one.",
  )
  ahead: int = key(
    0,
    "Updates that the policy of a rollout may lag behind: rollouts then "
    "overlap with earlier updates. 0 = no overlap.",
    least=0,
  )
  oversample: int = key(
    0,
    "Task groups of the next updates that are started with those of this one, "
    "for slots that would idle; what is unfinished is carried over.",
    least=0,
  )
  refresh: bool = key(
    False,
    "Whether carried-over episodes continue with the new weights, from their "
    "next turn on, instead of with those that started them.",
  )
  context: str = key(
    "window",
    "`window`: a prompt shows the last turns. `append`: it is the whole "
    "dialogue, verbatim, and restarts from the window when it gets too long.",
    choices=collect.CONTEXTS,
  )
  memory: int = key(4, "(observation, action) pairs in the window.", least=0)
  prefix: str = key("<think>", "Text prepended to every response.")
  max_prompt: int = key(192, "Tokens, including the prefix.", least=2)
  max_response: int = key(48, "Tokens.", least=1)
  slots: int = key(
    64, "Responses decoded at the same time, per process.", least=1
  )
  tensor: int = key(
    1,
    "Devices of a process that split each matrix product; the slots are "
    "divided over groups of that many devices.",
    least=1,
  )
  chunk: int = key(
    16,
    "Most tokens decoded per device call; measured in docs/performance.md.",
    least=1,
  )
  prefill_tokens: int = key(32, "Smallest prompt size.", least=1)
  prefill_rows: int = key(16, "Most prompts per call.", least=1)
  live_tokens: int = key(128, "Smallest cache length.", least=1)
  one_size: bool = key(
    False,
    "Always use the program of the largest size: results then do not depend on "
    "which responses share a call, and thus not on the environments' latency. "
    "Costs more.",
  )
  env_threads: int = key(
    0, "Concurrent environment calls; 0 = no threads.", least=0
  )
  env_workers: int = key(0, "Worker processes; 0 = none.", least=0)
  env_memory: float = key(
    2000.0, "MB a worker may grow; 0 = no limit.", least=0
  )
  env_calls: int = key(
    0,
    "Decode calls after which an environment's answer is awaited, or earlier "
    "if nothing is left to decode, so that runs are bit-identical whatever the "
    "latency. 0 = take answers as they arrive.",
    least=0,
  )
  env_timeout: float = key(
    0.0, "Seconds per environment call; 0 = no limit.", least=0
  )
  temperature: float = key(1.0, "Sampling temperature.", least=0)
  top_k: int = key(
    0, "Number of most likely tokens to sample from; 0 = all.", least=0
  )
  top_p: float = key(
    1.0, "Cumulative probability to sample from; 1 = all.", above=0, most=1
  )
  min_p: float = key(
    0.0,
    "Least probability of a token relative to the largest; 0 = no bound.",
    least=0,
    most=1,
  )

  @property
  def updates_early(self) -> int:
    """Updates whose groups are started with those of an earlier one."""
    return -(-self.oversample // self.tasks)


@dataclasses.dataclass(frozen=True)
class Thinking:
  """The token-level thinking intervention."""

  enabled: bool = key(True, "Whether the intervention is on.")
  epsilon: str = key(
    "auto(0.2)",
    "Threshold of mean |dM|: a number in quotes, or `auto(q)`, the q-quantile "
    "of the measured values.",
  )
  window: int = key(8, "N: the mean is over N + 1 changes.", least=0)
  min_tokens: int = key(
    8, "L_min: tokens before which it never fires.", least=0
  )
  max_tokens: int = key(
    450, "L_max: tokens at which it always fires; the hard budget.", least=1
  )
  require_past_peak: bool = key(True, "Only fire after the signal's peak.")
  closing: str = key(
    "",
    "The forced text, beginning with `</think>`; empty = the environment's, "
    "which also opens the action.",
  )


@dataclasses.dataclass(frozen=True)
class Resampling:
  """Turn-level resampling."""

  eta: str = key("auto(0.1)", "Threshold of |dPhi|, as `thinking.epsilon`.")
  max_tries: int = key(2, "B_max: attempts beyond the first; 0 = off.", least=0)
  sign: str = key(
    "phi",
    "What triggers resampling: |dPhi| < eta (`phi`); or, ours, the same "
    "`action` from the same observation as in the previous turn, `both` of "
    "them, or an `unsure` response, exp(-mean entropy) < eta.",
    choices=resampling.SIGNS,
  )
  negative: float = key(
    0.0,
    "Train on discarded responses with an advantage of minus this (ours); 0 = "
    "do not.",
    least=0,
  )


@dataclasses.dataclass(frozen=True)
class Calibration:
  """When `auto` thresholds are set."""

  rollouts: int = key(1, "Rollouts before the first calibration.", least=0)
  every: int = key(10, "Updates between recalibrations; 0 = never.", least=0)


@dataclasses.dataclass(frozen=True)
class Control:
  """Exploration control (arXiv 2605.02178)."""

  signal: str = key(
    "calibrated",
    "Uncertainty signal; the options of all signals are keys, too.",
    choices=lambda: uncertainty.SIGNALS,
  )
  top_j: int = key(20, "Tokens the confidence averages over.", least=1)
  tempered: bool = key(False, "Measure the tempered distribution.")
  thinking: Thinking = Thinking()
  resampling: Resampling = Resampling()
  calibration: Calibration = Calibration()


@dataclasses.dataclass(frozen=True)
class Reward:
  """Penalties on the environment's reward, and episodes left out."""

  format_penalty: float = key(
    0.1, "For a response that violates the grammar.", least=0
  )
  invalid_penalty: float = key(
    0.1, "For an action that is not possible.", least=0
  )
  penalties: str = key(
    "sum",
    "The penalty of a response that is both.",
    choices=penalties.COMBINATIONS,
  )
  repeat_penalty: float = key(
    0.0,
    "Per response that does what the turn before did, from the same "
    "observation (ours).",
    least=0,
  )
  overlong_penalty: float = key(
    0.0,
    "For a response of `rollout.max_response` tokens (soft overlong punishment "
    "of DAPO).",
    least=0,
  )
  overlong_buffer: int = key(
    0, "Tokens below that length over which the penalty rises.", least=0
  )
  drop_void: bool = key(
    False,
    "Leave out episodes with a turn without an action.",
  )
  drop_overlong: bool = key(False, "Leave out truncated responses.")
  kl: str = key(
    "off", "KL to the reference policy, charged per turn.", choices=_KL
  )
  kl_coefficient: float = key(0.0, "Coefficient of that KL.", least=0)
  kl_target: float = key(
    0.0,
    "Target KL in nats per token, to which the coefficient adapts; 0 = fixed.",
    least=0,
  )
  kl_horizon: float = key(
    10_000.0,
    "Trajectories, or turns, over which the coefficient adapts.",
    least=1,
  )
  kl_mean: str = key(
    "token",
    "How the KL for adaptation is averaged: over all tokens, counting "
    "trajectories, or over per-turn means, counting turns (the reference).",
    choices=kl_control.MEANS,
  )


@dataclasses.dataclass(frozen=True)
class Advantage:
  """The advantage estimator; the options of all estimators are keys, too."""

  estimator: str = key(
    "gigpo",
    "One of `learning/estimators`, or another one as `package.module:NAME`.",
  )
  modulation: str = key(
    "off",
    "Factors applied to the estimator's advantages: `aem`, confident turns "
    "learn more.",
    choices=lambda: ("off", *modulation.MODULATIONS),
  )


@dataclasses.dataclass(frozen=True)
class Critic:
  """The value network of `gae` and `gae_turn`."""

  kind: str = key(
    "trunk",
    "Share the policy's layers (`trunk`), or a `separate` network.",
    choices=critic.KINDS,
  )
  rate: float = key(
    10.0,
    "Learning rate of its own parameters, relative to the policy's.",
    above=0,
  )
  coefficient: float = key(0.5, "trunk: weight of the value loss.", above=0)
  clip: float = key(0.0, "Clip range around its old values; 0 = off.", least=0)


@dataclasses.dataclass(frozen=True)
class Loss:
  """The objective of an update."""

  kind: str = key(
    "ppo",
    "The policy loss; the options of all losses are keys, too.",
    choices=lambda: policy_losses.POLICY_LOSSES,
  )
  aggregation: str = key(
    "token_mean", "How token losses are averaged.", choices=losses.AGGREGATIONS
  )
  kl: str = key(
    "off",
    "KL to the reference policy as a loss term; `k1+` and `k3+` have the "
    "gradient of k2.",
    choices=_KL,
  )
  kl_coefficient: float = key(0.0, "Coefficient of that term.", least=0)
  entropy_coefficient: float = key(
    0.0, "Coefficient of the entropy bonus.", least=0
  )
  old_logprobs: str = key(
    "sampler",
    "Log-probs of the old policy: from the `sampler`, or `recompute` before "
    "each update.",
    choices=objectives.OLD_LOGPROBS,
  )
  importance: str = key(
    "truncate",
    "With `recompute`: w = old / sampler; `truncate` it to at most the cap, "
    "`mask` tokens beyond it, `turn_truncate` the product over a turn, or "
    "`off`.",
    choices=objectives.WEIGHTS,
  )
  importance_cap: float = key(2.0, "Largest importance weight.", above=1)
  importance_low: float = key(
    0.0, "mask: the smallest weight; 0 = 1 / cap.", least=0, most=1
  )
  rejection: str = key(
    "off",
    "With `recompute`: leave out turns whose `geometric` mean of ratios, "
    "`product` of ratios, or any `token`'s ratio is out of bounds.",
    choices=objectives.REJECTIONS,
  )
  rejection_low: float = key(
    0.0, "Smallest ratio; 0 = the usual one for the kind.", least=0, most=1
  )
  rejection_high: float = key(
    0.0, "Largest ratio; 0 = the usual one for the kind.", least=0
  )


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW."""

  learning_rate: float = key(3e-4, "Peak learning rate.", above=0)
  schedule: str = key(
    "constant",
    "`constant`, or `linear` or `cosine` decay to 0.",
    choices=optimizers.SCHEDULES,
  )
  warmup: int = key(0, "Steps of linear warm-up.", least=0)
  b1: float = key(0.9, "Decay of the first moment.", least=0, most=1)
  b2: float = key(0.95, "Decay of the second moment.", least=0, most=1)
  weight_decay: float = key(
    0.0, "Weight decay per step, times the learning rate.", least=0
  )
  clip_norm: float = key(
    1.0, "Global gradient norm to clip to; 0 = off.", least=0
  )
  target_kl: float = key(
    0.0,
    "KL of an update, nats per token, above which the learning rate is reduced "
    "until it falls below; 0 = off. A single step costs another scoring.",
    least=0,
  )
  max_kl: float = key(
    0.0,
    "KL to the policy that sampled, nats per token, above which the remaining "
    "steps of an update leave the policy as it is; 0 = off.",
    least=0,
  )


@dataclasses.dataclass(frozen=True)
class Train:
  """The loop of rollouts and updates."""

  updates: int = key(30, "Rollouts, each followed by gradient steps.", least=0)
  mini_batches: int = key(
    1, "Optimizer steps per pass over a rollout.", least=1
  )
  epochs: int = key(1, "Passes over a rollout.", least=1)
  row_tokens: int = key(
    256, "Length of packed rows in tokens; at least prompt + response.", least=1
  )
  micro_rows: int = key(
    8,
    "Rows per micro-batch (gradient accumulation step); keep it small, because "
    "partly filled micro-batches are computed whole.",
    least=1,
  )
  eval_every: int = key(
    5, "Updates between evaluations; 0 = only at the end.", least=0
  )
  save_every: int = key(
    5, "Updates between checkpoints; 0 = only at the end.", least=0
  )
  keep: int = key(2, "Newest checkpoints to keep, besides the best.", least=1)
  checkpoints: str = key(
    "",
    "Folder of the checkpoints, a path or `gs://...`, accessible to all "
    "processes; empty = in the workdir.",
  )
  split: str = key("train", "Split of the tasks.")


@dataclasses.dataclass(frozen=True)
class Guard:
  """Limits whose violation indicates a collapse of training; 0 = no limit."""

  action: str = key(
    "warn",
    "Reaction to an alarm: `off`, `warn`, `stop`, or `rollback` to the best "
    "checkpoint, continuing more cautiously with a fresh optimizer.",
    choices=collapse_guard.ACTIONS,
  )
  patience: int = key(
    3, "Consecutive violations of a limit that raise an alarm.", least=1
  )
  min_entropy: float = key(0.002, "nats per token.", least=0)
  max_entropy: float = key(5.0, "nats per token.", least=0)
  max_kl: float = key(
    0.5, "KL of the old policy to the new one within an update, nats.", least=0
  )
  max_reference_kl: float = key(
    0.0, "With `loss.kl`: KL to the reference policy, nats.", least=0
  )
  max_grad_norm: float = key(50.0, "Gradient norm before clipping.", least=0)
  max_repetition: float = key(
    0.8, "Fraction of repeated 4-grams in a response.", least=0
  )
  min_format: float = key(
    0.3, "Fraction of responses that follow the grammar.", least=0
  )
  max_mismatch: float = key(
    0.1, "Mean gap of log-probs between sampler and trainer, nats.", least=0
  )
  max_skipped: float = key(
    0.5, "Fraction of steps skipped because of a non-finite gradient.", least=0
  )
  window: int = key(
    3,
    "Updates over which training metrics are averaged to detect a fall.",
    least=1,
  )
  max_score_fall: float = key(
    0.4,
    "Fall of the held-out success below the run's best, as a fraction of it, "
    "beyond noise.",
    least=0,
  )
  max_return_fall: float = key(
    0.4,
    "Fall of the training return below the run's best, in standard deviations "
    "of an episode's return.",
    least=0,
  )
  max_deviation_fall: float = key(
    0.6,
    "Fall of the standard deviation of returns within groups below the run's "
    "best, while the return is not at its best.",
    least=0,
  )
  max_dependence_fall: float = key(
    0.7,
    "Fall of the dependence of first responses on their prompt below the run's "
    "best.",
    least=0,
  )
  rate_factor: float = key(
    0.5, "rollback: factor of the learning rate, per rollback.", above=0, most=1
  )
  reuse_factor: float = key(
    0.5,
    "rollback: factor of epochs and of mini-batches, per rollback.",
    above=0,
    most=1,
  )
  kl_coefficient: float = key(
    0.05,
    "rollback: reward charged per nat of KL to the good policy, per rollback.",
    least=0,
  )
  rollbacks: int = key(
    3, "rollback: the most rollbacks; after that, stop.", least=0
  )


@dataclasses.dataclass(frozen=True)
class ColdStart:
  """The supervised start of the policy."""

  kind: str = key(
    "none",
    "Imitate the expert, the policy's own successes, or first one and then the "
    "other.",
    choices=("expert", "rft", "expert+rft", "none"),
  )
  episodes: int = key(512, "Demonstrations of the scripted expert.", least=1)
  only_successes: bool = key(False, "Leave out demonstrations that failed.")
  epochs: int = key(1, "Passes over the demonstrations.", least=1)
  learning_rate: float = key(1e-3, "Peak learning rate; cosine decay.", above=0)
  batch_size: int = key(32, "Turns per optimizer step.", least=1)
  micro_rows: int = key(8, "Rows per gradient accumulation step.", least=1)
  rft_rounds: int = key(
    1, "Rounds of sampling and fine-tuning on successes.", least=1
  )
  rft_tasks: int = key(
    64, "Tasks per round, with `rollout.group_size` episodes each.", least=1
  )
  rft_epochs: int = key(1, "Passes over the successes of a round.", least=1)


@dataclasses.dataclass(frozen=True)
class Eval:
  """The fixed panel of held-out tasks."""

  split: str = key("valid", "Split of its tasks.")
  tasks: int = key(64, "Number of tasks, from the start of the split.", least=1)
  temperature: float = key(0.6, "Sampling temperature; 0 = greedy.", least=0)
  top_k: int = key(20, "As `rollout.top_k`.", least=0)
  top_p: float = key(0.95, "As `rollout.top_p`.", above=0, most=1)


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices per mesh axis of the update; one may be -1: the remaining."""

  data: int = key(-1, "Devices that split the rows.", least=-1)
  fsdp: int = key(1, "Devices that split rows and parameters.", least=-1)
  tensor: int = key(1, "Devices that split matrix products.", least=-1)
  rollout_devices: int = key(
    0,
    "Devices that play rollouts and take no part in updates, the last ones; "
    "0 = all do both.",
    least=0,
  )


@dataclasses.dataclass(frozen=True)
class Memory:
  """The memory plan of a device."""

  check: bool = key(
    True,
    "Print a run's memory plan; refuse the run if it cannot fit.",
  )
  limit: float = key(
    0.0, "GB that may be used per device; 0 = all of it.", least=0
  )


@dataclasses.dataclass(frozen=True)
class Log:
  """What a run reports."""

  tensorboard: bool = key(True, "Write `tensorboard/`.")
  wandb: str = key("", "Weights & Biases project; empty = off.")
  mlflow: str = key("", "MLflow experiment; empty = off.")
  trajectories: int = key(
    4,
    "Training episodes written to `trajectories/` per update; of evaluations, "
    "all are written. 0 = none at all.",
    least=0,
  )
  gradient_noise: int = key(
    0,
    "Updates between measurements of how much the micro-batches' gradients "
    "agree, `learn/grad_agreement`; each costs one gradient. 0 = never.",
    least=0,
  )


# Sections with the options of registered methods as keys.
_OPTIONS: Mapping[type, Callable[[], Mapping[str, keys.Key]]] = {
  Control: uncertainty.option_keys,
  Advantage: estimators.option_keys,
  Loss: policy_losses.option_keys,
}


def with_options(section: type) -> type:
  """A section with the options registered for it so far."""
  if section not in _OPTIONS:
    return section
  return _extend(section, tuple(_OPTIONS[section]().values()))


@functools.cache
def _extend(section: type, options: tuple[keys.Key, ...]) -> type:
  """The section extended by these keys; cached per set of keys."""
  return dataclasses.make_dataclass(
    section.__name__,
    [(key.name, type(key.default), keys.field(key)) for key in options],
    bases=(section,),
    frozen=True,
  )


def _extensible(section: type) -> Any:
  """A field for a section whose keys are only known later."""
  return dataclasses.field(default_factory=lambda: with_options(section)())


@dataclasses.dataclass(frozen=True)
class Config:
  """All settings of a run."""

  name: str = key("base", "Name of the run and of its directory.")
  seed: int = key(0, "All random numbers derive from it.", least=0)
  env: Environment = Environment()
  model: Model = Model()
  lora: Lora = Lora()
  rollout: Rollout = Rollout()
  control: Control = _extensible(Control)
  reward: Reward = Reward()
  advantage: Advantage = _extensible(Advantage)
  critic: Critic = Critic()
  loss: Loss = _extensible(Loss)
  optimizer: Optimizer = Optimizer()
  train: Train = Train()
  guard: Guard = Guard()
  cold_start: ColdStart = ColdStart()
  eval: Eval = Eval()
  mesh: Mesh = Mesh()
  memory: Memory = Memory()
  log: Log = Log()
  cache_dir: str = key(
    "",
    "Folder of cold starts, search indexes and compiled programs; empty = "
    "`~/.cache/t2po_jax`.",
  )


def get_config() -> ConfigDict:
  """All keys, with defaults that train a tiny model on a CPU."""
  return config_dict.ConfigDict(to_dict(Config()))


def to_dict(config: Any) -> dict[str, Any]:
  """A configuration, or a section of one, as nested dicts of plain values."""
  if isinstance(config, Environment):
    return {"name": config.name, **config.arguments}
  return {
    field.name: to_dict(value) if dataclasses.is_dataclass(value) else value
    for field in dataclasses.fields(config)
    for value in [getattr(config, field.name)]
  }


def read(config: ConfigDict) -> Config:
  """Reads a configuration into its frozen record.

  Args:
    config: from a task's `get_config`, possibly modified.

  Returns:
    The same settings.

  Raises:
    ValueError: for an unknown key or a value that is not allowed.
  """
  return _read(Config, config.to_dict(), "")


def _read(section: type, values: Mapping[str, Any], name: str) -> Any:
  """Reads one section and its subsections."""
  if section is Environment:
    arguments = dict(values)
    return Environment(arguments.pop("name"), arguments)
  usual = section()
  defaults = {f.name: getattr(usual, f.name) for f in dataclasses.fields(usual)}
  for unknown in sorted(values.keys() - defaults.keys()):
    place = f"{name}.{unknown}" if name else unknown
    raise ValueError(f"{place}: unknown key{keys.nearest(unknown, defaults)}")
  keys.check(section, values, name=name)
  return section(
    **{
      key: _read(type(defaults[key]), value, f"{name}.{key}" if name else key)
      if dataclasses.is_dataclass(defaults[key])
      else value
      for key, value in values.items()
    }
  )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested settings as one dict of dotted keys."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = value
  return flat


def apply_presets(
  config: ConfigDict,
  names: str,
  presets: Mapping[str, Callable[[ConfigDict], None]],
) -> ConfigDict:
  """Applies comma-separated presets in order and locks the result.

  Args:
    config: the task's default.
    names: of the presets.
    presets: the task's own, by name.

  Raises:
    ValueError: if a preset is unknown.
  """
  presets = {
    "tiny": lambda c: None,
    **algorithms.PRESETS,
    **environment.PRESETS,
    **presets,
  }
  for name in filter(None, (part.strip() for part in names.split(","))):
    if name not in presets:
      raise ValueError(
        f"config preset {name!r} is unknown{keys.nearest(name, presets)}"
      )
    presets[name](config)
  return config.lock()
