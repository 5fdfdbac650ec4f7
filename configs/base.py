"""Every key of a configuration: type, default, meaning and bounds.

A task file (`searchqa.py`, `webshop.py`, ...) starts from `get_config()` and
states only what differs. The result is locked: a key that is not listed here
is refused, with the nearest name that exists. `read` turns it into the frozen
records below, which is what the library works with.

Presets are joined by commas after a colon, later ones win:
`--config=configs/searchqa.py:smollm2,grpo`. A task brings those of its models,
`algorithms.py` those that every task has, and `tiny` is the task's default.

The file is long because every key stands here with all that is known of it.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import TYPE_CHECKING, Any, TypeAlias

from ml_collections import config_dict

from t2po_jax import keys
from t2po_jax.configs import algorithms
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
  """What is played.

  Attributes:
    name: of the environment.
    arguments: of its constructor, by name.
  """

  name: str = "toy"
  arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Model:
  """Where the policy comes from and how it is computed."""

  source: str = key(
    "scratch",
    "A Hugging Face directory or hub id, a GGUF file, or `scratch` for a model "
    "of `size` trained here from the start.",
  )
  size: str = key("tiny", "Named size, for `scratch` only.")
  vocab_size: int = key(
    1024, "Most pieces of the tokenizer, for `scratch` only.", least=1
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
    "Training: what the backward pass computes again: `none`, `full` (layers) "
    "or `dots` (layers, but not their products with weights).",
    choices=decoder.REMATS,
  )


@dataclasses.dataclass(frozen=True)
class Lora:
  """Low-rank adapters over the policy."""

  rank: int = key(
    0, "Train adapters of this rank alone; 0 = all weights.", least=0
  )
  alpha: float = key(32.0, "Their strength is alpha / rank.", above=0)
  targets: str = key(
    "all",
    "`all` projections of the layers, or some of `query,key,value,out,gate,up,"
    "down,head`.",
  )
  cold_start: bool = key(
    False,
    "Train adapters in the cold start too and merge them after it; else it "
    "trains all weights.",
  )


@dataclasses.dataclass(frozen=True)
class Rollout:
  """How episodes are played for training.

  Programs are compiled for sizes that double from the smallest on: tokens of
  a prompt, prompts per call (these in fours), cache length attended to.
  Environments answer on the spot, or in threads if they wait for a server, or
  in processes if they are not safe between threads, crash or leak.
  """

  tasks: int = key(16, "Task groups per update.", least=1)
  group_size: int = key(8, "Trajectories per group, G.", least=1)
  filter_groups: bool = key(
    False, "Replace groups whose returns are all equal by fresh ones (DAPO)."
  )
  filter_tries: int = key(3, "Most rounds of replacement per update.", least=1)
  ahead: int = key(
    0,
    "Updates that the policy of a rollout may lag behind: rollouts are played "
    "beside the updates before them. 0 = they take turns.",
    least=0,
  )
  context: str = key(
    "window",
    "`window`: a prompt shows the last turns. `append`: it is the whole "
    "dialogue, word for word, and starts over from the window when it gets "
    "too long.",
    choices=collect.CONTEXTS,
  )
  memory: int = key(4, "(observation, action) pairs in the window.", least=0)
  prefix: str = key("<think>", "Text that every response is begun with.")
  max_prompt: int = key(192, "Tokens, the prefix included.", least=2)
  max_response: int = key(48, "Tokens.", least=1)
  slots: int = key(
    64, "Responses decoded at the same time, per process.", least=1
  )
  tensor: int = key(
    1,
    "Devices of a process that share every product; the slots are split over "
    "as many groups of them as divide their number.",
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
    "One program of the largest size for all: results then do not depend on "
    "which responses share a call, nor so on environments' latency; dearer.",
  )
  env_threads: int = key(
    0, "Environment calls at the same time; 0 = no threads.", least=0
  )
  env_workers: int = key(0, "Worker processes; 0 = none.", least=0)
  env_memory: float = key(
    2000.0, "MB a worker may grow; 0 = no limit.", least=0
  )
  env_calls: int = key(
    0,
    "Decode calls that an environment may think: its answer is taken that much "
    "later, or when nothing else is left to decode, so that runs are equal to "
    "the last bit whatever the latency. 0 = it is taken once it is there.",
    least=0,
  )
  env_timeout: float = key(
    0.0, "Seconds per environment call; 0 = no limit.", least=0
  )
  temperature: float = key(1.0, "Of sampling.", least=0)
  top_k: int = key(0, "Most likely tokens to draw from; 0 = all.", least=0)
  top_p: float = key(1.0, "Probability to draw from; 1 = all.", above=0, most=1)
  min_p: float = key(
    0.0,
    "Least probability of a token, as a part of the largest; 0 = none.",
    least=0,
    most=1,
  )


@dataclasses.dataclass(frozen=True)
class Thinking:
  """The token-level thinking intervention."""

  enabled: bool = key(True, "Whether it acts.")
  epsilon: str = key(
    "auto(0.2)",
    "Threshold of mean |dM|: a number in quotes, or `auto(q)`, the q-quantile "
    "of what is measured.",
  )
  window: int = key(8, "N: the mean is over N + 1 changes.", least=0)
  min_tokens: int = key(8, "L_min: never fires before.", least=0)
  max_tokens: int = key(
    450, "L_max: always fires here; the hard budget.", least=1
  )
  require_past_peak: bool = key(True, "Only after the signal's peak.")
  closing: str = key(
    "",
    "Text that it forces, beginning with `</think>`; empty = the "
    "environment's, which opens the action as well.",
  )


@dataclasses.dataclass(frozen=True)
class Resampling:
  """Turn-level resampling."""

  eta: str = key("auto(0.1)", "Threshold of |dPhi|, as `thinking.epsilon`.")
  max_tries: int = key(
    2, "B_max: samplings beyond the first; 0 = off.", least=0
  )
  sign: str = key(
    "phi",
    "What asks for another try: |dPhi| < eta (`phi`); of ours, the same "
    "`action` from the same observation as at the turn before, `both` of them, "
    "or an `unsure` response, exp(-mean entropy) < eta.",
    choices=resampling.SIGNS,
  )
  negative: float = key(
    0.0,
    "Discarded responses are learned from with an advantage of minus this "
    "(ours); 0 = they are not.",
    least=0,
  )


@dataclasses.dataclass(frozen=True)
class Calibration:
  """When `auto` thresholds are set."""

  rollouts: int = key(1, "Rollouts that one waits for.", least=0)
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
  tempered: bool = key(False, "Measure after the temperature.")
  thinking: Thinking = Thinking()
  resampling: Resampling = Resampling()
  calibration: Calibration = Calibration()


@dataclasses.dataclass(frozen=True)
class Reward:
  """What is added to and left out of the environment's reward."""

  format_penalty: float = key(
    0.1, "Per response that breaks the grammar.", least=0
  )
  invalid_penalty: float = key(0.1, "Per action that is not possible.", least=0)
  penalties: str = key(
    "sum",
    "What a response costs that is both.",
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
    "Of a response of `rollout.max_response` tokens (soft overlong punishment "
    "of DAPO).",
    least=0,
  )
  overlong_buffer: int = key(
    0, "Tokens below that length over which it is approached.", least=0
  )
  drop_void: bool = key(False, "Leave out episodes with a turn without action.")
  drop_overlong: bool = key(False, "Leave out responses that were cut off.")
  kl: str = key("off", "KL to the reference, charged per turn.", choices=_KL)
  kl_coefficient: float = key(0.0, "Of that KL.", least=0)
  kl_target: float = key(
    0.0, "nats per token; the coefficient follows; 0 = fixed.", least=0
  )
  kl_horizon: float = key(
    10_000.0, "Trajectories, or turns, over which it follows.", least=1
  )
  kl_mean: str = key(
    "token",
    "What the KL that it follows is a mean of: all tokens, counting "
    "trajectories, or the means of turns, counting turns (the reference).",
    choices=kl_control.MEANS,
  )


