"""Evaluation of any policy on the tasks of training: tables and intervals."""
