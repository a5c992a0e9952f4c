"""The denoising stage between gateway and loop: leases, answers and what becomes of requests that nobody waits for."""

from __future__ import annotations

import gc
import json
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from icportrait.contract import bytes_tensor
from icportrait.errors import Cancelled, DeadlineMissed, IcPortraitError, Unavailable
from icportrait.loop.job import Job
from icportrait.serving.control import Ping
from tests.label_slots import BASE, alone, labelled
from tests.stage_front import Front, metric, open_stage, until

GUIDED = replace(BASE, num_portraits=8, guidance_scale=2.0, num_inference_steps=4)
"""Takes all slots."""
LONG = replace(BASE, num_inference_steps=150)


def test_a_request_has_a_lease_is_answered_and_gives_it_back() -> None:
    with open_stage() as (slots, stage), Front(stage) as front:
        slots.step_gate.clear()
        request = replace(BASE, num_portraits=2)
        front.lease("a", request, nbytes=70)
        assert (metric(stage, "queued_requests"), metric(stage, "admitted_bytes")) == (1, 70)
        answers = front.submit("a", request, label=3.0)
        assert slots.is_stepping.wait(10)
        assert (metric(stage, "queued_requests"), metric(stage, "active_slots")) == (0, 2)
        slots.step_gate.set()
        outputs = answers.get(timeout=10)
        assert np.array_equal(outputs["portrait_latent"], alone(labelled(request, 3.0)))
        report = front.report(outputs)
        assert (report["engine"], report["numerics_id"], report["rows_shared"]) == ("labels", None, 2)
        assert report["match_confidence"] == 3
        ((given,), _) = slots.to_warp
        assert np.array_equal(given["reference_latent"], labelled(request, 3.0).reference_latent)
        times = [report[name] for name in ("arrived_ns", "joined_ns", "conditioned_ns", "denoised_ns")]
        assert times == sorted(times)
        assert (metric(stage, "admitted_bytes"), metric(stage, "answers_total")) == (70, 0)
        front.release("a", {"denoise": 5.0, "decode": 2.0})
        assert (metric(stage, "admitted_bytes"), metric(stage, "answers_total")) == (0, 1)
        assert metric(stage, "stage_ms_sum", stage="decode") == 2
        assert metric(stage, "first_step_ms_count") == 1
        assert metric(stage, "cancellations_total") == metric(stage, "deadline_misses_total") == 0
        front.release("a", {"decode": 2.0})  # which there is no more
        assert metric(stage, "answers_total") == 1 and answers.empty()


def test_a_confidence_that_is_no_number_is_none_in_the_report() -> None:
    with open_stage() as (slots, stage), Front(stage) as front:
        warped = slots.wait_warping
        slots.wait_warping = lambda: np.full_like(warped(), math.nan)  # type: ignore[method-assign]
        front.lease("a", BASE)
        assert front.report(front.submit("a", BASE).get(timeout=10))["match_confidence"] is None


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("ends", ["answered", "cancelled"])
def test_nothing_of_a_request_stays_that_only_the_garbage_collector_would_find(ends: str) -> None:
    """Look for jobs directly, because the collector comes round only when thousands of objects are there."""
    earlier = {id(found) for found in _jobs()}
    with open_stage() as (_, stage), Front(stage) as front:
        for index in range(6):
            request = BASE if ends == "answered" else LONG
            front.lease(f"{index}", request)
            answers = front.submit(f"{index}", request)
            if ends == "cancelled":
                front.say("cancel", f"{index}")
            answers.get(timeout=10)
            front.release(f"{index}", {"denoise": 5.0} if ends == "answered" else None)
        left = [found for found in _jobs() if id(found) not in earlier]
        assert len(left) <= 1, "the loop may know the last one still"


def _jobs() -> list[Job]:
    return [found for found in gc.get_objects() if type(found) is Job]


def test_what_is_refused_runs_no_engine() -> None:
    with open_stage(slots_limit=0) as (slots, stage), Front(stage) as front:
        front.lease("a", GUIDED)
        refusal = front.ask("b", BASE)
        assert isinstance(refusal, Unavailable) and "queue is full" in str(refusal)
        assert "retry_after_ms: " in str(refusal)
        with pytest.raises(Cancelled):
            front.submit("b", BASE)
        assert metric(stage, "refusals_total", reason="queue_slots") == 1
        front.release("b")
        assert not slots.is_warping.is_set() and metric(stage, "cancellations_total") == 0
        front.release("a")
        assert front.ask("b", BASE) is None


