"""Search QA: answer questions of one to three hops by searching.

  python experiments/main.py --config=configs/searchqa.py

trains a small model from scratch on the embedded world.
"""

from configs import base


def get_config(presets: str = "") -> base.ConfigDict:
  """The embedded default; `presets` are names of `PRESETS`."""
  c = base.get_config()
  c.name = "searchqa"
  c.env = base.ConfigDict(
    {
      "name": "searchqa",
      "data_dir": "",  # Real questions and corpus; empty = embedded world.
      "max_turns": 4,
      "wording": "",  # `compact` or `full`; empty = by the kind of data.
      "topk": 2,  # Passages per search.
      "expert_hesitation": 1.5,  # Needless rounds per thought, on average.
      "expert_doubt": 0.3,  # Chance per round that the expert goes wrong.
    }
  )
  c.cold_start.kind = "expert"
  c.cold_start.episodes = 1500
  c.cold_start.epochs = 2
  c.cold_start.learning_rate = 3e-3
  return base.apply_presets(c, presets, PRESETS)


PRESETS = {}
