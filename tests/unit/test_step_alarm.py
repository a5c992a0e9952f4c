"""When the loop is back before a step ends, by a clock that only what is said to take time moves on."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace

import pytest

import icportrait.step_alarm
from icportrait.decision import Decider, Decision
from icportrait.loop_times import LoopTimes, Pace
from icportrait.metrics import Metrics
from icportrait.step_alarm import LEAD_SHARE, RUNS_KNOWN, StepAlarm
from icportrait.ticket import DenoiseResult
from tests.label_slots import LabelSlots, label_batcher, steps_of, submit
from tests.unit.test_loop_times import Clock, TimedSlots, step


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    module_time = SimpleNamespace(perf_counter=made, sleep=lambda seconds: made.pass_ms(1000 * seconds))
    monkeypatch.setattr(icportrait.step_alarm, "time", module_time)
    monkeypatch.setattr(icportrait.loop_times, "time", module_time)
    return made


def back_ms(alarm: StepAlarm, clock: Clock, step_ms: float, work_ms: float = 0.5, rows: int = 2) -> float:
    """How far into a step the loop is back; it is told how long the step lasts still.

    To fetch the output takes 0.2 ms, however late the loop is.
    """
    began_s = clock()
    alarm.begin(rows)
    left_s = alarm.sleep()
    back_s = clock() - began_s
    assert left_s == 0 or back_s == 0 or left_s == pytest.approx(max(0.002, LEAD_SHARE * (back_s + left_s)))
    clock.pass_ms(work_ms)
    alarm.back()
    clock.now_s = max(clock() + 0.0002, began_s + step_ms / 1000)
    alarm.end(clock())
    return round(1000 * back_s, 6)


def test_the_loop_is_back_shortly_before_a_step_ends_once_it_knows_how_long_steps_take(clock: Clock) -> None:
    """As long as the shortest of the last ones, and each number of rows for itself."""
    alarm = StepAlarm()
    for step_ms in (*[11] * 3, 10, *[20] * 4):
        assert back_ms(alarm, clock, step_ms) == 0
    for _ in range(4):
        assert back_ms(alarm, clock, 20) == 8
    assert back_ms(alarm, clock, 20) == 20 * (1 - LEAD_SHARE)
    assert back_ms(alarm, clock, 20, rows=3) == 0
    assert back_ms(alarm, clock, 20) == 20 * (1 - LEAD_SHARE)


def test_a_loop_that_comes_too_late_comes_earlier_until_it_knows_again(clock: Clock) -> None:
    """What a late one sees is its own work, which must not make it later still."""
    alarm = StepAlarm()
    for _ in range(RUNS_KNOWN):
        back_ms(alarm, clock, 12)
    assert back_ms(alarm, clock, 7) == 10
    for _ in range(RUNS_KNOWN):
        assert back_ms(alarm, clock, 7) == 4
    assert back_ms(alarm, clock, 7) == 5
    for _ in range(RUNS_KNOWN):
        last_ms = back_ms(alarm, clock, 7, work_ms=9)
    assert last_ms == 0, "no step is so long that this work fits into it"


@pytest.mark.parametrize(("overlaps", "slept_ms"), [(True, 3), (False, 0)])
def test_a_step_is_expected_to_end_when_its_engine_does(clock: Clock, overlaps: bool, slept_ms: float) -> None:
    """A step takes 5 ms; where the engine keeps the loop's thread there is nothing to sleep through."""
    times, slept_s = LoopTimes(TimedSlots(clock, overlaps), Metrics(), Pace()), []

    def meanwhile() -> None:
        began_s = clock()
        times.sleep_before_end()
        slept_s.append(clock() - began_s)
        clock.pass_ms(1)

    for _ in range(RUNS_KNOWN + 1):
        clock.pass_ms(40)
        step(times, meanwhile)
    assert [round(1000 * seconds, 6) for seconds in slept_s] == [0] * RUNS_KNOWN + [slept_ms]


def test_who_comes_while_the_loop_sleeps_is_decided_on_before_the_step_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """No decision is made anew between the steps, which the engine would wait for."""
    revoked: list[Decision] = []
    monkeypatch.setattr(Decider, "revoke", lambda _, decision: revoked.append(decision))
    monkeypatch.setattr(LabelSlots, "overlaps", True)
    first, second = steps_of(3, 3)
    later: list[Future[DenoiseResult]] = []
    with label_batcher() as (slots, batcher):

        def sleep(_: LoopTimes) -> float:
            if not later:
                later.append(submit(batcher, second))
            return 0.0

        monkeypatch.setattr(LoopTimes, "sleep_before_end", sleep)
        submit(batcher, first).result(60)
        later[0].result(60)
        assert slots.steps == [1, 2, 2, 1]
        assert not revoked
