"""The server's counters, histograms and gauges. The denoising loop's process keeps them.

Counting costs the loop about a microsecond, and publishing through Triton costs a hundred. A thread of its own
therefore publishes now and then (``triton_loop.MetricsPublisher``). A histogram is published in Prometheus's form:
cumulative counters by the label ``le``, their sum and their count.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

PREFIX = "icportrait_"
REFUSALS = ("queue_slots", "queue_bytes", "deadline")
"""The label ``reason``."""
STAGES = ("preprocess", "conditioning", "denoise", "decode", "postprocess")
"""The label ``stage``, as in an answer's ``stage_ms``."""

_MS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 30_000.0)
_SHORT_MS = (0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0)
LARGEST = 24 * 3600 * 1000.0
"""A day in milliseconds. A longer measurement is wrong."""

Labels = tuple[tuple[str, str], ...]


class Kind(Enum):
    COUNTER = auto()
    GAUGE = auto()
    HISTOGRAM = auto()


@dataclass(frozen=True)
class Family:
    """One metric with all its labels."""

    kind: Kind
    description: str
    bounds: tuple[float, ...] = ()
    """A histogram's upper bounds."""
    label: str = ""
    values: tuple[str, ...] = ()
    """Every value of the label. Each value has a time series from the start."""

    @property
    def labels(self) -> tuple[Labels, ...]:
        return tuple(((self.label, value),) for value in self.values) or ((),)


FAMILIES = {
    "queued_requests": Family(Kind.GAUGE, "Admitted requests that the denoising batch doesn't hold yet"),
    "queued_slots": Family(Kind.GAUGE, "Slots that the queued requests will take"),
    "admitted_bytes": Family(Kind.GAUGE, "Bytes of the pictures of all admitted requests"),
    "active_slots": Family(Kind.GAUGE, "Slots in use"),
    "step_slots": Family(Kind.HISTOGRAM, "Slots in use at a step: the batch's occupancy", (1.0, 2.0, 4.0, 8.0, 16.0)),
    "step_ms": Family(Kind.HISTOGRAM, "UNet forward of one step, until the loop takes its output", _MS),
    "step_outside_engine_ms": Family(
        Kind.HISTOGRAM, "Between two UNet forwards, warping apart: what the loop itself takes", _SHORT_MS
    ),
    "warping_ms": Family(Kind.HISTOGRAM, "Warping network over the requests that join together", _MS),
    "first_step_ms": Family(Kind.HISTOGRAM, "From a request's arrival to the end of its first step", _MS),
    "stage_ms": Family(Kind.HISTOGRAM, "Answered requests, by stage", _MS, "stage", STAGES),
    "answers_total": Family(Kind.COUNTER, "Portraits' requests answered with portraits"),
    "refusals_total": Family(Kind.COUNTER, "Requests refused before any engine ran", (), "reason", REFUSALS),
    "cancellations_total": Family(Kind.COUNTER, "Requests whose caller went away"),
    "deadline_misses_total": Family(Kind.COUNTER, "Admitted requests that ran out of time"),
    "previews_total": Family(Kind.COUNTER, "Previews sent"),
    "engine_failures_total": Family(Kind.COUNTER, "Runs of an engine in the loop that failed"),
}


class Metrics:
    """The values of ``FAMILIES``. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, Labels], float] = {}
        # Counts by bucket, the last above every bound; then the sum.
        self._histograms: dict[tuple[str, Labels], list[float]] = {}
        self._gauges: dict[str, Callable[[], float]] = {}
        for name, family in FAMILIES.items():
            for labels in family.labels:
                if family.kind is Kind.COUNTER:
                    self._counts[name, labels] = 0.0
                elif family.kind is Kind.HISTOGRAM:
                    self._histograms[name, labels] = [0.0] * (len(family.bounds) + 2)

    def count(self, name: str, **labels: str) -> None:
        """Add one to a counter."""
        with self._lock:
            self._counts[name, tuple(labels.items())] += 1

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add a value to a histogram, brought into 0 to ``LARGEST``: the sums are counters, which only grow."""
        value = min(max(value, 0.0), LARGEST) if value == value else LARGEST
        with self._lock:
            histogram = self._histograms[name, tuple(labels.items())]
            histogram[bisect_left(FAMILIES[name].bounds, value)] += 1
            histogram[-1] += value

    def gauge(self, name: str, read: Callable[[], float]) -> None:
        """Name the function that reads a gauge's value each time that the value is published, from any thread."""
        self._gauges[name] = read

    def series(self) -> dict[tuple[str, Labels], tuple[Kind, float]]:
        """Return every time series by name and labels. A histogram gives the counters that it is published as."""
        values: dict[tuple[str, Labels], tuple[Kind, float]] = {}
        values |= {(name, ()): (Kind.GAUGE, read()) for name, read in self._gauges.items()}
        with self._lock:
            values |= {series: (Kind.COUNTER, count) for series, count in self._counts.items()}
            histograms = {series: list(histogram) for series, histogram in self._histograms.items()}
        for (name, labels), histogram in histograms.items():
            total = 0.0
            for bound, count in zip((*FAMILIES[name].bounds, math.inf), histogram[:-1], strict=True):
                total += count
                below = "+Inf" if bound == math.inf else f"{bound:g}"
                values[f"{name}_bucket", (*labels, ("le", below))] = (Kind.COUNTER, total)
            values[f"{name}_sum", labels] = (Kind.COUNTER, histogram[-1])
            values[f"{name}_count", labels] = (Kind.COUNTER, total)
        return values


def description(series: str) -> str:
    """Return the description of a series of ``Metrics.series``, ``_bucket``, ``_sum`` and ``_count`` included."""
    name, _, part = series.rpartition("_")
    if series in FAMILIES:
        return FAMILIES[series].description
    return f"{FAMILIES[name].description} ({part})"
