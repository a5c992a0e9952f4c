"""What counts as the loop's own time, by a clock that only what is said to take time moves on."""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from icportrait.batching import Batcher
from icportrait.loop_times import NEW_SHARE, LoopTimes, Pace
from icportrait.metrics import Metrics
from tests.label_slots import LabelSlots, label_batcher, steps_of, submit
from tests.unit.conftest import Clock


class TimedSlots(LabelSlots):
    """A warping takes 20 ms and a step 5; what is done meanwhile takes 2, within the step where it overlaps."""

    def __init__(self, clock: Clock, overlaps: bool = False) -> None:
        super().__init__()
        self.clock, self.overlaps = clock, overlaps

    def condition(self, jobs, rows, meanwhile):
        self.clock.pass_ms(20)
        return super().condition(jobs, rows, meanwhile)

    def predict(self, canvas_latent, timestep, meanwhile):
        began_s = self.clock()
        output = super().predict(canvas_latent, timestep, meanwhile)
        self.clock.now_s = max(self.clock(), began_s + 0.005) if self.overlaps else self.clock() + 0.005
        return output


def histogram(metrics: Metrics, name: str) -> tuple[float, float]:
    """Its sum, in whole tenths, and its count."""
    series = metrics.series()
    return round(series[f"{name}_sum", ()][1], 1), series[f"{name}_count", ()][1]


CANVAS = np.zeros((2, 4, 32, 64), np.float32)


def warp(times: LoopTimes) -> None:
    times.condition([{"profile_latent": CANVAS[:1]}], [[0]], lambda: None)


def step(times: LoopTimes, meanwhile: Callable[[], None] = lambda: None) -> None:
    times.predict(CANVAS, np.zeros(2, np.float32), meanwhile)


@pytest.mark.parametrize(("overlaps", "outside_ms"), [(True, 1 + 1 + 3), (False, 3 + 3 + 3)])
def test_what_runs_beside_the_engine_is_not_outside_of_it(clock: Clock, overlaps: bool, outside_ms: float) -> None:
    """A warping and two steps, with 1 ms of the loop's own before each step and 3 between them."""
    metrics, pace = Metrics(), Pace()
    times = LoopTimes(TimedSlots(clock, overlaps), metrics, pace)
    warp(times)
    for _ in range(2):
        clock.pass_ms(1)
        step(times, lambda: clock.pass_ms(2))
        times.publish()
        clock.pass_ms(3)
    assert histogram(metrics, "step_outside_engine_ms") == (outside_ms, 2)
    assert histogram(metrics, "step_ms") == (10, 2)
    assert histogram(metrics, "warping_ms") == (20, 1)
    assert histogram(metrics, "step_slots") == (4, 2)
    # The first of the two has the warping in it.
    first_ms, second_ms = (20 + 1 + 5, 3 + 1 + 5) if overlaps else (20 + 3 + 5, 3 + 3 + 5)
    assert 1000 * pace.step_s(2) == pytest.approx(first_ms + NEW_SHARE * (second_ms - first_ms))


def test_a_warping_between_two_steps_is_no_time_of_the_loops_own_and_a_part_of_the_pace(clock: Clock) -> None:
    metrics, pace = Metrics(), Pace()
    times = LoopTimes(TimedSlots(clock), metrics, pace)
    for _ in range(2):
        warp(times)
        clock.pass_ms(1)
        step(times)
        times.publish()
    assert histogram(metrics, "step_outside_engine_ms") == (2, 2)
    assert 1000 * pace.step_s(2) == pytest.approx(26)


def test_an_engine_that_fails_was_an_engine_too_and_no_step(clock: Clock) -> None:
    slots, metrics = TimedSlots(clock), Metrics()
    times = LoopTimes(slots, metrics, Pace())

    def fail(*_: Any) -> None:
        clock.pass_ms(50)
        raise RuntimeError("the device is lost")

    with pytest.MonkeyPatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(slots, "predict", fail)
        step(times)
    times.publish()
    step(times)
    times.publish()
    assert histogram(metrics, "step_outside_engine_ms") == (0, 1)


def test_waiting_for_requests_is_no_time_of_the_loops_own(clock: Clock) -> None:
    metrics, pace = Metrics(), Pace()
    times = LoopTimes(TimedSlots(clock), metrics, pace)
    for _ in range(2):
        clock.pass_ms(10_000)
        times.resume()
        clock.pass_ms(1)
        warp(times)
        step(times)
        times.publish()
    assert histogram(metrics, "step_outside_engine_ms") == (2, 2)
    assert 1000 * pace.step_s(2) == pytest.approx(26)


@pytest.mark.parametrize(("overlaps", "outside_ms"), [(False, 21), (True, 0)])
def test_the_loop_reports_a_step_while_the_next_one_runs_where_it_can(
    clock: Clock, overlaps: bool, outside_ms: float
) -> None:
    """Elsewhere, whatever a report takes, the next step is later by it; the last one's is nobody's."""
    metrics = Metrics()
    with label_batcher(slots=TimedSlots(clock, overlaps), metrics=metrics) as (_, batcher):
        submit(batcher, steps_of(4)[0], lambda *_: clock.pass_ms(7)).result(60)
    assert histogram(metrics, "step_outside_engine_ms") == (outside_ms, 4)
    assert histogram(metrics, "warping_ms") == (20, 1)


