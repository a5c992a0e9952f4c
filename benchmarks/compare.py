"""Ways of batching under the same loads, on the real server with simulated engines.

First whole batches are saturated, which says what they can serve. Then every mode gets each share of that, at the same
moments and with the same steps and seeds; a round has all modes, one after the other, and rounds differ in their seeds.
Each mode of a round has a server of its own, started for it: no other is there beside it, and none begins with what an
earlier round left in its caches.

Engines take a latency table's times. The rest is this machine's, and real: Triton, pictures, the loop.
"""

from __future__ import annotations

import contextlib
import http.client
import math
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.calls import OK
from benchmarks.compare_report import SERVER, medians, run_line
from benchmarks.load import run_load
from benchmarks.report import conditions_here, sample_quantiles, steady_answers, summarise
from benchmarks.settings import CompareSettings, LoadSettings
from icportrait.contract import engine_specs
from icportrait.deploy.repository import assemble
from icportrait.errors import IcPortraitError
from icportrait.manifest import Manifest
from icportrait.metrics import PREFIX
from icportrait.policy import SIMULATED, ServingPolicy
from icportrait.runtime.latency_table import LatencyTable
from icportrait.server import Ports, ServerProcess

BASELINE = "whole"
"""The mode whose capacity the loads are shares of."""
OVERLOAD = 1.5
"""Load that saturates a server, in capacities as the latency table alone has them.

No server has more capacity than that, and refusing more takes CPU: with 3.0 on 2 cores no more was answered.
"""
SATURATED_RUNS = 2
"""Length of the saturated run, in durations.

Answers come a batch at a time, so a short look counts one batch too many or too few.
"""
_METRICS_TIMEOUT_S = 5.0

Say = Callable[[str], None]


def compare(settings: CompareSettings, say: Say = lambda _: None) -> dict[str, Any]:
    """Measure every mode.

    Args:
        settings: the modes and loads.
        say: is told what goes on, a line at a time.

    Returns:
        Figures and conditions, ready for JSON: medians over rounds, the modes' ratios, and each run's own figures.

    Raises:
        IcPortraitError: the export or the latency table isn't one, a server doesn't start or ends, or none answers.
        KeyboardInterrupt: as a load's run swallows it, it is raised again.
    """
    latencies = LatencyTable.read(settings.latency_table)
    manifest = Manifest.read(settings.export)
    with tempfile.TemporaryDirectory(prefix="icportrait-compare-") as name:
        folder = Path(name)
        for mode in {*settings.modes, BASELINE}:
            assemble(settings.export, folder / mode, _policy(settings, mode))
        capacity = _find_capacity(settings, folder, estimated_capacity_per_s(latencies, manifest), say)
        runs = []
        for round_index in range(settings.rounds):
            for mode in settings.modes:
                with _serve(folder, mode) as server:
                    for load_index, share in enumerate(settings.loads):
                        # The second load of a server mustn't find the first one's pictures in the encoder's cache.
                        seed = settings.seed + round_index * len(settings.loads) + load_index
                        load = _load(settings, server, share * capacity["per_s"], seed)
                        figures = measure(server, load)
                        runs.append({"round": round_index + 1, "mode": mode, "load": share, "seed": seed, **figures})
                        say(run_line(runs[-1], settings.rounds))
    policy = _policy(settings, BASELINE)
    return {
        "simulated": True,
        "capacity": capacity,
        "loads": [
            {"share": share, "rate_per_s": round(share * capacity["per_s"], 3), **medians(settings.modes, runs, share)}
            for share in settings.loads
        ],
        "runs": runs,
        "conditions": {
            **conditions_here(settings),
            **capacity["server"],
            "latency_ms": latencies.latency_ms,
            "slots": policy.slots,
            "max_queued_slots": policy.max_queued_slots,
            "steps": list(LoadSettings.steps),
            "guidance_scale": LoadSettings.guidance_scale,
            "warm_up_s": settings.warm_up_s,
        },
    }


def estimated_capacity_per_s(latencies: LatencyTable, manifest: Manifest) -> float:
    """Estimate the requests a second of full whole batches, if only engines took time.

    Profiles count as encoded before.
    """
    slots, (low, high) = ServingPolicy.slots, LoadSettings.steps
    count = high - low + 1
    # The longest of a batch, expected: it is above k unless every slot's steps are at most k.
    longest = low + sum(1 - ((k - low) / count) ** slots for k in range(low + 1, high + 1))
    batch_ms = longest * latencies.of("unet", slots)
    for name, spec in engine_specs(manifest.preset, manifest.precision).items():
        if name != "unet":
            at_once = min(slots, spec.batch.max)
            batch_ms += math.ceil(slots / at_once) * latencies.of(name, at_once)
    return 1000 * slots / batch_ms


