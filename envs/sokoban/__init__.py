"""Sokoban in text: push every box onto a goal."""

from t2po_jax.envs.sokoban import benchmark

Sokoban = benchmark.Sokoban
