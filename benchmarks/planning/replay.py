"""The same arrivals on a real server and in the simulation, request by request, the largest differences explained.

Both get the schedule of ``benchmarks.schedule``: the same moments and steps. A difference of latencies is laid to the
stages that the request passed: a wrong profile shows as one stage, and a machine with other work as all of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.calls import OK
from benchmarks.load import LoadRun, Outcome, run_load
from benchmarks.planning.evaluation import quantile
from benchmarks.planning.measured import as_served, measure_host, real_server, simulated_server, stages_ms
from benchmarks.planning.profile import Host, PlanningError, ServiceProfile
from benchmarks.planning.simulation import Passage, ServerSettings, SimulatedServer
from benchmarks.planning.workload import Call
from benchmarks.schedule import PlannedRequest
from benchmarks.settings import LoadSettings
from icportrait.phases import ALL_STEPS
from icportrait.presets import DEMO_128

WORST = 10


@dataclass(frozen=True)
class Pair:
    """One request on both."""

    request: PlannedRequest
    measured_ms: float
    simulated_ms: float
    measured_code: str
    simulated_code: str
    measured_stages: dict[str, float]
    simulated_stages: dict[str, float]

    @property
    def difference_ms(self) -> float:
        """Return the simulated latency less the measured one."""
        return self.simulated_ms - self.measured_ms

    @property
    def cause(self) -> str:
        """Name the stages that most of the difference comes from."""
        if self.measured_code != self.simulated_code or self.measured_code != OK:
            return f"measured {self.measured_code}, simulated {self.simulated_code}"
        parts = {name: self.simulated_stages[name] - self.measured_stages[name] for name in self.simulated_stages}
        largest = sorted(parts, key=lambda name: -abs(parts[name]))[:2]
        return ", ".join(f"{name} {parts[name]:+.0f} ms" for name in largest)


@dataclass(frozen=True)
class Replay:
    """A whole run on both."""

    settings: LoadSettings
    pairs: Sequence[Pair]
    lateness_p99_ms: float

    @property
    def steady(self) -> list[Pair]:
        """Return the pairs after the warm-up that both have answered with portraits."""
        return [
            pair
            for pair in self.pairs
            if pair.request.send_s >= self.settings.warm_up_s and pair.measured_code == pair.simulated_code == OK
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the comparison's figures.

        Raises:
            PlanningError: there is no request to compare.
        """
        if not self.steady:
            measured_codes, simulated_codes = (
                _count(getattr(pair, name) for pair in self.pairs) for name in ("measured_code", "simulated_code")
            )
            raise PlanningError(
                f"no request after the first {self.settings.warm_up_s:g} s was answered by both: measured"
                f" {measured_codes}, simulated {simulated_codes}; ask for a lower rate or a longer duration"
            )
        measured = np.array([pair.measured_ms for pair in self.steady])
        simulated = np.array([pair.simulated_ms for pair in self.steady])
        rows = {}
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
            found, expected = quantile(measured, share), quantile(simulated, share)
            rows[name] = {
                "measured_ms": round(found, 2),
                "simulated_ms": round(expected, 2),
                "error": round(expected / found - 1, 4),
            }
        stages = list(self.steady[0].measured_stages)
        return {
            "requests": len(self.pairs),
            "compared": len(self.steady),
            "outcomes": {
                "measured": _count(pair.measured_code for pair in self.pairs),
                "simulated": _count(pair.simulated_code for pair in self.pairs),
            },
            **rows,
            "request_error": {
                "median": round(float(np.median(np.abs(simulated / measured - 1))), 4),
                "p90": round(float(np.percentile(np.abs(simulated / measured - 1), 90)), 4),
            },
            "stage_ms": {
                name: {
                    "measured": round(float(np.median([pair.measured_stages[name] for pair in self.steady])), 2),
                    "simulated": round(float(np.median([pair.simulated_stages[name] for pair in self.steady])), 2),
                }
                for name in stages
            },
            "lateness_p99_ms": round(self.lateness_p99_ms, 2),
            "worst": [
                {
                    "send_s": round(pair.request.send_s, 3),
                    "steps": pair.request.num_inference_steps,
                    "measured_ms": round(pair.measured_ms, 1),
                    "simulated_ms": round(pair.simulated_ms, 1),
                    "cause": pair.cause,
                }
                for pair in self.worst()
            ],
        }

    def worst(self) -> list[Pair]:
        """Return the pairs that differ most, other outcomes first."""

        def size(pair: Pair) -> float:
            is_other = pair.measured_code != pair.simulated_code
            return math.inf if is_other else abs(pair.difference_ms)

        steady = [pair for pair in self.pairs if pair.request.send_s >= self.settings.warm_up_s]
        return sorted(steady, key=size, reverse=True)[:WORST]


