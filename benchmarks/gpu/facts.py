"""The GPU, its driver, the libraries beside it, and the runtime that ``make serve`` would take."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from benchmarks.gpu.settings import GpuProbeSettings
from icportrait.deploy.choice import choose
from icportrait.presets import SD15_512
from icportrait.runtime.cuda import CudaError, DeviceMemory, Stream, attribute, find_gpu

PACKAGES = ("cuda-bindings", "torch", "tensorrt-rtx-cu13", "tensorrt-cu13", "numpy")
ATTRIBUTES = {
    "multiprocessors": "MultiProcessorCount",
    "copy_engines": "AsyncEngineCount",
    "l2_bytes": "L2CacheSize",
    "is_integrated": "Integrated",
    "has_memory_pools": "MemoryPoolsSupported",
}


def probe(settings: GpuProbeSettings) -> dict[str, Any]:
    """Ask the driver and the packages; nothing is timed."""
    import torch

    gpu = find_gpu()
    runtime, reason = choose(SD15_512, gpu=lambda: gpu)
    sees_gpu = torch.cuda.is_available()
    return {
        "memory_gb": {"free": round(gpu.free_bytes / 1e9, 2), "total": round(gpu.total_bytes / 1e9, 2)},
        **{name: _attribute(of_cuda) for name, of_cuda in ATTRIBUTES.items()},
        "batched_copies": _has_batched_copies(),
        "torch": {
            "cuda": torch.version.cuda,
            "sees_gpu": sees_gpu,
            "kernels_for": torch.cuda.get_arch_list() if sees_gpu else [],
        },
        "packages": {name: _version(name) for name in PACKAGES},
        "make_serve": {"runtime": runtime, "reason": reason},
    }


def _attribute(name: str) -> int | None:
    try:
        return attribute(name)
    except CudaError:  # a driver that is older than the question
        return None


def _has_batched_copies() -> bool:
    stream, block = Stream(), DeviceMemory(2).array((2,), np.dtype(np.uint8))
    stream.copy_all([(block.rows(0, 1), block.rows(1, 1))])
    stream.synchronize()
    return stream.has_batches


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(report: dict[str, Any]) -> str:
    """Write the facts as lines for a reader."""
    where = report["conditions"]
    lines = [
        f"{where['gpu']}, compute capability {where['compute_capability']}, CUDA {where['driver_cuda_version']}, "
        f"compute mode {where['compute_mode']}, MPS {'on' if where['mps'] else 'off'}"
    ]
    return "\n".join(lines + [f"{name:<18}{value}" for name, value in report.items() if name != "conditions"])
