"""ALFWorld: household tasks in text, six task types."""

from t2po_jax.envs.alfworld import benchmark

ALFWorld = benchmark.ALFWorld
