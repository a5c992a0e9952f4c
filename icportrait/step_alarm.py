"""Wakes the denoising loop shortly before the engine ends a step, as its last steps let expect.

What the loop does then, it does with all that has come until then, and leaves in the caches what it needs right after.
"""

from __future__ import annotations

import time
from collections import deque

RUNS_KNOWN = 8
"""A step is expected to take as long as the shortest of so many before it."""

LEAD_S, LEAD_SHARE = 0.002, 0.15
"""So long before its end the loop is back, or by such a share of it where that is longer."""

WAITED_SHARE = 0.25
"""Who waits less than such a share of that for an engine may have come when it had ended: to fetch what a GPU has made
takes time as well."""


class StepAlarm:
    """Told when steps begin and end; steps of as many rows take about as long. Not thread-safe."""

    def __init__(self) -> None:
        """Begin without knowing how long steps take."""
        self._rows, self._began_s, self._back_s = 0, 0.0, 0.0
        self._lasted_s: dict[int, deque[float]] = {}
        """By rows; less than that where the loop came too late to see it."""

    def begin(self, rows: int) -> None:
        """The engine runs."""
        self._rows, self._began_s = rows, time.perf_counter()

    def sleep(self) -> float:
        """Sleep until the step is about to end, if that is known.

        Returns:
            Seconds that it still lasts; 0 where that isn't known.
        """
        ends_s = self._began_s + self._lasts_s()
        if (early_s := ends_s - self._lead_s() - time.perf_counter()) > 0:
            time.sleep(early_s)
        return max(0.0, ends_s - time.perf_counter())

    def back(self) -> None:
        """The loop has done what it had to do, and waits for the engine."""
        self._back_s = time.perf_counter()

    def end(self, now_s: float) -> None:
        """The engine has ended, by ``time.perf_counter``."""
        has_waited = now_s - self._back_s > WAITED_SHARE * self._lead_s()
        lasted_s = now_s - self._began_s if has_waited else self._lasts_s() / 2
        self._lasted_s.setdefault(self._rows, deque(maxlen=RUNS_KNOWN)).append(lasted_s)

    def _lead_s(self) -> float:
        return max(LEAD_S, LEAD_SHARE * self._lasts_s())

    def _lasts_s(self) -> float:
        """What the step takes at least; 0 before enough of its kind are known."""
        lasted_s = self._lasted_s.get(self._rows, ())
        return min(lasted_s) if len(lasted_s) == RUNS_KNOWN else 0.0
