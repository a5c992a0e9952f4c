"""Coverage of the intervals of ``benchmarks.statistics`` on synthetic latencies whose quantiles are known.

- lognormal, exponential: independent latencies.
- AR(1): the logarithms follow a Gaussian autoregression, each phi times the one before plus noise.
- M/M/1: waiting times of a queue with random arrivals and services, by Lindley's recursion. With the load rho a wait
  exceeds x with the probability rho exp(-(1 - rho) x), in mean services. They start in their steady state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import special

from benchmarks.settings import CoverageSettings
from benchmarks.statistics import CONFIDENCE, Floats, intervals

_CHUNK = 2**21
"""Latencies that are in memory at once."""


@dataclass(frozen=True)
class Process:
    """A kind of latencies with known quantiles."""

    name: str
    draw: Callable[[np.random.Generator, int, int], Floats]
    """Draws [runs, samples]."""
    quantile: Callable[[float], float]


def lognormal(sigma: float = 0.5) -> Process:
    """Make independent latencies with a long tail."""
    return Process(
        f"lognormal, sigma {sigma:g}",
        lambda rng, runs, count: rng.lognormal(0, sigma, (runs, count)),
        lambda level: float(np.exp(sigma * special.ndtri(level))),
    )


def exponential() -> Process:
    """Make independent exponential latencies."""
    return Process(
        "exponential",
        lambda rng, runs, count: rng.exponential(1, (runs, count)),
        lambda level: float(-np.log(1 - level)),
    )


def autoregression(phi: float, sigma: float = 0.5) -> Process:
    """Make latencies whose logarithms follow an AR(1)."""

    def draw(rng: np.random.Generator, runs: int, count: int) -> Floats:
        logarithms = rng.standard_normal((count, runs))
        logarithms[1:] *= np.sqrt(1 - phi**2)
        for before, now in pairwise(logarithms):
            now += phi * before
        latencies: Floats = np.exp(sigma * logarithms.T)
        return latencies

    return Process(f"AR(1), phi {phi:g}", draw, lognormal(sigma).quantile)


def queue(rho: float) -> Process:
    """Make waiting times of an M/M/1 queue, in mean services."""

    def draw(rng: np.random.Generator, runs: int, count: int) -> Floats:
        first = np.where(rng.random(runs) < rho, rng.exponential(1 / (1 - rho), runs), 0)
        change = np.zeros((runs, count))
        change[:, 1:] = rng.exponential(1, (runs, count - 1)) - rng.exponential(1 / rho, (runs, count - 1))
        walk = np.cumsum(change, axis=1)
        # Lindley's recursion W' = max(0, W + change), solved: the walk above its lowest point, or above the first wait.
        waits: Floats = walk + np.maximum(first[:, np.newaxis], -np.minimum.accumulate(walk, axis=1))
        return waits

    return Process(f"M/M/1, load {rho:g}", draw, lambda level: float(np.log(rho / (1 - level)) / (1 - rho)))


CASES = (
    (lognormal(), 600),
    (lognormal(), 2000),
    (exponential(), 1000),
    (exponential(), 5000),
    (autoregression(0.5), 5000),
    (autoregression(0.8), 10_000),
    (queue(0.5), 20_000),
)
"""Processes and samples a run for which intervals of p99 hold: nearly all runs are long enough to give one."""
SHORT_CASES = (
    (exponential(), 300),
    (autoregression(0.8), 5000),
    (autoregression(0.95), 5000),
    (queue(0.5), 12_000),
    (queue(0.8), 20_000),
)
"""Runs that are too short: most give no interval. Where a few give one, it covers less."""


def measure(process: Process, count: int, settings: CoverageSettings) -> dict[str, Any]:
    """Draw runs and count whose intervals cover.

    Returns:
        ``coverage`` of the runs that gave an interval and ``answered``, their share; ``width``, the median width of
        intervals, by the ideal: the range of the middle 95 % of the runs' sample quantiles; None where none answered.
    """
    rng = np.random.default_rng(settings.seed)
    truth = process.quantile(settings.level)
    covered, answered, widths, samples = [], [], [], []
    for runs in _chunks(settings.trials, count):
        drawn = process.draw(rng, runs, count)
        low, high, needed = intervals(drawn, settings.level)
        answered.append(needed <= count)
        covered.append((low <= truth) & (truth <= high))
        widths.append(high - low)
        samples.append(np.quantile(drawn, settings.level, axis=1))
    gave = np.concatenate(answered)
    spread = np.subtract(*np.quantile(np.concatenate(samples), (0.5 + CONFIDENCE / 2, 0.5 - CONFIDENCE / 2)))
    return {
        "process": process.name,
        "samples": count,
        "answered": round(float(gave.mean()), 4),
        "coverage": round(float(np.concatenate(covered)[gave].mean()), 4) if gave.any() else None,
        "width": round(float(np.median(np.concatenate(widths)[gave]) / spread), 3) if gave.any() and spread else None,
    }


def _chunks(trials: int, count: int) -> Iterator[int]:
    each = max(1, _CHUNK // count)
    for begun in range(0, trials, each):
        yield min(each, trials - begun)


def run_coverage(settings: CoverageSettings) -> dict[str, Any]:
    """Measure all cases."""
    return {
        "level": settings.level,
        "trials": settings.trials,
        "holds": [measure(*case, settings) for case in CASES],
        "too_short": [measure(*case, settings) for case in SHORT_CASES],
    }


def table(report: dict[str, Any]) -> str:
    """Write the figures of ``run_coverage`` as lines for a reader."""
    lines = [
        f"95 % intervals of p{100 * report['level']:g}, {report['trials']} runs of each process",
        f"{'':<26}{'samples':>9}{'answered':>10}{'covers':>9}{'width':>8}",
    ]
    for group, title in (("holds", None), ("too_short", "too short, and mostly not answered")):
        lines += [title] if title else []
        for case in report[group]:
            covers, width = (
                "-" if case[name] is None else form.format(case[name])
                for name, form in (("coverage", "{:.1%}"), ("width", "{:.2f}"))
            )
            lines.append(f"  {case['process']:<24}{case['samples']:>9}{case['answered']:>10.1%}{covers:>9}{width:>8}")
    return "\n".join([*lines, "width: the median interval's, by the range of the middle 95 % of the sample quantiles"])
