"""When the loop is back before a step ends, by a clock that only what is said to take time moves on."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from icportrait.decision import Decider, Decision
from icportrait.errors import DeadlineMissed
from icportrait.loop_times import LoopTimes, Pace
from icportrait.metrics import Metrics
from icportrait.step_alarm import LEAD_S, RUNS_KNOWN, StepAlarm
from icportrait.ticket import DenoiseResult
from tests.label_slots import LabelSlots, label_batcher, steps_of, submit
from tests.unit.conftest import Clock
from tests.unit.test_loop_times import TimedSlots, step

LEAD_MS = 1000 * LEAD_S


def back_ms(alarm: StepAlarm, clock: Clock, step_ms: float, work_ms: float = 0.5, rows: int = 2) -> float:
    """How far into a step the loop is back. To fetch the output takes 0.2 ms, however late it is."""
    began_s = clock()
    alarm.begin(rows)
    alarm.sleep()
    back_s = clock() - began_s
    clock.pass_ms(work_ms)
    alarm.back()
    clock.now_s = max(clock() + 0.0002, began_s + step_ms / 1000)
    alarm.end(clock())
    return round(1000 * back_s, 6)


def test_the_loop_is_back_shortly_before_a_step_ends_once_it_knows_how_long_steps_take(clock: Clock) -> None:
    """As long as the shortest of the last ones, and each number of rows for itself."""
    alarm, last = StepAlarm(), [11, 10, 20, 20, 20, 20, 20, 20]
    assert [back_ms(alarm, clock, step_ms) for step_ms in last] == [0] * RUNS_KNOWN
    assert back_ms(alarm, clock, 20) == 0, "now and then it looks how long steps really take"
    assert back_ms(alarm, clock, 20) == 10 - LEAD_MS - 0.5
    assert back_ms(alarm, clock, 20) == 20 - LEAD_MS - 0.5
    assert back_ms(alarm, clock, 20, rows=3) == 0
    assert back_ms(alarm, clock, 20) == 20 - LEAD_MS - 0.5


def test_the_longest_of_its_last_works_fits_in_before_the_end(clock: Clock) -> None:
    alarm = StepAlarm()
    for _ in range(RUNS_KNOWN + 1):
        back_ms(alarm, clock, 20)
    assert back_ms(alarm, clock, 20, work_ms=4) == 20 - LEAD_MS - 0.5
    for _ in range(RUNS_KNOWN - 2):
        assert back_ms(alarm, clock, 20) == 20 - LEAD_MS - 4
    back_ms(alarm, clock, 20)
    assert back_ms(alarm, clock, 20) == 20 - LEAD_MS - 4
    assert back_ms(alarm, clock, 20) == 20 - LEAD_MS - 0.5


def test_a_loop_that_comes_too_late_comes_earlier_once_it_has_looked(clock: Clock) -> None:
    """What a late one sees is its own work, which must not make it later still."""
    alarm = StepAlarm()
    for _ in range(RUNS_KNOWN):
        back_ms(alarm, clock, 12)
    assert [back_ms(alarm, clock, 7) for _ in range(3)] == [0, *2 * [7 - LEAD_MS - 0.5]]
    for _ in range(4 * RUNS_KNOWN):
        assert back_ms(alarm, clock, 3, work_ms=2.5) + 2.5 <= 9
    assert back_ms(alarm, clock, 3, work_ms=2.5) == 0, "what a step has room for"


@pytest.mark.parametrize(("overlaps", "slept_ms"), [(True, 5 - LEAD_MS - 1), (False, 0)])
def test_a_step_is_expected_to_end_when_its_engine_does(clock: Clock, overlaps: bool, slept_ms: float) -> None:
    """A step takes 5 ms; where the engine keeps the loop's thread there is nothing to sleep through."""
    times, slept_s = LoopTimes(TimedSlots(clock, overlaps), Metrics(), Pace()), []

    def meanwhile() -> None:
        began_s = clock()
        times.sleep_before_end(2)
        slept_s.append(clock() - began_s)
        clock.pass_ms(1)

    for _ in range(RUNS_KNOWN + 2):
        clock.pass_ms(40)
        step(times, meanwhile)
    assert [round(1000 * seconds, 6) for seconds in slept_s] == [0] * (RUNS_KNOWN + 1) + [slept_ms]


def test_how_long_a_step_still_takes_is_known_by_the_pace_from_the_first_on(clock: Clock) -> None:
    times, left_s = LoopTimes(TimedSlots(clock, overlaps=True), Metrics(), Pace()), []
    for late_ms in (1, 2, 9):
        step(times, lambda: (clock.pass_ms(late_ms), left_s.append(times.sleep_before_end(2))))  # noqa: B023
        times.publish()
    assert [round(1000 * seconds, 6) for seconds in left_s] == [0, 3, 0]


def test_who_comes_while_the_loop_sleeps_is_decided_on_before_the_step_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """No decision is made anew between the steps, which the engine would wait for. Reports aren't slept over."""
    revoked: list[Decision] = []
    monkeypatch.setattr(Decider, "revoke", lambda _, decision: revoked.append(decision))
    monkeypatch.setattr(LabelSlots, "overlaps", True)
    first, second = steps_of(3, 3)
    later: list[Future[DenoiseResult]] = []
    reported: list[int] = []
    slept_after: list[int] = []
    with label_batcher() as (slots, batcher):

        def sleep(*_: object) -> float:
            slept_after.append(len(reported))
            if not later:
                later.append(submit(batcher, second))
            return 0.0

        monkeypatch.setattr(LoopTimes, "sleep_before_end", sleep)
        submit(batcher, first, lambda step, _: reported.append(step)).result(60)
        later[0].result(60)
        assert slots.steps == [1, 2, 2, 1]
        assert not revoked
        assert slept_after == [0, 1, 2, 3]


def test_who_comes_while_a_step_runs_has_that_step_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its deadline is 10 s away, and the step is said to take a minute more."""
    monkeypatch.setattr(LabelSlots, "overlaps", True)
    first, second = steps_of(2, 2)
    late: list[Future[DenoiseResult]] = []
    with label_batcher(clock=lambda: 100.0) as (slots, batcher):

        def sleep(*_: object) -> float:
            if not late:
                late.append(submit(batcher, second, deadline_s=110.0))
            return 60.0

        monkeypatch.setattr(LoopTimes, "sleep_before_end", sleep)
        submit(batcher, first).result(60)
        with pytest.raises(DeadlineMissed, match="too near"):
            late[0].result(60)
        assert slots.steps == [1, 1]
