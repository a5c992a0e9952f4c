"""The latency table of all four engines on this GPU, in the form of ``benchmarks/latency``."""

from __future__ import annotations

import sys
from functools import partial
from statistics import median
from typing import Any

from benchmarks.gpu.engines import REPEATS, gpu_ms, load
from benchmarks.gpu.settings import GpuProbeSettings
from icportrait.contract import ENGINES
from icportrait.manifest import Manifest
from icportrait.runtime.cuda import find_gpu
from icportrait.runtime.latency_table import TFLOP_A_ROW, LatencyTable


def probe(settings: GpuProbeSettings) -> dict[str, Any]:
    """Measure each engine's CUDA graphs by batch, one engine after the other.

    Raises:
        LatencyTableError: a figure is faster than the GPU can be.
    """
    manifest, gpu = Manifest.read(settings.export), find_gpu()
    version, medians, p90 = "", dict[str, dict[str, float]](), dict[str, dict[str, float]]()
    for name in ENGINES:
        engine = load([name], settings, manifest)[name]
        version, medians[name], p90[name] = engine.version, {}, {}
        for rows in engine.buckets:
            engine.run(engine.spec.dummy_inputs(rows, settings.seed))
            taken = gpu_ms(engine.stream, partial(engine.execute, rows))
            medians[name][str(rows)] = round(median(taken), 3)
            p90[name][str(rows)] = round(taken[int(0.9 * len(taken))], 3)
        print(f"{name}: {medians[name]}", file=sys.stderr, flush=True)
        del engine  # the next one may need its memory
    preset = manifest.preset.name
    found = {
        "device": gpu.name,
        **({"preset": preset} if preset in TFLOP_A_ROW else {}),
        "conditions": f"{version}, CUDA {gpu.driver_cuda_version}, {preset}, {manifest.precision}, "
        f"{next(iter(manifest.source))}, CUDA graphs in the server's own buffers, median of {REPEATS} runs",
        "engines": medians,
        "p90_ms": p90,
    }
    LatencyTable.of_fields(found)  # refuses a table that can't be true
    return found


def table(report: dict[str, Any]) -> str:
    """Write the table as lines for a reader."""
    lines = [f"{report['device']}: {report['conditions']}"]
    for name, points in report["engines"].items():
        lines.append(f"{name:<18}" + "".join(f"{rows:>4}: {ms:<8.3f}" for rows, ms in points.items()))
    return "\n".join(lines)
