"""One GPU and several behind one gateway, at the same rate for each: latencies, and what the gateway takes of a core.

GPUs are simulated: engines take a profile's times on this machine, and all else is real. Where the p99 of N devices at
N times the rate isn't above the p99 of one, N devices serve at least N times as much with the same p99. One and several
are measured in turn, so that a machine that gets slower meanwhile is no difference between them.

The rates are those of small pictures and of engines that take a multiple of their time, because a host of fast GPUs
needs more cores than an ordinary machine has. The CPU time of a portrait is measured apart, for small pictures and
large ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Any

from benchmarks.calls import OK
from benchmarks.compare import server_counters
from benchmarks.gateway_limits import cpu_s
from benchmarks.load import LoadRun, run_load
from benchmarks.planning.measured import simulated_server
from benchmarks.planning.profile import ServiceProfile
from benchmarks.planning.question import PROFILES, find_profile
from benchmarks.report import conditions_here, run_fell_behind
from benchmarks.settings import DevicesSettings, LoadSettings
from benchmarks.statistics import quantile
from icportrait.deploy.stub_processes import descendants
from icportrait.errors import IcPortraitError
from icportrait.presets import DEMO_128, SD15_512, Preset
from icportrait.server import ServerProcess

STARTS_WITHIN_S = 120.0
ANSWERED = 'gateway_requests_total{model="ic_portrait",outcome="succeeded"}'


@dataclass
class _Runs:
    """Runs of one number of devices."""

    runs: list[LoadRun] = field(default_factory=list)
    gateway_shares: list[float] = field(default_factory=list)
    """Shares of a core, by run."""

    def add(self, load: LoadSettings) -> None:
        """Put a load on a server."""
        self.runs.append(_run(load))

    def figures(self) -> dict[str, Any]:
        """Return the figures of all rounds together; a request that failed takes for ever."""
        sent = [each for run in self.runs for each in run.outcomes if each.request.send_s >= run.settings.warm_up_s]
        latencies_ms = [1000 * each.latency_s if each.answer.code == OK else math.inf for each in sent]
        counted_s = sum(run.settings.duration_s - run.settings.warm_up_s for run in self.runs)
        p99 = quantile(latencies_ms, 0.99)
        return {
            "rate_per_s": round(len(sent) / counted_s, 3),
            "requests": len(sent),
            "failed": sum(each.answer.code != OK for each in sent),
            "p50_ms": _rounded(quantile(latencies_ms, 0.5).value),
            "p99_ms": {name: _rounded(getattr(p99, name)) for name in ("value", "low", "high")},
            # Of few requests it has no interval.
            "sample_p99_ms": _rounded(sorted(latencies_ms)[math.ceil(0.99 * len(sent)) - 1]),
            "gateway_share": round(fmean(self.gateway_shares), 4),
            "fell_behind": run_fell_behind(self.runs),
        }


def measure(settings: DevicesSettings, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure one device and several, and the CPU time of a portrait.

    Args:
        settings: of the run.
        say: is told what goes on, a line at a time.

    Returns:
        Figures and conditions, ready for JSON.

    Raises:
        IcPortraitError: a server doesn't start, or nothing is answered.
        KeyboardInterrupt: as a load's run swallows it, it is raised again.
    """
    profile = find_profile(settings.profile, PROFILES)
    runs = measure_rates(settings, say)
    costs = {}
    for preset in (DEMO_128, SD15_512):
        with serve(replace(profile, preset=preset), settings.devices) as server:
            costs[preset.name] = _cost(settings, server, preset)
        say(f"{preset.name}: {costs[preset.name]}")
    return {
        "simulated": True,
        "device": profile.device,
        "preset": DEMO_128.name,
        "steps": list(LoadSettings.steps),
        "devices": runs,
        "a_portrait": costs,
        "conditions": conditions_here(settings),
    }


def measure_rates(settings: DevicesSettings, say: Callable[[str], None] = lambda _: None) -> dict[str, dict[str, Any]]:
    """Measure one device and several at the same rate for each; return the figures by the number of devices."""
    small = replace(find_profile(settings.profile, PROFILES).scaled(settings.slower), preset=DEMO_128)
    runs = {1: _Runs(), settings.devices: _Runs()}
    for number in range(settings.rounds):
        for count, made in runs.items():
            with serve(small, count) as server:
                # One device gets fewer requests in a second, and is measured for longer.
                seconds = settings.duration_s * (settings.devices / 2 if count == 1 else 1)
                load = _load(settings, server, count * settings.rate_per_s, seconds, settings.seed + number)
                spent = _spent(server, partial(made.add, load))
                made.gateway_shares.append(spent["gateway"] / spent["passed"])
            say(f"round {number + 1}, {count}: {_Runs(made.runs[-1:], made.gateway_shares[-1:]).figures()}")
    return {str(count): made.figures() for count, made in runs.items() if made.runs}


