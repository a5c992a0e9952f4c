"""The loop's own time, by a clock that only moves when it is told to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from icportrait.loop.times import Times
from icportrait.metrics import Metrics
from icportrait.pace import NEW_SHARE, Pace
from tests.label_slots import LabelSlots, label_loop, start, steps_of, submit
from tests.unit.conftest import Clock


class TimedSlots(LabelSlots):
    """A warping takes 20 ms and a step 5, from their launch on."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.ends_s = clock, 0.0

    def launch_warping(self, jobs, rows):
        super().launch_warping(jobs, rows)
        self.ends_s = self.clock() + 0.020

    def launch(self, canvas_latent, timestep):
        super().launch(canvas_latent, timestep)
        self.ends_s = self.clock() + 0.005

    def wait_warping(self):
        confidences = super().wait_warping()
        self.clock.now_s = max(self.clock(), self.ends_s)
        return confidences

    def wait(self):
        noise_pred = super().wait()
        self.clock.now_s = max(self.clock(), self.ends_s)
        return noise_pred


def histogram(metrics: Metrics, name: str) -> tuple[float, float]:
    """Return a histogram's sum, in whole tenths, and its count."""
    series = metrics.series()
    return round(series[f"{name}_sum", ()][1], 1), series[f"{name}_count", ()][1]


class Driven:
    """``Times`` of a loop that takes 2 rows' steps."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.metrics, self.pace = clock, Metrics(), Pace()
        self.times = Times(clock, self.metrics, self.pace)

    def warp(self) -> None:
        self.times.begin()
        self.clock.pass_ms(20)
        self.times.warped(self.times.end())

    def step(self, milliseconds: float = 5) -> None:
        self.times.begin(2)
        self.clock.pass_ms(milliseconds)
        self.times.stepped(2, self.times.end())
        self.times.publish()


@pytest.fixture
def driven(clock: Clock) -> Driven:
    return Driven(clock)


def test_what_lies_between_engines_runs_is_the_loops_own(driven: Driven) -> None:
    """Run a warping and two steps, with 1 ms before each of the three and 3 after each step."""
    driven.clock.pass_ms(1)
    driven.warp()
    for _ in range(2):
        driven.clock.pass_ms(1)
        driven.step()
        driven.clock.pass_ms(3)
    assert histogram(driven.metrics, "step_outside_engine_ms") == (1 + 1 + 3 + 1, 2)
    assert histogram(driven.metrics, "step_ms") == (10, 2)
    assert histogram(driven.metrics, "warping_ms") == (20, 1)
    assert histogram(driven.metrics, "step_slots") == (4, 2)
    # The first of the two has the warping in it.
    first_ms, second_ms = 1 + 20 + 1 + 5, 3 + 1 + 5
    assert 1000 * driven.pace.step_s(2) == pytest.approx(first_ms + NEW_SHARE * (second_ms - first_ms))


def test_an_engine_that_fails_was_an_engine_too_and_no_step(driven: Driven) -> None:
    driven.times.begin(2)
    driven.clock.pass_ms(50)
    driven.times.end()
    driven.times.publish()
    driven.step()
    assert histogram(driven.metrics, "step_outside_engine_ms") == (0, 1)


def test_waiting_for_requests_is_no_time_of_the_loops_own(driven: Driven) -> None:
    for _ in range(2):
        driven.clock.pass_ms(10_000)
        driven.times.resume()
        driven.clock.pass_ms(1)
        driven.warp()
        driven.step()
    assert histogram(driven.metrics, "step_outside_engine_ms") == (2, 2)
    assert 1000 * driven.pace.step_s(2) == pytest.approx(26)


def test_a_standstill_is_timed_from_where_the_loop_is_and_a_step_is_expected_to_last_as_long_as_before(
    driven: Driven,
) -> None:
    driven.clock.pass_ms(7)
    assert driven.times.standstill() == (pytest.approx(0.007), 0.0)
    driven.step()
    assert driven.times.standstill() == (0.0, 0.0)
    driven.clock.pass_ms(4)
    driven.times.begin(2)
    driven.clock.pass_ms(3)
    assert driven.times.standstill() == (pytest.approx(0.003), pytest.approx(driven.pace.step_s(2)))
    driven.times.end()
    driven.times.begin()
    assert driven.times.standstill() == (0.0, 0.0)
    driven.times.end()
    driven.clock.pass_ms(2)
    assert driven.times.standstill() == (pytest.approx(0.002), 0.0)
    driven.times.resume()
    assert driven.times.standstill() == (0.0, 0.0)


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


# The loop itself


def test_the_loop_reports_a_step_and_answers_while_the_next_engine_runs(clock: Clock) -> None:
    """Take 4 ms of a step's 5 for its report, except for the last step's, and 15 of a warping's 20 for an answer."""
    metrics = Metrics()
    with label_loop(slots=TimedSlots(clock), metrics=metrics, clock=clock) as (slots, loop):
        slots.gate.clear()
        start(loop, steps_of(1)[0], lambda _: clock.pass_ms(15))
        assert slots.is_warping.wait(10)
        second = submit(loop, steps_of(4)[0], lambda step, _: clock.pass_ms(4 if step < 4 else 0))
        slots.gate.set()
        second.result(60)
    assert histogram(metrics, "step_outside_engine_ms") == (0, 5)
    assert histogram(metrics, "warping_ms") == (40, 2)
    assert histogram(metrics, "step_ms") == (25, 5)


