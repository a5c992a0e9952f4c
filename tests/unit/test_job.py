"""Jobs that are held, that are dropped for their deadlines, or that have ended in a batch that goes on.

``alone`` gives the portraits of a job that was never held and shared its batch with none.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from icportrait.errors import (
    Cancelled,
    ContractError,
    DeadlineMissed,
    IcPortraitError,
    InvalidRequest,
    Unavailable,
)
from icportrait.loop.job import DenoiseResult, Job
from icportrait.loop.loop import DenoisingLoop
from icportrait.metrics import Metrics
from tests.label_slots import BASE, Entry, LabelSlots, alone, label_loop, labelled, start, steps_of, submit

KINDS = [
    replace(BASE, seed=10, num_inference_steps=6, num_portraits=2, guidance_scale=3.0),
    replace(BASE, seed=20, num_inference_steps=9, scheduler="euler"),
    replace(BASE, seed=30, num_inference_steps=8, scheduler="ddim", num_portraits=3),
]


class Held:
    """A job that is held after some of its steps."""

    def __init__(self, loop: DenoisingLoop, entry: Entry, after: int, **options: Any) -> None:
        self.steps: list[int] = []
        self.is_held = threading.Event()
        self.future: Future[Any] = Future()
        self._after = after
        self._has_job = threading.Event()
        self.job: Job = start(loop, entry, self.future.set_result, self._report, hold_every=after, **options)
        self._has_job.set()

    def _report(self, step: int, _: object) -> None:
        self._has_job.wait(10)
        self.steps.append(step)
        if step == self._after:
            self.job.hold()
            self.is_held.set()


def settled(slots: LabelSlots) -> int:
    """Return how many steps have run once no more do."""
    count = -1
    while count != len(slots.steps):
        count = len(slots.steps)
        time.sleep(0.1)
    return count


@pytest.mark.parametrize("after", [1, 4])
@pytest.mark.parametrize("request_", KINDS)
def test_a_job_that_is_held_stays_as_it_is_while_the_others_go_on(request_: Any, after: int) -> None:
    """Move the held job's rows meanwhile, because a job before it ends."""
    with label_loop() as (slots, loop):
        slots.gate.clear()
        before = submit(loop, labelled(replace(BASE, num_portraits=2, num_inference_steps=5), 7.0))
        held = Held(loop, labelled(request_, 2.0), after)
        slots.gate.set()
        other = submit(loop, labelled(replace(BASE, seed=40, num_inference_steps=20, num_portraits=2), 5.0))
        assert held.is_held.wait(60)
        before.result(60)
        other_latent = other.result(60).portrait_latent
        assert held.steps == list(range(1, after + 1)) and not held.future.done()
        assert slots.moves
        late = submit(loop, steps_of(3)[0])
        late.result(60)
        held.job.go_on()
        latent = held.future.result(60).portrait_latent
    assert np.array_equal(latent, alone(labelled(request_, 2.0)))
    assert np.array_equal(
        other_latent, alone(labelled(replace(BASE, seed=40, num_inference_steps=20, num_portraits=2), 5.0))
    )
    assert held.steps == list(range(1, request_.num_inference_steps + 1))


def test_rows_that_are_held_and_rows_that_move_at_a_step_change_nothing_for_each_other() -> None:
    """Hold three jobs, each after another step, and let each go once the one after it is held."""
    with label_loop() as (slots, loop):
        slots.gate.clear()
        jobs = [Held(loop, labelled(request, index + 1.0), index + 2) for index, request in enumerate(KINDS)]
        slots.gate.set()
        for job in jobs:
            assert job.is_held.wait(60)
        for job in jobs:
            job.job.go_on()
        latents = [job.future.result(60).portrait_latent for job in jobs]
    for index, (request, latent) in enumerate(zip(KINDS, latents, strict=True)):
        assert np.array_equal(latent, alone(labelled(request, index + 1.0)))


def test_while_all_are_held_no_engine_runs_and_deadlines_still_count() -> None:
    now = [0.0]
    with label_loop(clock=lambda: now[0]) as (slots, loop):
        held, other = (Held(loop, steps_of(9)[0], 2, deadline_s=deadline_s) for deadline_s in (10.0, 1000.0))
        assert held.is_held.wait(60) and other.is_held.wait(60)
        run = settled(slots)
        now[0] = 11.0
        late = held.future.result(5)
        assert isinstance(late, DeadlineMissed) and "passed after 2 of 9 steps" in str(late)
        assert len(slots.steps) == run
        other.job.cancel()
        assert isinstance(other.future.result(5), Cancelled)
        submit(loop, steps_of(1)[0]).result(60)


