"""The phases of a request: the rows of a UNet batch that it takes, step by step, and a plan of many requests' rows.

Guidance costs each portrait a second row, at the steps of its interval alone.
"""

from __future__ import annotations

import math

import numpy as np

Phases = tuple[tuple[int, int], ...]
"""Steps one after another, as pairs: a number of steps, and the rows that each of them takes."""
ALL_STEPS = (0.0, 1.0)
"""The interval of guidance at all steps."""
FOR_GOOD = 2**31
"""A number of steps that never end."""


def guided_steps(guidance_scale: float, interval: tuple[float, float], steps: int) -> range:
    """Return the steps with guidance: the interval's, which is in shares of all steps (arXiv 2404.07724).

    Args:
        guidance_scale: 1 is without guidance.
        interval: begin and end, rounded to whole steps.
        steps: number of all.
    """
    begin, end = (math.floor(share * steps + 0.5) for share in interval)
    return (range(begin, end) if guidance_scale > 1.0 else range(0)) or range(0)


def phases_of(num_portraits: int, guided: range, steps: int) -> Phases:
    """Return the phases of a request: before, in and after its steps with guidance."""
    parts = (guided.start, 1), (len(guided), 2), (steps - guided.stop, 1)
    return tuple((count, num_portraits * rows) for count, rows in parts if count)


def remaining(phases: Phases, steps_done: int) -> Phases:
    """Return the phases after a number of steps."""
    left = []
    for steps, rows in phases:
        if steps > steps_done:
            left.append((steps - steps_done, rows))
        steps_done = max(0, steps_done - steps)
    return tuple(left)


def most_rows(phases: Phases) -> int:
    """Return the most rows that a step takes."""
    return max((rows for _, rows in phases), default=0)


def row_steps(phases: Phases) -> int:
    """Return the rows of all steps together."""
    return sum(steps * rows for steps, rows in phases)


class Timetable:
    """The rows of a batch that are free at each of its next steps."""

    def __init__(self, rows: int, steps: int) -> None:
        """Begin with all rows free at a number of steps, and at all later ones for good."""
        self._free = np.full(steps, rows, np.int32)

    def take(self, phases: Phases, start: int = 0) -> None:
        """Take a request's rows from a step on."""
        for steps, rows in phases:
            self._free[start : start + steps] -= rows
            start += steps

    def first_fit(self, phases: Phases, start: int = 0) -> int:
        """Return the first step from ``start`` on at which a request can begin."""
        while late := self._lateness(phases, start):
            start += late
        return start

    def _lateness(self, phases: Phases, start: int) -> int:
        """Return 0 where a request fits from a step on, else steps for which it must wait at least."""
        for steps, rows in phases:
            lacking = np.flatnonzero(self._free[start : start + steps] < rows)
            if lacking.size:
                # The phase must begin after the last step with too few rows.
                return int(lacking[-1]) + 1
            start += steps
        return 0
