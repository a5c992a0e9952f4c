"""Break every part of a server under load, and say what callers saw and how long the server took to come back."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.chaos.callers import CALLERS, Callers, portraits
from tests.chaos.faults import CLOCK_FILE, FAULTS, MOUNTED, SHORT, Fault, Recovery, State
from tests.chaos.site import STARTS, Site, make_repository, running
from tests.conftest import EXAMPLES

RATIO = 1.2
"""Longest recovery, in cold starts of the same run."""
COLD_STARTS = 3
SHM_SIZE, DISK_SIZE = "96m", "256m"
PICTURES = {"profile": "hopper.jpg", "reference": "astronaut.jpg"}


@dataclass
class Result:
    """A fault's outcome."""

    fault: Fault
    skipped: str = ""
    took_s: list[float] = field(default_factory=list)
    cold_s: float = 0.0
    """The last cold start before it: where the machine was slower then than over the run, this one counts."""
    answered: int = 0
    lost: list[str] = field(default_factory=list)
    changed: int = 0
    """Portraits that weren't their seed's."""
    longest_s: float = 0.0
    seen: Counter[str] = field(default_factory=Counter)
    failed: str = ""
    """The reason why it never was over."""
    has_traceback: bool = False

    def verdict(self, cold_s: float | None) -> str:
        """Return what is wrong; an empty text where nothing is.

        Args:
            cold_s: a cold start's seconds; None where times don't count.
        """
        if self.failed:
            return self.failed
        if self.lost:
            return f"{len(self.lost)} lost: {self.lost[0]}"
        if self.changed:
            return f"{self.changed} portraits were other ones"
        pattern = f"served|{self.fault.may_see}" if self.fault.may_see else "served"
        if unknown := [answer for answer in self.seen if not re.fullmatch(pattern, answer)]:
            return f"callers got: {unknown[0]}"
        if self.has_traceback and not self.fault.logs_traceback:
            return "a traceback in the log"
        if cold_s is not None and self.median_s > (most_s := RATIO * max(cold_s, self.cold_s) + self.fault.pause_s):
            return f"took {self.median_s:.1f} s, expected {most_s:.1f} s or less"
        return ""

    @property
    def median_s(self) -> float:
        return statistics.median(self.took_s) if self.took_s else float("nan")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="faults whose name has it")
    parser.add_argument("--callers", type=int, default=CALLERS, help="default: %(default)s")
    parser.add_argument("--short", action="store_true", help="a few faults, once each; their times don't count")
    args = parser.parse_args(argv)
    faults = [fault for fault in FAULTS if re.search(args.only, fault.name) and (not args.short or fault.name in SHORT)]
    if not faults:
        parser.error(
            f"--only: no fault's name has {args.only!r}; they are: {', '.join(fault.name for fault in FAULTS)}"
        )
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        mounting = _mounting(folder, argv if argv is not None else sys.argv[1:])
        if mounting and not os.environ.get(MOUNTED):
            return subprocess.run(mounting, env={**os.environ, MOUNTED: folder}, check=False).returncode
        return Run(Path(os.environ.get(MOUNTED, folder)), args.callers, args.short).run(faults)


def _mounting(folder: str, argv: list[str]) -> list[str]:
    """Return this command with small file systems of its own; nothing where that isn't allowed."""
    mounts = f"mount -t tmpfs -o size={SHM_SIZE} chaos /dev/shm && mount -t tmpfs -o size={DISK_SIZE} chaos '{folder}'"
    unshare = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"]), "sh", "-c"]
    with contextlib.suppress(OSError):
        if subprocess.run([*unshare, mounts], check=False, capture_output=True).returncode == 0:
            return [*unshare, f'{mounts} && exec "$@"', "sh", sys.executable, "-m", "tests.chaos", *argv]
    return []


