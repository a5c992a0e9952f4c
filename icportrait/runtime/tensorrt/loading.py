"""Plans of one process onto its GPU: found, checked to fit into memory together, loaded, and made to share scratch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from icportrait.contract import ModelSpec, engine_specs
from icportrait.errors import RuntimeNotAvailable
from icportrait.manifest import Manifest
from icportrait.runtime.cuda import Stream, find_gpu
from icportrait.runtime.device_engine import DeviceEngine, buffer_bytes, check_memory
from icportrait.runtime.tensorrt.engine import TensorRtExecutor, share_scratch
from icportrait.runtime.tensorrt.plans import PlanManifest, covering_bucket, find_plans
from icportrait.runtime.tensorrt.products import Flavour

logger = logging.getLogger(__name__)


def load_plans(
    names: Iterable[str],
    directory: Path,
    manifest: Manifest,
    flavour: Flavour,
    pinned_rows: Mapping[str, int] | None = None,
    caches: Mapping[str, Path] = MappingProxyType({}),
) -> dict[str, DeviceEngine]:
    """Load engines that never run at once: they work on one stream and share one block of scratch memory.

    They are warm: every bucket has run and is recorded.

    Args:
        names: of ``contract.ENGINES``.
        directory: holds their plans, each with its manifest beside it.
        manifest: the export's that the plans were built from.
        flavour: the product that built them.
        pinned_rows: for each engine the rows that every run of it must have room for: it gets their bucket and no
            other; None loads all buckets.
        caches: for each engine the file of kernels that TensorRT-RTX keeps between starts.

    Raises:
        RuntimeNotAvailable: there is no GPU, the product isn't installed, or the engines won't fit into its memory.
        PlanError: see ``TensorRtExecutor`` and ``covering_bucket``.
    """
    gpu = find_gpu()
    specs = engine_specs(manifest.preset, manifest.precision)
    plans = {name: find_plans(directory, name) for name in names}
    pinned: dict[str, int] = {}
    for name, rows in (pinned_rows or {}).items():
        plan, pinned[name] = covering_bucket(plans[name], rows)
        plans[name] = [plan]
        logger.info("%s: always runs %d rows", name, pinned[name])
    needs = {name: memory_need(paths, specs[name]) for name, paths in plans.items()}
    check_memory(needs, gpu, planned_scratch(path for paths in plans.values() for path in paths))
    stream = Stream()
    executors = {
        name: TensorRtExecutor(
            paths, specs[name], manifest.contract_hash, flavour, stream, pinned.get(name), caches.get(name)
        )
        for name, paths in plans.items()
    }
    scratch = max(executor.scratch_bytes for executor in executors.values())
    logger.info("%s: %.2f GB of scratch memory, shared", ", ".join(executors), scratch / 1e9)
    if scratch > (free := find_gpu().free_bytes):
        raise RuntimeNotAvailable(
            f"{', '.join(executors)}: need {scratch / 1e9:.1f} GB of scratch memory, and {gpu.name} has "
            f"{free / 1e9:.1f} of {gpu.total_bytes / 1e9:.1f} GB left; free some, or build with a smaller --workspace"
        )
    share_scratch(executors.values())
    engines = {name: DeviceEngine(specs[name], executor, stream) for name, executor in executors.items()}
    for name, engine in engines.items():
        engine.warm_up()
        executors[name].keep_cache()
    return engines


def memory_need(plans: Iterable[Path], spec: ModelSpec) -> int:
    """Return the bytes of GPU memory for an engine's weights, nearly all of a plan, and its input and output buffers.

    Scratch memory comes on top, once for all engines that share it.
    """
    return sum(plan.stat().st_size for plan in plans) + buffer_bytes(spec)


def planned_scratch(plans: Iterable[Path]) -> int | None:
    """Return the bytes of scratch memory that plans share, as the builder has planned it; None where it didn't say.

    The GPU's own figure may differ, and is asked for once the plans are loaded.
    """
    return max((size for plan in plans for size in PlanManifest.read(plan).scratch_bytes), default=None)