@dataclasses.dataclass(frozen=True)
class Advantage:
  """How good a turn was; the options of all estimators are keys, too."""

  estimator: str = key(
    "gigpo",
    "One of `learning/estimators`, or `package.module:NAME` of another.",
  )
  modulation: str = key(
    "off",
    "Factors on what the estimator finds: `aem`, sure turns learn more.",
    choices=lambda: ("off", *modulation.MODULATIONS),
  )


@dataclasses.dataclass(frozen=True)
class Critic:
  """The value network of `gae` and `gae_turn`."""

  kind: str = key(
    "trunk",
    "Shares the policy's layers; or `separate`.",
    choices=critic.KINDS,
  )
  rate: float = key(
    10.0, "Learning rate of its own parameters, per policy's.", above=0
  )
  coefficient: float = key(0.5, "trunk: weight of its loss.", above=0)
  clip: float = key(0.0, "Range around its old values; 0 = off.", least=0)


@dataclasses.dataclass(frozen=True)
class Loss:
  """What an update minimises."""

  kind: str = key(
    "ppo",
    "Of the policy; the options of all losses are keys, too.",
    choices=lambda: policy_losses.POLICY_LOSSES,
  )
  aggregation: str = key(
    "token_mean", "How tokens are averaged.", choices=losses.AGGREGATIONS
  )
  kl: str = key(
    "off",
    "Term against the reference; `k1+`, `k3+` have the gradient of k2.",
    choices=_KL,
  )
  kl_coefficient: float = key(0.0, "Of that term.", least=0)
  entropy_coefficient: float = key(0.0, "Of the entropy bonus.", least=0)
  old_logprobs: str = key(
    "sampler",
    "Or `recompute` before each update.",
    choices=objectives.OLD_LOGPROBS,
  )
  importance: str = key(
    "truncate",
    "With `recompute`: w = old / sampler, `truncate` to at most the cap, "
    "`mask` tokens beyond it, `turn_truncate` a turn's product, or `off`.",
    choices=objectives.WEIGHTS,
  )
  importance_cap: float = key(2.0, "Largest importance weight.", above=1)
  importance_low: float = key(
    0.0, "mask: the smallest; 0 = 1 / cap.", least=0, most=1
  )
  rejection: str = key(
    "off",
    "With `recompute`: leave out turns whose `geometric` mean of ratios, "
    "`product` of ratios, or any `token`'s ratio is out of bounds.",
    choices=objectives.REJECTIONS,
  )
  rejection_low: float = key(
    0.0, "Smallest ratio; 0 = what is usual for the kind.", least=0, most=1
  )
  rejection_high: float = key(
    0.0, "Largest ratio; 0 = what is usual for the kind.", least=0
  )


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW."""

  learning_rate: float = key(3e-4, "Peak of the schedule.", above=0)
  schedule: str = key(
    "constant",
    "Or `linear`, `cosine`: decay to 0.",
    choices=optimizers.SCHEDULES,
  )
  warmup: int = key(0, "Steps of linear warm-up.", least=0)
  b1: float = key(0.9, "Decay of the gradient's mean.", least=0, most=1)
  b2: float = key(0.95, "Decay of its square.", least=0, most=1)
  weight_decay: float = key(0.0, "Per step, times the learning rate.", least=0)
  clip_norm: float = key(1.0, "Global gradient norm; 0 = off.", least=0)


@dataclasses.dataclass(frozen=True)
class Train:
  """The loop of rollouts and updates."""

  updates: int = key(30, "Rollouts, each followed by gradient steps.", least=0)
  mini_batches: int = key(
    1, "Optimizer steps per pass over a rollout.", least=1
  )
  epochs: int = key(1, "Passes over a rollout.", least=1)
  row_tokens: int = key(
    256, "Length of packed rows; at least prompt + response.", least=1
  )
  micro_rows: int = key(
    8,
    "Rows per gradient accumulation step; few, because a part is computed "
    "whole.",
    least=1,
  )
  eval_every: int = key(
    5, "Updates between evaluations; 0 = only at the end.", least=0
  )
  save_every: int = key(
    5, "Updates between checkpoints; 0 = only at the end.", least=0
  )
  keep: int = key(2, "Newest checkpoints kept, beside the best.", least=1)
  checkpoints: str = key(
    "",
    "Folder of the checkpoints, a path or `gs://...`, that all processes "
    "reach; empty = in the workdir.",
  )
  split: str = key("train", "Where tasks come from.")


@dataclasses.dataclass(frozen=True)
class Guard:
  """Limits whose violation means that training collapses; 0 = no limit."""

  action: str = key(
    "warn",
    "What follows an alarm: `off`, `warn`, `stop`, or `rollback` to the "
    "checkpoint that was measured best, on with a fresh optimizer and with "
    "more care.",
    choices=collapse_guard.ACTIONS,
  )
  patience: int = key(
    3, "Updates in a row beyond a limit that make an alarm.", least=1
  )
  min_entropy: float = key(0.002, "nats per token.", least=0)
  max_entropy: float = key(5.0, "nats per token.", least=0)
  max_kl: float = key(
    0.5, "Old policy against new within an update, nats.", least=0
  )
  max_reference_kl: float = key(
    0.0, "With `loss.kl`: from the reference, nats.", least=0
  )
  max_grad_norm: float = key(50.0, "Before clipping.", least=0)
  max_repetition: float = key(0.8, "Of a response's 4-grams.", least=0)
  min_format: float = key(0.3, "Responses that follow the grammar.", least=0)
  max_mismatch: float = key(
    0.1, "Sampler against trainer, mean, nats.", least=0
  )
  max_skipped: float = key(
    0.5, "Steps skipped because a gradient was not finite.", least=0
  )
  window: int = key(
    3, "Updates over which falling metrics of training are averaged.", least=1
  )
  max_score_fall: float = key(
    0.4,
    "Of the held-out success below the run's best, beyond its noise.",
    least=0,
  )
  max_return_fall: float = key(
    0.4,
    "Of the training return below the run's best, in standard deviations of an "
    "episode's.",
    least=0,
  )
  max_deviation_fall: float = key(
    0.6,
    "Of the deviation of returns inside the groups below the run's best, while "
    "the return is not at its own.",
    least=0,
  )
  max_dependence_fall: float = key(
    0.7,
    "Of the dependence of first responses on their prompt below the run's "
    "best.",
    least=0,
  )
  rate_factor: float = key(
    0.5, "rollback: of the learning rate, per rollback.", above=0, most=1
  )
  reuse_factor: float = key(
    0.5,
    "rollback: of passes over a rollout and of mini-batches, per rollback.",
    above=0,
    most=1,
  )
  kl_coefficient: float = key(
    0.05,
    "rollback: reward per nat of KL from the good policy, per rollback.",
    least=0,
  )
  rollbacks: int = key(3, "rollback: most of them; then stop.", least=0)


@dataclasses.dataclass(frozen=True)
class ColdStart:
  """Supervised start of the policy."""

  kind: str = key(
    "none",
    "Imitate the expert, then the policy's own successes, or one of them.",
    choices=("expert", "rft", "expert+rft", "none"),
  )
  episodes: int = key(512, "Demonstrations of the scripted expert.", least=1)
  only_successes: bool = key(False, "Leave out demonstrations that failed.")
  epochs: int = key(1, "Passes over the demonstrations.", least=1)
  learning_rate: float = key(1e-3, "Peak; cosine decay.", above=0)
  batch_size: int = key(32, "Turns per optimizer step.", least=1)
  micro_rows: int = key(8, "Rows per gradient accumulation step.", least=1)
  rft_rounds: int = key(
    1, "Rounds of sampling and fine-tuning on successes.", least=1
  )
  rft_tasks: int = key(
    64, "Tasks per round, `rollout.group_size` tries each.", least=1
  )
  rft_epochs: int = key(1, "Passes over the successes of a round.", least=1)


@dataclasses.dataclass(frozen=True)
class Eval:
  """The fixed panel of held-out tasks."""

  split: str = key("valid", "Where its tasks come from.")
  tasks: int = key(64, "Its size, from the split's start.", least=1)
  temperature: float = key(0.6, "Of sampling; 0 = greedy.", least=0)
  top_k: int = key(20, "As `rollout.top_k`.", least=0)
  top_p: float = key(0.95, "As `rollout.top_p`.", above=0, most=1)


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices per axis of the update; one may be -1, the rest."""

  data: int = key(-1, "Rows are split over these.", least=-1)
  fsdp: int = key(1, "Rows and parameters are split over these.", least=-1)
  tensor: int = key(1, "Products are split over these.", least=-1)


