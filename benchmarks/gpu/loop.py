"""The denoising loop over this GPU's slots, kept full, without and with guidance."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.engines import load
from benchmarks.gpu.settings import GpuProbeSettings
from benchmarks.loop import figures_of
from benchmarks.settings import LoopSettings
from icportrait.manifest import Manifest
from icportrait.runtime.device_slots import DeviceSlots

GUIDANCE = (1.0, 3.0)


def probe(settings: GpuProbeSettings) -> dict[str, Any]:
    """Run the real loop as ``python -m benchmarks loop`` does, on engines that aren't simulated."""
    manifest = Manifest.read(settings.export)
    engines = load(("warping_network", "unet"), settings, manifest)
    rows = engines["unet"].spec.batch.max
    slots = DeviceSlots(engines["warping_network"], engines["unet"], rows)
    return {
        "version": slots.version,
        "slots": slots.rows,
        "step_ms_alone": {str(count): round(1000 * seconds, 3) for count, seconds in slots.step_s.items()},
        "loops": [
            {"guidance_scale": guidance}
            | figures_of(
                slots,
                LoopSettings(
                    settings.export,
                    slots=slots.rows,
                    guidance_scale=guidance,
                    seconds=settings.seconds,
                    seed=settings.seed,
                ),
                manifest,
            )
            for guidance in GUIDANCE
        ],
    }


def table(report: dict[str, Any]) -> str:
    """Write the figures as lines for a reader."""
    lines = [
        f"{report['version']}, {report['slots']} slots kept full",
        f"{'guidance':<10}{'steps/s':>9}{'UNet ms':>10}{'outside ms':>12}{'p99':>9}{'occupancy':>11}",
    ]
    for each in report["loops"]:
        outside = each["outside_engine_ms"]
        lines.append(
            f"{each['guidance_scale']:<10g}{each['steps_per_s']:>9.2f}{each['engine_ms']['median']:>10.3f}"
            f"{outside['median']:>12.3f}{outside['p99']:>9.3f}{each['occupancy']:>11.2f}"
        )
    return "\n".join(lines)
