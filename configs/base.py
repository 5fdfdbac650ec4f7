"""Every key of a configuration, with its unit and meaning.

A task file (`searchqa.py`, `webshop.py`, ...) starts from `get_config()` and
states only what differs. The result is locked: a key that is not listed here
is refused, with the nearest name that exists.

Presets are joined by commas after a colon, later ones win:
`--config=configs/searchqa.py:smollm2,grpo`. A task brings those of its models,
`algorithms.py` those that every task has, and `tiny` is the task's default.
"""

from collections.abc import Callable, Mapping
import difflib

from ml_collections import config_dict

from t2po_jax.configs import algorithms

ConfigDict = config_dict.ConfigDict


def get_config() -> ConfigDict:
  """All keys with defaults that train a tiny model on a CPU."""
  c = ConfigDict()
  c.name = "base"  # Names the run and its directory.
  c.seed = 0  # Everything random derives from it.

  # The environment: `name` and its constructor's own arguments.
  c.env = ConfigDict({"name": "toy"})

  c.model = model = ConfigDict()
  # Where the policy comes from: a Hugging Face directory or hub id, a GGUF
  # file, or `scratch` for a model of `size` trained here from the start.
  model.source = "scratch"
  model.size = "tiny"  # Named size, for `scratch` only.
  model.vocab_size = 1024  # Most pieces of the tokenizer, for `scratch` only.
  model.dtype = "float32"  # Compute type; master weights are float32.
  model.scan_layers = True  # Training: scan over layers, or unroll them.
  # Training: what the backward pass computes again: `none`, `full` (layers) or
  # `dots` (layers, but not their products with weights).
  model.remat = "none"

  c.lora = lora = ConfigDict()  # Low-rank adapters over the policy.
  lora.rank = 0  # Train adapters of this rank alone; 0 = all weights.
  lora.alpha = 32.0  # Their strength is alpha / rank.
  # `all` projections of the layers, or some of `query,key,value,out,gate,up,
  # down,head`.
  lora.targets = "all"
  # Train adapters in the cold start too and merge them after it; else it
  # trains all weights.
  lora.cold_start = False

  c.rollout = rollout = ConfigDict()
  rollout.tasks = 16  # Task groups per update.
  rollout.group_size = 8  # Trajectories per group, G.
  # Replace groups whose returns are all equal by fresh ones (DAPO).
  rollout.filter_groups = False
  rollout.filter_tries = 3  # Most rounds of replacement per update.
  # `window`: a prompt shows the last turns. `append`: it is the whole dialogue,
  # word for word, and starts over from the window when it gets too long.
  rollout.context = "window"
  rollout.memory = 4  # (observation, action) pairs in the window.
  rollout.prefix = "<think>"  # Text that every response is begun with.
  rollout.max_prompt = 192  # Tokens, the prefix included.
  rollout.max_response = 48  # Tokens.
  rollout.slots = 64  # Responses decoded at the same time, per process.
  # Devices of a process that share every product; the slots are split over as
  # many groups of them as divide their number.
  rollout.tensor = 1
  # Most tokens decoded per device call; measured in docs/performance.md.
  rollout.chunk = 16
  # Programs are compiled for sizes that double from the smallest on: tokens of
  # a prompt, prompts per call (these in fours), cache length attended to.
  rollout.prefill_tokens = 32  # Smallest prompt size.
  rollout.prefill_rows = 16  # Most prompts per call.
  rollout.live_tokens = 128  # Smallest cache length.
  # Environments answer on the spot, or in threads if they wait for a server,
  # or in processes if they are not safe between threads, crash or leak.
  rollout.env_threads = 0  # Calls at the same time; 0 = no threads.
  rollout.env_workers = 0  # Worker processes; 0 = none.
  rollout.env_memory = 2000.0  # MB a process may grow; 0 = no limit.
  rollout.env_timeout = 0.0  # Seconds per environment call; 0 = no limit.
  rollout.temperature = 1.0
  rollout.top_k = 0  # 0 = off.
  rollout.top_p = 1.0  # 1 = off.
  rollout.min_p = 0.0  # 0 = off.

  c.control = control = ConfigDict()
  # Uncertainty signal: `calibrated`, `entropy`, `confidence`, `released`.
  control.signal = "calibrated"
  control.normalizer = "running"  # `running` extremes, or `vocab`.
  control.alpha = 0.4  # Weight of the entropy in the calibrated signal.
  control.top_j = 20  # Tokens the confidence averages over.
  control.tempered = False  # Measure after the temperature.
  control.thinking = thinking = ConfigDict()
  thinking.enabled = True  # The token-level thinking intervention.
  # Threshold of mean |dM|: a number in quotes, or `auto(q)`, the q-quantile of
  # what is measured.
  thinking.epsilon = "auto(0.2)"
  thinking.window = 8  # N: the mean is over N + 1 changes.
  thinking.min_tokens = 8  # L_min: never fires before.
  thinking.max_tokens = 450  # L_max: always fires here; the hard budget.
  thinking.require_past_peak = True  # Only after the signal's peak.
  control.resampling = again = ConfigDict()
  again.eta = "auto(0.1)"  # Threshold of |dPhi|, likewise.
  again.max_tries = 2  # B_max: samplings beyond the first; 0 = off.
  control.calibration = calibration = ConfigDict()
  calibration.rollouts = 1  # Rollouts that an `auto` threshold waits for.
  calibration.every = 10  # Updates between recalibrations; 0 = never.

  c.reward = reward = ConfigDict()
  reward.format_penalty = 0.1  # Per response that breaks the grammar.
  reward.invalid_penalty = 0.1  # Per action that is not possible.
  reward.drop_void = False  # Leave out episodes with a turn without action.
  reward.drop_overlong = False  # Leave out responses that were cut off.
  reward.kl = "off"  # KL to the reference, charged per turn: `k1`, `k2`, `k3`.
  reward.kl_coefficient = 0.0
  reward.kl_target = 0.0  # nats per token; the coefficient follows; 0 = fixed.
  reward.kl_horizon = 10_000.0  # Trajectories over which it follows.

  c.advantage = advantage = ConfigDict()
  # `grpo`, `gigpo`, `rloo`, `reinforce_pp`, `reinforce_pp_baseline`, `remax`,
  # `empg`, or with a critic `gae` (of tokens) and `gae_turn`.
  advantage.estimator = "gigpo"
  advantage.discount = 0.95  # beta, per turn.
  advantage.norm_std = True  # Divide by the group's standard deviation.
  advantage.step_weight = 1.0  # gigpo: weight of the step advantage.
  advantage.step_norm = "mean_norm"  # gigpo: or `mean_std_norm`.
  advantage.similarity = 1.0  # gigpo: anchors match from this ratio; 1 = equal.
  advantage.per = "trajectory"  # grpo, gigpo: group statistics; or `turn`.
  advantage.trace = 0.95  # gae, gae_turn: lambda, per turn.
  advantage.token_discount = 1.0  # gae: gamma, per token of a turn.
  advantage.token_trace = 1.0  # gae: lambda, per token of a turn.
  advantage.whiten = True  # gae, gae_turn: mean 0 and deviation 1.
  advantage.entropy_scale = 1.0  # empg: k, how much sure turns learn more.
  advantage.clarity_scale = 1.0  # empg: k', of the bonus for a sure next turn.
  advantage.clarity_weight = 0.05  # empg: zeta, of that bonus.

  c.critic = critic = ConfigDict()  # gae, gae_turn.
  critic.kind = "trunk"  # Shares the policy's layers; or `separate`.
  critic.rate = 10.0  # Learning rate of its own parameters, per policy's.
  critic.coefficient = 0.5  # trunk: weight of its loss.
  critic.clip = 0.0  # Range around its old values; 0 = off.

  c.loss = loss = ConfigDict()
  loss.kind = "ppo"  # Or `gspo`, `cispo`, `sapo`.
  loss.clip_low = 0.2
  loss.clip_high = 0.2  # Above clip_low: clip-higher (DAPO).
  loss.dual_clip = 3.0  # ppo; 0 = off.
  loss.temperature_positive = 1.0  # sapo: of the gate where A > 0.
  loss.temperature_negative = 1.05  # sapo: of the gate elsewhere.
  loss.aggregation = "token_mean"
  # Loss term against the reference: `k1`, `k2`, `k3`; `k1+`, `k3+` have the
  # gradient of k2.
  loss.kl = "off"
  loss.kl_coefficient = 0.0
  loss.entropy_coefficient = 0.0
  loss.old_logprobs = "sampler"  # Or `recompute` before each update.
  # With `recompute`: w = old / sampler, `truncate` to at most the cap, `mask`
  # tokens beyond it, or `off`.
  loss.importance = "truncate"
  loss.importance_cap = 2.0

  c.optimizer = optimizer = ConfigDict()
  optimizer.learning_rate = 3e-4
  optimizer.schedule = "constant"  # Or `linear`, `cosine`: decay to 0.
  optimizer.warmup = 0  # Steps of linear warm-up.
  optimizer.b1 = 0.9
  optimizer.b2 = 0.95
  optimizer.weight_decay = 0.0
  optimizer.clip_norm = 1.0  # Global gradient norm; 0 = off.

  c.train = train = ConfigDict()
  train.updates = 30  # Rollouts, each followed by gradient steps.
  train.mini_batches = 1  # Optimizer steps per pass over a rollout.
  train.epochs = 1  # Passes over a rollout.
  train.row_tokens = 256  # Length of packed rows; at least prompt + response.
  # Rows per gradient accumulation step; few, because a part is computed whole.
  train.micro_rows = 8
  train.eval_every = 5  # Updates between evaluations; 0 = only at the end.
  train.save_every = 5  # Updates between checkpoints; 0 = only at the end.
  train.keep = 2  # Newest checkpoints kept, beside the best.
  # Folder of the checkpoints, a path or `gs://...`, that all processes reach;
  # empty = in the workdir.
  train.checkpoints = ""
  train.split = "train"

  c.guard = guard = ConfigDict()
  # What follows an alarm: `off`, `warn`, `stop`, or `rollback` to the last
  # good checkpoint with a lower learning rate.
  guard.action = "warn"
  guard.patience = 3  # Updates in a row beyond a limit that make an alarm.
  guard.min_entropy = 0.002  # nats per token; 0 = off, as for every limit.
  guard.max_entropy = 5.0
  guard.max_kl = 0.5  # Old policy against new within an update, nats.
  guard.max_reference_kl = 0.0  # With `loss.kl`: from the reference, nats.
  guard.max_grad_norm = 50.0  # Before clipping.
  guard.max_repetition = 0.8  # Of a response's 4-grams.
  guard.min_format = 0.3  # Responses that follow the grammar.
  guard.max_mismatch = 0.1  # Sampler against trainer, mean, nats.
  guard.max_skipped = 0.5  # Steps skipped because a gradient was not finite.
  guard.rate_factor = 0.5  # rollback: of the learning rate.
  guard.rollbacks = 3  # rollback: most of them; then stop.

  c.cold_start = cold = ConfigDict()
  cold.kind = "none"  # `expert`, `rft`, `expert+rft` or `none`.
  cold.episodes = 512  # Demonstrations of the scripted expert.
  cold.only_successes = False  # Leave out demonstrations that failed.
  cold.epochs = 1  # Passes over the demonstrations.
  cold.learning_rate = 1e-3  # Peak; cosine decay.
  cold.batch_size = 32  # Turns per optimizer step.
  cold.micro_rows = 8  # Rows per gradient accumulation step.
  cold.rft_rounds = 1  # Rounds of sampling and fine-tuning on successes.
  cold.rft_tasks = 64  # Tasks per round, `rollout.group_size` tries each.
  cold.rft_epochs = 1

  c.eval = evaluation = ConfigDict()
  evaluation.split = "valid"
  evaluation.tasks = 64  # Tasks of the fixed panel, from the split's start.
  evaluation.temperature = 0.6
  evaluation.top_k = 20
  evaluation.top_p = 0.95

  c.mesh = mesh = ConfigDict()
  mesh.data = -1  # Devices per axis; one of them may be -1, the rest.
  mesh.fsdp = 1
  mesh.tensor = 1

  c.memory = memory = ConfigDict()
  memory.check = True  # Say what a run needs; refuse it if that cannot fit.
  memory.limit = 0.0  # GB of a device that may be used; 0 = what it has.

  c.log = log = ConfigDict()
  log.tensorboard = True
  log.wandb = ""  # Weights & Biases project; empty = off.
  log.mlflow = ""  # MLflow experiment; empty = off.
  # Training episodes written to `trajectories/` per update, for reading; those
  # of evaluations are written whole. 0 = none at all.
  log.trajectories = 4

  # Cold starts, search indexes and compiled programs; relative to the home
  # directory's cache unless absolute. Empty = `~/.cache/t2po_jax`.
  c.cache_dir = ""
  return c


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
      near = difflib.get_close_matches(name, presets, n=1)
      hint = f"; did you mean {near[0]!r}?" if near else ""
      raise ValueError(
        f"config preset {name!r} is unknown{hint} "
        f"(known: {', '.join(sorted(presets))})"
      )
    presets[name](config)
  return config.lock()