@contextmanager
def serve(profile: ServiceProfile, count: int) -> Iterator[ServerProcess]:
    """Start a server with engines on some simulated devices, wait until all are up, and end it."""
    devices = [str(number) for number in range(count)]
    with simulated_server(profile, flags=(f"--devices={','.join(devices)}",)) as server:
        end_s = time.monotonic() + STARTS_WITHIN_S
        up = [f'gateway_engine_ready{{device="{device}"}}' for device in devices]
        while not all(server_counters(server.metrics_url).get(name) for name in up):
            if time.monotonic() > end_s:
                raise IcPortraitError(f"{count} engines were not up after {STARTS_WITHIN_S:g} s")
            time.sleep(0.2)
        yield server


def _load(
    settings: DevicesSettings, server: ServerProcess, rate_per_s: float, seconds: float, seed: int
) -> LoadSettings:
    return LoadSettings(
        url=server.grpc_url, rate_per_s=rate_per_s, duration_s=seconds, returning=settings.returning, seed=seed
    )


def _run(load: LoadSettings) -> LoadRun:
    run = run_load(load)
    if run.interrupted_s is not None:
        raise KeyboardInterrupt
    return run


def _cost(settings: DevicesSettings, server: ServerProcess, preset: Preset) -> dict[str, Any]:
    """Measure the CPU time of a portrait at a low rate, beyond the time that an idle server takes."""
    idle = _spent(server, lambda: time.sleep(settings.idle_s))
    began = server_counters(server.metrics_url)[ANSWERED]
    load = _load(settings, server, settings.cost_rate_per_s, settings.cost_s, settings.seed)
    busy = _spent(server, lambda: _run(load))
    count = int(server_counters(server.metrics_url)[ANSWERED] - began)
    if not count:
        raise IcPortraitError(f"{preset.name}: no portrait was answered")
    each_s = {part: (busy[part] - busy["passed"] * idle[part] / idle["passed"]) / count for part in ("gateway", "all")}
    idle_share = idle["gateway"] / idle["passed"]
    return {
        "portraits": count,
        "gateway_idle_share": round(idle_share, 4),
        "gateway_cpu_ms": round(1000 * each_s["gateway"], 2),
        "all_processes_cpu_ms": round(1000 * each_s["all"], 2),
        "per_s_of_a_gateways_core": round((1 - idle_share) / each_s["gateway"], 1),
    }


def _spent(server: ServerProcess, work: Callable[[], object]) -> dict[str, float]:
    """Return the seconds that have passed during some work, and the CPU time that the server took meanwhile."""
    before, began_s = _cpu_s(server), time.monotonic()
    work()
    spent = {part: after - before[part] for part, after in _cpu_s(server).items()}
    return {**spent, "passed": time.monotonic() - began_s}


def _cpu_s(server: ServerProcess) -> dict[str, float]:
    """Return the CPU time of the gateway's own process, and of all of the server's processes together."""
    assert server.process
    gateway = server.process.pid
    return {"gateway": cpu_s(gateway), "all": sum(map(cpu_s, (gateway, *descendants(gateway))))}


def _rounded(value: float | None) -> float | None:
    return round(value, 1) if value is not None and math.isfinite(value) else None


def table(report: dict[str, Any]) -> str:
    """Write the figures as lines for a reader."""
    lines = [f"{'devices':>8}{'requests/s':>12}{'requests':>10}{'failed':>8}{'p50, ms':>10}  p99, ms"]
    for count, found in report["devices"].items():
        times_ms = found["p50_ms"], *found["p99_ms"].values()
        p50, value, low, high = ("-" if each is None else f"{each:.0f}" for each in times_ms)
        lines.append(
            f"{count:>8}{found['rate_per_s']:>12.2f}{found['requests']:>10}{found['failed']:>8}"
            f"{p50:>10}  {value} ({low} to {high})"
            + ("  INVALID: the generator did NOT keep up" if found["fell_behind"] else "")
        )
    for preset, cost in report["a_portrait"].items():
        lines.append(
            f"{preset}: {cost['gateway_cpu_ms']:.1f} ms of the gateway a portrait, {cost['all_processes_cpu_ms']:.1f} "
            f"of all processes; idle, it takes {cost['gateway_idle_share']:.1%} of a core; "
            f"a core is full at {cost['per_s_of_a_gateways_core']:.0f}/s"
        )
    return "\n".join(lines)
