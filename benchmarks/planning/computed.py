"""Profiles of GPUs that nobody measured, from the table that was measured on an H200 and the makers' data sheets.

An engine is taken to reach the same share of a GPU's peak in dense fp16 as it was measured to reach on the H200, batch
by batch: 16 % for the UNet over one row of ``sd15-512``, 25 % over 16. So fp16's times go with the peaks:

    time = operations / (share measured on the H200 * peak)

Only a part of a run is arithmetic; the rest is memory, launches and elementwise work, which may go with the memory's
bandwidth instead. ``slowest`` has the times of that other end, which a profile's assumptions name.

fp8 makes the UNet's arithmetic alone faster (ADR 0007 says what is quantised): the part of its time that it would take
at ``EFFICIENCY`` of the peak.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.planning.profile import PlanningError
from icportrait.runtime.latency_table import TFLOP_A_ROW, LatencyTable

EFFICIENCY = 0.7
"""Share of the peak that large matrix products reach; what a run takes beyond it isn't arithmetic."""
MEASURED_ON = "H200"


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet."""

    device: str
    fp16_tflops: float
    """Dense, on tensor cores."""
    fp8_tflops: float | None
    """Dense, on tensor cores; None where there is no fp8."""
    bandwidth_gb_s: float
    memory_gb: int
    source: str


GPUS = {
    "B200": Gpu("NVIDIA B200", 2250, 4500, 7700, 180, "HGX B200 data sheet"),
    "H200": Gpu("NVIDIA H200", 989, 1979, 4800, 141, "H200 SXM data sheet"),
    "H100": Gpu("NVIDIA H100", 989, 1979, 3350, 80, "H100 SXM data sheet"),
    "L40S": Gpu("NVIDIA L40S", 362, 733, 864, 48, "L40S data sheet"),
    "A100": Gpu("NVIDIA A100", 312, None, 2039, 80, "A100 80GB SXM data sheet"),
    "L4": Gpu("NVIDIA L4", 121, 242, 300, 24, "L4 data sheet"),
}


def compute(gpu: Gpu, precision: str, table: LatencyTable, preset: str) -> dict[str, dict[str, float]]:
    """Compute a GPU's engines' milliseconds by batch.

    Args:
        gpu: the GPU.
        precision: ``fp16`` or ``fp8``.
        table: measured on ``MEASURED_ON``.
        preset: the model that the table is of.

    Raises:
        PlanningError: the GPU has no such precision.
    """
    slower, faster = GPUS[MEASURED_ON].fp16_tflops / gpu.fp16_tflops, gpu.fp16_tflops / peak_tflops(gpu, precision)
    engines: dict[str, dict[str, float]] = {}
    for engine, points in table.latency_ms.items():
        engines[engine] = {}
        for rows, latency_ms in points.items():
            saved_ms = _arithmetic_ms(engine, rows, latency_ms, preset) * (1 - faster) if engine == "unet" else 0.0
            engines[engine][str(rows)] = round((latency_ms - saved_ms) * slower, 3)
    return engines


def slowest(gpu: Gpu, table: LatencyTable, preset: str) -> float:
    """Return the factor on the UNet's time in full batches where all but arithmetic goes with the bandwidth."""
    measured, points = GPUS[MEASURED_ON], table.latency_ms["unet"]
    rows, latency_ms = list(points.items())[-1]
    arithmetic_ms = _arithmetic_ms("unet", rows, latency_ms, preset)
    by_peak = measured.fp16_tflops / gpu.fp16_tflops
    by_bandwidth = measured.bandwidth_gb_s / gpu.bandwidth_gb_s
    share = arithmetic_ms / latency_ms
    return (share * by_peak + (1 - share) * by_bandwidth) / by_peak


def _arithmetic_ms(engine: str, rows: int, latency_ms: float, preset: str) -> float:
    """Return the part of a time on the H200 that is arithmetic."""
    tflop = rows * TFLOP_A_ROW[preset][engine]
    return min(latency_ms, 1000 * tflop / (EFFICIENCY * GPUS[MEASURED_ON].fp16_tflops))


def peak_tflops(gpu: Gpu, precision: str) -> float:
    """Return a GPU's dense peak in a precision.

    Raises:
        PlanningError: it has none.
    """
    if precision == "fp16":
        return gpu.fp16_tflops
    if precision == "fp8" and gpu.fp8_tflops:
        return gpu.fp8_tflops
    raise PlanningError(f"{gpu.device} has no {precision}; expected fp16{' or fp8' if gpu.fp8_tflops else ''}")


def profile(gpu: Gpu, precision: str, table: LatencyTable, preset: str, host: Mapping[str, Any]) -> dict[str, Any]:
    """Return a computed profile as JSON."""
    peak = peak_tflops(gpu, precision)
    return {
        "device": gpu.device,
        "preset": preset,
        "precision": precision,
        "origin": "computed",
        "assumptions": [
            f"engine times are computed from those measured on an {MEASURED_ON} with torch, CUDA graphs, fp16",
            f"the same share of the peak in dense fp16, {gpu.fp16_tflops:g} TFLOP/s here ({gpu.source})",
            *(
                [f"a batch may take {slowest(gpu, table, preset):.2f} times as long, with {gpu.bandwidth_gb_s:g} GB/s"]
                if slowest(gpu, table, preset) > 1.01
                else []
            ),
            *([f"in fp8 the UNet's arithmetic alone is faster, at {peak:g} TFLOP/s"] if precision == "fp8" else []),
            "host times are those of two slow cores; a GPU's host has faster ones",
        ],
        "host": host,
        "engines": compute(gpu, precision, table, preset),
    }


def write_all(table_path: Path, folder: Path, host: Mapping[str, Any], preset: str = "sd15-512") -> list[Path]:
    """Write the repository's profiles of one preset, the measured one among them, and return their paths."""
    table, fields = LatencyTable.read(table_path), json.loads(table_path.read_text())
    written = []
    for name, gpu in GPUS.items():
        for precision in ("fp16", "fp8"):
            if precision == "fp8" and not gpu.fp8_tflops:
                continue
            made = profile(gpu, precision, table, preset, host)
            if name == MEASURED_ON and precision == "fp16":
                made = {
                    "device": gpu.device,
                    "preset": preset,
                    "precision": precision,
                    "origin": "measured",
                    "assumptions": [
                        f"engine times: {fields['conditions']}; TensorRT's may be shorter",
                        made["assumptions"][-1],
                    ],
                    "host": host,
                    "engines": fields["engines"],
                }
            path = folder / f"{name.lower()}-{preset}-{precision}.json"
            path.write_text(json.dumps(made, indent=1) + "\n")
            written.append(path)
    return written
