"""Every setting of WebShop: default, meaning and bounds."""

import dataclasses

from t2po_jax import keys
from t2po_jax.envs import base
from t2po_jax.envs.webshop import goals

STORAGES = ("auto", "memory", "disk")
WORDINGS = ("compact", "full", "reference")


@dataclasses.dataclass(frozen=True)
class Settings(base.PromptSettings):
  """The keys of `config.env` for WebShop."""

  catalogue: str = keys.key(
    "embedded",
    "`embedded`, or the path of `items_shuffle*.json`; environment variables "
    "in it are expanded. `items_ins_v2*.json` with the same suffix and "
    "`items_human_ins.json` are expected next to it.",
  )
  goals: str = keys.key(
    "synthetic",
    "Where goals come from; `human` needs instructions written by people.",
    choices=goals.KINDS,
  )
  products: int = keys.key(
    0,
    "Number of products, taken from the start of a file; 0 takes all (300 of "
    "the embedded catalogue).",
    least=0,
  )
  seed: int = keys.key(
    0, "Seed of the embedded catalogue; tasks of a file do not depend on it."
  )
  nouns: str = keys.key(
    "auto",
    "Where nouns of real titles come from: `spacy`, `approximate`, the path of "
    "a recorded table, or `auto`, the best available one.",
  )
  storage: str = keys.key(
    "auto",
    "Storage of a real catalogue: in memory, on disk (SQLite, shared by all "
    "workers), or depending on its size.",
    choices=STORAGES,
  )
  cache_dir: str = keys.key(
    "",
    "Indexes and catalogues are kept in `webshop` below it; empty: the run's "
    "cache.",
  )
  show_attributes: bool = keys.key(
    False, "Whether product pages have a button for attributes."
  )
  wording: str = base.wording_key(*WORDINGS)
  max_turns: int = keys.key(
    15, "Turns until an episode ends without a purchase.", least=1
  )
  reward_success: float = keys.key(10.0, "Reward of a purchase that scores 1.")
  reward_score: float = keys.key(
    0.0, "Reward per unit of score, for every purchase."
  )
  expert_hesitation: float = base.hesitation_key(1.0, per="turn")
  expert_doubt: float = base.doubt_key(0.15, "that the expert makes an error")
