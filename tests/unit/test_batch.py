"""The denoising loop's rows and turns, on slots without engines: who joins and leaves, and that rows stay their own."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from icportrait.errors import Cancelled, DeadlineMissed, IcPortraitError
from icportrait.loop.job import DenoiseResult
from tests.label_slots import BASE, alone, label_loop, labelled, run_together, start, steps_of, submit


def test_rows_follow_their_jobs_when_others_end() -> None:
    """Run jobs that end at different steps, between others, guided and with several portraits."""
    kinds = [(3, 1, 1.0), (1, 2, 4.0), (5, 3, 1.0), (2, 1, 4.0), (7, 2, 2.0)]
    entries = [
        labelled(
            replace(BASE, seed=10 * index, num_inference_steps=steps, num_portraits=portraits, guidance_scale=scale),
            label=index + 1.0,
        )
        for index, (steps, portraits, scale) in enumerate(kinds)
    ]
    slots, together = run_together(entries)
    assert slots.steps == [1, 8, 10, 10, 7, 7, 4, 4, 4]
    assert slots.moves and all(target < source for source, target in slots.moves)
    for entry, result in zip(entries, together, strict=True):
        assert np.array_equal(result.portrait_latent, alone(entry))


@pytest.mark.parametrize(
    ("mode", "steps", "order"),
    [
        ("in-flight", [1, 4, 4, 1, 1, 1], "ABDC"),
        ("whole", [1, 1, 1, 3, 3, 3, 3, 3], "ABCD"),
        ("whole-leave-early", [1, 1, 1, 3, 3, 1, 1, 1], "ABDC"),
        ("whole-equal-steps", [1, 1, 1, 2, 2, 1, 1, 1, 1, 1], "ABDC"),
    ],
)
def test_modes_differ_in_who_joins_and_who_leaves(mode: str, steps: list[int], order: str) -> None:
    """Let B, C and D arrive while A is being warped; they have 3, 2, 5 and 2 steps."""
    answered: list[str] = []
    with label_loop(mode) as (slots, loop):
        slots.gate.clear()
        futures = []
        for name, entry in zip("ABCD", steps_of(3, 2, 5, 2), strict=True):
            futures.append(future := Future[DenoiseResult]())
            future.add_done_callback(lambda _, name=name: answered.append(name))
            start(loop, entry, future.set_result)
            slots.is_warping.wait(60)
        slots.gate.set()
        results = [future.result(60) for future in futures]
    assert (slots.steps, "".join(answered)) == (steps, order)
    for entry, result in zip(steps_of(3, 2, 5, 2), results, strict=True):
        assert np.array_equal(result.portrait_latent, alone(entry))


def test_warping_and_stepping_take_turns() -> None:
    """Queue more jobs than may be warped at once, which is three here."""
    with label_loop() as (slots, loop):
        slots.gate.clear()
        futures = [submit(loop, entry) for entry in steps_of(4)]
        slots.is_warping.wait(60)
        futures += [submit(loop, entry) for entry in steps_of(4, 4, 4, 4, 4, 4, 4, 4)]
        slots.gate.set()
        for future in futures:
            future.result(60)
    assert slots.runs == "ws" * 4 + "sss"
    assert slots.steps == [1, 4, 7, 9, 8, 5, 2]


def test_who_arrives_waits_for_one_step_at_most_where_slots_are_free() -> None:
    with label_loop() as (slots, loop):
        slots.step_gate.clear()
        first = submit(loop, steps_of(9)[0])
        slots.is_stepping.wait(60)
        second = submit(loop, steps_of(9)[0])
        slots.step_gate.set()
        first.result(60), second.result(60)
    assert slots.runs == "wsw" + 9 * "s"


def test_who_waits_takes_the_rows_of_who_leaves_and_nobody_moves() -> None:
    """Keep all slots in use until the last waiting job has joined."""
    kinds = [(1, 2), (8, 5), (7, 5), (1, 9)]
    entries = [
        labelled(replace(BASE, seed=20 * index, num_portraits=portraits, num_inference_steps=steps), index + 1.0)
        for index, (portraits, steps) in enumerate(kinds)
    ]
    slots, results = run_together(entries)
    assert slots.steps.count(16) >= 3 and not slots.moves
    for entry, result in zip(entries, results, strict=True):
        assert np.array_equal(result.portrait_latent, alone(entry))


def test_every_step_is_reported_with_its_latent() -> None:
    reported: list[tuple[int, Any]] = []
    with label_loop() as (_, loop):
        future: Future[DenoiseResult] = Future()
        entry = labelled(replace(BASE, num_portraits=2), 1.0)
        start(loop, entry, future.set_result, lambda step, latent: reported.append((step, latent().portrait_latent)))
        result = future.result(60)
    assert [step for step, _ in reported] == [1, 2, 3]
    assert not np.array_equal(reported[0][1], reported[1][1])
    assert np.array_equal(reported[-1][1], result.portrait_latent)


def test_a_cancelled_job_stops_at_the_next_step_and_its_slot_is_used_again() -> None:
    """Cancel at a step's report. The next step runs by then, and is the job's last."""
    with label_loop() as (slots, loop):
        outcomes: dict[str, Any] = {}
        done = threading.Event()
        tickets: list[Any] = []

        def cancel_after_three(step: int, _: object) -> None:
            if step == 3:
                tickets[0].cancel()

        def note(outcome: object) -> None:
            outcomes["cancelled"] = outcome
            done.set()

        slots.gate.clear()
        tickets.append(start(loop, steps_of(30)[0], note, cancel_after_three))
        slots.gate.set()
        assert done.wait(60)
        assert isinstance(outcomes["cancelled"], Cancelled)
        run = [1, 1, 1, 1]
        assert slots.steps == run
        submit(loop, steps_of(1)[0]).result(60)
        assert slots.steps == [*run, 1]


def test_a_job_that_is_cancelled_while_it_waits_runs_no_engine() -> None:
    with label_loop("whole") as (slots, loop):
        slots.gate.clear()
        first = submit(loop, steps_of(2)[0])
        slots.is_warping.wait(60)
        future: Future[Any] = Future()
        start(loop, steps_of(5)[0], future.set_result).cancel()
        slots.gate.set()
        assert isinstance(future.result(60), Cancelled)
        first.result(60)
        assert slots.steps == [1, 1]


def test_a_job_whose_deadline_passes_is_dropped_and_told_so() -> None:
    """Give the loop a clock that moves a second a step."""
    steps: list[int] = []
    with label_loop(clock=lambda: float(len(steps))) as (slots, loop):
        slots.steps = steps
        slots.gate.clear()
        outcomes: list[Future[Any]] = [Future(), Future()]
        for future, deadline_s in zip(outcomes, (3.0, 1000.0), strict=True):
            start(loop, steps_of(5)[0], future.set_result, deadline_s=deadline_s)
            slots.is_warping.wait(60)
        slots.gate.set()
        late, whole = (future.result(60) for future in outcomes)
    assert isinstance(late, DeadlineMissed)
    assert "deadline_ms: passed after 3 of 5 steps" in str(late)
    assert isinstance(whole, DenoiseResult)
    assert slots.steps[:4] == [1, 2, 2, 1]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_fails_alone(value: float) -> None:
    with label_loop() as (slots, loop):
        slots.gate.clear()
        good, bad, last = (submit(loop, entry) for entry in steps_of(4, 4, 6))
        bad_entry = steps_of(4)[0]
        bad_entry.profile_latent[...] = value
        broken = submit(loop, bad_entry)
        slots.gate.set()
        with pytest.raises(IcPortraitError, match="NaN or Inf for this request"):
            broken.result(60)
        for future, entry in zip((good, bad, last), steps_of(4, 4, 6), strict=True):
            assert np.array_equal(future.result(60).portrait_latent, alone(entry))
