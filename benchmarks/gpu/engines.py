"""The engines that the probes run, and the conditions under which they do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

from benchmarks.gpu.settings import GpuProbeSettings
from benchmarks.report import conditions_here
from icportrait.errors import RuntimeNotAvailable
from icportrait.manifest import Manifest
from icportrait.policy import ServingPolicy
from icportrait.runtime.cuda import Stream, find_gpu
from icportrait.runtime.device_engine import DeviceEngine
from icportrait.runtime.tensorrt.products import FLAVOURS

WARM_UPS = 3
REPEATS = 20


def conditions(settings: GpuProbeSettings) -> dict[str, Any]:
    """Return the conditions of a probe.

    Raises:
        RuntimeNotAvailable: there is no GPU.
    """
    gpu = find_gpu()
    return conditions_here(settings) | {
        "gpu": gpu.name,
        "compute_capability": gpu.compute_capability,
        "driver_cuda_version": gpu.driver_cuda_version,
        "compute_mode": gpu.compute_mode,
        "mps": gpu.has_mps,
    }


def load(names: Iterable[str], settings: GpuProbeSettings, manifest: Manifest) -> dict[str, DeviceEngine]:
    """Load engines on one stream; every batch has run, and is recorded where it can be.

    Raises:
        RuntimeNotAvailable: torch has no CUDA, or the product isn't installed.
        PlanError: a plan is missing, or isn't for this GPU.
    """
    if settings.plans is not None:
        from icportrait.runtime.tensorrt.loading import load_plans

        return load_plans(names, settings.plans, manifest, FLAVOURS[settings.runtime])
    import torch

    if not torch.cuda.is_available():
        raise RuntimeNotAvailable(f"torch {torch.__version__} has no CUDA here; install a build of torch for CUDA")
    from icportrait.runtime.torch_device import load_modules

    return load_modules(names, manifest, ServingPolicy(runtime="torch"))


def gpu_ms(stream: Stream, work: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Return the GPU's milliseconds of each of several runs, shortest first."""
    for _ in range(WARM_UPS):
        work()
    stream.synchronize()
    return sorted(stream.time_ms(work) for _ in range(repeats))


def host_us(stream: Stream, work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return the median of the microseconds that the host takes to queue work."""
    taken = []
    for _ in range(repeats):
        begun_s = time.perf_counter()
        work()
        taken.append(1e6 * (time.perf_counter() - begun_s))
        stream.synchronize()
    return median(taken)
