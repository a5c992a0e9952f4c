"""Steps beside another process that decodes, as the VAE's model does in a server: how much later are they?"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from statistics import median
from typing import Any, Protocol

import numpy as np

from benchmarks.gpu.engines import load
from benchmarks.gpu.settings import GpuProbeSettings
from icportrait.contract import engine_specs
from icportrait.errors import RuntimeNotAvailable
from icportrait.manifest import Manifest
from icportrait.runtime.cuda import find_gpu
from icportrait.runtime.device_engine import buckets_up_to
from icportrait.runtime.device_slots import DeviceSlots
from icportrait.runtime.slots import Inputs

MOST_OF_MEDIAN = 2.0
"""A step's p99 beside decoding, by its median alone, that is thought fine."""
START_S = 180.0
LEAST_STEPS = 30


class Event(Protocol):
    """The part of an event that the decoding process uses."""

    def is_set(self) -> bool: ...
    def set(self) -> None: ...


def probe(settings: GpuProbeSettings) -> dict[str, Any]:
    """Measure full steps alone, and then beside the decoder with each batch."""
    return measured(settings, decoding)


def measured(
    settings: GpuProbeSettings, neighbour: Callable[[GpuProbeSettings, int], AbstractContextManager[None]]
) -> dict[str, Any]:
    """Measure full steps alone and beside a neighbour.

    Args:
        settings: the probe's.
        neighbour: decodes batches of so many portraits within its ``with`` block.
    """
    manifest = Manifest.read(settings.export)
    engines = load(("warping_network", "unet"), settings, manifest)
    slots = DeviceSlots(engines["warping_network"], engines["unet"], engines["unet"].spec.batch.max)
    inputs = engines["unet"].spec.dummy_inputs(slots.rows, settings.seed)
    alone = _steps(slots, inputs, settings.seconds)
    largest = engine_specs(manifest.preset, manifest.precision)["vae_decoder"].batch.max
    beside = []
    for batch in buckets_up_to(largest):
        with neighbour(settings, batch):
            found = _steps(slots, inputs, settings.seconds)
        ratio = found["p99_ms"] / alone["median_ms"]
        beside.append({"decoder_batch": batch, **found, "p99_of_median_alone": round(ratio, 3)})
    return {
        "version": slots.version,
        "rows": slots.rows,
        "mps": find_gpu().has_mps,
        "alone": alone,
        "beside": beside,
        "largest_fine_batch": max(
            (each["decoder_batch"] for each in beside if each["p99_of_median_alone"] <= MOST_OF_MEDIAN), default=None
        ),
    }


def _steps(slots: DeviceSlots, inputs: Inputs, seconds: float) -> dict[str, Any]:
    """Take full steps for a while, as the loop does."""
    taken: list[float] = []
    end_s = time.perf_counter() + seconds
    while (begun_s := time.perf_counter()) < end_s or len(taken) < LEAST_STEPS:
        slots.launch(inputs["canvas_latent"], inputs["timestep"])
        slots.wait()
        taken.append(1000 * (time.perf_counter() - begun_s))
    return {
        "steps": len(taken),
        "median_ms": round(median(taken), 3),
        "p99_ms": round(float(np.percentile(taken, 99)), 3),
    }


@contextmanager
def decoding(settings: GpuProbeSettings, batch: int) -> Iterator[None]:
    """Keep a process of its own decoding within the block.

    Raises:
        RuntimeNotAvailable: the process ended, as it does without room in the GPU's memory.
    """
    context = multiprocessing.get_context("spawn")
    ready, stop = context.Event(), context.Event()
    process = context.Process(target=decode, args=(settings, batch, ready, stop), daemon=True)
    process.start()
    try:
        until_s = time.monotonic() + START_S
        while not ready.wait(0.1):
            if not process.is_alive() or time.monotonic() > until_s:
                raise RuntimeNotAvailable(f"the process that decodes {batch} at once didn't start; its error is above")
        yield
    finally:
        stop.set()
        process.join(START_S)
        process.kill()


def decode(settings: GpuProbeSettings, batch: int, ready: Event, stop: Event) -> None:
    """Decode until told to stop, with copies from and to the host as the VAE's model makes them."""
    engine = load(["vae_decoder"], settings, Manifest.read(settings.export))["vae_decoder"]
    inputs = engine.spec.dummy_inputs(batch, settings.seed)
    while not stop.is_set():
        engine.run(inputs)
        ready.set()


def table(report: dict[str, Any]) -> str:
    """Write the steps as lines for a reader."""
    alone = report["alone"]
    lines = [
        f"{report['version']}, steps of {report['rows']} rows, MPS {'on' if report['mps'] else 'off'}",
        f"{'beside':<26}{'median ms':>11}{'p99 ms':>10}{'p99 / median alone':>20}",
        f"{'nothing':<26}{alone['median_ms']:>11.2f}{alone['p99_ms']:>10.2f}",
    ]
    for each in report["beside"]:
        name = f"decoder, {each['decoder_batch']} at once"
        lines.append(f"{name:<26}{each['median_ms']:>11.2f}{each['p99_ms']:>10.2f}{each['p99_of_median_alone']:>20.2f}")
    fine = report["largest_fine_batch"]
    return "\n".join([*lines, f"largest batch with p99 within {MOST_OF_MEDIAN:g} medians: {fine or 'none'}"])
