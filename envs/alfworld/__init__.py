"""ALFWorld: household tasks in text, six task types."""

from envs.alfworld import benchmark

ALFWorld = benchmark.ALFWorld
