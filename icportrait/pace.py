"""The time that the next requests may expect: the loop measures its steps, the gateway's line the time around them."""

from __future__ import annotations

NEW_SHARE = 0.1
"""Share of an average that its newest value makes."""


class Pace:
    """Moving averages, in seconds: a step by slots in use, and the time of requests outside of the loop."""

    def __init__(self) -> None:
        self.before_s = 0.0
        """Seconds from a request's admission to its arrival at the loop."""
        self.after_s = 0.0
        """Seconds from a request's last step to its answer."""
        self._step_s: dict[int, float] = {}

    def step_s(self, rows: int) -> float:
        """Return the time from a step's end to the next one's, warping between them included; 0 before any step."""
        if not self._step_s:
            return 0.0
        if (known_s := self._step_s.get(rows)) is not None:
            return known_s
        return self._step_s[min(list(self._step_s), key=lambda known: abs(known - rows))]

    def stepped(self, rows: int, seconds: float) -> None:
        self._step_s[rows] = _average(self._step_s.get(rows, seconds), seconds)

    def arrived(self, seconds: float) -> None:
        self.before_s = _average(self.before_s or seconds, seconds)

    def answered(self, seconds: float) -> None:
        self.after_s = _average(self.after_s or seconds, seconds)


def _average(before: float, new: float) -> float:
    return before + NEW_SHARE * (new - before)
