"""A burst, followed by real servers and by the planner's: the same requests, the same rule, the same latency table."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.planning.autoscale import curve_calls
from benchmarks.planning.fleet import Fleet, FleetRun, FleetSettings
from benchmarks.planning.profile import ServiceProfile
from benchmarks.planning.question import find_profile
from benchmarks.planning.scaling_rule import SLOTS, read_rule
from benchmarks.planning.simulation import OK
from benchmarks.planning.workload import Workload
from icportrait.contract import ENGINES
from icportrait.presets import DEMO_128
from icportrait.runtime.latency_table import LatencyTable
from tests.e2e.conftest import simulated_repository
from tests.scale.autoscaler import RealFleet, Seen, prometheus
from tests.scale.load import OpenLoad, Outcome, until
from tests.scale.proxies import haproxy
from tests.scale.replicas import Replica, running
from tests.scale.tables import TABLES

FASTER = 15.0
"""Factor by which the rule's times are shorter, and Prometheus'; the cold start is what it is."""
MOST = 6
STEPS, STEP_MS, OTHER_MS = 4, 300.0, 5.0
"""A server with 16 slots answers 13 requests a second."""
PEAK_PER_S = 45.0
CURVE = ((0.0, 0.2), (24.5, 0.2), (25.0, 1.0), (60.0, 1.0), (60.5, 0.2), (125.0, 0.2))
BEGINS_S = 10.0
"""Moment at which the autoscalers begin, because a server without an answer seems to be slow."""
LIMIT_MS = 4000.0
CALLERS, BUCKET_S = 4, 12.5


def profile() -> ServiceProfile:
    """Return the servers' own times; the host's are measured ones of two cores."""
    times = {name: {1: STEP_MS if name == "unet" else OTHER_MS} for name in ENGINES}
    host = replace(find_profile("cpu-avx2-demo-128-fp32", Path()).host, workers=1)
    return ServiceProfile.of_table(
        "scale-test", LatencyTable("test device", times), DEMO_128, precision="fp32", origin="computed", host=host
    )


def test_real_servers_and_the_planner_follow_a_burst(scale_folder: Path, small: dict[str, bytes]) -> None:
    (scale_folder / "slow").mkdir()
    repository = simulated_repository(
        scale_folder / "slow", {name: STEP_MS if name == "unet" else OTHER_MS for name in ENGINES}
    )
    read = read_rule()
    # More rows make no step longer here, so that a server does with more of them.
    triggers = tuple(replace(each, target=12.0) if each.name == SLOTS else each for each in read.triggers)
    rule = replace(read, most=MOST, triggers=triggers)
    duration_s = CURVE[-1][0]
    calls = [
        replace(call, steps=STEPS, profile=0, reference=0)
        for call in curve_calls(Workload(rate_per_s=PEAK_PER_S), CURVE, seed=11)
    ]
    fast = FleetSettings(rule, cold_start_s=0.0).faster(FASTER)
    flags = ("--picture-workers=1",)
    replicas = [Replica(f"s{number}", repository, scale_folder / f"s{number}", flags) for number in range(MOST)]
    fixed = {**small, "num_inference_steps": STEPS, "guidance_scale": 1.0}
    requests = [(number % CALLERS, {**fixed, "seed": number}) for number in range(64)]
    with (
        tempfile.TemporaryDirectory(prefix="ic-") as proxy_folder,
        tempfile.TemporaryDirectory(prefix="ic-") as folder,
        running(*replicas[: rule.least]),
        haproxy(Path(proxy_folder), replicas) as proxy,
        prometheus(Path(folder), fast) as url,
    ):
        for replica in replicas[rule.least : 3]:
            proxy.drain(replica)
        fleet = RealFleet(replicas, rule.least, proxy, url, Path(folder), fast)
        try:
            # A caller who tries again would hide a refusal, which the planner counts.
            callers = [(proxy.addresses, {"attempts": 1}) for _ in range(CALLERS)]
            with OpenLoad(callers, requests, [call.send_s for call in calls]) as load:
                until(lambda: time.monotonic() >= load.began_s + BEGINS_S)
                with fleet.scaling():
                    load.wait()
                    time.sleep(max(0.0, load.began_s + duration_s - time.monotonic()))
        finally:
            for replica in replicas:
                replica.stop()
    started_s = [seconds for replica in replicas for seconds in replica.start_s][rule.least :]
    cold_start_s = statistics.mean(started_s)
    planned = Fleet(profile(), replace(fast, cold_start_s=cold_start_s), rule.least, begins_s=BEGINS_S).run(
        calls, duration_s
    )
    real = [(outcome.due_s - load.began_s, outcome) for outcome in load.outcomes]
    TABLES.add(
        "A burst: replicas and answers, real and planned",
        *(row(begin_s, real, fleet.seen, planned) for begin_s in np.arange(BUCKET_S, duration_s, BUCKET_S)),
        note=(
            f"rule {FASTER:g} times as fast, at most {MOST} replicas; {len(started_s)} cold starts of "
            f"{min(started_s):.1f} to {max(started_s):.1f} s, planned with {cold_start_s:.1f} s; "
            f"{fleet.failed_starts} starts failed; "
            f"goodput within {LIMIT_MS:g} ms"
        ),
    )
    good = [not outcome.error and outcome.latency_ms <= LIMIT_MS for _, outcome in real]
    whole = {"real": sum(good) / len(good), "planned": planned.goodput(LIMIT_MS)}
    most = {"real": max(each.wanted for each in fleet.seen), "planned": planned.most}
    fixed_s = max(most.values()) * duration_s
    TABLES.add(
        "A burst: in all",
        *(
            {
                "": name,
                "requests": len(calls),
                "without portrait": errors,
                "goodput": round(whole[name], 4),
                "answered, p50 ms": round(p50),
                "p99 ms": round(p99),
                "most replicas": most[name],
                "replica seconds": round(paid_s),
                "of as many all the time": f"{paid_s / fixed_s:.0%}",
            }
            for name, errors, p50, p99, paid_s in (
                (
                    "real",
                    sum(bool(each.error) for _, each in real),
                    *np.percentile([each.latency_ms for _, each in real if not each.error], (50, 99)),
                    fleet.paid_s,
                ),
                (
                    "planned",
                    planned.refused,
                    *np.percentile([1000 * each.latency_s for each in planned.passages if each.code == OK], (50, 99)),
                    planned.replica_s,
                ),
            )
        ),
    )
    assert len(real) == len(calls)
    assert most["real"] >= 4 and abs(most["real"] - most["planned"]) <= 1
    assert max(fleet.seen[-1].wanted, planned.points[-1].wanted) <= rule.least + 1
    assert abs(whole["real"] - whole["planned"]) < 0.1


def row(begin_s: float, real: list[tuple[float, Outcome]], seen: list[Seen], planned: FleetRun) -> dict[str, object]:
    """Return a while's figures of both fleets."""
    end_s = begin_s + BUCKET_S
    ours = [outcome for due_s, outcome in real if begin_s <= due_s < end_s]
    theirs = [passage for passage in planned.passages if begin_s <= passage.call.send_s < end_s]
    looked = [each for each in seen if begin_s <= each.at_s + BEGINS_S < end_s]
    points = [each for each in planned.points if begin_s <= each.at_s < end_s]
    good = [not each.error and each.latency_ms <= LIMIT_MS for each in ours]
    planned_good = [each.code == OK and 1000 * each.latency_s <= LIMIT_MS for each in theirs]
    return {
        "from s": float(begin_s),
        "requests a second": round(len(ours) / BUCKET_S, 1),
        "wanted, real": f"{min(each.wanted for each in looked)} to {max(each.wanted for each in looked)}",
        "wanted, planned": f"{min(each.wanted for each in points)} to {max(each.wanted for each in points)}",
        "ready, real": looked[-1].ready,
        "ready, planned": points[-1].ready,
        "goodput, real": round(sum(good) / len(good), 3),
        "goodput, planned": round(sum(planned_good) / len(planned_good), 3),
        "p99 ms, real": round(float(np.percentile([each.latency_ms for each in ours], 99))),
        "p99 ms, planned": round(float(np.percentile([1000 * each.latency_s for each in theirs], 99))),
    }
