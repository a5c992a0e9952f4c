"""Engines that fail on demand, for a repository under chaos: each model of it has a copy of this file.

A test orders a fault by a file with the engine's name, in the folder that ``CHAOS_FAULTS`` names. The file holds the
fault, and goes when the fault happens, so that a fault happens once.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = "CHAOS_FAULTS"
ERROR, NAN, ENDLESS = "error", "nan", "endless"


def faulty(name: str, engine: Any, method: str) -> Any:
    """Return the engine; its ``method`` looks for an ordered fault behind each run."""
    run = getattr(engine, method)

    def run_and_fail(*arguments: Any) -> Any:
        outcome = run(*arguments)
        fault = _ordered(name)
        if fault == ERROR:
            raise RuntimeError("ordered by a test")
        if fault == ENDLESS:
            threading.Event().wait()
        return _spoilt(outcome) if fault == NAN else outcome

    setattr(engine, method, run_and_fail)
    return engine


def _ordered(name: str) -> str:
    order = Path(os.environ[FOLDER]) / name
    try:
        fault = order.read_text()
        order.unlink()
    except OSError:
        return ""
    return fault


def _spoilt(outcome: Any) -> Any:
    if isinstance(outcome, dict):
        return {name: _spoilt(array) for name, array in outcome.items()}
    return np.full_like(outcome, np.nan)
