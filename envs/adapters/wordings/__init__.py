"""What the model reads: prompts and observations in words."""
