"""Engine runtimes: one protocol, and what executes an exported graph behind it."""

from icportrait.runtime.engine import Engine, load_engine
from icportrait.runtime.slots import Slots, load_slots

__all__ = ["Engine", "Slots", "load_engine", "load_slots"]
