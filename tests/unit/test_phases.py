"""Guidance in an interval of a request's steps: its rows step by step, their plan, and the bits of its portraits."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from icportrait.diffusion.sampling import guide
from icportrait.phases import FOR_GOOD, Phases, Timetable, guided_steps, phases_of, remaining
from icportrait.request import PortraitRequest
from tests.label_slots import (
    BASE,
    SCHEDULE,
    Entry,
    LabelSlots,
    alone,
    label_loop,
    labelled,
    run_together,
    steps_of,
    submit,
)

GUIDED = replace(BASE, num_inference_steps=10, guidance_scale=4.0)


def guided(begin: float, end: float, **changes: object) -> PortraitRequest:
    return replace(GUIDED, guidance_interval=(begin, end), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("interval", "steps", "expected"),
    [
        ((0.0, 1.0), 7, range(7)),
        ((0.2, 0.6), 10, range(2, 6)),
        ((0.25, 0.75), 2, range(1, 2)),
        ((0.0, 0.5), 1, range(1)),
        ((0.5, 1.0), 1, range(0)),
        ((0.0, 0.1), 4, range(0)),
        ((0.3, 0.3), 10, range(0)),
        ((1.0, 1.0), 5, range(0)),
    ],
)
def test_an_interval_is_rounded_to_whole_steps(interval: tuple[float, float], steps: int, expected: range) -> None:
    assert guided_steps(4.0, interval, steps) == expected
    assert guided_steps(1.0, interval, steps) == range(0)


@pytest.mark.parametrize("cut", [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 150])
def test_two_intervals_that_meet_have_every_step_once(cut: float, steps: int) -> None:
    found = [*guided_steps(2.0, (0.0, cut), steps), *guided_steps(2.0, (cut, 1.0), steps)]
    assert found == list(range(steps))


def test_a_request_takes_two_rows_a_portrait_at_guided_steps_alone() -> None:
    request = guided(0.2, 0.6, num_portraits=3)
    assert request.phases == ((2, 3), (4, 6), (4, 3))
    assert request.rows == 6
    assert remaining(request.phases, 0) == request.phases
    assert remaining(request.phases, 3) == ((3, 6), (4, 3))
    assert remaining(request.phases, 10) == ()
    assert guided(0.3, 0.3).phases == BASE_PHASES
    assert replace(guided(0.2, 0.6), guidance_scale=1.0).phases == BASE_PHASES


BASE_PHASES = ((10, 1),)


def test_the_timetable_finds_the_first_step_at_which_a_request_fits() -> None:
    """Compare with trying every step."""
    draw = random.Random(0)
    for _ in range(200):
        slots, taken, found = 8, [], Timetable(8, 400)
        for _ in range(draw.randint(1, 12)):
            steps = draw.randint(1, 12)
            begin, end = sorted((draw.randint(0, steps), draw.randint(0, steps)))
            phases = phases_of(draw.randint(1, 4), range(begin, end), steps)
            start = found.first_fit(phases, least := draw.randint(0, 5))
            assert start == next(at for at in range(least, 400) if fits(taken, phases, at, slots))
            found.take(phases, start)
            taken.append((start, phases))


def fits(taken: list[tuple[int, Phases]], phases: Phases, start: int, slots: int) -> bool:
    used = [0] * 600
    for at, each in [*taken, (start, phases)]:
        for steps, rows in each:
            for step in range(at, at + steps):
                used[step] += rows
            at += steps
    return max(used) <= slots


def test_a_request_that_may_stay_leaves_no_room_for_good() -> None:
    free = Timetable(4, 10)
    free.take(((FOR_GOOD, 3),))
    assert free.first_fit(((2, 1),)) == 0
    assert free.first_fit(((1, 1), (1, 2))) > 8


# The loop


def test_a_job_has_rows_for_guidance_while_it_lasts() -> None:
    with label_loop() as (slots, loop):
        submit(loop, labelled(guided(0.2, 0.6, num_portraits=2), 1.0)).result(60)
    assert slots.steps == [2, 2, 4, 4, 4, 4, 2, 2, 2, 2]


def test_a_job_is_charged_with_the_rows_that_a_step_had() -> None:
    class Timed(LabelSlots):
        engine_s = 0.5

    with label_loop(slots=Timed(), clock=count().__next__) as (_, loop):
        account = submit(loop, labelled(guided(0.0, 0.5, num_inference_steps=4), 1.0)).result(60).account
    assert account.engine_ms == 1000 * (0.5 + 4 * 0.5)
    assert account.rows_shared == 1.5


class GuidingSlots(LabelSlots):
    """An engine that guides a request's own row at given timesteps, so that the request needs no second row."""

    def __init__(self, request: PortraitRequest) -> None:
        super().__init__()
        trajectory = SCHEDULE.trajectory(request.scheduler, request.num_inference_steps)
        self.timesteps = set(trajectory.timesteps[request.guided_steps])
        self.scale = np.float32(request.guidance_scale)

    def predict(self, canvas_latent, timestep):
        conditional = super().predict(canvas_latent, timestep)
        labels, self.labels = self.labels, np.zeros_like(self.labels)
        unconditional, self.labels = super().predict(canvas_latent, timestep), labels
        is_guided = np.array([each in self.timesteps for each in timestep])[:, None, None, None]
        return np.where(is_guided, guide(conditional, unconditional, self.scale), conditional)


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpmpp_2m"])
@pytest.mark.parametrize("interval", [(0.0, 0.4), (0.2, 0.6), (0.5, 1.0), (0.3, 0.3)])
def test_a_step_without_guidance_is_a_step_of_a_request_that_never_has_any(
    interval: tuple[float, float], scheduler: str
) -> None:
    """Let others come and go meanwhile, so that rows move."""
    request = guided(*interval, num_portraits=2, scheduler=scheduler)
    others = [labelled(replace(BASE, seed=50 + n, num_inference_steps=n), 2.0 + n) for n in (3, 5, 8)]
    with label_loop(slots=GuidingSlots(request)) as (_, loop):
        never = labelled(replace(request, guidance_scale=1.0), 1.0)
        expected = submit(loop, never).result(60).portrait_latent
    _, results = run_together([others[0], labelled(request, 1.0), *others[1:]])
    assert results[1].portrait_latent.tobytes() == expected.tobytes()
    for other, result in zip(others, [results[0], *results[2:]], strict=True):
        assert np.array_equal(result.portrait_latent, alone(other))


