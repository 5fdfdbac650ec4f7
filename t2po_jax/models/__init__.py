"""The policy network: architecture, weights and tokenizer."""
