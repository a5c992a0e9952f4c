"""A name for all that decides on a portrait's bytes beside the request: equal names promise equal bytes."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import icportrait
from icportrait.contract import ENGINES, MODEL_ENGINES
from icportrait.errors import RuntimeNotAvailable
from icportrait.manifest import Manifest
from icportrait.policy import CPU_RUNTIMES, ServingPolicy
from icportrait.runtime.cuda import find_gpu
from icportrait.runtime.tensorrt.plans import PlanManifest, find_plans

PACKAGES = ("numpy", "Pillow", "onnxruntime")
"""Packages that compute pictures, faces and samplers on the CPU."""
CPUINFO = Path("/proc/cpuinfo")


def numerics_id(repository: Path, manifest: Manifest, policy: ServingPolicy, engine_version: str) -> str | None:
    """Name a server's arithmetic by 16 hexadecimal digits.

    Args:
        repository: holds ``<model>/<version>/``, with plans where the runtime runs plans.
        manifest: the export's.
        policy: how it is served.
        engine_version: the runtime's name and version.

    Returns:
        None where a portrait's bytes may depend on what shares its batch.
    """
    if not _is_independent(policy):
        return None
    plans = _plan_hashes(repository) if policy.uses_plans else []
    device = _gpu() if policy.uses_plans or policy.runtime == "torch" else ""
    text = json.dumps(
        [
            manifest.model_version,
            engine_version,
            policy.deterministic,
            policy.rows_at_once,
            policy.engine_threads or len(os.sched_getaffinity(0)),
            plans,
            device,
            platform.machine(),
            _cpu(),
            [_version(name) for name in PACKAGES],
            icportrait.__version__,
        ]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_independent(policy: ServingPolicy) -> bool:
    """Tell whether a row's bits depend on no other row (ADR 0010, docs/determinism.md)."""
    row_by_row = policy.runtime in (*CPU_RUNTIMES, "torch") and policy.rows_at_once == 1
    return policy.deterministic or row_by_row or policy.is_simulated or policy.runtime == "onnxruntime"


def _plan_hashes(repository: Path) -> list[str]:
    folders = {name: repository / (name if name in MODEL_ENGINES else "denoise") / "1" for name in ENGINES}
    plans: Iterable[Path] = (plan for name, folder in folders.items() for plan in find_plans(folder, name))
    return [PlanManifest.read(plan).plan_sha256 for plan in plans]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # the engine's process may do without ONNX Runtime
        return None


def _gpu() -> str:
    try:
        gpu = find_gpu()
    except RuntimeNotAvailable:
        return ""
    return f"{gpu.name} {gpu.compute_capability} {gpu.driver_cuda_version}"


def _cpu() -> str:
    """Name the CPU's model and features, because kernels are chosen by them."""
    lines = (line.partition(":") for line in CPUINFO.read_text().splitlines())
    found: dict[str, str] = {}
    for name, _, value in lines:
        found.setdefault(name.strip(), value.strip())
    names = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU part")
    return " ".join(f"{name}={found[name]}" for name in names if name in found)
