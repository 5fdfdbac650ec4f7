"""Learning: advantages, losses, batches and the sharded update."""
