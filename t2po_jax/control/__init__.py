"""Exploration control: pure functions of arrays (T2PO, arXiv 2605.02178)."""
