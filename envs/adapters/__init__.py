"""Adapters for environments of other libraries, each with its own extra.

All of them guarantee that a task id is a seed, that splits have different
seeds, and that a malformed response is a turn without effect. None of them
guarantees that two seeds are two different tasks, or that a lost episode can be
restored other than by replaying it.
"""
