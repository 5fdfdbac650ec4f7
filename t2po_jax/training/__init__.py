"""The training loop around rollouts and updates, and its outputs."""
