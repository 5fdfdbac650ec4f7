"""Configurations; see base.py for every key."""
