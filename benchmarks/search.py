"""The highest rate at which a server keeps an objective, to 5 %, in few probes.

A probe is a run of an open loop at one rate. Its requests that miss the objective are counted: those slower than
``p99_ms``, of which 1 % may be, or those not answered within their own deadline. A request that failed or was refused
misses any objective. The share's 95 % interval (``benchmarks.statistics``) decides: all of it below what is allowed,
and the rate is kept; all of it above, and it isn't. Where it lies on both sides the probe goes on, each time as long as
it has been, up to ``longest_s``; then the share itself decides, and the probe is called unsure.

The rate grows four times a probe until one isn't kept, and shrinks likewise until one is. Then the next rate is the
geometric mean of the highest kept and the lowest not kept, until they are within 8 % of each other. Their middle is
within 4 % of the highest rate that is kept, which leaves 1 % for chance. A probe that sent more than the server answers
also shows what it does answer, and the next rates are chosen as if none above that were kept; whether it is so is still
tried. Where a rate surely missed more than a higher one did, the search is invalid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from icportrait_client.errors import InvalidRequest

from benchmarks.calls import LEFT, OK
from benchmarks.load import LoadRun, run_load
from benchmarks.report import conditions_here, in_time, run_fell_behind
from benchmarks.settings import LoadSettings, SearchSettings
from benchmarks.statistics import Quantile, Share, quantile, share

GROWTH = 4.0
WITHIN = 1.08
"""Lowest rate not kept by highest kept at which the search ends."""
_SATURATED = 0.9
"""Share of the sent requests below which the answered ones show the server's limit."""
_STEP = 1.06
"""Least growth from a rate that is kept to the next."""


@dataclass(frozen=True)
class Probe:
    """The result of one rate."""

    rate_per_s: float
    kept: bool
    sure: bool
    """False where the interval has the allowed share inside."""
    requests: int
    missed: Share
    """Share of the requests that missed the objective."""
    p99_ms: Quantile
    answered_per_s: float
    """Answers a second while requests were sent."""
    seconds: float = 0.0
    fell_behind: bool = False


@dataclass(frozen=True)
class Found:
    """The result of a search by now."""

    kept_per_s: float | None
    """Highest rate that is kept below every one that isn't."""
    missed_per_s: float | None
    """Lowest rate that isn't kept."""
    sure_low_per_s: float | None
    """Highest rate that is surely kept."""
    sure_high_per_s: float | None
    """Lowest rate that surely isn't."""

    @property
    def rate_per_s(self) -> float | None:
        """Return the middle of the two rates; None where one is missing."""
        if self.kept_per_s is None or self.missed_per_s is None:
            return None
        return math.sqrt(self.kept_per_s * self.missed_per_s)

    @property
    def is_within(self) -> bool:
        """Tell whether the two rates are near enough."""
        if self.kept_per_s is None or self.missed_per_s is None:
            return False
        return self.missed_per_s <= WITHIN * self.kept_per_s


def found(probes: Sequence[Probe]) -> Found:
    """Return what the probes tell by now. Of rates that contradict each other, one that is surely kept counts."""
    sure_kept = max((probe.rate_per_s for probe in probes if probe.kept and probe.sure), default=0.0)
    missed = [probe for probe in probes if not probe.kept and probe.rate_per_s > sure_kept]
    lowest = min((probe.rate_per_s for probe in missed), default=math.inf)
    kept = max((probe.rate_per_s for probe in probes if probe.kept and probe.rate_per_s < lowest), default=0.0)
    sure_missed = min((probe.rate_per_s for probe in missed if probe.sure), default=math.inf)
    return Found(kept or None, _finite(lowest), sure_kept or None, _finite(sure_missed))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def contradict(probes: Sequence[Probe]) -> bool:
    """Tell whether a rate surely missed more than a higher one: the server or its machine changed in between."""
    return any(
        slow.rate_per_s < fast.rate_per_s and slow.missed.low > fast.missed.high for slow in probes for fast in probes
    )


