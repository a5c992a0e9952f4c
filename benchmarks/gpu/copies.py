"""The copies of a step and of a join: by pinned and by pageable memory, in one call and in many."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from benchmarks.gpu.engines import gpu_ms, host_us
from benchmarks.gpu.settings import GpuProbeSettings
from icportrait.contract import TensorSpec, engine_specs
from icportrait.manifest import Manifest
from icportrait.runtime.cuda import DeviceArray, DeviceMemory, Stream, pinned_array
from icportrait.runtime.slots import f_ref_names

BLOCK_BYTES = 64 * 2**20
JOBS = 8
"""Jobs that join at once, each into a row of its own."""


def probe(settings: GpuProbeSettings) -> dict[str, Any]:
    """Measure copies of the export's own sizes."""
    manifest = Manifest.read(settings.export)
    specs = engine_specs(manifest.preset, manifest.precision)
    unet, stream = specs["unet"], Stream()
    works: dict[str, tuple[int, Callable[[], object]]] = {}
    canvas = next(spec for spec in unet.inputs if spec.name == "canvas_latent")
    for way, spec in (("upload", canvas), ("download", unet.outputs[0])):
        _add_crossings(works, f"a step's {way}", way, stream, (unet.batch.max, *spec.shape(batch=1)[1:]), spec)
    block = np.dtype(np.uint8)
    for way in ("upload", "download"):
        _add_crossings(works, f"{BLOCK_BYTES >> 20} MB {way}", way, stream, (BLOCK_BYTES,), block)
    source, target = (DeviceMemory(BLOCK_BYTES).array((BLOCK_BYTES,), block) for _ in range(2))
    works[f"{BLOCK_BYTES >> 20} MB within the GPU"] = BLOCK_BYTES, partial(stream.copy, source, target)
    pairs = [
        (_on_gpu(spec, JOBS).rows(row, 1), _on_gpu(spec, JOBS).rows(row, 1))
        for spec in unet.inputs
        if spec.name in f_ref_names(specs["warping_network"])
        for row in range(JOBS)
    ]
    nbytes = sum(pair[0].nbytes for pair in pairs)
    works[f"F_ref of {JOBS} rows, one call"] = nbytes, partial(stream.copy_all, pairs)

    def one_by_one() -> None:
        for pair in pairs:
            stream.copy(*pair)

    works[f"F_ref of {JOBS} rows, {len(pairs)} calls"] = nbytes, one_by_one
    found = [_timed(name, nbytes, stream, work) for name, (nbytes, work) in works.items()]
    return {"batched_copies": stream.has_batches, "copies": found}


def _add_crossings(
    works: dict[str, tuple[int, Callable[[], object]]],
    name: str,
    way: str,
    stream: Stream,
    shape: tuple[int, ...],
    of: TensorSpec | np.dtype[Any],
) -> None:
    """Add one way between host and GPU, by both kinds of the host's memory."""
    dtype = np.dtype(of.dtype.numpy) if isinstance(of, TensorSpec) else of
    for kind, host in (("pinned", pinned_array(shape, dtype)), ("pageable", np.zeros(shape, dtype))):
        array = DeviceMemory(host.nbytes).array(shape, dtype)
        work = partial(stream.upload, host, array) if way == "upload" else partial(stream.download, array, host)
        works[f"{name}, {kind}"] = host.nbytes, work


def _on_gpu(spec: TensorSpec, rows: int) -> DeviceArray:
    return DeviceMemory(spec.nbytes(rows)).array(spec.shape(batch=rows), np.dtype(spec.dtype.numpy))


def _timed(name: str, nbytes: int, stream: Stream, work: Callable[[], object]) -> dict[str, Any]:
    ms = median(gpu_ms(stream, work))
    return {
        "copy": name,
        "bytes": nbytes,
        "gpu_us": round(1000 * ms, 2),
        "host_us": round(host_us(stream, work), 2),
        "gb_per_s": round(nbytes / ms / 1e6, 2),
    }


def table(report: dict[str, Any]) -> str:
    """Write the copies as lines for a reader."""
    lines = [f"{'copy':<34}{'bytes':>12}{'GPU us':>10}{'host us':>10}{'GB/s':>9}"]
    lines += [
        f"{each['copy']:<34}{each['bytes']:>12}{each['gpu_us']:>10.1f}{each['host_us']:>10.1f}{each['gb_per_s']:>9.2f}"
        for each in report["copies"]
    ]
    return "\n".join([*lines, f"batched copies: {'yes' if report['batched_copies'] else 'no, the driver is older'}"])
