"""Sizes of a server's processes, and whether they grow: read from /proc while nothing is under way."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from tests.e2e.supervised import named_processes

GROWTH = 0.02
"""Growth that a process may have from the first third to the last."""
GRAIN_MB, GRAIN_THREADS = 0.25, 1.0
"""Growth that is none: memory comes in pages and arenas, and a pool's last thread comes when all others are busy."""
DRIFT = 0.05
"""Drift of the p50 that is called none: windows of one run differ by more."""
CONFIDENCE = 0.95
Reading = dict[tuple[str, str], float]
"""Quantities by process and name."""


def read(server_pid: int, regions: Iterable[Path] = ()) -> Reading:
    """Read memory, shared memory, descriptors and threads of every process of a server.

    Args:
        server_pid: the gateway's.
        regions: of the shared memory that the server has made.
    """
    found: Reading = {}
    for pid, part in named_processes(server_pid).items():
        process = f"{part} {pid}"
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        found[process, "RSS"] = float(status["VmRSS"].split()[0]) / 1024
        found[process, "shared"] = float(status["RssShmem"].split()[0]) / 1024
        found[process, "descriptors"] = float(len(list(Path(f"/proc/{pid}/fd").iterdir())))
        found[process, "threads"] = float(status["Threads"])
    found["all", "/dev/shm"] = sum(512 * region.stat().st_blocks for region in regions) / 2**20
    return found


@dataclass(frozen=True)
class Growth:
    """A quantity's change from the first third of the readings to the last."""

    process: str
    quantity: str
    first: float
    last: float

    @property
    def share(self) -> float:
        """Return the growth as a share of the first; infinite where there was nothing."""
        if self.last <= self.first:
            return 0.0 if not self.first else self.last / self.first - 1
        return self.last / self.first - 1 if self.first else math.inf

    @property
    def is_too_much(self) -> bool:
        grain = {"descriptors": 0.0, "threads": GRAIN_THREADS}.get(self.quantity, GRAIN_MB)
        return self.share > GROWTH and self.last - self.first > grain


def growths(readings: Sequence[Reading]) -> list[Growth]:
    """Compare the median of the last third of the readings with the first third's.

    A median, because memory moves up and down with what was under way last.

    Raises:
        ValueError: a process has ended or has come, or there are fewer than three readings.
    """
    if len(readings) < 3:
        raise ValueError(f"{len(readings)} readings, expected 3 or more")
    for reading in readings:
        if other := reading.keys() ^ readings[0].keys():
            raise ValueError(f"processes have come or gone: {', '.join(sorted({process for process, _ in other}))}")
    third = max(1, len(readings) // 3)

    def median(part: Sequence[Reading], key: tuple[str, str]) -> float:
        return statistics.median(reading[key] for reading in part)

    return [Growth(*key, median(readings[:third], key), median(readings[-third:], key)) for key in readings[0]]


@dataclass(frozen=True)
class Drift:
    """A latency's change over a run, as a share of its median, with an interval of 95 %."""

    p50_ms: float
    share: float
    low: float
    high: float

    @property
    def is_too_much(self) -> bool:
        """Tell whether even the interval's low end is more than ``DRIFT``."""
        return self.low > DRIFT


def drift(p50s_ms: Sequence[float]) -> Drift:
    """Fit a line through the windows' medians by Theil and Sen, which a few slow windows don't move."""
    values = np.array([value for value in p50s_ms if not math.isnan(value)])
    if len(values) < 3:
        raise ValueError(f"{len(values)} windows with requests, expected 3 or more")
    slope, _, low, high = stats.theilslopes(values, alpha=CONFIDENCE)
    middle, steps = float(np.median(values)), len(values) - 1
    return Drift(middle, *(float(each) * steps / middle for each in (slope, low, high)))
