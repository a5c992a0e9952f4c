"""Quantiles and shares of one run's latencies with 95 % intervals that stand autocorrelation.

Latencies of neighbouring requests are alike, because they wait in the same queue. An interval for independent samples
is then too narrow. The method here, for the quantile q of level p of n latencies in the order of their sending:

1. The indicator of a latency above q has the variance p (1 - p). Its mean over n requests has tau p (1 - p) / n, and
   tau is 1 where requests are independent. Overlapping batch means estimate tau: Meketon and Schmeiser, "Overlapping
   batch means: something for nothing?" (WSC 1984). There are ``BATCHES`` batches; the estimate is worth
   1.5 (BATCHES - 1) degrees of freedom, and fewer where few latencies lie above q.
2. The n latencies are worth n / tau independent ones. Student's t in place of the normal quantile makes up for the
   estimate of tau: it divides them by (t / 1.96)^2 more.
3. Of independent samples the m-th largest is at least q with the probability that m or more of them exceed q, which is
   binomial: the order statistics' interval (David and Nagaraja, "Order Statistics", section 7.1), continued between
   whole m by the incomplete beta function. m is scaled back by tau, and the interval's ends are those latencies.

No interval is given where it wouldn't hold. ``python -m benchmarks coverage`` shows how often intervals cover.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import special

Floats: TypeAlias = npt.NDArray[np.float64]

CONFIDENCE = 0.95
BATCHES = 32
EFFECTIVE_TAIL = 15.0
"""Independent samples beyond the quantile, on its rarer side, that an interval of dependent latencies needs."""
EFFECTIVE_SAMPLES = 200.0
"""Independent samples in all that it needs: a batch must be several times longer than what latencies remember."""
_DEPENDENT = 1.6
"""A tau above this isn't chance: of independent latencies it is estimated as 1 with a deviation of 0.2."""
_LEAST_TAU = 0.6
_TAIL_KURTOSIS = 0.5
"""Share of the kurtosis of a batch's count that the degrees of freedom lose, chosen by coverage, between 0 and 1."""
_Z = float(special.ndtri(0.5 + CONFIDENCE / 2))


@dataclass(frozen=True)
class Quantile:
    """A quantile of one run."""

    level: float
    samples: int
    value: float | None
    """None below the order statistics' floor."""
    low: float | None
    high: float | None
    """Ends of the 95 % interval; None where there are too few samples for one."""
    needed: int | None
    """Samples that an interval takes, where there is none."""


@dataclass(frozen=True)
class Share:
    """A share of one run's requests, with its 95 % interval."""

    value: float
    low: float
    high: float


def quantile(values: Sequence[float] | Floats, level: float) -> Quantile:
    """Compute a quantile and its interval.

    Args:
        values: one run's latencies in the order of sending, after the warm-up; infinite for requests that failed.
        level: 0.99 for p99.
    """
    series = np.asarray(values, dtype=np.float64)
    floor = least_samples(level)
    if len(series) < floor:
        return Quantile(level, len(series), None, None, None, floor)
    value = float(np.sort(series)[_order(len(series), level)])
    if len(series) < 2 * BATCHES:
        return Quantile(level, len(series), value, None, None, 2 * BATCHES)
    low, high, needed = (each[0] for each in intervals(series[np.newaxis], level))
    if needed > len(series):
        return Quantile(level, len(series), value, None, None, int(needed))
    return Quantile(level, len(series), value, float(low), float(high), None)


def intervals(runs: Floats, level: float) -> tuple[Floats, Floats, Floats]:
    """Compute the intervals of many runs at once.

    Args:
        runs: [runs, samples], 64 samples or more.
        level: of the quantile.

    Returns:
        Lower ends, upper ends, and the samples that an interval takes: more than there are where it doesn't hold.
    """
    count = runs.shape[1]
    ordered = np.sort(runs, axis=1)
    # A level nearer to the middle has ten times the samples beyond it, and shows dependence more surely.
    coarse_level = max(0.5, 1 - 10 * (1 - level))
    tau, coarse = (_tau(runs > ordered[:, [_order(count, at)]], at) for at in (level, coarse_level))
    rare = min(level, 1 - level)
    beyond = count * rare / np.maximum(tau, 1)
    # A count of independent samples has a Poisson count's kurtosis, and one of clusters of geometric size thrice that.
    kurtosis = (3 - 2 / np.maximum(tau, 1)) / beyond
    freedom = 2 / (2 / (1.5 * (BATCHES - 1)) + _TAIL_KURTOSIS * kurtosis)
    scale = np.maximum(tau, _LEAST_TAU) * (special.stdtrit(freedom, 0.5 + CONFIDENCE / 2) / _Z) ** 2
    low, high = (_at(ordered, scale * _exceedances(count / scale, level, sure)) for sure in _tails())
    needed = np.ceil(scale * least_samples(level))
    dependent = (coarse > _DEPENDENT) | (tau > _DEPENDENT)
    worst = np.maximum(tau, coarse)
    enough = np.maximum(EFFECTIVE_TAIL / rare, EFFECTIVE_SAMPLES)
    return low, high, np.where(dependent, np.maximum(needed, np.ceil(worst * enough)), needed)