@dataclasses.dataclass(frozen=True)
class Memory:
  """The plan of a device's memory."""

  check: bool = key(True, "Say what a run needs; refuse it if that cannot fit.")
  limit: float = key(
    0.0, "GB of a device that may be used; 0 = what it has.", least=0
  )


@dataclasses.dataclass(frozen=True)
class Log:
  """What a run reports."""

  tensorboard: bool = key(True, "Write `tensorboard/`.")
  wandb: str = key("", "Weights & Biases project; empty = off.")
  mlflow: str = key("", "MLflow experiment; empty = off.")
  trajectories: int = key(
    4,
    "Training episodes written to `trajectories/` per update, for reading; "
    "those of evaluations are written whole. 0 = none at all.",
    least=0,
  )
  gradient_noise: int = key(
    0,
    "Updates between measurements of how much micro-batches agree on the "
    "gradient, `learn/grad_agreement`; each costs a gradient. 0 = never.",
    least=0,
  )


# Sections that have the options of whatever is registered for them as keys.
_OPTIONS: Mapping[type, Callable[[], Mapping[str, keys.Key]]] = {
  Control: uncertainty.option_keys,
  Advantage: estimators.option_keys,
  Loss: policy_losses.option_keys,
}


def with_options(section: type) -> type:
  """A section with the options that are registered for it by now."""
  if section not in _OPTIONS:
    return section
  return _extend(section, tuple(_OPTIONS[section]().values()))