class Run:
    """One run over faults, on as few servers as their restarts allow."""

    def __init__(self, folder: Path, callers: int, is_short: bool) -> None:
        self._folder, self._callers, self._is_short = folder, callers, is_short
        self._repository = make_repository(folder)
        self._pictures = {name: (EXAMPLES / file).read_bytes() for name, file in PICTURES.items()}
        self._expected: dict[int, bytes] = {}
        self._cold_s: list[float] = []
        self._stack = contextlib.ExitStack()
        self._site: Site | None = None
        self._sites = 0

    def run(self, faults: list[Fault]) -> int:
        """Let them strike, print the table and return the exit status."""
        results = []
        began_s = time.monotonic()
        with contextlib.closing(self._stack):
            while len(self._cold_s) < (1 if self._is_short else COLD_STARTS):
                self._start({})
            for number, fault in enumerate(faults, 1):
                results.append(result := self._result(fault))
                end = (result.skipped and "skipped") or result.verdict(None) or f"over in {result.median_s:.1f} s"
                say(f"{time.monotonic() - began_s:6.0f} s  {number} of {len(faults)}  {fault.name}: {end}")
        cold_s = statistics.median(self._cold_s)
        Console(width=None if sys.stdout.isatty() else 200).print(_table(results, cold_s, self._is_short))
        print(f"A cold start takes {cold_s:.1f} s here, the median of {len(self._cold_s)} of this run;")
        print("where the last one before a fault took longer, on a machine that did other things, that one counts.")
        print(f"A recovery's time is the median of its tries, and must be within {RATIO} cold starts. Where a try to")
        print("start may have begun before the fault was mended, the seconds of that try are added, as shown.")
        wrong = [result for result in results if not result.skipped and result.verdict(self._limit(cold_s))]
        skipped = sum(bool(result.skipped) for result in results)
        print(f"{len(results) - len(wrong) - skipped} passed, {len(wrong)} failed, {skipped} skipped")
        return bool(wrong)

    def _limit(self, cold_s: float) -> float | None:
        return None if self._is_short else cold_s

    def _start(self, environment: dict[str, str]) -> Site:
        """Start a server of its own, and stop the one before."""
        self._stack.close()
        self._sites += 1
        folder = self._folder / str(self._sites)
        if CLOCK_FILE in environment:
            environment = {**environment, "FAKETIME_TIMESTAMP_FILE": str(folder / "clock")}
        site = Site(self._repository, folder, environment, flags=("--pictures-kept=0",))
        (folder / "clock").write_text("+0")
        took_s = self._stack.enter_context(running(site))
        if not environment:
            self._cold_s.append(took_s)
        self._expected = self._expected or portraits(site, self._pictures)
        self._site, self._environment = site, environment
        return site

    def _result(self, fault: Fault) -> Result:
        result = Result(fault, fault.needs())
        if result.skipped:
            return result
        site = self._site
        if (
            site is None
            or fault.environment
            or self._environment
            or not site.is_ready()
            or site.metric(STARTS) - 1 + fault.engine_restarts > 3
        ):
            try:
                site = self._start(fault.environment)
            except TimeoutError as error:
                self._site, result.failed = None, f"it didn't start: {error}"
                return result
        result.cold_s = self._cold_s[-1]
        callers = Callers(site, self._pictures, self._expected, self._callers)
        logged = len(site.log())
        try:
            with callers.calling():
                callers.until_all_were_answered()
                for _ in range(1 if self._is_short else fault.times):
                    result.took_s.append(_suffer(site, fault))
                    callers.until_all_were_answered()
        except (AssertionError, TimeoutError, OSError) as error:
            result.failed = f"{error}"
        result.answered, result.lost = sum(callers.answered), callers.lost
        result.changed, result.longest_s, result.seen = len(callers.changed), callers.longest_s, callers.seen
        result.has_traceback = "Traceback" in site.log()[logged:]
        return result


def _suffer(site: Site, fault: Fault) -> float:
    """Let a fault strike and wait until it is over; return the seconds from its mending, or else from the strike."""
    before, began_s = State.of(site), time.monotonic()
    began_s = fault.strike(site) or began_s
    site.until(lambda: fault.is_over(site, before))
    return time.monotonic() - began_s


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


def _table(results: list[Result], cold_s: float, is_short: bool) -> Table:
    table = Table(show_lines=True)
    for name in ("fault", "restarts", "callers who don't try again", "tried again: lost / answered, longest"):
        table.add_column(name, overflow="fold")
    for name in ("ready after", "cold starts", "bytes", "verdict"):
        table.add_column(name, overflow="fold")
    for result in results:
        fault = result.fault
        if result.skipped:
            table.add_row(fault.name, fault.recovery.value, *5 * [""], f"skipped: {result.skipped}")
            continue
        is_timed = fault.recovery is not Recovery.NONE
        table.add_row(
            fault.name,
            fault.recovery.value,
            "\n".join(f"{count} {answer}" for answer, count in result.seen.most_common(4)),
            f"{len(result.lost)} / {result.answered}, {result.longest_s:.1f} s",
            " ".join(f"{each:.1f}" for each in result.took_s) + " s",
            f"{result.median_s / cold_s:.2f}" + (f" (+{fault.pause_s:g} s)" if fault.pause_s else "")
            if is_timed
            else "",
            "other" if result.changed else "the same",
            result.verdict(None if is_short else cold_s)[:300] or "passed",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
