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
import math
import re
import struct
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from icportrait_client import DEFAULT_URL
from icportrait_client.contract import load_contract
from icportrait_client.errors import InvalidRequest

from benchmarks.perf_analyzer_program import PerfAnalyzerError, Program, find_program
from benchmarks.settings import HEADS

_WINDOWS = 10
"""As many may pass before it gives a concurrency up; each is a little longer than asked for."""
_GRACE_S = 30.0
_QUANTILES = ("p50", "p90", "p95", "p99")


@dataclass(frozen=True)
class PerfAnalyzerSettings:
    """One run: ``concurrency`` levels one after the other."""

    url: str = DEFAULT_URL
    model: str = load_contract().model
    concurrency: str = "1:8"
    """FIRST, FIRST:LAST or FIRST:LAST:STEP calls under way at once."""
    profile: Path = HEADS / "profile.png"
    reference: Path = HEADS / "reference.png"
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    """None leaves it out of every call, as the two above."""
    window_s: float = 5.0
    stability_percent: float = 25.0
    """How far throughput and latency of three windows in a row may lie apart. perf_analyzer's own default is 10, which
    no shared CPU holds."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InvalidRequest: names the value, what came and what was expected.
        """
        if not self.levels:
            raise InvalidRequest(f"concurrency: {self.concurrency!r}, expected such as 4, 1:8 or 2:8:2")
        for name, value in (("window", self.window_s), ("stability", self.stability_percent)):
            if not (math.isfinite(value) and value > 0):
                raise InvalidRequest(f"{name}: {value:g}, expected a number above 0")
        inputs = load_contract().inputs
        for name, value in self.options.items():
            inputs[name].elements(value)

    @property
    def levels(self) -> range:
        """The concurrencies, none where the text isn't of that form."""
        match = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*)(?::([1-9]\d*))?)?", self.concurrency)
        if match is None:
            return range(0)
        return range(int(match[1]), int(match[2] or match[1]) + 1, int(match[3] or 1))

    @property
    def options(self) -> dict[str, Any]:
        """The optional inputs that every call has."""
        values = {name: getattr(self, name) for name in ("num_inference_steps", "guidance_scale", "seed")}
        return {name: value for name, value in values.items() if value is not None}


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
        pictures = {name: picture_bytes(getattr(settings, name), name) for name in ("profile", "reference")}
        with PortraitClient(settings.url) as client:
            portraits = client.generate(**pictures, **settings.options)  # type: ignore[arg-type]
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
    return _report(settings, program, pictures, portraits.metadata, figures, unstable)


def input_data(pictures: dict[str, bytes], options: dict[str, Any]) -> dict[str, Any]:
    """What ``--input-data`` reads: one call's inputs. perf_analyzer sends no optional input that isn't here."""
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
    """The concurrency at which perf_analyzer gave up; its status says so only where that was the first."""
    found = [re.match(r"Failed to obtain stable measurement within .* for concurrency (\d+)", line) for line in lines]
    return next((int(match[1]) for match in found if match), None)


def request_counts(lines: Iterable[str]) -> dict[int, int]:
    """How many calls the figures of each concurrency are of; only what perf_analyzer prints has that."""
    counts, level = {}, 0
    for line in lines:
        name, _, value = line.partition(": ")
        if name == "Request concurrency":
            level = int(value)
        elif name == "Request count":
            counts[level] = int(value)
    return counts


def levels(table: Iterable[str], counts: dict[int, int]) -> list[dict[str, Any]]:
    """The lines of perf_analyzer's CSV, in microseconds and by throughput, as figures by concurrency."""
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
    from benchmarks.report import is_simulated, run_conditions

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
    """The figures of ``measure`` as lines for a reader."""
    from benchmarks.report import headline

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
