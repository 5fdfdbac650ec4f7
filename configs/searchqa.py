"""Search QA: answer questions of one to three hops by searching.

  python experiments/main.py --config=configs/searchqa.py

trains a small model from scratch on the embedded world.
"""

from t2po_jax.configs import base, environment, models


def get_config(presets: str = "") -> base.ConfigDict:
  """The embedded default; `presets` are names of `PRESETS`."""
  c = base.get_config()
  c.name = "searchqa"
  c.env = environment.section(
    "searchqa",
    topk=1,
    expert_hesitation=2.0,
    expert_doubt=0.4,
  )
  models.from_scratch(c, max_prompt=112, max_response=48)
  c.control.thinking.min_tokens = 8  # A fact and a plan take seven.
  c.cold_start.episodes = 3000
  c.cold_start.epochs = 2
  c.train.updates = 60
  c.train.mini_batches = 2
  c.train.row_tokens = 160
  return base.apply_presets(c, presets, PRESETS)


def smollm2(c: base.ConfigDict) -> None:
  """SmolLM2-135M-Instruct; give `env.data_dir` for real questions.

  --config=configs/searchqa.py:smollm2 --config.env.data_dir=DIR
  """
  models.smollm2(c, max_prompt=960)
  c.env.reward_f1 = 0.5  # Such a small model seldom matches exactly.
  c.env.topk = 3
  c.env.passage_chars = 240
  c.control.thinking.min_tokens = 12
  c.cold_start.episodes = 96
  c.cold_start.only_successes = True


def qwen3_4b(c: base.ConfigDict) -> None:
  """Qwen3-4B for accelerators; not yet run."""
  models.qwen3_4b(c)
  c.env.topk = 3
  c.rollout.tasks = 256
  c.rollout.group_size = 5
  c.rollout.max_prompt = 4096
  c.train.row_tokens = 4608
  c.eval.tasks = 512


def deep(c: base.ConfigDict) -> None:
  """Three to five hops among distractors; thoughts run into the limit.

  A truncated response has no action, so its turn is void: the case that the
  paper's thinking intervention is made for. See docs/study.md.
  """
  c.env.hops = "3,4,5"
  c.env.topk = 2
  c.env.max_turns = 7
  c.env.expert_doubt = 0.1
  c.rollout.memory = 6
  c.rollout.max_prompt = 224
  c.rollout.max_response = 32
  c.control.thinking.max_tokens = 26
  c.train.row_tokens = 272  # A response of 48 fits too.


def paper(c: base.ConfigDict) -> None:
  """The setting of arXiv 2605.02178; see `models.paper`.

  Not yet run.
  """
  qwen3_4b(c)
  models.paper(c)
  c.rollout.memory = 4  # Its script: history length.
  c.advantage.norm = "mean_std_norm"  # Its script: mode of GiGPO.
  c.advantage.similarity = 0.9  # Its script: threshold of similarity.
  c.advantage.autojunk = True  # Its code: difflib as it comes.
  steps = c.train.updates * c.train.mini_batches * c.train.epochs
  c.optimizer.warmup = steps // 10  # Its script: a tenth of the steps.


def paper_code(c: base.ConfigDict) -> None:
  """The same as its released code has it, where that differs from the text."""
  paper(c)
  models.paper_code(c)


PRESETS = {
  "deep": deep,
  "smollm2": smollm2,
  "qwen3-4b": qwen3_4b,
  "paper": paper,
  "paper-code": paper_code,
}