def replay(
    profile: ServiceProfile,
    settings: LoadSettings,
    server_settings: ServerSettings | None = None,
    export: Path | None = None,
) -> tuple[Replay, Host]:
    """Put a load on a real server, and on the simulation.

    Args:
        profile: the times of the engines; the host's are measured here first.
        settings: the load, but the server's address.
        server_settings: of both servers.
        export: has the server's engines; None makes it simulate them by the profile.

    Returns:
        The comparison, and the host's times that it was made with.
    """
    server_settings = server_settings or ServerSettings()
    policy = server_settings.policy
    with real_server(export, policy) if export else simulated_server(profile, policy) as server:
        if export:
            profile = as_served(profile, server)
        host = measure_host(profile, server)
        run = run_load(replace(settings, url=server.grpc_url))
    return compare(replace(profile, host=host), run, server_settings), host


def small(profile: ServiceProfile) -> ServiceProfile:
    """Return a profile whose server makes pictures of 128 px: with larger ones, two cores are the limit."""
    return replace(profile, preset=replace(DEMO_128, max_warping_batch=profile.preset.max_warping_batch))


def table(report: dict[str, Any]) -> str:
    """Write a comparison's figures as lines for a reader."""
    arguments = report["conditions"]["arguments"]
    lines = [
        f"{arguments['profile']}: {arguments['rate_per_s']:g}/s for {arguments['duration_s']:g} s, "
        + ("real engines" if arguments.get("export") else "SIMULATED engines"),
        f"{report['requests']} requests, {report['compared']} compared; outcomes measured"
        f" {report['outcomes']['measured']}, simulated {report['outcomes']['simulated']}",
        "",
        f"{'':<16}{'measured':>10}{'simulated':>11}{'error':>9}",
    ]
    for name in ("p50", "p90", "p99"):
        row = report[name]
        lines.append(f"{name + ', ms':<16}{row['measured_ms']:>10.1f}{row['simulated_ms']:>11.1f}{row['error']:>+9.1%}")
    each = report["request_error"]
    lines += [f"one request's error: {each['median']:.1%} median, {each['p90']:.1%} p90", "", "stage, median ms"]
    for name, both in report["stage_ms"].items():
        lines.append(f"  {name:<14}{both['measured']:>10.1f}{both['simulated']:>11.1f}")
    lines += ["", "the requests that differ most"]
    for row in report["worst"]:
        lines.append(
            f"  {row['send_s']:>8.2f} s, {row['steps']:>3} steps: {row['measured_ms']:.0f} ms measured,"
            f" {row['simulated_ms']:.0f} simulated: {row['cause']}"
        )
    return "\n".join(lines)


def compare(profile: ServiceProfile, run: LoadRun, server_settings: ServerSettings) -> Replay:
    """Simulate a measured run's requests, and pair them.

    Raises:
        KeyboardInterrupt: the run was interrupted, which it swallows.
    """
    if run.interrupted_s is not None:
        raise KeyboardInterrupt
    outcomes = sorted(run.outcomes, key=lambda outcome: outcome.request.send_s)
    passages = simulate(profile, run.settings, [outcome.request for outcome in outcomes], server_settings)
    lateness = [1000 * outcome.lateness_s for outcome in outcomes]
    return Replay(
        run.settings,
        [_pair(outcome, passage) for outcome, passage in zip(outcomes, passages, strict=True)],
        float(np.percentile(lateness, 99)),
    )


def simulate(
    profile: ServiceProfile,
    settings: LoadSettings,
    requests: Sequence[PlannedRequest],
    server_settings: ServerSettings,
) -> Sequence[Passage]:
    """Simulate a load's requests, whose pictures come in turn as the load's do."""
    calls = [
        Call(
            request.send_s,
            request.num_inference_steps,
            2 if request.guidance_scale > 1 else 1,
            1,
            1 if request.priority is None else request.priority,
            request.deadline_ms,
            index % len(settings.profile) if request.profile is None else request.profile,
            index % len(settings.reference),
            request.guidance_interval or ALL_STEPS,
        )
        for index, request in enumerate(requests)
    ]
    return SimulatedServer(profile, server_settings).run(calls).passages


def _pair(outcome: Outcome, passage: Passage) -> Pair:
    code = outcome.answer.code
    measured_ms = 1000 * outcome.latency_s
    stages = stages_ms(json.loads(outcome.answer.metadata), measured_ms) if code == OK else {}
    return Pair(
        outcome.request,
        measured_ms,
        1000 * passage.latency_s,
        "UNAVAILABLE" if code == "DEADLINE_EXCEEDED" else code,
        OK if passage.code == OK else "UNAVAILABLE",
        stages,
        simulated_stages(passage),
    )


def simulated_stages(passage: Passage) -> dict[str, float]:
    """Return a simulated request's milliseconds by the stages that a real answer tells."""
    stages = passage.stage_ms
    return {
        "preprocess": stages["preprocess"],
        "encode": stages["encode"],
        "queue and warp": stages["queue"] + stages["warp"],
        "denoise": stages["denoise"],
        "decode": stages["decode"],
        "postprocess": stages["postprocess"],
        "beside": stages["front"] + stages["back"],
    }


def _count(codes: Any) -> dict[str, int]:
    counted: dict[str, int] = {}
    for code in codes:
        counted[code] = counted.get(code, 0) + 1
    return counted