def test_a_standalone_request_gets_its_lease_as_it_arrives_and_gives_it_back() -> None:
    with open_stage(slots_limit=0, is_standalone=True) as (slots, stage), Front(stage) as front:
        slots.step_gate.clear()
        answers = front.submit("", GUIDED, label=1.0)
        assert slots.is_stepping.wait(10)
        with pytest.raises(Unavailable, match="queue is full"):
            front.submit("", BASE)
        slots.step_gate.set()
        assert np.array_equal(answers.get(timeout=10)["portrait_latent"], alone(labelled(GUIDED, 1.0)))
        until(lambda: metric(stage, "answers_total") == 1)
        assert front.submit("", BASE, label=1.0).get(timeout=10)["portrait_latent"].shape[0] == 1


def test_a_standalone_request_that_the_loop_refuses_gives_its_lease_back() -> None:
    with open_stage(is_standalone=True) as (_, stage), Front(stage) as front:
        for _ in range(3):
            stage._loop.rows = 1  # as where a GPU's memory holds fewer slots than were asked for
            with pytest.raises(IcPortraitError, match="slots"):
                front.submit("", GUIDED)
        assert (metric(stage, "queued_requests"), metric(stage, "queued_slots")) == (0, 0)


def test_a_request_runs_once_on_its_lease() -> None:
    with open_stage() as (slots, stage), Front(stage) as front:
        slots.step_gate.clear()
        front.lease("a", BASE)
        answers = front.submit("a", BASE)
        with pytest.raises(Cancelled):
            front.submit("a", BASE)
        slots.step_gate.set()
        assert not isinstance(answers.get(timeout=10), IcPortraitError)


def test_what_a_loop_before_has_let_in_is_let_in_whatever_waits() -> None:
    with open_stage(slots_limit=0) as (slots, stage), Front(stage) as front:
        slots.step_gate.clear()
        front.lease("a", GUIDED)
        first = front.submit("a", GUIDED)
        assert slots.is_stepping.wait(10)
        assert isinstance(front.ask("b", GUIDED), Unavailable)
        assert front.ask("b", GUIDED, replayed=True) is None
        second = front.submit("b", GUIDED)
        slots.step_gate.set()
        for answers in (first, second):
            assert not isinstance(answers.get(timeout=10), IcPortraitError)


def test_a_lease_that_is_asked_for_again_ends_what_ran_on_the_first() -> None:
    """Ask again while the loop doesn't know yet that the first line has broken."""
    with open_stage() as (slots, stage), Front(stage) as before, Front(stage) as front:
        slots.step_gate.clear()
        before.lease("a", LONG)
        ended = before.submit("a", LONG)
        assert slots.is_stepping.wait(10)
        assert front.ask("a", BASE, replayed=True) is None
        stage.peer_has_gone(before.peer)
        answers = front.submit("a", BASE)
        slots.step_gate.set()
        assert isinstance(ended.get(timeout=10), Cancelled)
        assert not isinstance(answers.get(timeout=10), IcPortraitError)


# What should not come


@pytest.mark.parametrize(
    ("request_json", "text"),
    [
        ({"priority": "x"}, "priority: Input should be a valid integer"),
        ({"preview_every": "x"}, "preview_every: Input should be a valid integer"),
        ({"num_portraits": -3}, "num_portraits: -3, expected 1..8"),
        ({"num_inference_steps": 10**6}, "num_inference_steps: 1000000, expected 1..150"),
        ({"guidance_scale": "nan"}, "guidance_scale: Input should be a valid number"),
        ({"arrived_ns": 10**25}, "arrived_ns: "),
        ({"arrived_ns": 2**62}, "arrived_ns: .* is in the future"),
        ({"scheduler": "heun"}, "scheduler: 'heun', expected one of"),
        ({"profile_box": [0.0, 0.0, 1.0]}, "profile_box"),
        ({"more": 1}, "more: Unexpected keyword argument"),
        ({"num_inference_steps": 4}, r"steps and rows are \(\(4, 1\),\), and were \(\(3, 1\),\) when the lease"),
        ({"guidance_scale": 2.0}, r"steps and rows are \(\(3, 2\),\), and were \(\(3, 1\),\)"),
    ],
)
def test_a_forged_request_is_refused_and_harms_no_other(request_json: dict[str, object], text: str) -> None:
    with open_stage() as (slots, stage), Front(stage) as front:
        for key in "ab":
            front.lease(key, BASE)
        request = front.arrived_now(replace(BASE, key="a"))
        forged = json.dumps(json.loads(request.to_json()) | request_json).encode()
        with pytest.raises(IcPortraitError, match=f"^denoise: {text}") as refused:
            front.submit("a", request, request=bytes_tensor(forged))
        assert refused.value.code == "INTERNAL" and not slots.is_warping.is_set()
        assert not isinstance(front.submit("b", BASE).get(timeout=10), IcPortraitError)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("visibility", np.full((1, 1, 32, 32), np.nan, np.float32), "visibility has NaN or Inf"),
        ("profile_latent", np.full((1, 4, 32, 32), np.inf, np.float32), "profile_latent has NaN or Inf"),
        ("reference_latent", np.zeros((1, 4, 16, 16), np.float32), "reference_latent: axis 2"),
        ("visibility", np.ones((1, 1, 32, 32), np.float64), "visibility is float64"),
    ],
)
def test_a_tensor_that_is_not_what_it_should_be_is_refused(name: str, value: np.ndarray, text: str) -> None:
    with open_stage() as (slots, stage), Front(stage) as front:
        front.lease("a", BASE)
        with pytest.raises(IcPortraitError, match=text) as refused:
            front.submit("a", BASE, **{name: value})
        assert refused.value.code == "INTERNAL" and not slots.is_warping.is_set()


