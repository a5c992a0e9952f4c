"""The denoising loop against the reference pipeline: what shares a batch changes nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
import torch

from icportrait.contract import engine_specs
from icportrait.diffusion.masking import hide, reference_visibility
from icportrait.diffusion.sampling import NoiseSchedule
from icportrait.errors import IcPortraitError, InvalidRequest, Unavailable
from icportrait.loop.job import DenoiseResult
from icportrait.loop.loop import DenoisingLoop
from icportrait.nn import ReferencePipeline, engine_modules, random_checkpoint
from icportrait.presets import DEMO_128
from icportrait.request import PortraitRequest
from icportrait.runtime.eager import TorchEngine
from icportrait.runtime.slots import HostSlots
from tests.label_slots import BASE, Entry, start, submit

CHECKPOINT = random_checkpoint(DEMO_128)
MODULES = engine_modules(CHECKPOINT)
SPECS = engine_specs(DEMO_128)
PIPELINE = ReferencePipeline.of(CHECKPOINT, "cpu")
PICTURES = np.random.default_rng(0).integers(0, 256, (4, 128, 128, 3), dtype=np.uint8)
REQUESTS = [
    BASE,
    replace(BASE, seed=2, num_inference_steps=5, scheduler="euler"),
    replace(BASE, seed=3, num_portraits=2, guidance_scale=3.0, scheduler="ddim"),
    replace(BASE, seed=4, num_inference_steps=4, guidance_scale=2.0, guidance_interval=(0.25, 0.75), mask_ratio=0.5),
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
def loop(warping: CountingEngine, unet: CountingEngine) -> Iterator[DenoisingLoop]:
    schedule = NoiseSchedule.from_config(CHECKPOINT.scheduler_config)
    loop = DenoisingLoop(HostSlots(warping, unet, rows=16), schedule, DEMO_128)
    yield loop
    loop.close()


def job(request: PortraitRequest, index: int = 0) -> Entry:
    encoder = TorchEngine(MODULES["vae_encoder"], SPECS["vae_encoder"], "cpu")
    visibility = reference_visibility(DEMO_128, request.mask_ratio, request.seed)
    hidden = hide(PICTURES[(index + 1) % 4], visibility)
    latents = [encoder.run({"pixels": pixels[None]})["latent"] for pixels in (PICTURES[index], hidden)]
    return Entry(request, latents[0], latents[1], visibility)


def hold_first(loop: DenoisingLoop, warping: CountingEngine) -> Future[DenoiseResult]:
    """Keep the loop busy with one job until the gate opens, so that all that is submitted meanwhile waits."""
    warping.gate.clear()
    first = submit(loop, job(BASE))
    warping.is_running.wait(60)
    return first


def test_jobs_of_one_batch_equal_the_reference_pipeline(loop, warping, unet) -> None:
    first = hold_first(loop, warping)
    futures = [submit(loop, job(request, index)) for index, request in enumerate(REQUESTS)]
    warping.gate.set()
    first.result(60)
    results = [future.result(60) for future in futures]
    assert warping.batches == [1, 4]
    assert unet.batches == [1, 8, 9, 8, 2, 1]
    for index, (request, result) in enumerate(zip(REQUESTS, results, strict=True)):
        expected = PIPELINE(
            PICTURES[index],
            PICTURES[(index + 1) % 4],
            seed=request.seed,
            num_portraits=request.num_portraits,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            guidance_interval=request.guidance_interval,
            mask_ratio=request.mask_ratio,
            scheduler=request.scheduler,
        )
        np.testing.assert_allclose(result.portrait_latent, expected.latents, rtol=1e-3, atol=1e-4)
        assert result.account.match_confidence == pytest.approx(expected.match_confidence, abs=1e-5)


def test_an_answer_leaves_when_its_own_steps_are_done(loop, warping) -> None:
    first = hold_first(loop, warping)
    short, long = (submit(loop, job(replace(BASE, num_inference_steps=steps))) for steps in (1, 40))
    warping.gate.set()
    short.result(60)
    assert not long.done()
    long.result(60)
    first.result(60)


def test_what_does_not_fit_waits_until_slots_are_free(loop, warping, unet) -> None:
    first = hold_first(loop, warping)
    big = replace(BASE, num_portraits=8, num_inference_steps=1)
    futures = [submit(loop, job(request)) for request in (big, replace(big, seed=9), replace(big, seed=17))]
    warping.gate.set()
    first.result(60)
    for future in futures:
        assert future.result(60).portrait_latent.shape == (8, 4, 32, 32)
    assert unet.batches == [1, 9, 9, 8]


def test_a_request_larger_than_all_slots_is_refused_at_once(warping, unet) -> None:
    schedule = NoiseSchedule.from_config(CHECKPOINT.scheduler_config)
    loop = DenoisingLoop(HostSlots(warping, unet, rows=2), schedule, DEMO_128)
    with pytest.raises(InvalidRequest, match=r"num_portraits: 2 .* need 4 slots, this server has 2"):
        submit(loop, job(replace(BASE, num_portraits=2, guidance_scale=2.0)))
    loop.close()


def test_an_engine_failure_answers_its_batch_and_the_loop_goes_on(loop, unet, caplog) -> None:
    unet.fails_at = 1
    future = submit(loop, job(BASE))
    with pytest.raises(IcPortraitError, match="denoising failed on this server; its log has the cause"):
        future.result(60)
    assert "Traceback" in caplog.text
    submit(loop, job(BASE)).result(60)


def test_a_latent_that_is_not_finite_is_an_error_not_a_picture(loop) -> None:
    entry = job(BASE)
    entry.profile_latent[...] = np.nan
    with pytest.raises(IcPortraitError, match="NaN or Inf"):
        submit(loop, entry).result(60)


def test_a_failure_after_some_answers_left_reaches_the_others_and_the_loop_goes_on(loop, warping, unet) -> None:
    first = hold_first(loop, warping)
    short, long = (submit(loop, job(replace(BASE, num_inference_steps=steps))) for steps in (1, 5))
    unet.fails_at = 4  # the first job has ended by then, and the short one
    warping.gate.set()
    first.result(60)
    assert short.result(60).portrait_latent.shape == (1, 4, 32, 32)
    with pytest.raises(IcPortraitError, match="denoising failed"):
        long.result(60)
    submit(loop, job(BASE)).result(60)


def test_an_answer_that_cannot_be_delivered_does_not_harm_the_others(loop, warping, caplog) -> None:
    def broken(_: object) -> None:
        raise OSError("the caller's pipe is gone")

    first = hold_first(loop, warping)
    start(loop, job(replace(BASE, num_inference_steps=1)), broken)
    other = submit(loop, job(BASE))
    warping.gate.set()
    first.result(60)
    other.result(60)
    assert "the caller's pipe is gone" in caplog.text


def test_steps_that_the_schedule_has_not_are_refused_at_once(warping, unet) -> None:
    schedule = NoiseSchedule.from_config(CHECKPOINT.scheduler_config | {"num_train_timesteps": 100})
    loop = DenoisingLoop(HostSlots(warping, unet, rows=16), schedule, DEMO_128)
    with pytest.raises(InvalidRequest):
        submit(loop, job(replace(BASE, num_inference_steps=150)))
    assert not warping.batches
    loop.close()


def test_closing_refuses_what_runs_and_what_waits_and_ends_the_thread(loop, warping, unet) -> None:
    first = hold_first(loop, warping)
    waiting = [submit(loop, job(replace(BASE, num_portraits=8))) for _ in range(4)]
    closer = threading.Thread(target=loop.close)
    closer.start()
    while not loop._closed:
        time.sleep(0.01)
    warping.gate.set()
    closer.join(60)
    assert not closer.is_alive()
    assert not unet.batches
    for refused in (first, *waiting):
        with pytest.raises(Unavailable, match="shutting down"):
            refused.result(1)
    with pytest.raises(Unavailable, match="shutting down"):
        submit(loop, job(BASE))


def test_torch_runs_without_gradients() -> None:
    engine = TorchEngine(MODULES["unet"], SPECS["unet"], "cpu")
    outputs = engine.run(SPECS["unet"].dummy_inputs(1))
    assert not torch.from_numpy(outputs["noise_pred"]).requires_grad