def test_a_job_joins_beside_one_that_is_held() -> None:
    with label_loop() as (slots, loop):
        held = Held(loop, steps_of(4)[0], 1)
        assert held.is_held.wait(60)
        submit(loop, steps_of(2)[0]).result(60)
        assert slots.steps == [1, 2, 2]
        held.job.go_on()
        assert isinstance(held.future.result(60), DenoiseResult)
        assert slots.steps == [1, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("mode", ["in-flight", "whole"])
def test_the_loop_sleeps_while_what_waits_must_wait_for_what_is_held(mode: str) -> None:
    looks = [0]

    def clock() -> float:
        looks[0] += 1
        return 0.0

    with label_loop(mode, clock=clock) as (_, loop):
        held = Held(loop, labelled(replace(BASE, num_portraits=8, guidance_scale=2.0), 1.0), 1)
        assert held.is_held.wait(60)
        waiting = submit(loop, steps_of(1)[0])
        time.sleep(0.02)
        before = looks[0]
        time.sleep(0.2)
        assert looks[0] - before < 20
        held.job.go_on()
        waiting.result(60)


# Jobs that have ended wait in a batch that leaves as a whole


def test_rows_that_have_ended_stay_as_they_are_until_the_whole_batch_has() -> None:
    entries = [labelled(request, index + 1.0) for index, request in enumerate(KINDS)]
    with label_loop("whole") as (slots, loop):
        slots.gate.clear()
        first = submit(loop, steps_of(1)[0])
        slots.is_warping.wait(60)
        futures = [submit(loop, entry) for entry in entries]
        slots.gate.set()
        first.result(60)
        latents = [future.result(60).portrait_latent for future in futures]
    assert slots.steps == [1] + 9 * [8]
    for entry, latent in zip(entries, latents, strict=True):
        assert np.array_equal(latent, alone(entry))


def end_by_cancelling(_: LabelSlots, held: Held) -> None:
    held.job.cancel()


def end_by_a_failure(slots: LabelSlots, held: Held) -> None:
    slots.failures_due = 1
    held.job.go_on()


@pytest.mark.parametrize("end", [end_by_cancelling, end_by_a_failure])
def test_what_has_ended_is_answered_when_the_last_of_its_batch_falls_away(
    end: Callable[[LabelSlots, Held], None],
) -> None:
    """Check that the next batch begins too."""
    with label_loop("whole") as (slots, loop):
        slots.gate.clear()
        first = submit(loop, steps_of(1)[0])
        slots.is_warping.wait(60)
        short, long = submit(loop, steps_of(2)[0]), Held(loop, steps_of(9)[0], 4)
        slots.gate.set()
        first.result(60)
        assert long.is_held.wait(60)
        assert not short.done()
        following = submit(loop, steps_of(1)[0])
        end(slots, long)
        assert isinstance(long.future.result(5), IcPortraitError)
        assert np.array_equal(short.result(5).portrait_latent, alone(steps_of(2)[0]))
        following.result(5)


# Deadlines that can't be kept any more


def test_a_job_that_would_begin_too_late_to_end_in_time_is_dropped_before_any_engine_runs() -> None:
    with label_loop(clock=lambda: 0.0) as (slots, loop):
        loop.pace.stepped(slots.rows, 1.0)
        future: Future[Any] = Future()
        start(loop, steps_of(5)[0], future.set_result, deadline_s=4.9)
        late = future.result(60)
        assert isinstance(late, DeadlineMissed)
        assert str(late).startswith("deadline_ms: too near for 5 steps, which begin only now")
        assert not slots.steps and not slots.is_warping.is_set()
        submit(loop, steps_of(5)[0], deadline_s=5.1).result(60)


def test_what_an_answer_takes_after_the_last_step_counts_too() -> None:
    with label_loop(clock=lambda: 0.0) as (slots, loop):
        loop.pace.stepped(slots.rows, 1.0)
        loop.pace.answered(2.0)
        with pytest.raises(DeadlineMissed, match="too near"):
            submit(loop, steps_of(5)[0], deadline_s=6.9).result(60)
        submit(loop, steps_of(5)[0], deadline_s=7.1).result(60)


def test_a_job_that_waited_too_long_is_dropped_and_one_that_runs_is_not() -> None:
    """Give the running job its chance until its deadline has passed."""
    now = [0.0]
    with label_loop(clock=lambda: now[0]) as (slots, loop):
        loop.pace.stepped(slots.rows, 1.0)
        large = labelled(replace(BASE, num_portraits=8, guidance_scale=2.0, num_inference_steps=5), 1.0)
        running = Held(loop, large, 2, deadline_s=10.0)
        assert running.is_held.wait(60)
        waiting: Future[Any] = Future()
        start(loop, steps_of(5)[0], waiting.set_result, deadline_s=10.0)
        now[0] = 9.0
        running.job.go_on()
        late = waiting.result(60)
        assert isinstance(late, DeadlineMissed) and "begin only now" in str(late)
        assert isinstance(running.future.result(60), DenoiseResult)


# Guidance


class Recording(LabelSlots):
    def __init__(self) -> None:
        super().__init__()
        self.canvases: list[np.ndarray] = []

    def predict(self, canvas_latent, timestep):
        self.canvases.append(canvas_latent.copy())
        return super().predict(canvas_latent, timestep)


def test_both_rows_of_a_guided_portrait_see_the_same_canvas_at_every_step() -> None:
    """Move and hold the rows, beside others. A twin differs from its portrait by ``F_ref`` alone."""
    slots = Recording()
    with label_loop(slots=slots) as (_, loop):
        slots.gate.clear()
        before = submit(loop, steps_of(3)[0])
        guided = Held(loop, labelled(KINDS[0], 2.0), 4)
        slots.gate.set()
        assert guided.is_held.wait(60)
        before.result(60)
        submit(loop, steps_of(2)[0]).result(60)
        guided.job.go_on()
        guided.future.result(60)
    seen = 0
    for canvas in slots.canvases:
        rows = [row.tobytes() for row in canvas]
        portraits = {row for row in rows if rows.count(row) == 2}
        seen += len(portraits) == 2
    assert seen == len([count for count in slots.steps if count >= 4]) > 6


def test_guidance_goes_away_from_the_unconditional_prediction() -> None:
    """Compare scales: at 1 there is no guidance, and the further the scale, the further the portrait."""
    plain, weak, strong = (alone(labelled(replace(BASE, guidance_scale=scale), 2.0)) for scale in (1.0, 2.0, 4.0))
    assert np.allclose(strong - plain, 3 * (weak - plain), rtol=1e-3, atol=1e-4)
    assert not np.array_equal(weak, plain)


# Failures


def test_engines_that_fail_at_once_fail_those_that_ran_and_no_other() -> None:
    """Let a launch fail before anything is done beside it, while the answers of the step before are still to come."""

    class Failing(LabelSlots):
        def predict(self, canvas_latent, timestep):
            if len(self.steps) == 2:
                self.steps.append(0)
                raise RuntimeError("the device is lost")
            return super().predict(canvas_latent, timestep)

    slots = Failing()
    with label_loop(slots=slots) as (_, loop):
        slots.gate.clear()
        long = submit(loop, steps_of(9)[0])
        slots.is_warping.wait(60)
        steps: list[int] = []
        short = submit(loop, steps_of(1)[0], lambda step, _: steps.append(step))
        slots.gate.set()
        assert np.array_equal(short.result(60).portrait_latent, alone(steps_of(1)[0]))
        assert steps == [1]
        with pytest.raises(IcPortraitError, match="denoising failed"):
            long.result(60)
        again = submit(loop, steps_of(3)[0])
        assert np.array_equal(again.result(60).portrait_latent, alone(steps_of(3)[0]))


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "from the queue"])
def test_a_job_whose_start_cannot_be_made_fails_alone(waits: bool) -> None:
    """Check that neither running jobs nor jobs that are warped with it fail, and that the engines go on."""
    told: queue.SimpleQueue[int] = queue.SimpleQueue()
    with label_loop(on_failure=told.put) as (slots, loop):
        slots.gate.clear()
        first = replace(BASE, num_portraits=8, guidance_scale=2.0) if waits else BASE
        runs = submit(loop, labelled(first, 1.0))
        slots.is_warping.wait(60)
        before, bad, after = steps_of(3, 3, 3)
        bad.profile_latent = np.zeros((1, 4, 16, 16), np.float32)
        joining = [submit(loop, entry) for entry in (before, bad, after)]
        slots.gate.set()
        with pytest.raises(IcPortraitError, match="a job's start failed on this server") as failed:
            joining[1].result(60)
        assert failed.value.code == "INTERNAL"
        assert isinstance(runs.result(60), DenoiseResult)
        for future, entry in ((joining[0], before), (joining[2], after)):
            assert np.array_equal(future.result(60).portrait_latent, alone(entry))
        assert slots.runs.startswith("wsssw" if waits else "wsw")
    assert told.empty()


