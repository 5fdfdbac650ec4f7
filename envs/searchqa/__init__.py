"""Search QA: answer a question with a search engine in a few turns."""

from envs.searchqa import benchmark

SearchQA = benchmark.SearchQA
