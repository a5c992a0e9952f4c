"""The denoising loop against the reference pipeline: what shares a batch changes nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from icportrait.batching import Batcher, DenoiseResult
from icportrait.contract import engine_specs
from icportrait.errors import Cancelled, IcPortraitError, InvalidRequest, Unavailable
from icportrait.masking import hide, reference_visibility
from icportrait.nn import ReferencePipeline, engine_modules, random_checkpoint
from icportrait.presets import DEMO_128
from icportrait.request import PortraitRequest
from icportrait.runtime.eager import TorchEngine
from icportrait.runtime.slots import HostSlots
from icportrait.sampling import NoiseSchedule
from icportrait.slot_table import DenoiseJob

CHECKPOINT = random_checkpoint(DEMO_128)
MODULES = engine_modules(CHECKPOINT)
SPECS = engine_specs(DEMO_128)
PIPELINE = ReferencePipeline.of(CHECKPOINT, "cpu")
PICTURES = np.random.default_rng(0).integers(0, 256, (4, 128, 128, 3), dtype=np.uint8)
BASE = PortraitRequest(
    seed=1,
    num_portraits=1,
    num_inference_steps=3,
    guidance_scale=1.0,
    mask_ratio=0.8,
    scheduler="dpmpp_2m",
    output_format="png",
    encoding="binary",
)
REQUESTS = [
    BASE,
    replace(BASE, seed=2, num_inference_steps=5, scheduler="euler"),
    replace(BASE, seed=3, num_portraits=2, guidance_scale=3.0, scheduler="ddim"),
    replace(BASE, seed=4, num_inference_steps=2, mask_ratio=0.5),
]


class CountingEngine(TorchEngine):
    """Remembers the batches it ran and can be held back at its first."""

    def __init__(self, name: str) -> None:
        super().__init__(MODULES[name], SPECS[name], "cpu")
        self.batches: list[int] = []
        self.fails_at = 0
        self.gate, self.is_running = threading.Event(), threading.Event()
        self.gate.set()

    def run(self, inputs):
        self.is_running.set()
        self.gate.wait(60)
        self.batches.append(len(next(iter(inputs.values()))))
        if len(self.batches) == self.fails_at:
            raise RuntimeError("the device is lost")
        return super().run(inputs)


@pytest.fixture
def warping() -> CountingEngine:
    return CountingEngine("warping_network")


@pytest.fixture
def unet() -> CountingEngine:
    return CountingEngine("unet")


@pytest.fixture
def batcher(warping: CountingEngine, unet: CountingEngine) -> Iterator[Batcher]:
    schedule = NoiseSchedule.from_config(CHECKPOINT.scheduler_config)
    batcher = Batcher(HostSlots(warping, unet, rows=16), schedule, DEMO_128)
    yield batcher
    batcher.close()


def job(request: PortraitRequest, index: int = 0) -> DenoiseJob:
    encoder = TorchEngine(MODULES["vae_encoder"], SPECS["vae_encoder"], "cpu")
    visibility = reference_visibility(DEMO_128, request.mask_ratio, request.seed)
    hidden = hide(PICTURES[(index + 1) % 4], visibility)
    latents = [encoder.run({"pixels": pixels[None]})["latent"] for pixels in (PICTURES[index], hidden)]
    return DenoiseJob(request, latents[0], latents[1], visibility)


def submit(batcher: Batcher, entry: DenoiseJob) -> Future[DenoiseResult]:
    future: Future[DenoiseResult] = Future()

    def on_done(result: DenoiseResult | IcPortraitError) -> None:
        if isinstance(result, IcPortraitError):
            future.set_exception(result)
        else:
            future.set_result(result)

    batcher.submit(entry, on_done)
    return future


def hold_first(batcher: Batcher, warping: CountingEngine) -> Future[DenoiseResult]:
    """Keep the loop busy with one job until the gate opens, so that all that is submitted meanwhile waits."""
    warping.gate.clear()
    first = submit(batcher, job(BASE))
    warping.is_running.wait(60)
    return first


def test_jobs_of_one_batch_equal_the_reference_pipeline(batcher, warping, unet) -> None:
    first = hold_first(batcher, warping)
    futures = [submit(batcher, job(request, index)) for index, request in enumerate(REQUESTS)]
    warping.gate.set()
    first.result(60)
    results = [future.result(60) for future in futures]
    assert warping.batches == [1, 4]
    assert unet.batches == [1, 8, 8, 6, 1, 1]
    for index, (request, result) in enumerate(zip(REQUESTS, results, strict=True)):
        expected = PIPELINE(
            PICTURES[index],
            PICTURES[(index + 1) % 4],
            seed=request.seed,
            num_portraits=request.num_portraits,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            mask_ratio=request.mask_ratio,
            scheduler=request.scheduler,
        )
        np.testing.assert_allclose(result.portrait_latent, expected.latents, rtol=1e-3, atol=1e-4)
        assert result.match_confidence == pytest.approx(expected.match_confidence, abs=1e-5)


def test_an_answer_leaves_when_its_own_steps_are_done(batcher, warping) -> None:
    first = hold_first(batcher, warping)
    short, long = (submit(batcher, job(replace(BASE, num_inference_steps=steps))) for steps in (1, 40))
    warping.gate.set()
    short.result(60)
    assert not long.done()
    long.result(60)
    first.result(60)


def test_what_does_not_fit_waits_until_slots_are_free(batcher, warping, unet) -> None:
    first = hold_first(batcher, warping)
    big = replace(BASE, num_portraits=8, num_inference_steps=1)
    futures = [submit(batcher, job(request)) for request in (big, replace(big, seed=9), replace(big, seed=17))]
    warping.gate.set()
    first.result(60)
    for future in futures:
        assert future.result(60).portrait_latent.shape == (8, 4, 32, 32)
    assert unet.batches == [1, 9, 9, 8]


def test_a_request_larger_than_all_slots_is_refused_at_once(warping, unet) -> None:
    schedule = NoiseSchedule.from_config(CHECKPOINT.scheduler_config)
    batcher = Batcher(HostSlots(warping, unet, rows=2), schedule, DEMO_128)
    with pytest.raises(InvalidRequest, match=r"num_portraits: 2 .* need 4 slots, this server has 2"):
        submit(batcher, job(replace(BASE, num_portraits=2, guidance_scale=2.0)))
    batcher.close()


def test_an_engine_failure_answers_its_batch_and_the_loop_goes_on(batcher, unet, caplog) -> None:
    unet.fails_at = 1
    future = submit(batcher, job(BASE))
    with pytest.raises(IcPortraitError, match="denoising failed on this server; its log has the cause"):
        future.result(60)
    assert "Traceback" in caplog.text
    submit(batcher, job(BASE)).result(60)


def test_a_latent_that_is_not_finite_is_an_error_not_a_picture(batcher) -> None:
    entry = job(BASE)
    entry.profile_latent[...] = np.nan
    with pytest.raises(IcPortraitError, match="NaN or Inf"):
        submit(batcher, entry).result(60)


def test_a_failure_after_some_answers_left_reaches_the_others_and_the_loop_goes_on(batcher, warping, unet) -> None:
    first = hold_first(batcher, warping)
    short, long = (submit(batcher, job(replace(BASE, num_inference_steps=steps))) for steps in (1, 5))
    unet.fails_at = 4  # the first job has ended by then, and the short one
    warping.gate.set()
    first.result(60)
    assert short.result(60).portrait_latent.shape == (1, 4, 32, 32)
    with pytest.raises(IcPortraitError, match="denoising failed"):
        long.result(60)
    submit(batcher, job(BASE)).result(60)


def test_an_answer_that_cannot_be_delivered_does_not_harm_the_others(batcher, warping, caplog) -> None:
    def broken(_: object) -> None:
        raise OSError("the caller's pipe is gone")

    first = hold_first(batcher, warping)
    batcher.submit(job(replace(BASE, num_inference_steps=1)), broken)
    other = submit(batcher, job(BASE))
    warping.gate.set()
    first.result(60)
    other.result(60)
    assert "the caller's pipe is gone" in caplog.text


def test_steps_that_the_schedule_has_not_are_refused_at_once(warping, unet) -> None:
    schedule = NoiseSchedule.from_config(CHECKPOINT.scheduler_config | {"num_train_timesteps": 100})
    batcher = Batcher(HostSlots(warping, unet, rows=16), schedule, DEMO_128)
    with pytest.raises(InvalidRequest):
        submit(batcher, job(replace(BASE, num_inference_steps=150)))
    assert not warping.batches
    batcher.close()


def test_closing_refuses_what_runs_and_what_waits_and_ends_the_thread(batcher, warping, unet) -> None:
    first = hold_first(batcher, warping)
    waiting = [submit(batcher, job(replace(BASE, num_portraits=8))) for _ in range(4)]
    closer = threading.Thread(target=batcher.close)
    closer.start()
    while not batcher._closed:
        time.sleep(0.01)
    warping.gate.set()
    closer.join(60)
    assert not closer.is_alive()
    assert not unet.batches
    for refused in (first, *waiting):
        with pytest.raises(Unavailable, match="shutting down"):
            refused.result(1)
    with pytest.raises(Unavailable, match="shutting down"):
        submit(batcher, job(BASE))


def test_torch_runs_without_gradients() -> None:
    engine = TorchEngine(MODULES["unet"], SPECS["unet"], "cpu")
    outputs = engine.run(SPECS["unet"].dummy_inputs(1))
    assert not torch.from_numpy(outputs["noise_pred"]).requires_grad


class LabelSlots:
    """Slots without engines: a row's F_ref is its job's profile, and the noise that is predicted is that and the row's
    latent. A row that lost its F_ref, or that has another's, gives another portrait.
    """

    rows, max_jobs, version, overlaps = 16, 3, "labels", False

    def __init__(self) -> None:
        self.labels = np.zeros(self.rows)
        self.moves: list[tuple[int, int]] = []
        self.steps: list[int] = []
        self.gate, self.is_warping = threading.Event(), threading.Event()
        self.gate.set()

    def condition(self, jobs, rows):
        self.is_warping.set()
        self.gate.wait(60)
        assert len(jobs) <= self.max_jobs
        for given, targets in zip(jobs, rows, strict=True):
            self.labels[list(targets)] = given["profile_latent"].mean()
        return np.zeros(len(jobs), np.float32)

    def clear(self, rows):
        self.labels[list(rows)] = 0

    def move(self, source, target):
        self.labels[target], self.labels[source] = self.labels[source], np.nan
        self.moves.append((source, target))

    def predict(self, canvas_latent, timestep, meanwhile):
        meanwhile()
        self.steps.append(len(timestep))
        labels = self.labels[: len(timestep), None, None, None]
        return (0.1 * canvas_latent + labels + timestep[:, None, None, None] / 1000).astype(np.float32)

    def to_host(self, array):
        return array


def labelled(request: PortraitRequest, label: float) -> DenoiseJob:
    latent = np.full((1, 4, 32, 32), label, np.float32)
    return DenoiseJob(request, latent, latent, np.ones((1, 1, 32, 32), np.float32))


def run_together(entries: list[DenoiseJob]) -> tuple[LabelSlots, list[DenoiseResult]]:
    """Denoise a short job, and meanwhile the others arrive."""
    with label_batcher() as (slots, batcher):
        slots.gate.clear()
        first = submit(batcher, labelled(replace(BASE, num_inference_steps=1), 9.0))
        slots.is_warping.wait(60)
        futures = [submit(batcher, entry) for entry in entries]
        slots.gate.set()
        first.result(60)
        return slots, [future.result(60) for future in futures]


@contextmanager
def label_batcher(mode: str = "in-flight", **options: Any) -> Iterator[tuple[LabelSlots, Batcher]]:
    slots, schedule = LabelSlots(), NoiseSchedule.from_config(CHECKPOINT.scheduler_config)
    batcher = Batcher(slots, schedule, DEMO_128, mode, **options)
    try:
        yield slots, batcher
    finally:
        slots.gate.set()
        batcher.close()


def test_rows_follow_their_jobs_when_others_end() -> None:
    """Jobs that end at different steps, between others, guided and with several portraits."""
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
        (alone,) = run_together([entry])[1]
        assert np.array_equal(result.portrait_latent, alone.portrait_latent)


def steps_of(*counts: int) -> list[DenoiseJob]:
    return [
        labelled(replace(BASE, seed=index, num_inference_steps=count), index + 1.0)
        for index, count in enumerate(counts)
    ]


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
    """A is being warped when B, C and D arrive; they have 3, 2, 5 and 2 steps."""
    answered: list[str] = []
    with label_batcher(mode) as (slots, batcher):
        slots.gate.clear()
        futures = []
        for name, entry in zip("ABCD", steps_of(3, 2, 5, 2), strict=True):
            futures.append(future := Future[DenoiseResult]())
            future.add_done_callback(lambda _, name=name: answered.append(name))
            batcher.submit(entry, future.set_result)
            slots.is_warping.wait(60)
        slots.gate.set()
        results = [future.result(60) for future in futures]
    assert (slots.steps, "".join(answered)) == (steps, order)
    for entry, result in zip(steps_of(3, 2, 5, 2), results, strict=True):
        assert np.array_equal(result.portrait_latent, run_together([entry])[1][0].portrait_latent)


def test_every_step_is_reported_with_its_latent() -> None:
    reported: list[tuple[int, Any]] = []
    with label_batcher() as (_, batcher):
        future: Future[DenoiseResult] = Future()
        entry = labelled(replace(BASE, num_portraits=2), 1.0)
        batcher.submit(entry, future.set_result, lambda step, latent: reported.append((step, latent().portrait_latent)))
        result = future.result(60)
    assert [step for step, _ in reported] == [1, 2, 3]
    assert not np.array_equal(reported[0][1], reported[1][1])
    assert np.array_equal(reported[-1][1], result.portrait_latent)


def test_a_cancelled_job_stops_at_the_next_step_and_its_slot_is_used_again() -> None:
    with label_batcher() as (slots, batcher):
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
        tickets.append(batcher.submit(steps_of(30)[0], note, cancel_after_three))
        slots.gate.set()
        assert done.wait(60)
        assert isinstance(outcomes["cancelled"], Cancelled)
        assert slots.steps == [1, 1, 1]
        submit(batcher, steps_of(1)[0]).result(60)
        assert slots.steps == [1, 1, 1, 1]


def test_a_job_that_is_cancelled_while_it_waits_runs_no_engine() -> None:
    with label_batcher("whole") as (slots, batcher):
        slots.gate.clear()
        first = submit(batcher, steps_of(2)[0])
        slots.is_warping.wait(60)
        future: Future[Any] = Future()
        batcher.submit(steps_of(5)[0], future.set_result).cancel()
        slots.gate.set()
        assert isinstance(future.result(60), Cancelled)
        first.result(60)
        assert slots.steps == [1, 1]


def test_a_job_whose_deadline_passes_is_dropped_and_told_so() -> None:
    """By the clock that the loop is given: a second a step."""
    steps: list[int] = []
    with label_batcher(clock=lambda: float(len(steps))) as (slots, batcher):
        slots.steps = steps
        slots.gate.clear()
        outcomes: list[Future[Any]] = [Future(), Future()]
        for future, deadline_s in zip(outcomes, (3.0, 1000.0), strict=True):
            batcher.submit(steps_of(5)[0], future.set_result, deadline_s=deadline_s)
            slots.is_warping.wait(60)
        slots.gate.set()
        late, whole = (future.result(60) for future in outcomes)
    assert isinstance(late, Unavailable)
    assert "deadline_ms: passed after 3 of 5 steps" in str(late)
    assert isinstance(whole, DenoiseResult)
    assert slots.steps[:4] == [1, 2, 2, 1]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_fails_alone(value: float) -> None:
    with label_batcher() as (slots, batcher):
        slots.gate.clear()
        good, bad, last = (submit(batcher, entry) for entry in steps_of(4, 4, 6))
        bad_entry = steps_of(4)[0]
        bad_entry.profile_latent[...] = value
        broken = submit(batcher, bad_entry)
        slots.gate.set()
        with pytest.raises(IcPortraitError, match="NaN or Inf for this request"):
            broken.result(60)
        alone = [run_together([entry])[1][0].portrait_latent for entry in steps_of(4, 4, 6)]
        for future, expected in zip((good, bad, last), alone, strict=True):
            assert np.array_equal(future.result(60).portrait_latent, expected)
