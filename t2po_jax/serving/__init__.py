"""The OpenAI protocol over the sampler."""