def next_rate(probes: Sequence[Probe], first_per_s: float) -> float | None:
    """Return the rate to try next; None when the search is done."""
    if not probes:
        return first_per_s
    by_now = found(probes)
    if by_now.is_within:
        return None
    kept, missed = by_now.kept_per_s, by_now.missed_per_s
    if missed is None:
        assert kept is not None
        return kept * GROWTH
    limit = min((_limit(probe) for probe in probes), default=math.inf)
    if kept is None:
        return min(missed / GROWTH, limit / math.sqrt(GROWTH))
    return max(math.sqrt(kept * min(missed, limit)), kept * _STEP)


def _limit(probe: Probe) -> float:
    """Return the rate that a server answered when it was sent more; infinite where it kept up."""
    is_saturated = not probe.kept and 0 < probe.answered_per_s < _SATURATED * probe.rate_per_s
    return probe.answered_per_s if is_saturated else math.inf


def search(
    probe: Callable[[float], Probe], first_per_s: float, probes: int, say: Callable[[Probe], None] = lambda _: None
) -> list[Probe]:
    """Try rates until the search is done, ``probes`` were made, or a rate is beyond any that can be tried.

    Raises:
        InvalidRequest: the first rate can't be tried.
    """
    made: list[Probe] = []
    while len(made) < probes and (rate_per_s := next_rate(made, first_per_s)) is not None:
        try:
            made.append(probe(rate_per_s))
        except InvalidRequest:
            if not made:
                raise
            break  # a rate so low that no request falls into a probe, or so high that no generator has the memory
        say(made[-1])
    return made


def judge(
    rate_per_s: float, latencies_ms: Sequence[float], missed: Sequence[bool], allowed_share: float, **more: Any
) -> Probe:
    """Judge one rate by its requests.

    Args:
        rate_per_s: the rate.
        latencies_ms: of all requests in the order of sending, infinite for those that failed.
        missed: the requests that missed the objective.
        allowed_share: of the requests that may.
        more: the probe's other fields.
    """
    of_missed = share(missed, latencies_ms)
    return Probe(
        rate_per_s=rate_per_s,
        kept=of_missed.value <= allowed_share,
        sure=not of_missed.low <= allowed_share <= of_missed.high,
        requests=len(latencies_ms),
        missed=of_missed,
        p99_ms=quantile(latencies_ms, 0.99),
        **more,
    )


class ServerProbe:
    """Probes of a running server."""

    def __init__(self, settings: SearchSettings, run: Callable[[LoadSettings], LoadRun] = run_load) -> None:
        """Take the objective; calling it makes a probe."""
        self._settings = settings
        self._run = run
        self._runs = 0

    def __call__(self, rate_per_s: float) -> Probe:
        """Run one rate until it is sure, or ``longest_s`` are over.

        Raises:
            KeyboardInterrupt: as a run swallows it, it is raised again.
        """
        settings, parts = self._settings, list[LoadRun]()
        seconds = 0.0
        while True:
            ask_s = min(max(seconds, settings.load.duration_s), settings.longest_s - seconds)
            # Every part has a seed of its own: the same pictures and moments again would tell nothing new.
            seed = settings.load.seed + self._runs
            load = replace(settings.load, rate_per_s=rate_per_s, duration_s=ask_s, seed=seed)
            self._runs += 1
            parts.append(self._run(load))
            if parts[-1].interrupted_s is not None:
                raise KeyboardInterrupt
            seconds += ask_s
            probe = self._judge(rate_per_s, parts, seconds)
            if probe.sure or settings.longest_s - seconds <= settings.load.warm_up_s:
                return probe

    def _judge(self, rate_per_s: float, parts: Sequence[LoadRun], seconds: float) -> Probe:
        latencies_ms, missed = list[float](), list[bool]()
        answered, counted_s = 0, 0.0
        for part in parts:
            warm_up_s, until_s = part.settings.warm_up_s, part.settings.duration_s
            counted_s += until_s - warm_up_s
            answered += sum(
                each.answer.code == OK and warm_up_s <= (each.answered_s or 0) < until_s for each in part.outcomes
            )
            counted = [each for each in part.outcomes if each.request.send_s >= warm_up_s and each.answer.code != LEFT]
            latencies_ms += [1000 * each.latency_s if each.answer.code == OK else math.inf for each in counted]
            if self._settings.goodput is not None:
                missed += [not in_time(each) for each in counted]
        if self._settings.p99_ms is not None:
            missed = [latency_ms > self._settings.p99_ms for latency_ms in latencies_ms]
        if not missed:
            raise InvalidRequest(f"no request falls into the probe at {rate_per_s:g}/s; ask for a longer --duration")
        return judge(
            rate_per_s,
            latencies_ms,
            missed,
            self._settings.allowed_share,
            answered_per_s=answered / counted_s,
            seconds=seconds,
            fell_behind=run_fell_behind(parts),
        )


