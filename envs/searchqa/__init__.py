"""Search QA: answer a question with a search engine in a few turns."""

from t2po_jax.envs.searchqa import benchmark

SearchQA = benchmark.SearchQA
