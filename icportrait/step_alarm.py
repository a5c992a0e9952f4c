"""Wakes the denoising loop shortly before the engine ends a step, as its last steps let expect.

What the loop does then, it does with all that has come until then, and leaves in the caches what it needs right after.
"""

from __future__ import annotations

import time
from collections import Counter, deque

RUNS_KNOWN = 8
"""A step is expected to take as long as the shortest of so many before it. A loop that comes too late sees when it came
and not when the engine ended, so it sleeps in none of the first, and in all but one of every so many that follow: one
of those that are known is right."""

LEAD_S = 0.0005
"""So long before the engine's end the loop shall have done what it has to do."""


class StepAlarm:
    """Told when steps begin and end; steps of as many rows take about as long. Not thread-safe."""

    def __init__(self) -> None:
        """Begin without knowing how long steps take."""
        self._rows, self._began_s, self._due_s = 0, 0.0, 0.0
        self._runs: Counter[int] = Counter()
        self._lasted_s: dict[int, deque[float]] = {}
        """The last ones, by rows."""
        self._worked_s: deque[float] = deque([0.0], maxlen=RUNS_KNOWN)
        """How long after it was due the loop had done what it had to do."""

    def begin(self, rows: int) -> None:
        """The engine runs."""
        self._rows = rows
        self._began_s = self._due_s = time.perf_counter()

    def sleep(self) -> None:
        """Sleep until the loop has just time enough for what it has to do, where that is known."""
        now_s = time.perf_counter()
        runs = self._runs[self._rows]
        sleeps = runs > RUNS_KNOWN and runs % RUNS_KNOWN > 0
        lasts_s = min(self._lasted_s[self._rows]) if sleeps else 0.0
        self._due_s = max(now_s, self._began_s + lasts_s - LEAD_S - max(self._worked_s))
        if self._due_s > now_s:
            time.sleep(self._due_s - now_s)

    def back(self) -> None:
        """The loop has done it, and waits for the engine."""
        self._worked_s.append(time.perf_counter() - self._due_s)

    def end(self, now_s: float) -> None:
        """The engine has ended, by ``time.perf_counter``."""
        self._runs[self._rows] += 1
        self._lasted_s.setdefault(self._rows, deque(maxlen=RUNS_KNOWN)).append(now_s - self._began_s)
