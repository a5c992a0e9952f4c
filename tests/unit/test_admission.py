"""Admission and its refusals, against the scheduler that later decides, step by step, in made-up time."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from typing import Any

import pytest

import icportrait.serving.admission
from icportrait.errors import Unavailable
from icportrait.loop.job import Job, State
from icportrait.loop.scheduler import Scheduler
from icportrait.metrics import REFUSALS, Metrics
from icportrait.pace import Pace
from icportrait.phases import Phases, most_rows, phases_of
from icportrait.policy import BATCHING_MODES
from icportrait.serving.admission import MARGIN, UNKNOWN_RETRY_MS, Admission, Lease, Limits, forecast
from icportrait.serving.control import Demand
from tests.label_slots import steps_of
from tests.unit.test_scheduler import Request

STEP_S = 0.1


def simulated(running: Sequence[Phases], queued: Sequence[Phases], slots: int) -> list[int]:
    """Find ``forecast``'s answer by stepping until all have joined."""
    scheduler = Scheduler(BATCHING_MODES["in-flight"], slots, max_jobs=len(queued), pace=Pace())
    waiting = [Request("w", phases=phases, arrived_s=index) for index, phases in enumerate(queued)]
    scheduler.waiting += waiting
    batch = [Request("r", phases=phases) for phases in running]
    starts: dict[Request, int] = {}
    step = 0
    while scheduler.waiting:
        leaving, joining = scheduler.next_step(batch, 0.0)
        starts |= dict.fromkeys(joining, step)
        batch = [job for job in batch if job not in leaving] + joining
        assert sum(job.rows for job in batch) <= slots
        step += 1
        for job in batch:
            job.step()
    return [starts[item] for item in waiting]


def drawn_phases(draw: random.Random) -> Phases:
    steps = draw.randint(1, 30)
    begin, end = sorted((draw.randint(0, steps), draw.randint(0, steps)))
    return phases_of(draw.randint(1, 4), draw.choice((range(0), range(steps), range(begin, end))), steps)


def test_the_forecast_is_what_the_scheduler_does() -> None:
    """Let guidance begin and end for some requests on their way."""
    draw = random.Random(0)
    for _ in range(300):
        slots = draw.choice((8, 11, 16))
        jobs = [drawn_phases(draw) for _ in range(draw.randint(1, 20))]
        running: list[Phases] = []
        while jobs and sum(map(most_rows, running)) + most_rows(jobs[0]) <= slots and draw.random() < 0.8:
            running.append(jobs.pop(0))
        assert forecast(running, jobs, slots) == simulated(running, jobs, slots)


class Server:
    """Admission with a known pace, and the jobs that its loop would run."""

    def __init__(self, slots: int = 4, limit: int = 8, nbytes: int = 1000, is_known: bool = True) -> None:
        self.now_s, self.metrics, self.pace = 100.0, Metrics(), Pace()
        if is_known:
            self.pace.stepped(slots, STEP_S)
        self.admission = Admission(slots, Limits(limit, nbytes), self.pace, lambda: self.now_s, self.metrics)

    def lease(self, key: str, rows: int = 1, steps: int = 10, **options: Any) -> Lease:
        demand = Demand(
            ((steps, rows),),
            priority=options.get("priority", 1),
            deadline_ms=options.get("deadline_ms"),
            arrived_s=options.get("arrived_s", self.now_s),
            nbytes=options.get("nbytes", 1),
        )
        return self.admission.lease(key, demand)

    def refused(self, rows: int = 1, steps: int = 10, **options: Any) -> str:
        with pytest.raises(Unavailable) as refusal:
            self.lease("refused", rows, steps, **options)
        assert self.admission.get("refused") is None
        return str(refusal.value)

    def run(self, key: str, rows: int, steps: int, done: int = 0) -> Lease:
        """Add a request that has slots, and so many of its steps behind it."""
        lease = self.lease(key, rows, steps)
        lease.job = waiting_job()
        lease.job.state, lease.job.steps_done = State.RUNNING, done
        return lease

    @property
    def refusals(self) -> dict[str, float]:
        series = self.metrics.series()
        return {reason: series["refusals_total", (("reason", reason),)][1] for reason in REFUSALS}


def waiting_job() -> Job:
    (entry,) = steps_of(1)
    return Job(**vars(entry), on_done=print)


def retry_after_ms(text: str) -> int:
    found = re.search(r"; retry_after_ms: (\d+)$", text)
    assert found, text
    return int(found[1])


# The queue's limits


def test_an_idle_server_lets_a_request_of_all_slots_in() -> None:
    server = Server(slots=4, limit=0, nbytes=10)
    server.lease("a", rows=4, nbytes=10**9)
    assert server.admission.queued_slots == 0
    assert "queue is full (0 of 0 slots, and 1 more are asked for)" in server.refused(rows=1)
    server.admission.release("a")
    server.lease("b", rows=4)