@pytest.mark.parametrize("where", ["condition", "predict"])
def test_a_tensor_that_breaks_its_specification_in_an_engine_is_our_fault(where: str) -> None:
    class Breaking(LabelSlots):
        def condition(self, jobs, rows):
            if where == "condition":
                raise ContractError("unet: axis 3 is 200")
            return super().condition(jobs, rows)

        def predict(self, canvas_latent, timestep):
            if where == "predict":
                raise ContractError("unet: axis 3 is 200")
            return super().predict(canvas_latent, timestep)

    with label_loop(slots=Breaking()) as (_, loop):
        with pytest.raises(IcPortraitError, match="failed on this server; its log has the cause") as failed:
            submit(loop, steps_of(2)[0]).result(60)
        assert failed.value.code == "INTERNAL"


def test_those_that_have_ended_are_answered_with_their_portraits_though_the_loop_fails_in_that_turn() -> None:
    told: queue.SimpleQueue[int] = queue.SimpleQueue()

    class Stuck(LabelSlots):
        def move(self, source, target):
            raise RuntimeError("no more moves")

    first, second = steps_of(2, 9)
    with label_loop(slots=Stuck(), on_failure=told.put) as (slots, loop):
        slots.gate.clear()
        submit(loop, steps_of(1)[0])
        slots.is_warping.wait(60)
        ends, runs = submit(loop, first), submit(loop, second)
        slots.gate.set()
        assert np.array_equal(ends.result(60).portrait_latent, alone(first))
        with pytest.raises(Unavailable):
            runs.result(60)
        assert told.get(timeout=10) == sys.maxsize


