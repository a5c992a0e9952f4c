"""Latency tables: the milliseconds of each engine by batch size, measured on a device or computed from FLOPs.

    {"device": "NVIDIA H200", "preset": "sd15-512", "engines": {"unet": {"1": 11.8, "16": 117.9}, "vae_encoder": ...}}

``preset`` names the model that the times are of. With it, a table that is faster than its device can be is refused.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from icportrait.contract import ENGINES
from icportrait.errors import LatencyTableError

LATENCY_TABLE_NAME = "latency.json"
"""In a repository, beside the manifest of every model that runs engines."""
LONGEST_MS = 600_000
PEAK_TFLOPS = {
    "T4": 65,
    "L4": 121,
    "A10": 125,
    "A100": 312,
    "RTX 4090": 330,
    "L40S": 362,
    "H100": 989,
    "H200": 989,
    "B200": 2250,
}
"""Dense fp16 on tensor cores, from NVIDIA's data sheets; of a model with several variants the fastest."""
TFLOP_A_ROW = {
    "demo-128": {"vae_encoder": 0.0015, "warping_network": 0.0015, "unet": 0.002, "vae_decoder": 0.00277},
    "sd15-512": {"vae_encoder": 1.117, "warping_network": 1.262, "unet": 1.849, "vae_decoder": 2.515},
}
"""Counted by torch's ``FlopCounterMode``: matrix products, convolutions and attention, two operations a
multiplication."""


@dataclass(frozen=True)
class LatencyTable:
    """The time that a device takes for a batch, by engine."""

    device: str
    latency_ms: dict[str, dict[int, float]]
    """Milliseconds by engine and batch size, the sizes ascending."""

    @classmethod
    def read(cls, path: Path) -> LatencyTable:
        """Read a table's JSON file. Members beside ``device``, ``preset`` and ``engines`` are notes, and aren't read.

        Raises:
            LatencyTableError: the file can't be read, or isn't such a table; the text says what was expected.
        """
        try:
            fields = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise LatencyTableError(f"{path}: can't be read as JSON ({' '.join(str(error).split())})") from error
        try:
            return cls.of_fields(fields)
        except LatencyTableError as error:
            raise LatencyTableError(f"{path}: {error}") from error

    @classmethod
    def of_fields(cls, fields: object) -> LatencyTable:
        """Make a table of a file's content; see ``read``."""
        if not isinstance(fields, dict):
            raise LatencyTableError(f"is {_told(fields)}, expected an object with device and engines")
        device, engines = fields.get("device"), fields.get("engines")
        if not isinstance(device, str) or not device.strip() or not device.isprintable():
            raise LatencyTableError(f"device is {_told(device)}, expected its name, in one line")
        if not isinstance(engines, dict) or set(engines) != set(ENGINES):
            found = ", ".join(engines) or "empty" if isinstance(engines, dict) else _told(engines)
            raise LatencyTableError(f"engines is {found}, expected an object with {', '.join(ENGINES)}")
        table = cls(device.strip(), {name: _points(name, engines[name]) for name in ENGINES})
        if (preset := fields.get("preset")) is not None:
            table._check_peak(preset)
        return table

    def _check_peak(self, preset: object) -> None:
        if not isinstance(preset, str) or preset not in TFLOP_A_ROW:
            raise LatencyTableError(f"preset is {_told(preset)}, expected one of {', '.join(TFLOP_A_ROW)}")
        peaks = {name: peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", self.device)}
        for (name, peak), engine in product(peaks.items(), ENGINES):
            for size, latency_ms in self.latency_ms[engine].items():
                tflop = size * TFLOP_A_ROW[preset][engine]
                if tflop / (latency_ms / 1000) > peak:
                    raise LatencyTableError(
                        f"{engine}: batch {size} in {latency_ms:g} ms is {1000 * tflop / latency_ms:.0f} TFLOP/s, and "
                        f"{name} has {peak} at most; expected {1000 * tflop / peak:.1f} ms or more"
                    )

    def of(self, engine: str, batch: int) -> float:
        """Return milliseconds for a batch: linear between the listed sizes, and below the smallest as long as that.

        Beyond the largest, the line through the last two goes on; where it falls, or with one size, it stays level.
        """
        points = self.latency_ms[engine]
        sizes, times = list(points), list(points.values())
        if batch <= sizes[0] or len(sizes) == 1:
            return times[0]
        right = min(bisect_left(sizes, batch), len(sizes) - 1)
        slope = (times[right] - times[right - 1]) / (sizes[right] - sizes[right - 1])
        if batch > sizes[-1]:
            slope = max(slope, 0.0)
        return times[right] + slope * (batch - sizes[right])


def _points(engine: str, given: object) -> dict[int, float]:
    if not isinstance(given, dict) or not given:
        raise LatencyTableError(f"{engine} is {_told(given)}, expected milliseconds by batch size")
    points = {}
    for size, latency_ms in given.items():
        if not re.fullmatch("[1-9][0-9]{0,5}", size):
            raise LatencyTableError(f"{engine}: batch size is {_told(size)}, expected a whole number from 1")
        is_number = isinstance(latency_ms, int | float) and not isinstance(latency_ms, bool)
        if not is_number or not 0 < latency_ms <= LONGEST_MS:
            raise LatencyTableError(
                f"{engine}: batch {size} is {_told(latency_ms)}, expected milliseconds above 0, up to {LONGEST_MS}"
            )
        points[int(size)] = float(latency_ms)
    return dict(sorted(points.items()))


def _told(value: Any) -> str:
    """Return a JSON value as an error's text names it."""
    return "missing" if value is None else json.dumps(value)[:60]
