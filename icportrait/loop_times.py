"""Where the denoising loop's time goes, measured from within, and what the next requests may expect by it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from icportrait.contract import Array
from icportrait.metrics import Metrics
from icportrait.runtime import Slots
from icportrait.runtime.placement import Placed
from icportrait.runtime.slots import Inputs

NEW_SHARE = 0.1
"""How much of an average its newest value makes."""


class Pace:
    """What a step takes by slots in use, and what requests spend outside of the loop: moving averages, in seconds."""

    def __init__(self) -> None:
        self.before_s = 0.0
        """From a request's admission to its arrival at the loop."""
        self.after_s = 0.0
        """From its last step to its answer."""
        self._step_s: dict[int, float] = {}

    def step_s(self, rows: int) -> float:
        """From one step's end to the next one's, what is warped between them included; 0 before any was measured."""
        if not self._step_s:
            return 0.0
        return self._step_s[min(list(self._step_s), key=lambda known: abs(known - rows))]

    def stepped(self, rows: int, seconds: float) -> None:
        self._step_s[rows] = _average(self._step_s.get(rows, seconds), seconds)

    def arrived(self, seconds: float) -> None:
        self.before_s = _average(self.before_s or seconds, seconds)

    def answered(self, seconds: float) -> None:
        self.after_s = _average(self.after_s or seconds, seconds)


def _average(before: float, new: float) -> float:
    return before + NEW_SHARE * (new - before)


class LoopTimes:
    """``Slots`` that are timed, and the turns of the loop around them.

    Engines are timed by the real clock, whichever clock the loop lives by.
    """

    def __init__(self, slots: Slots, metrics: Metrics, pace: Pace) -> None:
        self._slots, self._metrics, self._pace = slots, metrics, pace
        self.rows, self.max_jobs, self.version = slots.rows, slots.max_jobs, slots.version
        self.overlaps, self.clear, self.move = slots.overlaps, slots.clear, slots.move
        self._engine_s = self._last_engine_s = 0.0
        # Since the last step.
        self._outside_s = self._turns_s = 0.0
        # When, and the engines' time by then.
        self._since = (0.0, 0.0)

    def condition(self, jobs: Sequence[Inputs], rows: Sequence[Sequence[int]]) -> Array:
        """See ``Slots.condition``."""
        with self._engine():
            confidences = self._slots.condition(jobs, rows)
        self._metrics.observe("warping_ms", 1000 * self._last_engine_s)
        return confidences

    def predict(self, canvas_latent: Array, timestep: Array, meanwhile: Callable[[], None]) -> Array:
        """See ``Slots.predict``; what can't run beside the engine counts as outside of it."""
        if not self.overlaps:
            meanwhile()
        with self._engine():
            return self._slots.predict(canvas_latent, timestep, meanwhile if self.overlaps else lambda: None)

    def to_host(self, array: Placed) -> Array:
        """See ``Slots.to_host``."""
        return self._slots.to_host(array)

    def pause(self) -> None:
        """Begin anew: the loop will wait, or a step has ended."""
        self._outside_s = self._turns_s = 0.0

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One turn of the loop: a warping or a step, and what belongs to it."""
        self._since = (time.perf_counter(), self._engine_s)
        try:
            yield
        finally:
            self._add()

    def stepped(self, rows: int) -> None:
        """A step of so many rows has ended; what this turn still does counts for the next one."""
        self._add()
        self._pace.stepped(rows, self._turns_s)
        self._metrics.observe("step_slots", rows)
        self._metrics.observe("step_ms", 1000 * self._last_engine_s)
        self._metrics.observe("step_outside_engine_ms", 1000 * self._outside_s)
        self.pause()

    def _add(self) -> None:
        began_s, engine_before_s = self._since
        self._since = (time.perf_counter(), self._engine_s)
        spent_s = self._since[0] - began_s
        self._turns_s += spent_s
        self._outside_s += spent_s - (self._engine_s - engine_before_s)

    @contextmanager
    def _engine(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._last_engine_s = time.perf_counter() - began
            self._engine_s += self._last_engine_s