def run_search(settings: SearchSettings, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Search on a running server.

    Returns:
        The rate, its interval, and every probe, ready for JSON.

    Raises:
        InvalidRequest: a picture can't be read, or no request falls into a probe.
        ServerUnavailable: no server answers, or its model isn't ready.
    """
    probes = search(
        ServerProbe(settings),
        settings.load.rate_per_s,
        settings.probes,
        lambda probe: say(probe_line(_row(probe), settings.allowed_share)),
    )
    result = found(probes)
    return {
        "rate_per_s": _rounded(result.rate_per_s),
        "interval_per_s": [_rounded(result.sure_low_per_s), _rounded(result.sure_high_per_s)],
        "within_5_percent": result.is_within,
        "contradictory": contradict(probes),
        "allowed_share": round(settings.allowed_share, 6),
        "probes": [_row(probe) for probe in probes],
        "conditions": conditions_here(settings),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _row(probe: Probe) -> dict[str, Any]:
    p99 = probe.p99_ms
    return {
        "rate_per_s": round(probe.rate_per_s, 3),
        "kept": probe.kept,
        "sure": probe.sure,
        "seconds": round(probe.seconds, 1),
        "requests": probe.requests,
        "missed": {
            name: round(value, 5)
            for name, value in (("share", probe.missed.value), ("low", probe.missed.low), ("high", probe.missed.high))
        },
        "p99_ms": {
            name: round(value, 2) if value is not None and math.isfinite(value) else None
            for name, value in (("value", p99.value), ("low", p99.low), ("high", p99.high))
        },
        "p99_needs": p99.needed,
        "answered_per_s": round(probe.answered_per_s, 3),
        "fell_behind": probe.fell_behind,
    }


def probe_line(probe: dict[str, Any], allowed: float) -> str:
    """Write one probe as a line."""
    missed = probe["missed"]
    verdict = "kept" if probe["kept"] else "not kept"
    doubt = "" if probe["sure"] else f", unsure: not enough samples in {probe['seconds']:g} s"
    behind = ", INVALID: the generator did NOT keep up" if probe["fell_behind"] else ""
    return (
        f"{probe['rate_per_s']:>9.2f}/s  {probe['requests']:>6} requests, {missed['share']:.2%} missed"
        f" ({missed['low']:.2%} to {missed['high']:.2%}), {allowed:.2%} may: {verdict}{doubt}{behind}"
    )


def table(report: dict[str, Any]) -> str:
    """Write the figures of ``run_search`` as lines for a reader."""
    settings = report["conditions"]["arguments"]
    objective = (
        f"p99 of at most {settings['p99_ms']:g} ms"
        if settings["goodput"] is None
        else f"{settings['goodput']:.2%} of the requests within their deadline"
    )
    low, high = ("-" if value is None else f"{value:.2f}" for value in report["interval_per_s"])
    lines = [f"the highest rate with {objective}, at {settings['load']['url']}"]
    lines += [probe_line(probe, report["allowed_share"]) for probe in report["probes"]]
    probes = len(report["probes"])
    if report["contradictory"]:
        lines.append(
            "INVALID: a rate surely missed more than a higher one; the server or its machine changed meanwhile"
        )
    if report["rate_per_s"] is None:
        bound = "below" if not any(probe["kept"] for probe in report["probes"]) else "above"
        rate = (min if bound == "below" else max)(probe["rate_per_s"] for probe in report["probes"])
        return "\n".join([*lines, f"not found in {probes} probes: it is {bound} {rate:.2f}/s"])
    lines.append(
        f"{report['rate_per_s']:.2f}/s, surely {low} to {high}/s"
        + ("" if report["within_5_percent"] else "; to less than 5 %, because the probes were used up")
    )
    return "\n".join(lines)
