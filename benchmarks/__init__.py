"""Measurements of a running server, from outside: ``python -m benchmarks``."""