def test_a_request_that_no_key_names_needs_a_lease_all_the_same() -> None:
    with open_stage() as (_, stage), Front(stage) as front, pytest.raises(Cancelled):
        front.submit("", BASE)


def test_the_first_step_is_timed_from_the_requests_arrival() -> None:
    with open_stage() as (_, stage), Front(stage) as front:
        # A thousand seconds ago, or at the machine's start.
        request = replace(BASE, arrived_ns=max(1, time.monotonic_ns() - 10**12))
        earliest_ms = (time.monotonic_ns() - request.arrived_ns) / 1e6
        front.lease("a", request)
        front.submit("a", request).get(timeout=10)
        latest_ms = (time.monotonic_ns() - request.arrived_ns) / 1e6
        assert earliest_ms < metric(stage, "first_step_ms_sum") < latest_ms


def test_the_class_that_goes_first_goes_first() -> None:
    """Let both wait for all slots. The one that came later runs before."""
    answered: list[str] = []
    with open_stage() as (slots, stage), Front(stage) as front:
        slots.step_gate.clear()
        front.lease("running", GUIDED)
        front.submit("running", GUIDED)
        assert slots.is_stepping.wait(10)
        for key, priority in (("second", 1), ("first", 0)):
            request = replace(GUIDED, priority=priority)
            front.lease(key, request)
            answers = front.submit(key, request, on_answer=lambda *_, key=key: answered.append(key))
        slots.step_gate.set()
        answers.get(timeout=10)
        until(lambda: len(answered) == 2)
    assert answered == ["first", "second"]


@pytest.mark.parametrize(("mode", "steps"), [("in-flight", [1, 2, 2, 1]), ("whole", [1, 1, 1, 1, 1, 1])])
def test_the_batching_mode_is_the_one_that_was_asked_for(mode: str, steps: list[int]) -> None:
    with open_stage(mode=mode) as (slots, stage), Front(stage) as front:
        slots.step_gate.clear()
        for key in "ab":
            front.lease(key, BASE)
        first = front.submit("a", BASE)
        assert slots.is_stepping.wait(10)
        second = front.submit("b", BASE)
        slots.step_gate.set()
        for answers in (first, second):
            answers.get(timeout=10)
        assert slots.steps == steps


def test_its_threads_have_names_and_end_with_the_process() -> None:
    """Check names, which tell threads apart in a dump, and that threads don't keep an unclosed process alive."""
    before = set(threading.enumerate())
    with open_stage():
        assert {(thread.name, thread.daemon) for thread in set(threading.enumerate()) - before} == {
            ("denoise", True),
            ("deliver", True),
        }


# Callers that go


def test_a_request_that_was_cancelled_before_it_arrived_runs_no_engine() -> None:
    with open_stage() as (slots, stage), Front(stage) as front:
        front.lease("a", BASE)
        for _ in range(2):
            front.say("cancel", "a")
        assert metric(stage, "queued_requests") == 0
        with pytest.raises(Cancelled):
            front.submit("a", BASE)
        front.release("a")
        with pytest.raises(Cancelled):
            front.submit("a", BASE)
        assert not slots.is_warping.is_set() and metric(stage, "cancellations_total") == 1


