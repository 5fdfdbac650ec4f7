"""Scores of any policy on the panels of training: tables, intervals, curves."""
