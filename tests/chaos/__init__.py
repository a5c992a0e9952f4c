"""Faults under load, and how the server comes back: ``make chaos``."""
