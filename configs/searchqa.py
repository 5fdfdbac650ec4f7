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
      "topk": 3,  # Passages per search.
      "expert_hesitation": 1.0,  # Needless rounds per thought, on average.
      "expert_doubt": 0.15,  # Chance per round that the expert goes wrong.
    }
  )
  c.cold_start.kind = "expert"
  return base.apply_presets(c, presets, PRESETS)


PRESETS = {}
