"""Slots without engines for tests of the loop and what is around it, and jobs for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from icportrait.batching import Batcher
from icportrait.errors import IcPortraitError
from icportrait.presets import DEMO_128
from icportrait.request import PortraitRequest
from icportrait.sampling import NoiseSchedule
from icportrait.ticket import DenoiseJob, DenoiseResult
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

    rows, max_jobs, version, overlaps = 16, 3, "labels", False

    def __init__(self) -> None:
        self.labels = np.zeros(self.rows)
        self.moves: list[tuple[int, int]] = []
        self.steps: list[int] = []
        self.runs = ""
        """What ran: w for a warping, s for a step."""
        self.failures_due = 0
        """So many of the next steps fail."""
        self.gate, self.is_warping = threading.Event(), threading.Event()
        self.step_gate, self.is_stepping = threading.Event(), threading.Event()
        self.open()

    def open(self) -> None:
        self.gate.set()
        self.step_gate.set()

    def condition(self, jobs, rows, meanwhile):
        meanwhile()
        self.is_warping.set()
        self.gate.wait(60)
        assert len(jobs) <= self.max_jobs
        self.runs += "w"
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

    def to_host(self, array):
        return array


def labelled(request: PortraitRequest, label: float) -> DenoiseJob:
    latent = np.full((1, 4, 32, 32), label, np.float32)
    return DenoiseJob(request, latent, latent, np.ones((1, 1, 32, 32), np.float32))


def steps_of(*counts: int) -> list[DenoiseJob]:
    return [
        labelled(replace(BASE, seed=index, num_inference_steps=count), index + 1.0)
        for index, count in enumerate(counts)
    ]


def submit(batcher: Batcher, entry: DenoiseJob, on_step: Any = None, **options: Any) -> Future[DenoiseResult]:
    future: Future[DenoiseResult] = Future()

    def on_done(result: DenoiseResult | IcPortraitError) -> None:
        if isinstance(result, IcPortraitError):
            future.set_exception(result)
        else:
            future.set_result(result)

    batcher.submit(entry, on_done, on_step, **options)
    return future


@contextmanager
def label_batcher(
    mode: str = "in-flight", slots: LabelSlots | None = None, **options: Any
) -> Iterator[tuple[LabelSlots, Batcher]]:
    slots = slots or LabelSlots()
    batcher = Batcher(slots, SCHEDULE, DEMO_128, mode, **options)
    try:
        yield slots, batcher
    finally:
        slots.open()
        batcher.close()


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


def alone(entry: DenoiseJob) -> np.ndarray:
    """The portraits of a job that shares its batch with none."""
    with label_batcher() as (_, batcher):
        return submit(batcher, entry).result(60).portrait_latent
