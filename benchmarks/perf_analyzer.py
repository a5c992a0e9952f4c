"""NVIDIA's perf_analyzer on a running server: a client that knows Triton and nothing of this project.

It keeps a number of unary calls under way over gRPC, each sent as soon as the one before is answered (a closed loop;
``benchmarks.load`` is an open one), and measures in windows until three in a row agree. At the first call that fails it
gives up. Every call has the same two pictures, so that what the server caches of them is there from the second one on.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from benchmarks.perf_analyzer_program import PerfAnalyzerError, Program, find_program
from benchmarks.report import headline, is_simulated, run_conditions
from benchmarks.settings import PerfAnalyzerSettings

_WINDOWS = 10
"""Windows that perf_analyzer measures before it gives a concurrency up; each is a little longer than asked for."""
_GRACE_S = 30.0
_QUANTILES = ("p50", "p90", "p95", "p99")


def measure(settings: PerfAnalyzerSettings, echo: TextIO) -> dict[str, Any]:
    """Run perf_analyzer on a server.

    Args:
        settings: the run.
        echo: gets what perf_analyzer prints, as it comes.

    Returns:
        Figures and conditions, ready for JSON; ``unstable_at`` is the concurrency at which it gave up because its
        windows didn't agree, None where it didn't give up.

    Raises:
        InvalidRequest: a picture can't be read or the server refuses it.
        PerfAnalyzerError: perf_analyzer can't run here, or a call failed.
        PortraitError: no server answers, or a first call fails.
    """
    from icportrait_client import PortraitClient
    from icportrait_client.pictures import picture_bytes

    with tempfile.TemporaryDirectory(prefix="icportrait-perf-analyzer-") as name:
        folder = Path(name)
        program = find_program(folder)
        pictures = {
            name: picture_bytes(getattr(settings, name), name, shrink=False) for name in ("profile", "reference")
        }
        with PortraitClient(settings.url) as client:
            portrait = client.generate(**pictures, **settings.options)  # type: ignore[arg-type]
        (folder / "input.json").write_text(json.dumps(input_data(pictures, settings.options)))
        # It waits for an answer without end.
        lines = program.run(_arguments(settings, folder), _WINDOWS * 2 * settings.window_s + _GRACE_S, echo)
        table = folder / "figures.csv"
        figures = levels(table.read_text().splitlines(), request_counts(lines)) if table.is_file() else []
    unstable = unstable_level(lines)
    measured = [level["concurrency"] for level in figures]
    if measured != [level for level in settings.levels if unstable is None or level < unstable]:
        raise PerfAnalyzerError(
            f"perf_analyzer has figures of concurrency {measured}, expected {list(settings.levels)}"
        )
    return _report(settings, program, pictures, portrait.metadata.raw, figures, unstable)


def input_data(pictures: dict[str, bytes], options: dict[str, Any]) -> dict[str, Any]:
    """Build ``--input-data``'s content: one call's inputs. perf_analyzer sends no optional input that isn't here."""
    # It sends what b64 holds as it is, and a BYTES tensor's element has its length before it.
    elements = {name: struct.pack("<I", len(data)) + data for name, data in pictures.items()}
    tensors: dict[str, Any] = {name: {"b64": base64.b64encode(data).decode()} for name, data in elements.items()}
    return {"data": [tensors | {name: [value] for name, value in options.items()}]}


def _arguments(settings: PerfAnalyzerSettings, folder: Path) -> list[str]:
    return [
        *("-m", settings.model, "-u", settings.url, "-i", "grpc"),
        *("--input-data", str(folder / "input.json"), "--concurrency-range", settings.concurrency),
        *("-p", f"{1000 * settings.window_s:.0f}", "-s", f"{settings.stability_percent:g}"),
        *("-f", str(folder / "figures.csv")),
    ]


def unstable_level(lines: Iterable[str]) -> int | None:
    """Find the concurrency at which perf_analyzer gave up. Its status says so only where that was the first."""
    found = [re.match(r"Failed to obtain stable measurement within .* for concurrency (\d+)", line) for line in lines]
    return next((int(match[1]) for match in found if match), None)


def request_counts(lines: Iterable[str]) -> dict[int, int]:
    """Read the number of calls behind each concurrency's figures. Only perf_analyzer's printed output has it."""
    counts, level = {}, 0
    for line in lines:
        name, _, value = line.partition(": ")
        if name == "Request concurrency":
            level = int(value)
        elif name == "Request count":
            counts[level] = int(value)
    return counts


def levels(table: Iterable[str], counts: dict[int, int]) -> list[dict[str, Any]]:
    """Convert the lines of perf_analyzer's CSV, in microseconds and by throughput, to figures by concurrency."""
    figures = [
        {
            "concurrency": int(row["Concurrency"]),
            "count": counts.get(int(row["Concurrency"])),
            "throughput_per_s": round(float(row["Inferences/Second"]), 3),
            "latency_ms": {name: round(float(row[f"{name} latency"]) / 1000, 2) for name in _QUANTILES},
        }
        for row in csv.DictReader(table)
    ]
    return sorted(figures, key=lambda level: level["concurrency"])


def _report(
    settings: PerfAnalyzerSettings,
    program: Program,
    pictures: dict[str, bytes],
    metadata: dict[str, Any],
    figures: list[dict[str, Any]],
    unstable: int | None,
) -> dict[str, Any]:
    return {
        "simulated": is_simulated(metadata),
        "levels": figures,
        "unstable_at": unstable,
        "conditions": {
            **run_conditions(settings, {name: len(data) for name, data in pictures.items()}),
            "perf_analyzer": program.version,
            "picture_pixels": {name: _pixels(data) for name, data in pictures.items()},
            **{name: metadata[name] for name in ("steps", "scheduler", "guidance_scale")},
            **metadata["versions"],
        },
    }


def _pixels(picture: bytes) -> list[int]:
    from PIL import Image

    with Image.open(io.BytesIO(picture)) as image:
        return list(image.size)


def table(report: dict[str, Any]) -> str:
    """Write the figures of ``measure`` as lines for a reader."""
    conditions = report["conditions"]
    arguments, pixels = conditions["arguments"], conditions["picture_pixels"]
    pictures = [
        f"{name} {pixels[name][0]}x{pixels[name][1]}, {size} bytes"
        for name, size in conditions["picture_bytes"].items()
    ]
    seed = "drawn by the server" if conditions["seed"] is None else conditions["seed"]
    lines = [
        headline(report),
        f"pictures: {'; '.join(pictures)}",
        f"{conditions['steps']} steps, {conditions['scheduler']}, guidance {conditions['guidance_scale']:g},"
        f" seed {seed}; commit {(conditions['commit'] or 'unknown')[:12]}",
        f"perf_analyzer {conditions['perf_analyzer']} over gRPC, windows of {arguments['window_s']:g} s that agree"
        f" within {arguments['stability_percent']:g} %",
        "",
        f"{'concurrency':<12}{'calls':>8}{'calls/s':>10}" + "".join(f"{f'{name}, ms':>11}" for name in _QUANTILES),
    ]
    for level in report["levels"]:
        count = "-" if level["count"] is None else level["count"]
        lines.append(
            f"{level['concurrency']:<12}{count:>8}{level['throughput_per_s']:>10.2f}"
            + "".join(f"{level['latency_ms'][name]:>11.1f}" for name in _QUANTILES)
        )
    return "\n".join(lines)