def measure(server: ServerProcess, load: LoadSettings) -> dict[str, Any]:
    """Put a load on a server: a run's figures, of what was sent and answered after its warm-up."""
    with _Window(server, load) as window:
        run = run_load(load)
    _check_engine(server)
    if run.interrupted_s is not None:
        raise KeyboardInterrupt
    report = summarise(run)
    counts = {code: kind["count"] for code, kind in report["outcomes"].items()}
    refused, sent = counts.get("UNAVAILABLE", 0), report["requests"]["sent"]
    # Medians over rounds are reported, so that a round's p99 of few answers does no harm.
    steady = sample_quantiles(1000 * outcome.latency_s for outcome in steady_answers(run))
    return {
        "rate_per_s": round(load.rate_per_s, 3),
        "offered_per_s": report["rate_per_s"]["offered"],
        "requests": sent,
        "answers": steady["count"],
        "p50_ms": steady["p50"],
        "p99_ms": steady["p99"],
        "throughput_per_s": report["rate_per_s"]["steady"],
        "refused": round(refused / sent, 4),
        "failed": round((sent - refused - counts.get(OK, 0)) / sent, 4),
        **window.figures(),
        "fell_behind": report["fell_behind"],
        "server": {name: report["conditions"][name] for name in SERVER if name in report["conditions"]},
    }


def _check_engine(server: ServerProcess) -> None:
    """Raise IcPortraitError where the server has ended, or its engine was started again."""
    try:
        starts = server_counters(server.metrics_url).get("gateway_engine_starts_total")
    except (OSError, http.client.HTTPException) as error:
        raise IcPortraitError("the server ended while it was measured") from error
    if starts != 1:
        raise IcPortraitError("the engine ended while it was measured; the server's log has the cause")


class _Window:
    """The server's counters and the machine's CPU times, from the end of a run's warm-up to its last sending.

    The server publishes its counters four times a second; sums and counts are as old as each other.
    """

    def __init__(self, server: ServerProcess, load: LoadSettings) -> None:
        self._url = server.metrics_url
        self._samples: list[Mapping[str, float]] = []
        self._timers = [threading.Timer(after_s, self._sample) for after_s in (load.warm_up_s, load.duration_s)]

    def __enter__(self) -> _Window:
        for timer in self._timers:
            timer.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for timer in self._timers:
            if kind is not None:
                timer.cancel()
            timer.join()

    def figures(self) -> dict[str, float | None]:
        """Return means per step; None where there was no step, or the server's metrics couldn't be read."""
        if len(self._samples) < 2:
            return dict.fromkeys(("outside_engine_ms", "occupancy", "cpu_busy"))
        first, last = self._samples
        return {
            "outside_engine_ms": mean_between(first, last, "step_outside_engine_ms"),
            "occupancy": mean_between(first, last, "step_slots"),
            "cpu_busy": mean_between(first, last, "cpu_busy"),
        }

    def _sample(self) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            self._samples.append({**_cpu_times(), **server_counters(self._url)})


def mean_between(first: Mapping[str, float], last: Mapping[str, float], name: str) -> float | None:
    """Return the mean of the values between two readings of ``<name>_sum`` and ``<name>_count``; None without any."""
    sums, counts = (last.get(f"{name}_{part}", 0.0) - first.get(f"{name}_{part}", 0.0) for part in ("sum", "count"))
    return round(sums / counts, 4) if counts else None


def server_counters(url: str) -> dict[str, float]:
    """Read this project's series from a server's metrics endpoint, by name and ``{label="value"}``."""
    # http.client asks no proxy.
    connection = http.client.HTTPConnection(url, timeout=_METRICS_TIMEOUT_S)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    found = re.findall(rf"^{PREFIX}(\w+(?:{{[^}}]*}})?) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def _cpu_times() -> dict[str, float]:
    """Read all CPUs' busy and whole time; proc_stat(5) describes the file."""
    user, nice, system, idle, iowait, irq, softirq, steal = map(
        float, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    )
    busy = user + nice + system + irq + softirq + steal
    return {"cpu_busy_sum": busy, "cpu_busy_count": busy + idle + iowait}


def _policy(settings: CompareSettings, mode: str) -> ServingPolicy:
    return ServingPolicy(runtime=SIMULATED, latency_table=str(settings.latency_table), batching=mode)


@contextlib.contextmanager
def _serve(folder: Path, mode: str) -> Iterator[ServerProcess]:
    with ServerProcess(folder / mode, Ports.free(), folder / f"{mode}.log") as server:
        yield server


def _load(settings: CompareSettings, server: ServerProcess, rate_per_s: float, seed: int) -> LoadSettings:
    return LoadSettings(
        url=server.grpc_url,
        rate_per_s=rate_per_s,
        duration_s=settings.duration_s,
        warm_up_s=settings.warm_up_s,
        seed=seed,
    )


def _find_capacity(settings: CompareSettings, folder: Path, estimate_per_s: float, say: Say) -> dict[str, Any]:
    """Measure the answers a second of whole batches that always find a full queue."""
    with _serve(folder, BASELINE) as server:
        load = _load(settings, server, OVERLOAD * estimate_per_s, settings.seed)
        found = measure(server, replace(load, duration_s=SATURATED_RUNS * load.duration_s))
    if not found["throughput_per_s"]:
        raise IcPortraitError(f"{BASELINE}: no answer in {settings.duration_s:g} s; ask for a longer --duration")
    capacity = {"mode": BASELINE, "per_s": found["throughput_per_s"], "estimated_per_s": round(estimate_per_s, 3)}
    runs = len(settings.modes) * len(settings.loads) * settings.rounds
    say(
        f"{BASELINE}: {capacity['per_s']:.2f}/s at most, asked for {found['offered_per_s']:.2f}/s;"
        f" now {runs} runs of {settings.duration_s:g} s"
    )
    return capacity | found
