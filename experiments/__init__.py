"""Entry points: train, compare, fine-tune, play, report."""
