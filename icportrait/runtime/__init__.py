"""Engine runtimes: one protocol, and what executes an exported graph behind it."""

from icportrait.runtime.engine import Engine
from icportrait.runtime.load import load_engine, load_slots
from icportrait.runtime.slots import Slots

__all__ = ["Engine", "Slots", "load_engine", "load_slots"]
