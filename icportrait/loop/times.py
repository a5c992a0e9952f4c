"""The time that the denoising loop's steps take."""

from __future__ import annotations

from collections.abc import Callable

from icportrait.metrics import Metrics
from icportrait.pace import Pace


class Times:
    """The times at which engines run, and the time between their runs.

    A runtime that computes in ``wait`` counts as running from ``launch`` on.
    """

    def __init__(self, clock: Callable[[], float], metrics: Metrics, pace: Pace) -> None:
        self._clock, self._metrics, self._pace = clock, metrics, pace
        self._outside_s = self._expected_s = 0.0
        now_s = clock()
        # When a run began or ended, or the loop found work; then the same of runs' ends and of steps' ends alone.
        self._moved_s = self._free_since_s = self._step_since_s = now_s
        # To be counted by ``publish``.
        self._warpings_s: list[float] = []
        self._last_step: tuple[int, float, float, float] | None = None

    def begin(self, rows: int = 0) -> None:
        """Note that an engine is launched: the UNet over a number of rows, or with 0 the warping network."""
        self._moved_s = self._clock()
        self._expected_s = self._pace.step_s(rows) if rows else 0.0
        self._outside_s += self._moved_s - self._free_since_s

    def end(self, engine_s: float | None = None) -> float:
        """Note that the engine has ended or failed, and return the seconds of its run.

        Args:
            engine_s: the engine's own time, where the device has measured it. The rest, such as copies, counts as time
                between runs.
        """
        began_s, self._moved_s, self._expected_s = self._moved_s, self._clock(), 0.0
        self._free_since_s = self._moved_s
        seconds = self._moved_s - began_s
        if engine_s is None or engine_s > seconds:
            return seconds
        self._outside_s += seconds - engine_s
        return engine_s

    def warped(self, seconds: float) -> None:
        """Note a warping that has ended."""
        self._warpings_s.append(seconds)

    def stepped(self, rows: int, engine_s: float) -> None:
        """Note that a step of a number of rows has ended."""
        self._last_step = (rows, self._free_since_s - self._step_since_s, self._outside_s, engine_s)
        self._outside_s, self._step_since_s = 0.0, self._free_since_s

    def resume(self) -> None:
        """Begin anew, because the loop has waited for work."""
        self._moved_s = self._free_since_s = self._step_since_s = self._clock()
        self._outside_s = 0.0

    def standstill(self) -> tuple[float, float]:
        """Return seconds since the loop moved on, and the expected seconds of the run that the loop waits for, else 0.

        Any thread may call it.
        """
        return self._clock() - self._moved_s, self._expected_s

    def publish(self) -> None:
        """Count the last step and the warpings before it, once there is time for it."""
        while self._warpings_s:
            self._metrics.observe("warping_ms", 1000 * self._warpings_s.pop())
        if self._last_step:
            rows, seconds, outside_s, engine_s = self._last_step
            self._last_step = None
            self._pace.stepped(rows, seconds)
            self._metrics.observe("step_slots", rows)
            self._metrics.observe("step_ms", 1000 * engine_s)
            self._metrics.observe("step_outside_engine_ms", 1000 * outside_s)
