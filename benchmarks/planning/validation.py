"""Predictions against measurements: scenarios on a real server, its engines simulated or real; none is tuned to.

A scenario is a mix at a load; a mix's loads share one server. The host's times and those of real engines depend on the
machine's other work, so they are measured before and after each load, with no load, and the mean of both counts.
Reported are, for p50 and p99:

    error       the simulation of the same arrivals by the measurement, less 1: chance is the same on both sides
    interval    90 %: where a run of this length falls, by the spread of simulated runs with other arrivals, half of
                them with the times from before the load and half with those from after it
    is wide     the interval's half is more than 20 % of the figure: other arrivals would give another one, and a p99
                that is wide abstains

and for each mix the highest rate that keeps a p99 goal, both measured and simulated, by interpolation between loads.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.calls import OK
from benchmarks.load import LoadRun, run_load
from benchmarks.planning.evaluation import Scenario, quantile, student_95
from benchmarks.planning.measured import (
    as_served,
    host_json,
    mean_profile,
    measure_engines,
    measure_host,
    measure_late_ms,
    real_server,
    simulated_server,
)
from benchmarks.planning.planner import least_replicas
from benchmarks.planning.profile import ServiceProfile
from benchmarks.planning.replay import compare, simulate, small
from benchmarks.planning.simulation import ServerSettings
from benchmarks.planning.workload import Workload, uniform
from benchmarks.schedule import poisson_schedule
from benchmarks.settings import LoadSettings
from icportrait.contract import Array
from icportrait.policy import ServingPolicy
from icportrait.server import ServerProcess

LOADS = (0.25, 0.4, 0.55)
"""Shares of the rate that full batches would serve with nothing between them."""
HOST_REQUESTS = 8
"""Requests of each kind that the host is measured by."""
RUNS = 20
"""Simulated runs of a scenario with other arrivals."""
WARM_UP_S = 8.0
WIDEST = 0.2


@dataclass(frozen=True)
class Mix:
    """Requests and a server: the scenarios differ in the load only."""

    name: str
    profile: str | None
    """Name in ``benchmarks/profiles``; the engines take its times, and the host is this machine. None is for the real
    engines of an export on this machine."""
    steps: tuple[int, int]
    guidance_scale: float = 1.0
    batching: str = "in-flight"
    deadline_ms: int | None = None


MIXES = (
    Mix("few steps", "b200-sd15-512-fp8", (1, 4)),
    Mix("guided", "b200-sd15-512-fp16", (2, 6), guidance_scale=1.5),
    Mix("whole batches", "b200-sd15-512-fp8", (2, 2), batching="whole"),
    Mix("real engines", None, (1, 4)),
)
"""Mixes that are put on a server at each of the loads. The quicker the engines are, the more requests a run has."""


def validate(
    mixes: Sequence[Mix],
    find: Callable[[str], ServiceProfile],
    duration_s: float,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
    export: Path | None = None,
) -> dict[str, Any]:
    """Measure and predict every scenario.

    Args:
        mixes: of the scenarios.
        find: finds a profile by its name.
        duration_s: of each measured run.
        seed: of the first run.
        say: is told what goes on, a line at a time.
        export: of the mixes with real engines; None leaves them out.

    Returns:
        Figures, ready for JSON: every scenario's, each mix's highest rates, and the errors of all.
    """
    began_s = time.monotonic()
    scenarios: list[dict[str, Any]] = []
    highest: list[dict[str, Any]] = []
    for place, mix in enumerate(mixes):
        policy = ServingPolicy(batching=mix.batching)
        if mix.profile:
            engines = small(find(mix.profile))
            starting, measure = simulated_server(engines, policy), partial(_with_host, engines)
        elif export:
            starting, measure = real_server(export, policy), partial(_real, export, policy.runtime)
        else:
            continue
        with starting as server:
            after = measure(server)
            capacity = capacity_per_s(after, mix)
            found = []
            for number, load in enumerate(LOADS):
                plain = _load(mix, capacity * load, duration_s, seed + 100 * (len(LOADS) * place + number))
                run = run_load(replace(plain, url=server.grpc_url))
                before, after = after, measure(server)
                found.append(assess(mix, load, (before, after), run))
                say(_line(found[-1]))
        scenarios += found
        highest.append(highest_rates(mix, found))
    took_s = round(time.monotonic() - began_s)
    found_in_all = summary(scenarios, highest)
    return {"scenarios": scenarios, "highest_rates": highest, "summary": found_in_all, "took_s": took_s}


def _real(export: Path, runtime: str, server: ServerProcess) -> ServiceProfile:
    return _with_host(as_served(measure_engines(export, runtime), server), server)


def _with_host(profile: ServiceProfile, server: ServerProcess) -> ServiceProfile:
    host = measure_host(profile, server, HOST_REQUESTS, steps=2)
    return replace(profile, host=replace(host, late_ms=measure_late_ms(profile, server)))


def capacity_per_s(profile: ServiceProfile, mix: Mix) -> float:
    """Return the requests a second of full batches with nothing between them."""
    workload = Workload(1000.0, steps=uniform(*mix.steps), guided=float(mix.guidance_scale > 1), returning=1.0)
    return 1000.0 / least_replicas(Scenario(profile, workload))


def predict(
    profiles: Sequence[ServiceProfile], settings: LoadSettings, server_settings: ServerSettings
) -> dict[str, Array]:
    """Simulate runs like a load's with other seeds, and return the p50 and p99 of each, in milliseconds.

    Args:
        profiles: of the server at different times; the runs take turns.
        settings: the load's.
        server_settings: the server's.
    """
    p50, p99 = [], []
    for run in range(RUNS):
        schedule = poisson_schedule(replace(settings, seed=settings.seed + 10_000 + run))
        passages = simulate(profiles[run % len(profiles)], settings, schedule, server_settings)
        steady = [passage for passage in passages if passage.call.send_s >= settings.warm_up_s and passage.code == OK]
        latency_ms = np.array([1000 * passage.latency_s for passage in steady])
        p50.append(quantile(latency_ms, 0.5))
        p99.append(quantile(latency_ms, 0.99))
    return {"p50": np.array(p50), "p99": np.array(p99)}


def _load(mix: Mix, rate_per_s: float, duration_s: float, seed: int) -> LoadSettings:
    return LoadSettings(
        rate_per_s=rate_per_s,
        duration_s=duration_s,
        steps=mix.steps,
        guidance_scale=mix.guidance_scale,
        deadline_ms=mix.deadline_ms,
        warm_up_s=WARM_UP_S,
        seed=seed,
    )


def assess(mix: Mix, load: float, profiles: tuple[ServiceProfile, ServiceProfile], run: LoadRun) -> dict[str, Any]:
    """Compare a measured run with the simulation, and return the scenario's figures.

    Args:
        mix: of the requests.
        load: share of the server's capacity.
        profiles: of the server before and after the run.
        run: was measured.
    """
    settings, profile = ServerSettings(ServingPolicy(batching=mix.batching)), mean_profile(*profiles)
    replay, predicted = compare(profile, run, settings), predict(profiles, run.settings, settings)
    row: dict[str, Any] = {
        "mix": mix.name,
        "load": load,
        "rate_per_s": round(replay.settings.rate_per_s, 4),
        "duration_s": replay.settings.duration_s,
        "host": host_json(profile.host),
        "machines_load": round(os.getloadavg()[0], 2),
        "replay": replay.to_json(),
    }
    for name in ("p50", "p99"):
        both, values = row["replay"][name], predicted[name]
        # Runs' quantiles are skewed to the right, and their logarithms less.
        centre, spread = float(np.log(values).mean()), float(np.log(values).std(ddof=1))
        half = student_95(RUNS - 1) * spread * math.sqrt(1 + 1 / RUNS)
        low, high = math.exp(centre - half), math.exp(centre + half)
        row[name] = {
            **both,
            "interval_ms": [round(low, 2), round(high, 2)],
            "covered": low <= both["measured_ms"] <= high,
            "is_wide": (high - low) / 2 > WIDEST * math.exp(centre),
        }
    return row


def highest_rates(mix: Mix, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compare the highest rates that keep a goal: a p99 halfway between those of the first load and the last."""
    rates = [row["rate_per_s"] for row in rows]
    goal_ms = math.sqrt(rows[0]["p99"]["simulated_ms"] * rows[-1]["p99"]["simulated_ms"])
    measured, predicted = (
        crossing(rates, [row["p99"][name] for row in rows], goal_ms) for name in ("measured_ms", "simulated_ms")
    )
    error = predicted / measured - 1 if measured and predicted else None
    return {
        "mix": mix.name,
        "p99_goal_ms": round(goal_ms, 1),
        "measured_per_s": measured and round(measured, 3),
        "predicted_per_s": predicted and round(predicted, 3),
        "error": None if error is None else round(error, 4),
    }


