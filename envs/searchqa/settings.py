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
    "Question set of TensorFlow Datasets to use instead, e.g. "
    "`natural_questions_open`; its split `train` is for training, and "
    "`data_dir` then needs only the corpus. Empty: none.",
  )
  tfds_eval_split: str = keys.key(
    "validation", "Split of that set to evaluate on."
  )
  wording: str = keys.key(
    "",
    "How prompts are worded; empty: `compact` for the embedded world, `full` "
    "for real data; `reference` has the format of the published experiments.",
    choices=("", *WORDINGS),
  )
  max_turns: int = keys.key(4, "Turns until an episode ends.", least=1)
  topk: int = keys.key(3, "Passages per search.", least=1)
  passage_chars: int = keys.key(
    0,
    "Most characters of a passage that are shown; longer ones lose their "
    "middle. 0: no limit.",
    least=0,
  )
  reward_success: float = keys.key(1.0, "Reward of a right answer.")
  reward_f1: float = keys.key(
    0.0,
    "Reward of any other answer per unit of F1, so that a small model that "
    "seldom matches exactly has something to learn from.",
    least=0.0,
  )
  categories: str = keys.key(
    "",
    "Question sets of real data, or `1-hop`, `2-hop`, `3-hop` of the embedded "
    "world, separated by commas; empty: all.",
  )
  hops: str = keys.key(
    "1,2,3",
    "Numbers of hops of the embedded questions, up to 5, in equal proportions; "
    "with `1,2,3`, one hop is half as frequent.",
  )
  retriever: str = keys.key(
    "bm25", "How passages are searched.", choices=RETRIEVERS
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
    60.0, "Seconds to wait for an answer of the server.", above=0.0
  )
  tries: int = keys.key(
    10, "Most requests per search before the trajectory is aborted.", least=1
  )
  backoff: float = keys.key(
    1.0,
    "Mean seconds of the first pause between tries; pauses grow linearly.",
    least=0.0,
  )
  deadline: float = keys.key(
    300.0, "Seconds that a search may take, all tries included.", above=0.0
  )
  cache_dir: str = keys.key(
    "", "Where indexes of real corpora are kept; empty: the run's cache."
  )
  seed: int = keys.key(0, "Seed of the embedded world, not of the splits.")
  people: int = keys.key(48, "People in the embedded world; even.", least=2)
  places: int = keys.key(24, "Places in it; even.", least=2)
  works: int = keys.key(32, "Works in it; even.", least=2)
  regions: int = keys.key(6, "Regions in it; even.", least=2)
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
  expert_hesitation: float = base.hesitation_key(1.0, per="turn")
  expert_doubt: float = base.doubt_key(0.15, "that the expert makes an error")
  expert_slip: float = keys.key(
    0.0,
    "Probability per turn that it makes an error regardless of its thought.",
    least=0.0,
    most=1.0,
  )