def test_a_request_that_is_cancelled_while_it_waits_is_answered_and_takes_no_step() -> None:
    with open_stage() as (slots, stage), Front(stage) as front:
        slots.step_gate.clear()
        front.lease("a", GUIDED)
        running = front.submit("a", GUIDED)
        assert slots.is_stepping.wait(10)
        front.lease("b", BASE)
        waiting = front.submit("b", BASE)
        front.say("cancel", "b")
        assert metric(stage, "queued_requests") == 0
        slots.step_gate.set()
        outcome = waiting.get(timeout=10)
        assert isinstance(outcome, Cancelled)
        running.get(timeout=10)
        assert slots.steps == [16] * 4 and metric(stage, "cancellations_total") == 1


@pytest.mark.parametrize("op", ["cancel", "release"])
def test_a_request_that_nobody_waits_for_stops_at_the_next_step(op: str) -> None:
    """Cancel the request as its caller does, or give the lease back without an answer as its front does."""
    with open_stage() as (slots, stage), Front(stage) as front:
        slots.step_gate.clear()
        front.lease("a", LONG)
        answers = front.submit("a", LONG)
        assert slots.is_stepping.wait(10)
        if op == "cancel":
            front.say("cancel", "a")
        else:
            front.release("a")
        slots.step_gate.set()
        outcome = answers.get(timeout=10)
        assert isinstance(outcome, Cancelled)
        assert slots.steps == [1] and metric(stage, "active_slots") == metric(stage, "admitted_bytes") == 0
        assert metric(stage, "cancellations_total") == (op == "cancel")
        assert metric(stage, "answers_total") == 0


@pytest.mark.parametrize("op", ["cancel", "release"])
def test_one_line_neither_cancels_nor_releases_what_another_has_leased(op: str) -> None:
    with open_stage() as (slots, stage), Front(stage) as mine, Front(stage) as other:
        slots.step_gate.clear()
        mine.lease("a", BASE)
        answers = mine.submit("a", BASE)
        assert slots.is_stepping.wait(10)
        other.say(op, "a")
        assert metric(stage, "admitted_bytes") == mine.nbytes and metric(stage, "cancellations_total") == 0
        slots.step_gate.set()
        assert not isinstance(answers.get(timeout=10), IcPortraitError)
        mine.release("a", {})
        assert metric(stage, "admitted_bytes") == 0


def test_a_caller_that_goes_while_its_portraits_are_decoded_cancelled_nothing() -> None:
    with open_stage() as (_, stage), Front(stage) as front:
        front.lease("a", BASE)
        front.submit("a", BASE).get(timeout=10)
        front.say("cancel", "a")
        assert metric(stage, "cancellations_total") == 0
        front.release("a")


def test_a_front_that_has_gone_frees_its_leases_and_what_runs_and_no_other_fronts() -> None:
    with open_stage() as (slots, stage), Front(stage) as gone, Front(stage) as other:
        slots.step_gate.clear()
        for key in ("runs", "on its way"):
            gone.lease(key, LONG)
        running = gone.submit("runs", LONG)
        assert slots.is_stepping.wait(10)
        other.lease("mine", BASE)
        mine = other.submit("mine", BASE, label=2.0)
        stage.peer_has_gone(gone.peer)
        assert metric(stage, "cancellations_total") == 2
        assert metric(stage, "admitted_bytes") == other.nbytes
        slots.step_gate.set()
        assert isinstance(running.get(timeout=10), Cancelled)
        outputs = mine.get(timeout=10)
        assert np.array_equal(outputs["portrait_latent"], alone(labelled(BASE, 2.0)))
        with pytest.raises(Cancelled):
            gone.submit("on its way", LONG)
        other.release("mine", {})
        assert metric(stage, "answers_total") == 1


# Deadlines


def test_a_deadline_that_passes_is_answered_and_counted_once() -> None:
    with open_stage() as (slots, stage), Front(stage) as front:
        slots.step_gate.clear()
        request = front.arrived_now(replace(LONG, deadline_ms=20))
        front.lease("a", request)
        answers = front.submit("a", request)
        until(lambda: front.is_past(request))
        slots.step_gate.set()
        outcome = answers.get(timeout=10)
        assert isinstance(outcome, DeadlineMissed)
        assert metric(stage, "queued_requests") == 0
        front.release("a")
        assert metric(stage, "deadline_misses_total") == 1
        assert metric(stage, "cancellations_total") == metric(stage, "answers_total") == 0


def test_an_answer_that_came_after_its_deadline_missed_it() -> None:
    with open_stage() as (_, stage), Front(stage) as front:
        request = front.arrived_now(replace(BASE, num_inference_steps=1, deadline_ms=200))
        front.lease("a", request)
        outcome = front.submit("a", request).get(timeout=10)
        assert not isinstance(outcome, IcPortraitError)
        until(lambda: front.is_past(request))
        front.release("a", {})
        assert (metric(stage, "deadline_misses_total"), metric(stage, "answers_total")) == (1, 1)


