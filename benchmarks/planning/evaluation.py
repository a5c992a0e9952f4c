"""Replications of a simulation: independent runs of one scenario, and figures with 90 % intervals.

A quantile's estimate is that of all runs' requests together. Its interval is Student's, from the runs' own quantiles:
runs are independent, whatever the correlation within one. A request that isn't answered with a portrait counts as
one that takes for ever.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import numpy as np

from benchmarks.planning.profile import PlanningError, ServiceProfile
from benchmarks.planning.simulation import OK, ServerSettings, SimulatedServer
from benchmarks.planning.workload import Workload
from icportrait.contract import Array

CONFIDENCE = 0.90
WARM_UP = 0.2
"""Share of a run's requests that its figures leave out, because the server began empty."""
_STUDENT_95 = tuple(
    map(
        float,
        [
            "inf",
            "6.314",
            "2.92",
            "2.353",
            "2.132",
            "2.015",
            "1.943",
            "1.895",
            "1.86",
            "1.833",
            "1.812",
            "1.796",
            "1.782",
            "1.771",
            "1.761",
            "1.753",
            "1.746",
        ],
    )
)
"""Quantile 0.95 of Student's distribution by degrees of freedom, from 0 to 16: two sides of 5 % each."""
_NORMAL_95 = 1.645


@dataclass(frozen=True)
class Scenario:
    """A fleet of equal servers under a workload."""

    profile: ServiceProfile
    workload: Workload
    replicas: int = 1
    balancer: str = "random"
    settings: ServerSettings = field(default_factory=ServerSettings)

    def at(self, rate_per_s: float) -> Scenario:
        """Return the scenario at another rate of all callers together."""
        return replace(self, workload=self.workload.at(rate_per_s))


@dataclass(frozen=True)
class Estimate:
    """A figure with its 90 % interval."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> Estimate:
        """Return a factor of the figure and of its interval."""
        return Estimate(factor * self.value, factor * self.low, factor * self.high)

    def at_least(self, least: float) -> Estimate:
        """Return the figure and its interval, neither below ``least``."""
        return Estimate(*(max(least, each) for each in (self.value, self.low, self.high)))

    def to_json(self) -> dict[str, float | None]:
        """Return the figure with null for what isn't finite."""
        return {name: round(value, 4) if math.isfinite(value) else None for name, value in vars(self).items()}


@dataclass(frozen=True)
class Sample:
    """One run's figures."""

    latency_ms: Array
    """Latency of the requests after the warm-up, in the order of their sending; infinite without a portrait."""
    codes: Mapping[str, int]
    busy: Mapping[str, float]
    batches: Mapping[str, float]
    stage_ms: Mapping[str, float]
    """Medians of the answered requests."""
    portraits: int
    """Portraits of the answered requests."""


@dataclass(frozen=True)
class Figures:
    """A scenario's figures."""

    scenario: Scenario
    requests: int
    p50_ms: Estimate
    p99_ms: Estimate
    answered: Estimate
    """Share of requests that are answered with portraits."""
    goodput: Estimate
    """Share of requests that are answered within the limit."""
    mean_ms: float
    """Mean latency of the answered requests."""
    busy: Mapping[str, float]
    batches: Mapping[str, float]
    stage_ms: Mapping[str, float]
    codes: Mapping[str, int]
    latency_ms: Array = field(repr=False)