@functools.cache
def _extend(section: type, options: tuple[keys.Key, ...]) -> type:
  """The section with these keys; the same class for the same ones."""
  return dataclasses.make_dataclass(
    section.__name__,
    [(key.name, type(key.default), keys.field(key)) for key in options],
    bases=(section,),
    frozen=True,
  )


def _extensible(section: type) -> Any:
  """A field for a section whose keys are not known before it is made."""
  return dataclasses.field(default_factory=lambda: with_options(section)())


@dataclasses.dataclass(frozen=True)
class Config:
  """All settings of a run."""

  name: str = key("base", "Names the run and its directory.")
  seed: int = key(0, "Everything random derives from it.", least=0)
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
    "Cold starts, search indexes and compiled programs; relative to the home "
    "directory's cache unless absolute. Empty = `~/.cache/t2po_jax`.",
  )


def get_config() -> ConfigDict:
  """All keys with defaults that train a tiny model on a CPU."""
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
  """The frozen record of a configuration.

  Args:
    config: from a task's `get_config`, perhaps changed since.

  Returns:
    The same settings.

  Raises:
    ValueError: for a key that does not exist, or a value out of its bounds.
  """
  return _read(Config, config.to_dict(), "")


def _read(section: type, values: Mapping[str, Any], name: str) -> Any:
  """One section and those inside it."""
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
  presets = {"tiny": lambda c: None, **algorithms.PRESETS, **presets}
  for name in filter(None, (part.strip() for part in names.split(","))):
    if name not in presets:
      raise ValueError(
        f"config preset {name!r} is unknown{keys.nearest(name, presets)}"
      )
    presets[name](config)
  return config.lock()
