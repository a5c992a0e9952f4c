"""The time that a portrait takes, and why: engines alone, a request alone, peers side by side, the gateway's limits."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.engines_alone import engines_alone
from benchmarks.gateway_limits import gateway_limits
from benchmarks.ladder import climb
from benchmarks.ladder_names import OURS
from benchmarks.machine import measured_peak, over_the_floor
from benchmarks.pairs import pixels
from benchmarks.report import conditions_here
from benchmarks.request_alone import PARTS, request_alone
from benchmarks.settings import LatencySettings
from benchmarks.spread import interval_text, ratio_text
from icportrait.deploy.repository import assemble
from icportrait.manifest import Manifest
from icportrait.policy import ServingPolicy
from icportrait.server import Ports, ServerProcess

GUIDED = 1.5


def measure_latency(settings: LatencySettings, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure everything that the settings ask for.

    Raises:
        IcPortraitError: the export or the checkpoint isn't one, a server doesn't start, or a request fails.
        PortraitError: a picture can't be read.
    """
    manifest = Manifest.read(settings.export)
    pictures = {name: pixels(getattr(settings, name), name) for name in ("profile", "reference")}
    files = {name: getattr(settings, name).read_bytes() for name in pictures}
    peak = measured_peak(settings.seconds / 2)
    say(f"peak: {peak['gflops']:.0f} GFLOP/s in float32, {peak['gb_per_s']:.1f} GB/s")
    engines = engines_alone(settings.export, settings.runtimes, settings.seconds, peak, say)
    with tempfile.TemporaryDirectory(prefix="icportrait-latency-") as name:
        folder = Path(name)
        requests = _requests_alone(settings, manifest, pictures, folder, say)
        ladder = climb(settings, folder, say)
        say("the gateway's limits")
        limits = gateway_limits(settings.export, folder, files, settings.seconds)
    return {
        "peak": peak,
        "engines": engines,
        "requests": requests,
        "ladder": ladder,
        "gateway": limits,
        "conditions": {
            **conditions_here(settings),
            "preset": manifest.preset.name,
            "precision": manifest.precision,
            "model_version": manifest.model_version,
        },
    }


def _requests_alone(
    settings: LatencySettings, manifest: Manifest, pictures: Any, folder: Path, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Measure a request alone at the checkpoint's own settings, at the asked number of steps, and with guidance."""
    asked: list[dict[str, Any]] = [
        {name: manifest.defaults[name] for name in ("num_inference_steps", "guidance_scale")},
        {"num_inference_steps": settings.num_inference_steps, "guidance_scale": settings.guidance_scale},
        {"num_inference_steps": settings.num_inference_steps, "guidance_scale": GUIDED},
    ]
    assemble(settings.export, folder / "alone", ServingPolicy(runtime=settings.runtime))
    found = []
    with ServerProcess(folder / "alone", Ports.free(), folder / "alone.log") as server:
        for index, options in enumerate(asked):
            if options not in asked[:index]:
                # Each setting has pictures of its own, because the server keeps the latents of those it has seen.
                found.append(request_alone(server, pictures, options, settings.rounds, settings.seed + 1000 * index))
                say(f"a request alone, {options}: {found[-1]['ms']['whole']['p50']:.0f} ms")
    return found


def table(report: dict[str, Any]) -> str:
    """Write the figures of ``measure_latency`` as lines for a reader."""
    conditions, peak = report["conditions"], report["peak"]
    here = conditions["machine"]
    lines = [
        f"{conditions['preset']}, {conditions['precision']}, {conditions['model_version']}; {here['cores']} cores of"
        f" {here['cpu']}, {here['instruction_set']}; commit {(conditions['commit'] or 'unknown')[:12]}",
        f"peak of float32 {peak['gflops']:.0f} GFLOP/s, of a copy {peak['gb_per_s']:.1f} GB/s; medians with their 95 %"
        " intervals",
        "",
        f"{'engine':<17}{'batch':>6}  {'runtime':<26}{'ms':>22}{'p90':>9}{'floor':>9}{'share':>7}{'to first':>10}",
    ]
    for row in report["engines"]:
        lines.append(
            f"{row['engine']:<17}{row['batch']:>6}  {row['runtime']:<26}{interval_text(row['ms']):>22}"
            f"{_figure(row['ms']['p90']):>9}{row['floor_ms']:>9.1f}{row['share_of_floor']:>7.0%}"
            f"{row['ratio_to_first']['median']:>10.2f}"
        )
    if note := over_the_floor(report["engines"]):
        lines.append(note)
    for request in report["requests"]:
        options = request["options"]
        lines += [
            "",
            f"a request alone, {options['num_inference_steps']} steps, guidance {options['guidance_scale']:g}:"
            f" {interval_text(request['ms']['whole'])} ms",
            *(
                f"  {name:<20}{interval_text(request['ms'][name]):>24} ms{request['share'][name]:>8.1%}   {what}"
                for name, what in PARTS.items()
            ),
        ]
    arguments = conditions["arguments"]
    lines += [
        "",
        f"the ladder, {arguments['num_inference_steps']} steps, guidance {arguments['guidance_scale']:g}",
        f"  {'rung':<13}{'ms':>24}{'ours by this':>24}",
    ]
    for name, rung in report["ladder"].items():
        if "left_out" in rung:
            lines.append(f"  {name:<13}left out: {rung['left_out']}")
            continue
        ours = rung.get("ours_by_this")
        by = ratio_text(ours) if ours and name != OURS else ""
        lines.append(f"  {name:<13}{interval_text(rung['ms']):>24}{by:>24}   {rung['what']}")
    lines += ["", f"the gateway's limits, {report['gateway']['callers']} callers, engines that take no time"]
    for name, limit in report["gateway"].items():
        if name != "callers":
            lines.append(
                f"  {name:<18}{limit['per_s']:>9.1f}/s measured{limit['per_s_of_a_core']:>9.1f}/s of a core"
                f"{limit['megabytes_per_s']:>9.1f} MB/s{limit['megabytes_per_s_of_a_core']:>9.1f} MB/s of a core"
            )
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
