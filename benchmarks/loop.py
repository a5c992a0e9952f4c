"""The denoising loop alone: what it takes between two runs of the UNet, without Triton and without a GPU.

Another thread keeps a ``DenoisingLoop`` over simulated slots full, as a server's requests would. Engines take the times
of a latency table; all that lies between them is this machine's, and real.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from benchmarks.report import conditions_here
from benchmarks.settings import LoopSettings
from icportrait.contract import engine_specs
from icportrait.diffusion.sampling import NoiseSchedule
from icportrait.errors import IcPortraitError, InvalidRequest
from icportrait.loop.job import DenoiseResult, Job
from icportrait.loop.loop import DenoisingLoop
from icportrait.manifest import Manifest
from icportrait.metrics import Metrics
from icportrait.policy import SIMULATED, ServingPolicy
from icportrait.request import PortraitRequest
from icportrait.runtime import Slots, load_slots
from icportrait.runtime.latency_table import LatencyTable
from icportrait.runtime.shared_device import DEVICE_FOLDER

WARM_UP_S = 0.5
LEAST_STEPS = 10
_SERIES = ("step_outside_engine_ms", "step_ms", "step_slots")


class Recorder(Metrics):
    """Keeps each step's figures as they are, once it is told to."""

    def __init__(self) -> None:
        """Record nothing yet."""
        super().__init__()
        self.is_recording = False
        self.values: dict[str, list[float]] = {name: [] for name in _SERIES}

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Keep a value while recording, as ``Metrics.observe`` would count it."""
        if self.is_recording and name in self.values:
            self.values[name].append(value)


def run_loop(settings: LoopSettings) -> dict[str, Any]:
    """Keep the loop full for a while.

    Returns:
        Figures and conditions, ready for JSON.

    Raises:
        IcPortraitError: the export or the latency table isn't one, the engines can't take so many slots, or the loop
            fails.
    """
    latencies, manifest = LatencyTable.read(settings.latency_table), Manifest.read(settings.export)
    largest = engine_specs(manifest.preset, manifest.precision)["unet"].batch.max
    if settings.slots > largest:
        raise InvalidRequest(f"slots: {settings.slots}, expected {largest} or fewer: {settings.export}'s UNet has them")
    with _simulated_slots(settings, manifest) as slots:
        figures = figures_of(slots, settings, manifest)
    return {
        "simulated": True,
        **figures,
        "conditions": {
            **conditions_here(settings),
            "numpy": np.__version__,
            "preset": manifest.preset.name,
            "precision": manifest.precision,
            "engine": f"simulated-{latencies.device}",
            "latency_ms": latencies.latency_ms,
        },
    }


def figures_of(slots: Slots, settings: LoopSettings, manifest: Manifest) -> dict[str, Any]:
    """Keep a loop over these slots full for the settings' seconds, or ``LEAST_STEPS`` if they take longer.

    Returns:
        The figures of its steps.

    Raises:
        IcPortraitError: the loop failed.
    """
    recorder, schedule = Recorder(), NoiseSchedule.from_config(manifest.scheduler_config)
    loop = DenoisingLoop(slots, schedule, manifest.preset, metrics=recorder)
    feeder = _Feeder(loop, settings, manifest)
    try:
        time.sleep(WARM_UP_S)
        began_s, recorder.is_recording = time.perf_counter(), True
        time.sleep(settings.seconds)
        while len(recorder.values[_SERIES[0]]) < LEAST_STEPS and not feeder.failure:
            time.sleep(0.01)
        recorder.is_recording, took_s = False, time.perf_counter() - began_s
    finally:
        feeder.stop()
        loop.close()
    if feeder.failure:
        raise feeder.failure
    outside, step_ms, in_use = (recorder.values[name] for name in _SERIES)
    return {
        "steps": len(outside),
        "steps_per_s": round(len(outside) / took_s, 2),
        "outside_engine_ms": {
            "median": round(median(outside), 4),
            "mean": round(fmean(outside), 4),
            "p99": round(float(np.percentile(outside, 99)), 4),
        },
        "engine_ms": {"median": round(median(step_ms), 4), "mean": round(fmean(step_ms), 4)},
        "occupancy": round(fmean(in_use), 3),
    }


class _Feeder:
    """Submits a request as soon as one is answered, so that as many wait as there are slots."""

    def __init__(self, loop: DenoisingLoop, settings: LoopSettings, manifest: Manifest) -> None:
        self.failure: IcPortraitError | None = None
        self._loop, self._settings = loop, settings
        spec = engine_specs(manifest.preset, manifest.precision)["warping_network"]
        self._inputs = spec.dummy_inputs(1)
        self._room = threading.Semaphore(2 * settings.slots // settings.rows)
        self._stopped = False
        self._thread = threading.Thread(target=self._feed, name="feeder", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Submit no more."""
        self._stopped = True
        self._room.release()
        self._thread.join()

    def _feed(self) -> None:
        rng = np.random.default_rng(self._settings.seed)
        low, high = self._settings.steps
        seed = 0
        while True:
            self._room.acquire()
            if self._stopped:
                return
            steps = int(rng.integers(low, high, endpoint=True))
            self._loop.submit(self._job(seed, steps))
            seed += 1

    def _job(self, seed: int, steps: int) -> Job:
        request = PortraitRequest(
            seed=seed,
            num_portraits=1,
            num_inference_steps=steps,
            guidance_scale=self._settings.guidance_scale,
            mask_ratio=0.8,
            scheduler="dpmpp_2m",
            output_format="png",
            encoding="binary",
        )
        given = self._inputs
        return Job(
            request, given["profile_latent"], given["reference_latent"], given["visibility"], on_done=self._on_done
        )

    def _on_done(self, outcome: DenoiseResult | IcPortraitError) -> None:
        if isinstance(outcome, IcPortraitError) and not self._stopped:
            self.failure = outcome
            self._stopped = True
        self._room.release()


