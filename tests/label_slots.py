"""Slots without engines for tests of the loop and what is around it, and jobs for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from icportrait.contract import Array
from icportrait.diffusion.sampling import NoiseSchedule
from icportrait.errors import IcPortraitError
from icportrait.loop.job import DenoiseResult, Job, OnDone, OnStep
from icportrait.loop.loop import DenoisingLoop
from icportrait.presets import DEMO_128, Preset
from icportrait.request import PortraitRequest
from tests.trivial_engines import SD15_SCHEDULER

SCHEDULE = NoiseSchedule.from_config(SD15_SCHEDULER)
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


class LabelSlots:
    """Slots without engines: a row's F_ref is its job's profile, and the noise that is predicted is that and both
    halves of the row's canvas. A row that lost its F_ref, or that has another's, gives another portrait.
    """

    rows, max_jobs, version = 16, 3, "labels"
    engine_s: float | None = None
    step_s: Mapping[int, float] = MappingProxyType({})

    def __init__(self) -> None:
        self.labels = np.zeros(self.rows)
        self.moves: list[tuple[int, int]] = []
        self.steps: list[int] = []
        self.runs = ""
        """Runs in order: w for a warping, s for a step."""
        self.failures_due = 0
        """So many of the next steps fail."""
        self.gate, self.is_warping = threading.Event(), threading.Event()
        self.step_gate, self.is_stepping = threading.Event(), threading.Event()
        self.open()

    def open(self) -> None:
        self.gate.set()
        self.step_gate.set()

    def launch_warping(self, jobs, rows):
        self.to_warp = (jobs, rows)

    def wait_warping(self):
        return self.condition(*self.to_warp)

    def launch(self, canvas_latent, timestep):
        self.to_step = (canvas_latent, timestep)

    def wait(self):
        return self.predict(*self.to_step)

    def condition(self, jobs, rows):
        self.is_warping.set()
        self.gate.wait(60)
        assert len(jobs) <= self.max_jobs
        self.runs += "w"
        for given, targets in zip(jobs, rows, strict=True):
            self.labels[list(targets)] = given["profile_latent"].mean()
        return np.array([given["profile_latent"].mean() for given in jobs], np.float32)

    def clear(self, rows):
        self.labels[list(rows)] = 0

    def move(self, source, target):
        self.labels[target], self.labels[source] = self.labels[source], np.nan
        self.moves.append((source, target))

    def predict(self, canvas_latent, timestep):
        self.is_stepping.set()
        self.step_gate.wait(60)
        if self.failures_due:
            self.failures_due -= 1
            raise RuntimeError("the device is lost")
        self.steps.append(len(timestep))
        self.runs += "s"
        labels = self.labels[: len(timestep), None, None, None]
        swapped = np.roll(canvas_latent, canvas_latent.shape[-1] // 2, axis=-1)
        times = timestep[:, None, None, None] / 1000
        return (0.1 * canvas_latent + 0.05 * swapped + labels + times).astype(np.float32)


@dataclass
class Entry:
    """A job's request and inputs, from which any number of jobs are made."""

    request: PortraitRequest
    profile_latent: Array
    reference_latent: Array
    visibility: Array


def labelled(request: PortraitRequest, label: float, preset: Preset = DEMO_128) -> Entry:
    side = preset.latent_size
    latent = np.full((1, preset.latent_channels, side, side), label, np.float32)
    return Entry(request, latent, latent, np.ones((1, 1, side, side), np.float32))


def steps_of(*counts: int) -> list[Entry]:
    return [
        labelled(replace(BASE, seed=index, num_inference_steps=count), index + 1.0)
        for index, count in enumerate(counts)
    ]


def start(loop: DenoisingLoop, entry: Entry, on_done: OnDone, on_step: OnStep | None = None, **options: Any) -> Job:
    job = Job(**vars(entry), on_done=on_done, on_step=on_step, **options)
    loop.submit(job)
    return job


def submit(loop: DenoisingLoop, entry: Entry, on_step: Any = None, **options: Any) -> Future[DenoiseResult]:
    future: Future[DenoiseResult] = Future()

    def on_done(result: DenoiseResult | IcPortraitError) -> None:
        if isinstance(result, IcPortraitError):
            future.set_exception(result)
        else:
            future.set_result(result)

    start(loop, entry, on_done, on_step, **options)
    return future


@contextmanager
def label_loop(
    mode: str = "in-flight", slots: LabelSlots | None = None, preset: Preset = DEMO_128, **options: Any
) -> Iterator[tuple[LabelSlots, DenoisingLoop]]:
    slots = slots or LabelSlots()
    loop = DenoisingLoop(slots, SCHEDULE, preset, mode, **options)
    try:
        yield slots, loop
    finally:
        slots.open()
        loop.close()


def run_together(entries: list[Entry]) -> tuple[LabelSlots, list[DenoiseResult]]:
    """Denoise a short job, and meanwhile the others arrive."""
    with label_loop() as (slots, loop):
        slots.gate.clear()
        first = submit(loop, labelled(replace(BASE, num_inference_steps=1), 9.0))
        slots.is_warping.wait(60)
        futures = [submit(loop, entry) for entry in entries]
        slots.gate.set()
        first.result(60)
        return slots, [future.result(60) for future in futures]


def alone(entry: Entry) -> np.ndarray:
    """Run a job that shares its batch with none, and return its portraits."""
    with label_loop() as (_, loop):
        return submit(loop, entry).result(60).portrait_latent
