"""The order of waiting requests and the turn between warping and stepping, without engines and in made-up time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from icportrait.errors import Cancelled, DeadlineMissed, IcPortraitError
from icportrait.loop.job import Job
from icportrait.loop.scheduler import Scheduler
from icportrait.pace import Pace
from icportrait.phases import Phases, remaining
from icportrait.policy import BATCHING_MODES


@dataclass(eq=False)
class Request:
    """The part of a job that the scheduler looks at."""

    name: str
    rows: int = 1
    steps: int = 10
    priority: int = 1
    deadline_s: float = math.inf
    arrived_s: float = 0.0
    has_ended: bool = False
    is_cancelled: bool = False
    failure: IcPortraitError | None = None
    steps_begun: int = 0
    hold_every: int = 0
    phases: Phases = ()
    refusal = Job.refusal

    def __post_init__(self) -> None:
        self.phases = self.phases or ((self.steps, self.rows),)
        self.steps, self.rows = sum(steps for steps, _ in self.phases), self.phases[0][1]

    def step(self) -> None:
        self.phases = remaining(self.phases, 1)
        self.has_ended = not self.phases
        self.rows = self.phases[0][1] if self.phases else self.rows


def scheduler(
    *waiting: Request, mode: str = "in-flight", rows: int = 16, max_jobs: int = 8, aging_s: float = 10.0
) -> Scheduler:
    made = Scheduler(BATCHING_MODES[mode], rows, max_jobs, Pace(), aging_s)
    made.waiting += waiting
    return made


def joining(queue: Scheduler, now_s: float = 0.0, used_rows: int = 0) -> str:
    """Return the jobs that join beside others, which run on."""
    leaving, found = queue.next_step([Request("running", rows=used_rows)] if used_rows else [], now_s)
    assert not leaving
    return "".join(request.name for request in found)


def joined(waiting: list[Request], now_s: float = 0.0, used_rows: int = 0, **options) -> str:
    return joining(scheduler(*waiting, **options), now_s, used_rows)


def test_classes_come_first_then_deadlines_then_arrival() -> None:
    waiting = [
        Request("a", arrived_s=1),
        Request("b", arrived_s=2, deadline_s=50),
        Request("c", arrived_s=3, deadline_s=40),
        Request("d", arrived_s=4, priority=0),
        Request("e", arrived_s=0, priority=2),
    ]
    assert joined(waiting, now_s=5) == "dcbae"


def test_waiting_moves_a_request_up_so_that_none_starves() -> None:
    old = Request("o", priority=3, arrived_s=0)
    fresh = [Request("f", priority=0, arrived_s=arrived) for arrived in (9.0, 29.0)]
    assert joined([fresh[0], old], now_s=9.5, max_jobs=1) == "f"
    assert joined([fresh[1], old], now_s=29.5, max_jobs=1) == "f"
    # Three classes up after 30 s, and older than what has come since.
    assert joined([Request("f", priority=0, arrived_s=29.0), old], now_s=30.5, max_jobs=1) == "o"


@pytest.mark.parametrize("priority", [0, 1, 9])
def test_a_request_without_a_deadline_goes_before_new_ones_with_one_once_it_has_waited_through_all_classes(
    priority: int,
) -> None:
    """Add a class-0 request with a deadline each second, for ever."""
    queue, now_s = scheduler(Request("w", priority=priority), max_jobs=1), -1.0
    joins = ""
    while joins != "w":
        now_s += 1.0
        queue.waiting = [request for request in queue.waiting if request.name == "w"]
        queue.waiting.append(Request("f", priority=0, arrived_s=now_s, deadline_s=now_s + 5))
        joins = joining(queue, now_s)
        assert now_s <= 10.0 * (priority + 1)
    assert now_s == 10.0 * (priority + 1)


def test_those_that_have_waited_through_all_classes_go_in_the_order_of_arrival() -> None:
    waiting = [
        Request("c", priority=0, arrived_s=9.0),
        Request("b", priority=0, arrived_s=5.0, deadline_s=31.0),
        Request("a", priority=1, arrived_s=1.0),
        Request("d", priority=0, arrived_s=25.0, deadline_s=30.0),
    ]
    assert joined(waiting, now_s=29.0) == "abcd"


def test_a_large_request_isnt_overtaken_by_small_ones() -> None:
    waiting = [Request("s", rows=2), Request("L", rows=8, arrived_s=1), Request("t", rows=1, arrived_s=2)]
    assert joined(waiting, used_rows=8) == "s"


def test_no_more_are_warped_at_once_than_the_engine_takes() -> None:
    waiting = [Request(name, arrived_s=index) for index, name in enumerate("abcde")]
    assert joined(waiting, max_jobs=3) == "abc"
    assert joined(waiting, max_jobs=3, mode="whole") == "abcde"


@pytest.mark.parametrize(("mode", "beside"), [("in-flight", ["a", "a", ""]), ("whole", ["a", "", ""])])
def test_a_batch_is_open_while_it_has_rows_or_is_empty(mode: str, beside: list[str]) -> None:
    assert [joined([Request("a")], mode=mode, used_rows=used) for used in (0, 15, 16)] == beside


@pytest.mark.parametrize("mode", ["whole", "whole-leave-early", "whole-equal-steps"])
def test_whole_batches_are_joined_by_none(mode: str) -> None:
    queue = scheduler(Request("a"), mode=mode)
    assert joining(queue) == "a"
    queue.waiting.append(Request("b"))
    assert [joining(queue, used_rows=1) for _ in range(3)] == ["", "", ""]
    assert joining(queue) == "b"


def test_equal_steps_share_a_batch_and_the_others_keep_their_place() -> None:
    waiting = [
        Request(name, steps=steps, arrived_s=index)
        for index, (name, steps) in enumerate([("a", 5), ("b", 9), ("c", 5), ("d", 9)])
    ]
    queue = scheduler(*waiting, mode="whole-equal-steps")
    assert [joining(queue), joining(queue), joining(queue)] == ["ac", "bd", ""]


def test_cancelled_and_late_jobs_leave_the_queue_and_the_others_join() -> None:
    queue = scheduler(Request("a"), Request("b", is_cancelled=True), Request("c", deadline_s=5.0), Request("d"))
    leaving, found = queue.next_step([], now_s=6.0)
    assert {request.name: type(error) for request, error in leaving.items()} == {"b": Cancelled, "c": DeadlineMissed}
    assert [request.name for request in found] == ["a", "d"]
    assert not queue.waiting