def together(*entries: Entry) -> list[int]:
    """Return the rows of the steps after the first job's, which the others have waited for."""
    slots, results = run_together(list(entries))
    for entry, result in zip(entries, results, strict=True):
        assert np.array_equal(result.portrait_latent, alone(entry))
    assert slots.steps[0] == 1
    return slots.steps[1:]


def test_rows_that_guidance_gives_back_are_others() -> None:
    large = guided(0.0, 0.5, num_portraits=8, num_inference_steps=8)
    small = replace(BASE, seed=30, num_portraits=8, num_inference_steps=2)
    assert together(labelled(large, 1.0), labelled(small, 2.0)) == 4 * [16] + 2 * [16] + 2 * [8]


@pytest.mark.parametrize(("steps", "rows"), [(4, 8 * [16]), (5, 4 * [8] + 4 * [16] + 5 * [8])])
def test_a_job_joins_where_it_ends_before_another_needs_the_rows(steps: int, rows: list[int]) -> None:
    grows = guided(0.5, 1.0, num_portraits=8, num_inference_steps=8)
    other = replace(BASE, seed=30, num_portraits=8, num_inference_steps=steps)
    assert together(labelled(grows, 1.0), labelled(other, 2.0)) == rows


def test_two_jobs_that_would_need_each_others_rows_run_one_after_the_other() -> None:
    first, second = (guided(0.5, 1.0, seed=seed, num_portraits=8, num_inference_steps=4) for seed in (1, 20))
    assert together(labelled(first, 1.0), labelled(second, 2.0)) == 2 * ([8] * 2 + [16] * 2)


def test_a_job_that_may_be_held_keeps_room_for_its_guidance() -> None:
    """Let a small job wait, though it would end before the other's guidance begins, if that were never held."""
    grows = labelled(guided(0.5, 1.0, num_portraits=8, num_inference_steps=4), 1.0)
    with label_loop() as (slots, loop):
        slots.gate.clear()
        futures = [submit(loop, grows, hold_every=1)]
        slots.is_warping.wait(60)
        futures += [submit(loop, entry) for entry in steps_of(1)]
        slots.gate.set()
        for future in futures:
            future.result(60)
    assert slots.steps == [8, 8, 16, 16, 1]


@pytest.mark.parametrize("mode", ["whole", "whole-equal-steps"])
def test_a_batch_that_leaves_as_a_whole_has_room_for_all_guidance(mode: str) -> None:
    """Let the first job end with guidance, and stay, before the second one's begins."""
    first, second = (
        guided(0.5, 1.0, seed=seed, num_portraits=8, num_inference_steps=n) for seed, n in ((1, 2), (20, 6))
    )
    with label_loop(mode) as (slots, loop):
        slots.gate.clear()
        futures = [submit(loop, steps_of(1)[0])]
        slots.is_warping.wait(60)
        futures += [submit(loop, labelled(request, 2.0 + n)) for n, request in enumerate((first, second))]
        slots.gate.set()
        for future in futures:
            future.result(60)
    assert slots.steps == [1, 8, 16, 8, 8, 8, 16, 16, 16]