@contextmanager
def _simulated_slots(settings: LoopSettings, manifest: Manifest) -> Iterator[Slots]:
    """Open slots on a device of their own, in a folder as a server's is."""
    policy = ServingPolicy(
        runtime=SIMULATED, slots=settings.slots, latency_table=str(settings.latency_table.absolute())
    )
    with tempfile.TemporaryDirectory(prefix="icportrait-loop-") as name:
        folder = Path(name)
        (folder / DEVICE_FOLDER).mkdir()
        (folder / "repository").symlink_to(folder, target_is_directory=True)
        yield load_slots(folder / "repository" / "denoise" / "1", manifest, policy)


def table(report: dict[str, Any]) -> str:
    """Write the figures of ``run_loop`` as lines for a reader."""
    conditions = report["conditions"]
    arguments, outside, engine = conditions["arguments"], report["outside_engine_ms"], report["engine_ms"]
    low, high = arguments["steps"]
    return "\n".join(
        [
            f"denoising loop: {conditions['preset']}, {conditions['precision']}, {conditions['engine']} - SIMULATED"
            " engines, no figure is a real engine's",
            f"{arguments['slots']} slots kept full, steps {low}..{high}, guidance {arguments['guidance_scale']:g}, seed"
            f" {conditions['seed']}; {conditions['cpu_count']} CPUs, commit {(conditions['commit'] or 'unknown')[:12]}",
            "",
            f"{'outside the engines':<22}{outside['median']:.3f} ms a step median, {outside['mean']:.3f} mean,"
            f" {outside['p99']:.3f} p99",
            f"{'UNet':<22}{engine['median']:.3f} ms median, {engine['mean']:.3f} mean",
            f"{'occupancy':<22}{report['occupancy']:.2f} of {arguments['slots']} slots",
            f"{'steps':<22}{report['steps_per_s']:.1f}/s, {report['steps']} measured",
        ]
    )