def test_the_loop_does_not_count_what_it_waits_for(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: queue.SimpleQueue[None] = queue.SimpleQueue()
    wait = Batcher._wait

    def noted(batcher: Batcher) -> None:
        waits.put(None)
        wait(batcher)

    monkeypatch.setattr(Batcher, "_wait", noted)
    metrics = Metrics()
    with label_batcher(slots=TimedSlots(clock), metrics=metrics) as (_, batcher):
        for _ in range(3):
            waits.get(timeout=10)
            clock.pass_ms(10_000)
            submit(batcher, steps_of(1)[0]).result(60)
        waits.get(timeout=10)
    assert histogram(metrics, "step_outside_engine_ms") == (0, 3)
    assert 1000 * batcher.pace.step_s(1) == pytest.approx(25)


def test_the_pace_is_a_moving_average_by_slots_in_use() -> None:
    pace = Pace()
    assert pace.step_s(1) == pace.step_s(16) == 0
    pace.stepped(4, 0.1)
    assert pace.step_s(16) == pace.step_s(1) == 0.1
    pace.stepped(16, 0.5)
    pace.stepped(16, 1.0)
    assert pace.step_s(16) == pytest.approx(0.5 + 0.05)
    assert [pace.step_s(rows) for rows in (1, 9, 11)] == [0.1, 0.1, pace.step_s(16)]


def test_what_requests_spend_outside_of_the_loop_is_averaged_from_the_first_on() -> None:
    pace = Pace()
    for seconds in (2.0, 3.0):
        pace.arrived(seconds)
        pace.answered(10 * seconds)
    assert pace.before_s == pytest.approx(2.1)
    assert pace.after_s == pytest.approx(21)


def test_a_standstill_is_timed_from_where_the_loop_is_and_an_engines_run_is_expected_to_last_as_long_as_before(
    clock: Clock,
) -> None:
    seen: list[tuple[float, float]] = []

    class Looking(TimedSlots):
        def predict(self, canvas_latent, timestep, meanwhile):
            self.clock.pass_ms(3)
            seen.append(times.standstill())
            return super().predict(canvas_latent, timestep, meanwhile)

    metrics, pace = Metrics(), Pace()
    times = LoopTimes(Looking(clock), metrics, pace)
    clock.pass_ms(7)
    assert times.standstill() == (pytest.approx(0.007), 0.0)
    step(times)
    times.publish()
    assert times.standstill() == (0.0, 0.0)
    clock.pass_ms(4)
    step(times)
    clock.pass_ms(2)
    assert times.standstill() == (pytest.approx(0.002), 0.0)
    times.resume()
    assert times.standstill() == (0.0, 0.0)
    assert seen == [(pytest.approx(0.003), 0.0), (pytest.approx(0.003), pytest.approx(pace.step_s(2)))]
    assert pace.step_s(2) > 0


def test_a_loop_without_work_stands_still_for_no_time(clock: Clock) -> None:
    slots = TimedSlots(clock)
    slots.step_gate.clear()
    with label_batcher(slots=slots) as (_, batcher):
        clock.pass_ms(500)
        assert batcher.standstill() == (0.0, 0.0)
        future = submit(batcher, steps_of(1)[0])
        assert slots.is_stepping.wait(10)
        clock.pass_ms(40)
        assert batcher.standstill()[0] == pytest.approx(0.040)
        slots.step_gate.set()
        future.result(60)


@pytest.mark.parametrize("overlaps", [False, True])
def test_engines_time_is_charged_by_rows_and_adds_up(clock: Clock, overlaps: bool) -> None:
    """One row and three are warped together; then one row is alone."""
    slots = TimedSlots(clock, overlaps)
    with label_batcher(slots=slots) as (_, batcher):
        slots.gate.clear()
        first = submit(batcher, steps_of(1)[0])
        assert slots.is_warping.wait(10)
        short, long = steps_of(2, 4)
        wide = replace(short, request=replace(short.request, num_portraits=3))
        futures = [submit(batcher, entry) for entry in (wide, long)]
        slots.gate.set()
        alone, many, one = (future.result(60) for future in (first, *futures))
    assert (alone.rows_shared, alone.warp_ms, alone.engine_ms) == (1, pytest.approx(20), pytest.approx(25))
    assert (many.rows_shared, one.rows_shared) == (4, 2.5)
    assert many.warp_ms == one.warp_ms == pytest.approx(20)
    assert many.engine_ms == pytest.approx(0.75 * (20 + 2 * 5))
    assert one.engine_ms == pytest.approx(0.25 * (20 + 2 * 5) + 2 * 5)
    assert one.joined_ns <= one.conditioned_ns <= many.denoised_ns <= one.denoised_ns