def least_samples(level: float) -> int:
    """Return the order statistics' floor: with fewer samples even the extreme one lies beyond the quantile too seldom.

    The largest of n independent samples is below the quantile with the probability level^n, which must be 2.5 % at
    most: 368 samples for p99, 36 for p90.
    """
    return math.ceil(math.log((1 - CONFIDENCE) / 2) / math.log(max(level, 1 - level)))


def share(hits: Sequence[bool] | npt.NDArray[np.bool_], values: Sequence[float] | Floats) -> Share:
    """Compute the share of requests that something is true of, with its interval.

    The interval is Clopper and Pearson's for n / tau requests. Of few hits tau can't be estimated. The larger one
    counts: theirs, or that of latencies above p90.

    Args:
        hits: one run's requests in the order of sending, one or more.
        values: their latencies, infinite for requests that failed.
    """
    series, hit = np.asarray(values, dtype=np.float64), np.asarray(hits, dtype=np.bool_)
    value = float(hit.mean())
    tau = 1.0
    if len(series) >= 2 * BATCHES:
        tenth = np.sort(series)[_order(len(series), 0.9)]
        tau = max(tau, float(_tau((series > tenth)[np.newaxis], 0.9)[0]))
        if 0 < value < 1:
            tau = max(tau, float(_tau(hit[np.newaxis], value)[0]))
    count = len(series) / tau
    low_tail, high_tail = _tails()
    low = float(special.betaincinv(value * count, (1 - value) * count + 1, low_tail)) if value > 0 else 0.0
    high = float(special.betaincinv(value * count + 1, (1 - value) * count, high_tail)) if value < 1 else 1.0
    return Share(value, low, high)


def _order(count: int, level: float) -> int:
    """Return the index of the sample quantile in sorted samples."""
    return min(count - 1, max(0, math.ceil(count * level) - 1))


def _tau(above: npt.NDArray[np.bool_], level: float) -> Floats:
    """Estimate tau of indicators [runs, samples] by overlapping batch means."""
    runs, count = above.shape
    batch = count // BATCHES
    sums = np.zeros((runs, count + 1), dtype=np.int64)
    np.cumsum(above, axis=1, out=sums[:, 1:])
    batches = sums[:, batch:] - sums[:, :-batch]
    off = batches - batch * (sums[:, -1:] / count)
    variance = np.einsum("ij,ij->i", off, off) / ((count - batch + 1) * (1 - batch / count) * batch)
    found: Floats = variance / (level * (1 - level))
    return found


def _tails() -> tuple[float, float]:
    return (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2


def _exceedances(count: Floats, level: float, probability: float) -> Floats:
    """Find the m for which ``probability`` is that of m or more among ``count`` samples exceeding the quantile."""
    low, high = np.full_like(count, 1e-9), count.copy()
    for _ in range(50):
        middle = (low + high) / 2
        is_likelier = special.betainc(middle, count - middle + 1, 1 - level) > probability
        low, high = np.where(is_likelier, middle, low), np.where(is_likelier, high, middle)
    return (low + high) / 2


def _at(ordered: Floats, largest: Floats) -> Floats:
    """Return the ``largest``-th largest of each run, linear between two."""
    runs, count = ordered.shape
    index = np.clip(count - largest, 0, count - 1)
    below = np.floor(index).astype(np.int64)
    above = np.minimum(below + 1, count - 1)
    row = np.arange(runs)
    lower, upper = ordered[row, below], ordered[row, above]
    with np.errstate(invalid="ignore"):  # requests that failed are infinite
        found: Floats = np.where(upper > lower, lower + (index - below) * (upper - lower), lower)
    return found