def run_once(scenario: Scenario, requests: int, seed: int) -> Sample:
    """Simulate one server of a scenario.

    Args:
        scenario: the fleet; one of its servers runs.
        requests: that come to the server.
        seed: of the requests.
    """
    workload, settings = scenario.workload, scenario.settings
    if not workload.returning and not workload.references:
        # Where no picture returns, keeping pictures changes nothing and takes time.
        settings = replace(settings, pictures_kept=0, policy=replace(settings.policy, cache_bytes=0))
    calls = workload.calls(requests, seed, scenario.replicas, scenario.balancer)
    run = SimulatedServer(scenario.profile, settings).run(calls)
    steady = run.passages[int(WARM_UP * len(calls)) :]
    answered = [passage for passage in steady if passage.code == OK]
    latency_ms = [1000 * passage.latency_s if passage.code == OK else math.inf for passage in steady]
    stages: dict[str, list[float]] = {}
    for passage in answered[:: max(1, len(answered) // 200)]:
        for stage, duration_ms in passage.stage_ms.items():
            stages.setdefault(stage, []).append(duration_ms)
    return Sample(
        np.array(latency_ms),
        Counter(passage.code for passage in steady),
        run.busy,
        run.batches,
        {stage: float(np.median(values)) for stage, values in stages.items()},
        sum(passage.call.portraits for passage in answered),
    )


class Simulator:
    """Runs replications, on several processes where that pays."""

    def __init__(self, processes: int | None = None) -> None:
        """Begin; ``close`` ends the processes.

        Args:
            processes: None for one a core; 1 stays in this process.
        """
        self.requests = 0
        """Requests simulated by now."""
        count = processes or len(os.sched_getaffinity(0))
        context = multiprocessing.get_context("spawn")
        # Ctrl-C goes to all processes of a terminal: this one ends the others.
        ignore = (signal.SIGINT, signal.SIG_IGN)
        self._pool = (
            ProcessPoolExecutor(count, context, initializer=signal.signal, initargs=ignore) if count > 1 else None
        )

    def __enter__(self) -> Simulator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def evaluate(
        self, scenarios: Sequence[Scenario], runs: int, requests: int, limit_ms: float, seed: int = 0
    ) -> list[Figures]:
        """Simulate scenarios, each with the same requests' draws.

        Args:
            scenarios: what to simulate.
            runs: replications of each.
            requests: of a run.
            limit_ms: that goodput counts within.
            seed: of the first run.

        Raises:
            PlanningError: a process has died.
        """
        tasks = [(scenario, requests, seed + run) for scenario in scenarios for run in range(runs)]
        self.requests += requests * len(tasks)
        if self._pool:
            try:
                samples = list(self._pool.map(run_once, *zip(*tasks, strict=True)))
            except BrokenProcessPool as error:
                raise PlanningError(
                    "a process of the simulation was killed, for want of memory perhaps; try --processes 1"
                ) from error
        else:
            samples = [run_once(*task) for task in tasks]
        return [
            summarise(scenario, samples[index * runs : (index + 1) * runs], limit_ms)
            for index, scenario in enumerate(scenarios)
        ]


def summarise(scenario: Scenario, samples: Sequence[Sample], limit_ms: float) -> Figures:
    """Join the runs of a scenario."""
    latency_ms = np.concatenate([sample.latency_ms for sample in samples])
    answered = latency_ms[np.isfinite(latency_ms)]
    codes: Counter[str] = Counter()
    for sample in samples:
        codes.update(sample.codes)
    return Figures(
        scenario,
        len(latency_ms),
        _estimate(samples, lambda values: quantile(values, 0.5)),
        _estimate(samples, lambda values: quantile(values, 0.99)),
        _estimate(samples, lambda values: float(np.isfinite(values).mean()), most=1.0),
        _estimate(samples, lambda values: float((values <= limit_ms).mean()), most=1.0),
        float(answered.mean()) if len(answered) else math.inf,
        _means(sample.busy for sample in samples),
        _means(sample.batches for sample in samples),
        _means(sample.stage_ms for sample in samples),
        dict(codes),
        latency_ms,
    )


def quantile(values: Array, share: float) -> float:
    """Return the smallest value that a share of the values is not above; infinite values count."""
    return float(np.sort(values)[max(0, math.ceil(share * len(values)) - 1)])


def student_95(degrees: int) -> float:
    """Return quantile 0.95 of Student's distribution."""
    return _STUDENT_95[degrees] if degrees < len(_STUDENT_95) else _NORMAL_95 + 1.6 / degrees


def _estimate(samples: Sequence[Sample], figure: Callable[[Array], float], most: float = math.inf) -> Estimate:
    value = figure(np.concatenate([sample.latency_ms for sample in samples]))
    each = [figure(sample.latency_ms) for sample in samples]
    if not all(map(math.isfinite, [value, *each])):
        finite = [one for one in each if math.isfinite(one)]
        return Estimate(value, min(finite, default=math.inf), math.inf)
    if len(each) == 1:
        return Estimate(value, -math.inf, math.inf)
    half = student_95(len(each) - 1) * float(np.std(each, ddof=1)) / math.sqrt(len(each))
    return Estimate(value, max(0.0, value - half), min(most, value + half))


def _means(values: Iterable[Mapping[str, float]]) -> dict[str, float]:
    listed: list[Mapping[str, Any]] = list(values)
    names = dict.fromkeys(name for each in listed for name in each)
    return {name: float(np.mean([each[name] for each in listed if name in each])) for name in names}