def test_a_request_that_the_gateway_has_answered_at_its_deadline_missed_it_and_stops() -> None:
    with open_stage() as (slots, stage), Front(stage) as front:
        slots.step_gate.clear()
        request = front.arrived_now(replace(LONG, deadline_ms=1000))
        front.lease("a", request)
        answers = front.submit("a", request)
        assert slots.is_stepping.wait(10)
        until(lambda: front.is_past(request))
        front.release("a")
        assert metric(stage, "deadline_misses_total") == 1
        slots.step_gate.set()
        assert isinstance(answers.get(timeout=10), Cancelled | DeadlineMissed)
        assert metric(stage, "deadline_misses_total") == 1 and metric(stage, "cancellations_total") == 0
        assert len(slots.steps) == 1


def test_what_was_measured_decides_on_the_next_deadline() -> None:
    """Check all that is measured: from arrival to the loop, the steps, and from the last step to the answer."""
    with open_stage() as (_, stage), Front(stage) as front:
        request = front.arrived_now(replace(BASE, deadline_ms=3_600_000))
        front.lease("a", replace(request, arrived_ns=request.arrived_ns - 5 * 10**9))
        front.submit("a", request).get(timeout=10)
        assert stage._loop.pace.after_s == 0
        front.release("a", {})
        assert stage._loop.pace.after_s > 0
        refusal = front.ask("b", front.arrived_now(replace(BASE, deadline_ms=4000)))
        assert isinstance(refusal, Unavailable) and "deadline_ms: 4000, and it would take about 5" in str(refusal)
        assert metric(stage, "refusals_total", reason="deadline") == 1


# Engines that fail


def test_engines_that_keep_failing_end_the_process_after_the_answers() -> None:
    events: list[str] = []
    with open_stage(give_up=lambda: events.append("give up")) as (slots, stage), Front(stage) as front:
        for number, due in enumerate((1, 1, 0, 1, 1, 1)):
            slots.failures_due = due
            front.lease(str(number), BASE)
            answers = front.submit(str(number), BASE, on_answer=lambda *_: events.append("answer"))
            outcome = answers.get(timeout=10)
            assert isinstance(outcome, IcPortraitError) is bool(due)
            front.release(str(number), None if due else {})
        until(lambda: len(events) == 7)
        assert events == 6 * ["answer"] + ["give up"]
        assert metric(stage, "engine_failures_total") == 5
        assert metric(stage, "cancellations_total") == 0


def test_an_answer_that_cannot_be_delivered_harms_no_other(caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object) -> None:
        raise OSError("the pipe is gone")

    with open_stage() as (_, stage), Front(stage) as front:
        for key, on_answer in (("a", fail), ("b", None)):
            front.lease(key, BASE)
            answers = front.submit(key, BASE, on_answer=on_answer)
        assert not isinstance(answers.get(timeout=10), IcPortraitError)
    assert "an answer could not be delivered" in caplog.text and "the pipe is gone" in caplog.text


def test_closing_answers_what_runs_and_what_waits() -> None:
    with open_stage() as (slots, stage), Front(stage) as front:
        slots.gate.clear()
        for key in "ab":
            front.lease(key, GUIDED)
        answers = [front.submit(key, GUIDED) for key in "ab"]
        assert slots.is_warping.wait(10)
        closing = front.in_thread(stage.close)
        until(lambda: stage._loop._closed)
        slots.gate.set()
        closing.join(10)
        for each in answers:
            outcome = each.get(timeout=10)
            assert isinstance(outcome, Unavailable) and "shutting down" in str(outcome)


def test_a_pong_says_for_how_long_a_step_has_run_and_that_an_idle_loop_is_not_busy() -> None:
    with open_stage() as (slots, stage), Front(stage) as front:

        def pong(number: int) -> dict[str, Any]:
            stage.handle(front.peer, Ping(id=number))
            (message,) = [each for each in front.messages() if each["op"] == "pong"]
            return message

        assert pong(3) == {"op": "pong", "id": 3, "step_age_ms": 0, "expected_ms": 0, "busy": False}
        slots.step_gate.clear()
        front.lease("a", BASE)
        answers = front.submit("a", BASE)
        assert slots.is_stepping.wait(10)
        first = pong(4)
        assert first["id"] == 4 and first["busy"] and first["step_age_ms"] > 0
        until(lambda: pong(5)["step_age_ms"] > first["step_age_ms"] + 20)
        slots.step_gate.set()
        answers.get(timeout=10)
        until(lambda: not pong(6)["busy"])
