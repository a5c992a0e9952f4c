"""Engine runtimes: one protocol, and what executes an exported graph behind it."""

from icportrait.runtime.engine import Engine, load_engine

__all__ = ["Engine", "load_engine"]