def crossing(rates: Sequence[float], p99_ms: Sequence[float], goal_ms: float) -> float | None:
    """Return the rate at which the p99 passes a goal, its logarithm linear between rates; None beyond the rates."""
    for (low, low_ms), (high, high_ms) in zip(
        zip(rates, p99_ms, strict=True), zip(rates[1:], p99_ms[1:], strict=False), strict=False
    ):
        if low_ms <= goal_ms < high_ms:
            share = (math.log(goal_ms) - math.log(low_ms)) / (math.log(high_ms) - math.log(low_ms))
            return low + share * (high - low)
    return None


def summary(scenarios: Sequence[dict[str, Any]], highest: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the errors over all scenarios, without the p99s that are wide, and list those that miss."""
    p50 = [abs(row["p50"]["error"]) for row in scenarios]
    p99 = [abs(row["p99"]["error"]) for row in scenarios if not row["p99"]["is_wide"]]
    checks = [row[name]["covered"] for row in scenarios for name in ("p50", "p99")]
    rates = [abs(row["error"]) for row in highest if row["error"] is not None]
    misses = [
        f"{_error(row, name)}; {_cause(row)}"
        for row in scenarios
        for name, most in (("p50", 0.10), ("p99", 0.20))
        if abs(row[name]["error"]) > most and not (name == "p99" and row[name]["is_wide"])
    ]
    abstain = [
        f"{_error(row, 'p99')}; an interval of {low:.0f} to {high:.0f} ms"
        for row in scenarios
        if row["p99"]["is_wide"]
        for low, high in [row["p99"]["interval_ms"]]
    ]
    return {
        "p50_error": _spread(p50),
        "p99_error": _spread(p99),
        "highest_rate_error": _spread(rates),
        "intervals_cover": round(sum(checks) / len(checks), 4),
        "misses": misses,
        "abstain": abstain,
    }


def _error(row: dict[str, Any], name: str) -> str:
    return f"{row['mix']} at {row['load']:g}: {name} {row[name]['error']:+.1%}"


def _cause(row: dict[str, Any]) -> str:
    stages = row["replay"]["stage_ms"]
    largest = max(stages, key=lambda name: abs(stages[name]["simulated"] - stages[name]["measured"]))
    both = stages[largest]
    return f"most by {largest}, {both['measured']:.0f} ms measured and {both['simulated']:.0f} simulated"


def _spread(errors: Sequence[float]) -> dict[str, float | int | None]:
    return {
        "median": round(median(errors), 4) if errors else None,
        "worst": round(max(errors), 4) if errors else None,
        "of": len(errors),
    }


def _line(row: dict[str, Any]) -> str:
    figures = ", ".join(
        f"{name} {row[name]['measured_ms']:.0f} measured, {row[name]['simulated_ms']:.0f} simulated"
        f" ({row[name]['error']:+.1%})"
        for name in ("p50", "p99")
    )
    return f"{row['mix']} at {row['load']:g} ({row['rate_per_s']:.2f}/s): {figures}"


def table(report: dict[str, Any]) -> str:
    """Write the figures of ``validate`` as lines for a reader."""
    found = report["summary"]
    lines = [_line(row) for row in report["scenarios"]]
    lines += [
        f"{row['mix']}: highest rate with a p99 of {row['p99_goal_ms']:.0f} ms: "
        + (
            "not between the loads"
            if row["error"] is None
            else f"{row['measured_per_s']:.2f}/s measured, {row['predicted_per_s']:.2f} predicted ({row['error']:+.1%})"
        )
        for row in report["highest_rates"]
    ]
    for name, label in (("p50_error", "p50"), ("p99_error", "p99"), ("highest_rate_error", "highest rate")):
        each = found[name]
        if each["of"]:
            lines.append(
                f"{label}: off by {each['median']:.1%} in the median of {each['of']} and {each['worst']:.1%} at worst"
            )
    lines.append(f"90 % intervals cover {found['intervals_cover']:.0%}")
    lines += [f"too wide to judge: {each}" for each in found["abstain"]]
    return "\n".join([*lines, *(f"miss: {miss}" for miss in found["misses"])])