def test_what_would_overfill_the_queue_is_refused_until_there_is_room() -> None:
    server = Server(slots=4, limit=8)
    server.run("running", rows=3, steps=10)
    for key in "abc":
        server.lease(key, rows=2)
    server.lease("d", rows=1)
    assert (server.admission.queued_requests, server.admission.queued_slots) == (4, 6)
    text = server.refused(rows=3)
    assert text.startswith("the queue is full (6 of 8 slots, and 3 more are asked for)")
    assert server.refusals == {"queue_slots": 1, "queue_bytes": 0, "deadline": 0}
    server.lease("fits", rows=2)
    server.refused(rows=1)
    server.admission.release("d")
    server.lease("after", rows=1)
    assert server.refusals["queue_slots"] == 2


def test_pictures_of_all_admitted_requests_count_until_they_are_answered() -> None:
    server = Server(slots=4, nbytes=1000)
    running = server.run("a", rows=1, steps=10)
    server.lease("b", steps=30, nbytes=600)
    text = server.refused(nbytes=400)
    assert text.startswith("the queue is full (601 of 1,000 bytes of pictures, and 400 more came)")
    assert retry_after_ms(text) == 1100  # when the first will have been answered
    running.denoised_s = 0.0
    server.refused(nbytes=400)
    assert server.refusals == {"queue_slots": 0, "queue_bytes": 2, "deadline": 0}
    server.admission.release("a")
    server.lease("c", nbytes=400)
    assert server.admission.admitted_bytes == 1000


def test_a_request_that_was_denoised_waits_for_no_slot() -> None:
    server = Server(slots=4, limit=0)
    lease = server.run("a", rows=4, steps=10, done=10)
    server.refused()
    lease.denoised_s = 0.0
    server.lease("b", rows=4)


def room_after_steps(running: list[tuple[int, int]], queued: list[tuple[int, int]], rows: int, limit: int) -> int:
    """Return how many steps from now a request of so many rows finds room, at 4 slots."""
    phases = [[((steps, rows),) for rows, steps in jobs] for jobs in (running, queued)]
    starts = simulated(*phases, slots=4)
    jobs = [*((0, *job) for job in running), *((start, *job) for start, job in zip(starts, queued, strict=True))]
    step = 0
    while sum(slots for start, slots, steps in jobs if step < start + steps) + rows > 4 + limit:
        step += 1
    return step


def test_a_refusal_says_after_how_long_there_is_room() -> None:
    """Check the hint from both sides. A caller that comes back earlier would be refused once more."""
    draw, refusals = random.Random(1), 0
    for _ in range(200):
        server, running, queued = Server(slots=4, limit=4), [], []
        for index in range(draw.randint(2, 8)):
            rows, steps = draw.randint(1, 4), draw.randint(1, 30)
            used = sum(job[0] for job in running)
            if used + sum(job[0] for job in queued) + rows > 8:
                continue
            if not queued and used + rows <= 4:
                server.run(str(index), rows, steps)
                running.append((rows, steps))
            else:
                server.now_s += 0.001
                server.lease(str(index), rows, steps)
                queued.append((rows, steps))
        rows = draw.randint(1, 4)
        if sum(job[0] for job in (*running, *queued)) + rows <= 8:
            server.lease("new", rows)
            continue
        refusals += 1
        steps = room_after_steps(running, queued, rows, 4)
        told = retry_after_ms(server.refused(rows)) / 1000 / STEP_S
        assert steps <= told <= steps + 1.01, (running, queued, rows)
    assert refusals > 30


def test_before_any_step_was_measured_a_refusal_says_what_it_always_says() -> None:
    server = Server(slots=4, limit=0, is_known=False)
    server.lease("a", rows=4)
    assert retry_after_ms(server.refused()) == UNKNOWN_RETRY_MS


# Deadlines


@pytest.fixture
def no_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(icportrait.serving.admission, "MARGIN", 1.0)


def test_a_promise_leaves_a_margin_of_what_lies_ahead() -> None:
    """Check that the margin leaves out the time since the request arrived."""
    assert MARGIN > 1
    server = Server(slots=4)
    server.pace.answered(0.2)
    server.run("running", rows=4, steps=10)
    needed_ms = 300 + MARGIN * (1000 + 600 + 200)
    arrived_s = server.now_s - 0.3
    text = server.refused(steps=5, deadline_ms=math.floor(needed_ms) - 1, arrived_s=arrived_s)
    assert f"would take about {needed_ms:.0f} ms" in text
    server.lease("kept", steps=5, deadline_ms=math.ceil(needed_ms) + 1, arrived_s=arrived_s)


@pytest.mark.usefixtures("no_margin")
def test_a_deadline_that_cannot_be_kept_is_refused_with_what_it_would_take() -> None:
    """Add up 10 steps of others, then a running one's, 5 of the request's own and the time after the last."""
    server = Server(slots=4)
    server.pace.answered(0.2)
    server.run("running", rows=4, steps=30, done=20)
    text = server.refused(rows=2, steps=5, deadline_ms=1700)
    assert text.startswith(
        "deadline_ms: 1700, and it would take about 1800 ms now; "
        "allow more time, ask for fewer steps, or try again; retry"
    )
    assert retry_after_ms(text) == pytest.approx(100, abs=1)
    assert server.refusals == {"queue_slots": 0, "queue_bytes": 0, "deadline": 1}
    server.lease("kept", rows=2, steps=5, deadline_ms=1801)


