"""One GPU and several behind one gateway: the highest rates with the same p99, and what the gateway takes of a core.

GPUs are simulated: engines take a profile's times on this machine, and all else is real. The rates are those of small
pictures, because the host of four fast GPUs needs more cores for large ones than an ordinary machine has. The CPU time
of a portrait is measured apart, at a low rate, for small pictures and for large ones.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from icportrait_client.errors import InvalidRequest

from benchmarks.compare import server_counters
from benchmarks.gateway_limits import cpu_s
from benchmarks.load import run_load
from benchmarks.planning.measured import simulated_server
from benchmarks.planning.profile import ServiceProfile
from benchmarks.planning.question import PROFILES, find_profile
from benchmarks.report import conditions_here
from benchmarks.search import run_search
from benchmarks.settings import DevicesSettings, LoadSettings, SearchSettings
from icportrait.deploy.stub_processes import descendants
from icportrait.errors import IcPortraitError
from icportrait.presets import DEMO_128, SD15_512, Preset
from icportrait.server import ServerProcess

STARTS_WITHIN_S = 120.0
ANSWERED = 'gateway_requests_total{model="ic_portrait",outcome="succeeded"}'


def measure(settings: DevicesSettings, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Search the highest rate of one device and of several, and measure the CPU time of a portrait.

    Args:
        settings: of the run.
        say: is told of each probe.

    Returns:
        Figures and conditions, ready for JSON.
    """
    profile = find_profile(settings.profile, PROFILES)
    small = replace(profile.scaled(settings.slower), preset=DEMO_128)
    searches: dict[int, dict[str, Any]] = {}
    first_per_s = settings.rate_per_s
    for count in (1, settings.devices):
        say(f"{count} simulated {profile.device}")
        with serve(small, count) as server:
            searches[count] = run_search(_search(settings, server, count * first_per_s), say)
        first_per_s = searches[count]["rate_per_s"] or first_per_s
    costs = {}
    for preset in (DEMO_128, SD15_512):
        with serve(replace(profile, preset=preset), settings.devices) as server:
            costs[preset.name] = _cost(settings, server, preset)
            say(f"{preset.name}: {costs[preset.name]}")
    one, several = (searches[count]["rate_per_s"] for count in (1, settings.devices))
    return {
        "simulated": True,
        "device": profile.device,
        "preset_of_rates": DEMO_128.name,
        "devices": {str(count): search for count, search in searches.items()},
        "times_as_many": round(several / one, 3) if one and several else None,
        "a_portrait": costs,
        "conditions": conditions_here(settings),
    }


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


def _search(settings: DevicesSettings, server: ServerProcess, first_per_s: float) -> SearchSettings:
    load = LoadSettings(
        url=server.grpc_url,
        rate_per_s=first_per_s,
        duration_s=settings.duration_s,
        returning=settings.returning,
        seed=settings.seed,
    )
    return SearchSettings(load, settings.p99_ms, longest_s=settings.longest_s, probes=settings.probes)


def _cost(settings: DevicesSettings, server: ServerProcess, preset: Preset) -> dict[str, Any]:
    """Measure the CPU time of a portrait at a low rate."""
    load = LoadSettings(
        url=server.grpc_url,
        rate_per_s=settings.cost_rate_per_s,
        duration_s=settings.duration_s,
        returning=settings.returning,
        seed=settings.seed,
    )
    before, began = _cpu_s(server), server_counters(server.metrics_url)[ANSWERED]
    if run_load(load).interrupted_s is not None:
        raise KeyboardInterrupt
    count = int(server_counters(server.metrics_url)[ANSWERED] - began)
    if not count:
        raise IcPortraitError(f"{preset.name}: no portrait was answered")
    spent_ms = {part: 1000 * (after - before[part]) / count for part, after in _cpu_s(server).items()}
    return {
        "portraits": count,
        "gateway_cpu_ms": round(spent_ms["gateway"], 2),
        "all_processes_cpu_ms": round(spent_ms["all"], 2),
        "per_s_of_a_gateways_core": round(1000 / spent_ms["gateway"], 1),
    }


def _cpu_s(server: ServerProcess) -> dict[str, float]:
    """Return the CPU time of the gateway's own process, and of all of the server's processes together."""
    assert server.process
    gateway = server.process.pid
    return {"gateway": cpu_s(gateway), "all": sum(map(cpu_s, (gateway, *descendants(gateway))))}


def table(report: dict[str, Any]) -> str:
    """Write the figures as lines for a reader."""
    lines = []
    for count, search in report["devices"].items():
        low, high = ("-" if value is None else f"{value:.2f}" for value in search["interval_per_s"])
        rate = (
            "not found" if search["rate_per_s"] is None else f"{search['rate_per_s']:.2f}/s, surely {low} to {high}/s"
        )
        lines.append(f"{count} simulated {report['device']}: {rate}")
    if report["times_as_many"] is not None:
        settings = report["conditions"]["arguments"]
        goal = f"a p99 of {settings['p99_ms']:g} ms and engines {settings['slower']:g} times as slow"
        lines.append(f"{report['times_as_many']:.2f} times as many, with {goal}")
    for preset, cost in report["a_portrait"].items():
        lines.append(
            f"{preset}: {cost['gateway_cpu_ms']:.1f} ms of the gateway a portrait, {cost['all_processes_cpu_ms']:.1f} "
            f"of all processes; the gateway fills a core at {cost['per_s_of_a_gateways_core']:.0f}/s"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure one device and several.

    Returns:
        0, or 1 after an error. A wrong command line ends the process with 2.
    """
    default = DevicesSettings()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.devices", description=__doc__)
    for flag, name, meaning in (
        ("--devices", "devices", "devices beside one alone"),
        ("--slower", "slower", "factor on the engines' times, so that this machine's cores are not the limit"),
        ("--p99-ms", "p99_ms", "the goal of both"),
        ("--start", "rate_per_s", "requests a second in the first probe of one device"),
        ("--duration", "duration_s", "seconds of a probe that leaves no doubt, and of a measurement of CPU time"),
        ("--longest", "longest_s", "seconds of a probe that leaves one"),
        ("--probes", "probes", "rates that are tried"),
        ("--seed", "seed", "the same seed, the same requests"),
    ):
        value = getattr(default, name)
        help_text = f"{meaning} (default: %(default)g)"
        parser.add_argument(flag, dest=name, type=type(value), default=value, metavar="N", help=help_text)
    parser.add_argument("--profile", default=default.profile, metavar="NAME", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    fields = vars(parser.parse_args(argv))
    out = fields.pop("out")
    try:
        settings = DevicesSettings(**fields)
    except InvalidRequest as error:
        parser.error(str(error))
    try:
        report = measure(settings, lambda line: print(line, file=sys.stderr, flush=True))
    except IcPortraitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(report))
    if out is not None:
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