def test_a_step_that_may_hold_its_job_is_reported_before_the_next_begins(clock: Clock) -> None:
    metrics = Metrics()
    with label_loop(slots=TimedSlots(clock), metrics=metrics, clock=clock) as (_, loop):
        submit(loop, steps_of(5)[0], lambda *_: clock.pass_ms(4), hold_every=2).result(60)
    # The reports of steps 2 and 4, and nothing of steps 1 and 3; 5 is the last.
    assert histogram(metrics, "step_outside_engine_ms") == (2 * 4, 5)


def test_the_loop_does_not_count_the_time_that_it_waits_for_work(clock: Clock) -> None:
    metrics = Metrics()
    with label_loop(slots=TimedSlots(clock), metrics=metrics, clock=clock) as (_, loop):
        for _ in range(3):
            clock.pass_ms(10_000)
            submit(loop, steps_of(1)[0]).result(60)
            while loop.standstill() != (0.0, 0.0):  # until its jobs are gone
                pass
    assert histogram(metrics, "step_outside_engine_ms") == (0, 3)
    assert 1000 * loop.pace.step_s(1) == pytest.approx(25)


def test_a_loop_without_work_stands_still_for_no_time(clock: Clock) -> None:
    slots = TimedSlots(clock)
    slots.step_gate.clear()
    with label_loop(slots=slots, clock=clock) as (_, loop):
        clock.pass_ms(500)
        assert loop.standstill() == (0.0, 0.0)
        future = submit(loop, steps_of(1)[0])
        assert slots.is_stepping.wait(10)
        clock.pass_ms(40)
        assert loop.standstill()[0] == pytest.approx(0.040)
        slots.step_gate.set()
        future.result(60)


def test_engines_time_is_charged_by_rows_and_adds_up(clock: Clock) -> None:
    """Warp one row and three together, and then leave one row alone."""
    slots = TimedSlots(clock)
    with label_loop(slots=slots, clock=clock) as (_, loop):
        slots.gate.clear()
        first = submit(loop, steps_of(1)[0])
        assert slots.is_warping.wait(10)
        short, long = steps_of(2, 4)
        wide = replace(short, request=replace(short.request, num_portraits=3))
        futures = [submit(loop, entry) for entry in (wide, long)]
        slots.gate.set()
        alone, many, one = (future.result(60).account for future in (first, *futures))
    assert (alone.rows_shared, alone.warp_ms, alone.engine_ms) == (1, pytest.approx(20), pytest.approx(25))
    assert (many.rows_shared, one.rows_shared) == (4, 2.5)
    assert many.warp_ms == one.warp_ms == pytest.approx(20)
    assert many.engine_ms == pytest.approx(0.75 * (20 + 2 * 5))
    assert one.engine_ms == pytest.approx(0.25 * (20 + 2 * 5) + 2 * 5)
    assert one.joined_ns <= one.conditioned_ns <= many.denoised_ns <= one.denoised_ns
