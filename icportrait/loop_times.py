"""Where the denoising loop's time goes, measured from within, and what the next requests may expect by it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from icportrait.contract import Array
from icportrait.metrics import Metrics
from icportrait.runtime import Slots
from icportrait.runtime.slots import Inputs
from icportrait.step_alarm import StepAlarm

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
    """``Slots`` that are timed, and what lies between their engines' runs.

    Engines are timed by the real clock, whichever clock the loop lives by.
    """

    def __init__(self, slots: Slots, metrics: Metrics, pace: Pace) -> None:
        self._slots, self._metrics, self._pace = slots, metrics, pace
        self.rows, self.max_jobs, self.version = slots.rows, slots.max_jobs, slots.version
        self.overlaps, self.clear, self.move, self.to_host = slots.overlaps, slots.clear, slots.move, slots.to_host
        self.engine_s = self._outside_s = 0.0
        """Of the last run, and since the last step."""
        self._moved_s, self._expected_s = time.perf_counter(), 0.0
        """When a run began or ended or the loop found nothing to do, and how long the run is expected to take."""
        # When an engine ended, or the loop found something to do; and the same, of steps alone.
        self._free_since_s = self._step_since_s = time.perf_counter()
        self._alarm = StepAlarm()
        # What is still to be counted.
        self._warpings_s: list[float] = []
        self._last_step: tuple[int, float, float, float] | None = None

    def condition(self, jobs: Sequence[Inputs], rows: Sequence[Sequence[int]], meanwhile: Callable[[], None]) -> Array:
        """See ``Slots.condition``."""
        confidences = self._run(lambda beside: self._slots.condition(jobs, rows, beside), meanwhile, 0.0)
        self._warpings_s.append(self.engine_s)
        return confidences

    def predict(self, canvas_latent: Array, timestep: Array, meanwhile: Callable[[], None]) -> Array:
        """See ``Slots.predict``."""

        def alarmed() -> None:
            self._alarm.begin(len(timestep))
            meanwhile()
            self._alarm.back()

        expected_s = self._pace.step_s(len(timestep))
        noise_pred = self._run(lambda beside: self._slots.predict(canvas_latent, timestep, beside), alarmed, expected_s)
        now_s = self._free_since_s
        self._alarm.end(now_s)
        self._last_step = (len(timestep), now_s - self._step_since_s, self._outside_s, self.engine_s)
        self._outside_s, self._step_since_s = 0.0, now_s
        return noise_pred

    def sleep_before_end(self, rows: int) -> float:
        """Within a step's ``meanwhile``: sleep until shortly before the engine's end, unless it keeps this thread.

        Args:
            rows: in use.

        Returns:
            Seconds that the step still takes, by the pace.
        """
        if self.overlaps:
            self._alarm.sleep()
        return max(0.0, self._pace.step_s(rows) - (time.perf_counter() - self._step_since_s))

    def resume(self) -> None:
        """Begin anew: the loop has waited for work."""
        self._free_since_s = self._step_since_s = self._moved_s = time.perf_counter()
        self._outside_s = 0.0

    def standstill(self) -> tuple[float, float]:
        """Since when the loop has been where it is, and how long an engine's run that it waits for may be expected to
        take, in seconds; 0 where that isn't known. From any thread.
        """
        return time.perf_counter() - self._moved_s, self._expected_s

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

    def _run(
        self, engine: Callable[[Callable[[], None]], Array], meanwhile: Callable[[], None], expected_s: float
    ) -> Array:
        """Time an engine; what can't run beside it counts as outside of it."""
        if not self.overlaps:
            meanwhile()
        began_s = self._moved_s = time.perf_counter()
        self._expected_s = expected_s
        self._outside_s += began_s - self._free_since_s
        try:
            return engine(meanwhile if self.overlaps else lambda: None)
        finally:
            self._free_since_s = self._moved_s = time.perf_counter()
            self._expected_s = 0.0
            self.engine_s = self._free_since_s - began_s
