"""The loop around rollouts and updates, and what it writes."""
