"""The spread of repeated measurements, and ratios of pairs, with 95 % intervals.

The measurements here are taken one by one on an idle server, so they are taken as independent. Latencies under load
depend on each other; ``benchmarks.statistics`` has the intervals for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.statistics import least_samples

RESAMPLED = 2000
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def spread(values: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Return the count, p50, p90 and p99, and the median's 95 % interval by the bootstrap's percentiles.

    A p90 or p99 with fewer measurements than ``statistics.least_samples`` is None.
    """
    found = np.asarray(values, float)
    figures: dict[str, Any] = {"count": len(found)}
    for name, q in QUANTILES.items():
        carries = name == "p50" or len(found) >= least_samples(q)
        figures[name] = round(float(np.quantile(found, q)), 3) if carries else None
    low, high = _median_interval(found, seed)
    return figures | {"p50_low": round(low, 3), "p50_high": round(high, 3)}


def ratio(values: Sequence[float], base: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Return the median of the pairs' ratios, with its 95 % interval by the bootstrap's percentiles."""
    found = np.asarray(values, float) / np.asarray(base, float)
    low, high = _median_interval(found, seed)
    return {"median": round(float(np.median(found)), 4), "low": round(low, 4), "high": round(high, 4)}


def ratio_text(found: Mapping[str, float]) -> str:
    """Write a ratio of ``ratio`` with its interval."""
    return f"{found['median']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def interval_text(figures: Mapping[str, Any], name: str = "p50", digits: int = 1) -> str:
    """Write a figure of ``spread`` with its interval, where there is one."""
    if figures.get(name) is None:
        return "not enough samples"
    low, high = figures.get(f"{name}_low"), figures.get(f"{name}_high")
    text = "" if low is None or high is None else f" ({low:.{digits}f} to {high:.{digits}f})"
    return f"{figures[name]:.{digits}f}{text}"


def _median_interval(values: npt.NDArray[np.float64], seed: int) -> tuple[float, float]:
    resampled = np.median(np.random.default_rng(seed).choice(values, (RESAMPLED, len(values))), axis=1)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return float(low), float(high)
