"""Meshes of devices and processes that work together."""
