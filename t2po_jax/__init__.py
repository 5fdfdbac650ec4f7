"""T2PO in JAX: multi-turn reinforcement learning of language agents.

The rollout loop lets a policy act under exploration control; the learner
turns what happened into a better policy; `training/loop.py` alternates the two.
The method is T2PO (arXiv 2605.02178).
"""

__version__ = "0.2.0"
