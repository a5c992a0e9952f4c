"""Keep a server busy with mixed load, and say whether any process grows or answers get slower."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.chaos.site import Site, make_repository, running
from tests.conftest import EXAMPLES
from tests.e2e.caller import settled
from tests.fuzz.watch import REST_S
from tests.soak.load import CALLERS, KINDS, Load, by_kind
from tests.soak.readings import DRIFT, GROWTH, Drift, Growth, Reading, drift, growths, read

DURATION_S, WARM_UP_S, EVERY_S = 1200.0, 120.0, 20.0
KEPT_PICTURES, CACHE_BYTES = 32, 2**20
"""So few that they are full within the warm-up."""
PICTURES = {"profile": "hopper.jpg", "reference": "astronaut.jpg"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--duration", type=float, default=DURATION_S, metavar="S", help="default: %(default)g")
    parser.add_argument(
        "--warm-up", type=float, default=WARM_UP_S, metavar="S", help="growth counts from then on; default: %(default)g"
    )
    parser.add_argument("--every", type=float, default=EVERY_S, metavar="S", help="between readings; %(default)g")
    parser.add_argument("--callers", type=int, default=CALLERS, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the mix; default: %(default)s")
    args = parser.parse_args(argv)
    if args.duration < args.warm_up + 3 * args.every:
        parser.error(f"--duration: {args.duration:g}, expected {args.warm_up + 3 * args.every:g} or more")
    console = Console(stderr=True)
    readings: list[Reading] = []
    p50s_ms: list[float] = []
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        repository = make_repository(Path(folder), CACHE_BYTES)
        site = Site(repository, Path(folder) / "site", flags=(f"--pictures-kept={KEPT_PICTURES}",))
        pictures = {name: (EXAMPLES / file).read_bytes() for name, file in PICTURES.items()}
        load = Load(site.url, site.http_url, pictures, args.seed)
        with running(site), load.running(args.callers):
            began_s = time.monotonic()
            while (now_s := time.monotonic() - began_s) < args.duration:
                time.sleep(min(args.every, args.duration - now_s))
                p50_ms = load.take_p50_ms()
                with load.paused():
                    settled(site.metrics_url)
                    time.sleep(REST_S)
                    reading = read(site.server.process.pid, site.server.shm_regions())
                now_s = time.monotonic() - began_s
                if now_s >= args.warm_up:
                    readings.append(reading)
                    p50s_ms.append(p50_ms)
                memory = sum(value for (_, quantity), value in reading.items() if quantity == "RSS")
                console.print(
                    f"{now_s:6.0f} of {args.duration:.0f} s: {sum(load.ends.values())} requests, p50 {p50_ms:.0f} ms, "
                    f"RSS {memory:.0f} MB{f', {len(load.unexpected)} unexpected' if load.unexpected else ''}",
                    highlight=False,
                )
        ends, restarts = load.ends, len(site.ends)
    found, slower = growths(readings), drift(p50s_ms)
    Console().print(_load_table(load), _table(found), _drift_line(slower, len(p50s_ms)))
    failures = [
        *(f"{kind}: {count} ended with {end!r}" for (kind, end), count in load.unexpected.items()),
        *(f"{kind}: none was sent" for kind in KINDS if not by_kind(ends)[kind]),
        *(f"{each.process}: {each.quantity} grew by {each.share:.1%}" for each in found if each.is_too_much),
    ]
    if restarts:
        failures.append(f"the server ended {restarts} times")
    if slower.is_too_much:
        failures.append(f"p50 rose by {slower.share:.1%}")
    for failure in failures:
        print(f"FAILED {failure}")
    print("failed" if failures else "passed")
    return bool(failures)


def _load_table(load: Load) -> Table:
    table = Table("kind", "must end with", "requests", "ended otherwise")
    for kind, ends in by_kind(load.ends).items():
        expected = KINDS[kind].ends
        table.add_row(kind, expected, str(ends.total()), str(ends.total() - ends[expected]))
    return table


def _table(found: list[Growth]) -> Table:
    table = Table("process", "quantity", "first third", "last third", "growth", f"under {GROWTH:.0%}")
    for each in found:
        if each.first or each.last:
            verdict = "NO" if each.is_too_much else "yes"
            table.add_row(
                each.process, each.quantity, f"{each.first:.1f}", f"{each.last:.1f}", f"{each.share:+.1%}", verdict
            )
    return table


def _drift_line(found: Drift, windows: int) -> str:
    return (
        f"p50 {found.p50_ms:.0f} ms, drift over the run {found.share:+.1%} "
        f"(95 %: {found.low:+.1%} to {found.high:+.1%}; {windows} windows), fails where the low end is over {DRIFT:.0%}"
    )


if __name__ == "__main__":
    sys.exit(main())