def test_a_result_that_cannot_be_had_is_that_jobs_error_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lost, other = steps_of(2, 2)
    with label_loop() as (slots, loop):
        result = loop._batch.result
        monkeypatch.setattr(loop._batch, "result", lambda job: 1 / 0 if job.request is lost.request else result(job))
        slots.gate.clear()
        first = submit(loop, steps_of(1)[0])
        slots.is_warping.wait(60)
        futures = [submit(loop, lost), submit(loop, other)]
        slots.gate.set()
        with pytest.raises(IcPortraitError, match="a result was lost on this server") as failed:
            futures[0].result(60)
        assert failed.value.code == "INTERNAL"
        assert np.array_equal(futures[1].result(60).portrait_latent, alone(other))
        assert isinstance(first.result(60), DenoiseResult)


def test_a_loop_in_pieces_answers_all_and_is_not_taken_for_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the work that the loop puts off fail while an engine runs."""
    told: queue.SimpleQueue[int] = queue.SimpleQueue()
    with label_loop(on_failure=told.put) as (slots, loop):
        monkeypatch.setattr(loop._batch._latents, "complete", lambda: 1 / 0)
        slots.gate.clear()
        futures = [submit(loop, steps_of(1)[0])]
        slots.is_warping.wait(60)
        futures += [submit(loop, entry) for entry in steps_of(1, 2, 9)]
        slots.gate.set()
        for future in futures:
            with pytest.raises(Unavailable, match="shutting down"):
                future.result(60)
        assert told.get(timeout=10) == sys.maxsize and told.empty()


def test_failing_beside_jobs_that_are_held_is_counted_in_a_row() -> None:
    told: queue.SimpleQueue[int] = queue.SimpleQueue()

    class Failing(LabelSlots):
        def condition(self, jobs, rows):
            if self.failures_due:
                raise RuntimeError("the device is lost")
            return super().condition(jobs, rows)

    slots = Failing()
    with label_loop(slots=slots, on_failure=told.put) as (_, loop):
        held = Held(loop, steps_of(9)[0], 2)
        assert held.is_held.wait(60)
        run = settled(slots)
        slots.failures_due = 3
        for count in (1, 2, 3):
            with pytest.raises(IcPortraitError, match="warping failed"):
                submit(loop, steps_of(2)[0]).result(60)
            assert told.get(timeout=10) == count
        assert len(slots.steps) == run


def test_a_loop_that_cannot_go_on_tells_everybody() -> None:
    told: queue.SimpleQueue[int] = queue.SimpleQueue()

    class Failing(LabelSlots):
        def move(self, source, target):
            raise RuntimeError("the device is lost")

    slots = Failing()
    with label_loop(slots=slots, on_failure=told.put) as (_, loop):
        slots.gate.clear()
        futures = [submit(loop, entry) for entry in steps_of(2, 9, 9)]
        slots.gate.set()
        for future in futures[1:]:
            with pytest.raises(Unavailable):
                future.result(60)
        assert told.get(timeout=10) > 1000
        with pytest.raises(Unavailable):
            submit(loop, steps_of(1)[0])


def test_who_has_ended_when_the_loop_is_closed_gets_the_portraits() -> None:
    with label_loop() as (slots, loop):
        slots.step_gate.clear()
        ended, runs = (submit(loop, entry) for entry in steps_of(1, 9))
        slots.is_stepping.wait(60)
        closer = threading.Thread(target=loop.close)
        closer.start()
        time.sleep(0.05)
        slots.step_gate.set()
        closer.join(60)
        assert np.array_equal(ended.result(1).portrait_latent, alone(steps_of(1)[0]))
        with pytest.raises(Unavailable):
            runs.result(1)


def test_who_waits_and_who_comes_once_the_loop_is_closed_is_refused() -> None:
    with label_loop() as (slots, loop):
        slots.gate.clear()
        runs, waits = (submit(loop, labelled(replace(BASE, num_portraits=16), 1.0)) for _ in range(2))
        slots.is_warping.wait(60)
        closer = threading.Thread(target=loop.close)
        closer.start()
        while not loop._closed:
            time.sleep(0.001)
        slots.gate.set()
        closer.join(60)
        for future in (runs, waits):
            with pytest.raises(Unavailable, match="shutting down; try again"):
                future.result(1)
        with pytest.raises(Unavailable, match="shutting down; try again"):
            submit(loop, steps_of(1)[0])
        assert not slots.steps


def test_what_can_never_run_is_refused_at_once() -> None:
    with label_loop() as (slots, loop):
        with pytest.raises(InvalidRequest, match=r"9 portraits at guidance_scale 1\.5 need 18 slots, .* has 16"):
            submit(loop, labelled(replace(BASE, num_portraits=9, guidance_scale=1.5), 1.0))
        with pytest.raises(InvalidRequest, match="num_inference_steps: 1001 steps"):
            submit(loop, steps_of(1001)[0])
        submit(loop, labelled(replace(BASE, num_portraits=16), 1.0)).result(60)
        assert slots.steps == [16] * 3


@pytest.mark.parametrize(
    ("method", "what"),
    [
        ("launch_warping", "warping"),
        ("wait_warping", "warping"),
        ("fill", "a job's start"),
        ("launch", "denoising"),
        ("wait", "denoising"),
    ],
)
def test_the_log_has_the_cause_of_a_failure_and_the_caller_has_not(
    method: str, what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the device is lost")

    with label_loop() as (slots, loop):
        assert loop.used_rows == 0
        monkeypatch.setattr(loop._batch if method == "fill" else slots, method, fail)
        with pytest.raises(IcPortraitError) as failure:
            submit(loop, steps_of(2)[0]).result(60)
        assert str(failure.value) == f"{what} failed on this server; its log has the cause"
        assert f"{what} failed" in caplog.messages and "RuntimeError: the device is lost" in caplog.text


@pytest.mark.parametrize("method", ["on_done", "on_step"])
def test_a_caller_that_cannot_be_told_harms_no_other(method: str, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: object) -> None:
        raise OSError("the caller's pipe is gone")

    with label_loop() as (slots, loop):
        slots.gate.clear()
        start(loop, steps_of(3)[0], **{"on_done": lambda _: None, method: broken})
        other = submit(loop, steps_of(4)[0])
        slots.gate.set()
        assert np.array_equal(other.result(60).portrait_latent, alone(steps_of(4)[0]))
    told = {"on_done": "an answer could not be delivered", "on_step": "a step could not be reported"}[method]
    assert told in caplog.text and "the caller's pipe is gone" in caplog.text


def test_failures_are_counted_in_a_row_and_told_after_the_answers() -> None:
    told: queue.SimpleQueue[tuple[int, bool]] = queue.SimpleQueue()
    metrics, answered = Metrics(), [False]
    with label_loop(metrics=metrics, on_failure=lambda count: told.put((count, answered[0]))) as (slots, loop):
        for due, expected in ((1, [1]), (1, [2]), (0, []), (1, [1])):
            slots.failures_due = due
            answered[0] = False
            done: Future[Any] = Future()

            def on_done(outcome: object, done: Future[Any] = done) -> None:
                answered[0] = True
                done.set_result(outcome)

            start(loop, steps_of(2)[0], on_done)
            assert isinstance(done.result(60), IcPortraitError) is bool(due)
            assert [told.get(timeout=10) for _ in expected] == [(count, True) for count in expected]
    assert told.empty()
    assert metrics.series()["engine_failures_total", ()][1] == 3
