"""Processes that work together, and which of them computes what."""