@pytest.mark.usefixtures("no_margin")
def test_a_forecast_counts_the_rows_of_each_step() -> None:
    """Let two requests of 2 rows in at once at 3 slots, where one has guidance first and one last."""
    server = Server(slots=3)
    first, last = ((4, 2), (4, 1)), ((4, 1), (4, 2))

    def demand(phases: Phases, deadline_ms: int | None = None) -> Demand:
        return Demand(phases, 1, deadline_ms, server.now_s, 1)

    running = server.admission.lease("first", demand(first))
    running.job = waiting_job()
    running.job.state = State.RUNNING
    with pytest.raises(Unavailable, match="would take about 1300 ms"):
        server.admission.lease("again", demand(((8, 2),), deadline_ms=1000))
    server.admission.lease("last", demand(last, deadline_ms=1000))


def test_the_pace_is_that_of_the_rows_that_are_taken_on_average() -> None:
    server = Server(slots=4)
    server.pace.stepped(1, 0.01)
    server.pace.stepped(2, 0.5)
    server.admission.lease("few", Demand(((1, 2), (9, 1)), 1, 200, server.now_s, 1))
    with pytest.raises(Unavailable):
        server.admission.lease("many", Demand(((10, 2),), 1, 200, server.now_s, 1))


@pytest.mark.usefixtures("no_margin")
def test_a_deadline_counts_from_the_requests_arrival() -> None:
    server = Server()
    text = server.refused(steps=5, deadline_ms=1000, arrived_s=server.now_s - 0.5)
    assert "would take about 1100 ms" in text
    server.lease("kept", steps=5, deadline_ms=1000)


@pytest.mark.usefixtures("no_margin")
def test_what_is_still_on_its_way_begins_no_sooner_than_it_arrives() -> None:
    server = Server()
    server.pace.arrived(0.4)
    assert "would take about 1000 ms" in server.refused(steps=5, deadline_ms=900)
    server.lease("kept", steps=5, deadline_ms=1001)


@pytest.mark.usefixtures("no_margin")
def test_before_any_step_was_measured_every_deadline_is_let_in() -> None:
    server = Server(is_known=False)
    server.run("running", rows=4, steps=150)
    server.lease("a", steps=150, deadline_ms=1)


@pytest.mark.usefixtures("no_margin")
def test_a_deadline_that_was_promised_is_not_broken_for_a_nearer_one() -> None:
    """Ask for a nearer deadline, which goes first in its class: were it let in, the other would be late."""
    server = Server(slots=4)
    server.run("running", rows=4, steps=10)
    server.lease("promised", rows=4, steps=10, deadline_ms=2200)
    text = server.refused(rows=4, steps=3, deadline_ms=1500)
    assert text.startswith(
        "deadline_ms: keeping it would break a deadline that was promised to another; "
        "allow more time, or try again; retry"
    )
    assert retry_after_ms(text) == pytest.approx(200, abs=1)
    assert server.refusals["deadline"] == 1
    server.lease("shorter", rows=4, steps=1, deadline_ms=1500)


@pytest.mark.usefixtures("no_margin")
def test_a_promise_is_kept_against_a_class_that_goes_first() -> None:
    server = Server(slots=4)
    server.run("running", rows=4, steps=10)
    server.lease("promised", rows=4, steps=10, deadline_ms=2200)
    assert "promised to another" in server.refused(rows=4, steps=3, deadline_ms=9000, priority=0)
    server.lease("behind", rows=4, steps=3, deadline_ms=9000, priority=2)


@pytest.mark.usefixtures("no_margin")
def test_what_nothing_was_promised_to_or_is_late_anyway_is_no_reason_to_refuse() -> None:
    server = Server(slots=4, limit=12)
    server.run("running", rows=4, steps=10)
    late = server.lease("late", rows=4, steps=10, deadline_ms=2200)
    server.lease("without", rows=4, steps=10)
    late.job = waiting_job()  # it has come, and waits
    server.now_s += 0.5
    server.lease("new", rows=4, steps=3, deadline_ms=2000, priority=0)


def test_what_was_let_in_before_is_let_in_whatever_waits_and_counts() -> None:
    server = Server(slots=4, limit=0)
    server.run("running", rows=4, steps=100)
    server.refused(rows=1)
    demand = Demand(((5, 2),), priority=1, deadline_ms=1, arrived_s=server.now_s - 9, nbytes=10**12)
    assert server.admission.grant("again", demand).demand is demand
    assert server.admission.queued_slots == 2 and server.admission.get("again")
    server.refused(rows=1)


@pytest.mark.usefixtures("no_margin")
def test_a_request_that_is_gone_leaves_its_time_to_others() -> None:
    server = Server(slots=4)
    server.run("running", rows=4, steps=100)
    server.refused(steps=5, deadline_ms=1000)
    assert server.admission.release("running")
    assert server.admission.release("running") is None
    server.lease("a", steps=5, deadline_ms=1000)
