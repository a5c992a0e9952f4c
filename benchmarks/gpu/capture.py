"""Each batch of the UNet and the warping network with and without its CUDA graph.

Both ways run the same batch, and so the same kernels: their bytes must be equal. Two batches aren't compared.
"""

from __future__ import annotations

import time
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from benchmarks.gpu.engines import gpu_ms, host_us, load
from benchmarks.gpu.settings import GpuProbeSettings
from icportrait.manifest import Manifest
from icportrait.runtime.device_engine import DeviceEngine

NAMES = ("warping_network", "unet")
REPEATS = 8


def probe(settings: GpuProbeSettings) -> dict[str, Any]:
    """Load both engines, and compare the two ways to run each batch."""
    begun_s = time.perf_counter()
    engines = load(NAMES, settings, Manifest.read(settings.export))
    return {
        "version": engines["unet"].version,
        "load_s": round(time.perf_counter() - begun_s, 1),
        "batches": [
            _compared(name, engine, rows, settings.seed) for name, engine in engines.items() for rows in engine.buckets
        ],
    }


def _compared(name: str, engine: DeviceEngine, rows: int, seed: int) -> dict[str, Any]:
    inputs, stream = engine.spec.dummy_inputs(rows, seed), engine.stream
    directly, recorded = engine.run(inputs, directly=True), engine.run(inputs)
    found: dict[str, Any] = {
        "engine": name,
        "rows": rows,
        "unrecorded_because": engine.unrecorded.get(rows),
        "differing_bytes": sum(
            int(np.count_nonzero(directly[output].view(np.uint8) != recorded[output].view(np.uint8)))
            for output in directly
        ),
    }
    for way, execute in (("directly", engine.execute_directly), ("graph", engine.execute)):
        work = partial(execute, rows)
        found[f"{way}_ms"] = round(median(gpu_ms(stream, work, REPEATS)), 3)
        found[f"{way}_host_us"] = round(host_us(stream, work, REPEATS), 1)
    return found


def table(report: dict[str, Any]) -> str:
    """Write the batches as lines for a reader."""
    lines = [
        f"{report['version']}, loaded and recorded in {report['load_s']:g} s",
        f"{'engine':<18}{'rows':>5}{'directly ms':>13}{'graph ms':>11}{'host us':>10}{'graph us':>10}  differing bytes",
    ]
    for each in report["batches"]:
        why = each["unrecorded_because"]
        lines.append(
            f"{each['engine']:<18}{each['rows']:>5}{each['directly_ms']:>13.3f}{each['graph_ms']:>11.3f}"
            f"{each['directly_host_us']:>10.0f}{each['graph_host_us']:>10.0f}  {each['differing_bytes']}"
            + (f"  NOT RECORDED: {why}" if why else "")
        )
    return "\n".join(lines)
