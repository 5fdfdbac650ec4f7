"""Every setting of Search QA: default, meaning and bounds."""

import dataclasses

from t2po_jax import keys
from t2po_jax.envs import base
from t2po_jax.envs.searchqa import dense, remote

RETRIEVERS = ("bm25", "dense", "http")
WORDINGS = ("compact", "full", "reference")


@dataclasses.dataclass(frozen=True)
class Settings(base.PromptSettings):
  """The keys of `config.env` for Search QA."""

  data_dir: str = keys.key(
    "",
    "Directory with `train.jsonl` and `eval.jsonl` (or `.parquet`) and "
    "`corpus.jsonl` (or `.jsonl.gz`; not needed with retriever `http`); empty: "
    "the embedded world.",
  )
  tfds: str = keys.key(
    "",
    "Question set of TensorFlow Datasets to ask instead, e.g. "
    "`natural_questions_open`; its split `train` trains, and `data_dir` then "
    "needs the corpus only. Empty: none.",
  )
  tfds_eval_split: str = keys.key(
    "validation", "Split of that set to evaluate on."
  )
  wording: str = keys.key(
    "",
    "How prompts are worded; empty: compact for the embedded world, full for "
    "real data; `reference` has the form of the published trainings.",
    choices=("", *WORDINGS),
  )
  max_turns: int = keys.key(4, "Turns until an episode ends.", least=1)
  topk: int = keys.key(3, "Passages per search.", least=1)
  passage_chars: int = keys.key(
    0,
    "Longest passage shown, in characters; longer ones lose their middle. 0: "
    "no limit.",
    least=0,
  )
  reward_success: float = keys.key(1.0, "Reward of a right answer.")
  reward_f1: float = keys.key(
    0.0,
    "Reward of any other answer per unit of F1; a small model that seldom "
    "matches exactly has something to learn from.",
    least=0.0,
  )
  categories: str = keys.key(
    "",
    "Question sets of real data, or `1-hop`, `2-hop`, `3-hop` of the embedded "
    "world, joined by commas; empty: all.",
  )
  hops: str = keys.key(
    "1,2,3",
    "Numbers of hops of the embedded questions, up to 5, in equal shares; with "
    "`1,2,3` those of one hop have half a share.",
  )
  retriever: str = keys.key(
    "bm25", "What searches the passages.", choices=RETRIEVERS
  )
  encoder: str = keys.key(
    dense.ENCODER,
    "Text encoder of retriever `dense`, a Hugging Face name or a directory.",
  )
  url: str = keys.key(
    "http://127.0.0.1:8000/retrieve",
    "Address of the server of retriever `http`.",
  )
  dialect: str = keys.key(
    "search-r1", "Protocol of that server.", choices=remote.DIALECTS
  )
  timeout: float = keys.key(
    60.0, "Seconds to wait for one answer of the server.", above=0.0
  )
  tries: int = keys.key(
    10, "Requests per search until the trajectory is aborted.", least=1
  )
  backoff: float = keys.key(
    1.0,
    "Seconds of the first pause between tries, on average; they grow linearly.",
    least=0.0,
  )
  deadline: float = keys.key(
    300.0, "Seconds that one search may take with all its tries.", above=0.0
  )
  cache_dir: str = keys.key(
    "", "Where indexes of real corpora are kept; empty: the run's cache."
  )
  seed: int = keys.key(0, "Of the embedded world, not of the splits.")
  people: int = keys.key(48, "People of the embedded world; even.", least=2)
  places: int = keys.key(24, "Its places; even.", least=2)
  works: int = keys.key(32, "Its works; even.", least=2)
  regions: int = keys.key(6, "Its regions; even.", least=2)
  train_tasks: int = keys.key(
    1000, "Training questions of the embedded world.", least=1
  )
  valid_tasks: int = keys.key(
    100,
    "Validation questions; with real data a part of `eval`, at most half of "
    "each category.",
    least=1,
  )
  test_tasks: int = keys.key(
    200,
    "Test questions of the embedded world; with real data the rest of `eval`.",
    least=1,
  )
  expert_hesitation: float = keys.key(
    1.0, "Needless rounds per turn of the expert, on average.", least=0.0
  )
  expert_doubt: float = keys.key(
    0.15,
    "Probability per such round that the expert goes wrong.",
    least=0.0,
    most=1.0,
  )
  expert_slip: float = keys.key(
    0.0,
    "Probability per turn that it goes wrong in any case.",
    least=0.0,
    most=1.0,
  )
