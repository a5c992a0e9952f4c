"""The search for the highest rate, on a simulated server whose capacity is known: which rate next, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from icportrait_client.errors import InvalidRequest

from benchmarks.__main__ import main
from benchmarks.calls import LEFT, Answer
from benchmarks.load import LoadRun, Outcome
from benchmarks.schedule import poisson_schedule
from benchmarks.search import (
    GROWTH,
    WITHIN,
    Probe,
    ServerProbe,
    contradict,
    found,
    judge,
    next_rate,
    probe_line,
    search,
    table,
)
from benchmarks.settings import LoadSettings, SearchSettings
from benchmarks.statistics import Quantile, Share

SERVICE_MS = 10.0
"""Time of a request: the server's capacity is 100 a second."""


def latencies_ms(rate_per_s: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """Simulate a queue with one server, random arrivals and equal services (M/D/1), in virtual time."""
    walk = np.concatenate([[0.0], np.cumsum(SERVICE_MS - rng.exponential(1000 / rate_per_s, count - 1))])
    return walk - np.minimum.accumulate(walk) + SERVICE_MS


@cache
def true_rate_per_s(p99_ms: float) -> float:
    """Find the rate whose p99 it is, of runs so long that chance plays no part."""
    low, high = 1.0, 100.0
    for _ in range(9):
        middle = (low + high) / 2
        p99 = np.quantile(latencies_ms(middle, 400_000, np.random.default_rng(9)), 0.99)
        low, high = (middle, high) if p99 <= p99_ms else (low, middle)
    return (low + high) / 2


def simulated(p99_ms: float, seed: int, first_s: float = 60, longest_s: float = 3840) -> Callable[[float], Probe]:
    """Make a probe of the simulated server, which goes on while it is unsure."""
    rng = np.random.default_rng(seed)

    def probe(rate_per_s: float) -> Probe:
        seconds = first_s
        while True:
            count = max(1, round(seconds * rate_per_s))
            values = latencies_ms(rate_per_s, count, rng)
            answered_per_s = min(rate_per_s, 1000 / SERVICE_MS)
            made = judge(rate_per_s, values, values > p99_ms, 0.01, answered_per_s=answered_per_s, seconds=seconds)
            if made.sure or seconds >= longest_s:
                return made
            seconds *= 2

    return probe


@pytest.mark.parametrize("p99_ms", [70, 150])
@pytest.mark.parametrize("first_per_s", [2, 30, 90, 4000])
def test_the_highest_rate_is_found_to_five_percent_in_eight_probes(p99_ms: float, first_per_s: float) -> None:
    result = found(search(simulated(p99_ms, seed=0), first_per_s, 8))
    assert result.is_within
    assert result.rate_per_s == pytest.approx(true_rate_per_s(p99_ms), rel=0.05)
    assert result.sure_low_per_s is not None and result.sure_high_per_s is not None
    assert result.sure_low_per_s <= true_rate_per_s(p99_ms) * 1.02
    assert result.sure_high_per_s >= true_rate_per_s(p99_ms) * 0.98


def test_probes_that_are_too_short_say_so() -> None:
    probes = search(simulated(60, 0, first_s=2, longest_s=2), 80, 8)
    assert not all(probe.sure for probe in probes)


def made(rate_per_s: float, kept: bool, sure: bool = True, answered_per_s: float | None = None) -> Probe:
    missed = Share(0.0, 0.0, 0.001) if kept else Share(0.5, 0.4, 0.6)
    p99 = Quantile(0.99, 1000, 1.0, 0.9, 1.1, None)
    return Probe(rate_per_s, kept, sure, 1000, missed, p99, rate_per_s if answered_per_s is None else answered_per_s)


def test_the_rate_grows_until_one_is_not_kept_and_shrinks_until_one_is() -> None:
    assert next_rate([], 5.0) == 5.0
    assert next_rate([made(5, True)], 5.0) == 5 * GROWTH
    assert next_rate([made(5, False)], 5.0) == 5 / GROWTH
    assert next_rate([made(5, True), made(20, False)], 5.0) == pytest.approx(10)


def test_an_overloaded_server_shows_where_to_look() -> None:
    """Ask near the answered rate next, and take the rate for missed only where it was tried."""
    overloaded = made(1000, False, answered_per_s=100)
    assert next_rate([overloaded], 5.0) == pytest.approx(50)
    assert next_rate([overloaded, made(50, True)], 5.0) == pytest.approx(math.sqrt(50 * 100))
    assert found([overloaded, made(99, True)]).missed_per_s == 1000
    beyond = next_rate([overloaded, made(99, True)], 5.0)
    assert beyond is not None and 99 < beyond < 99 * WITHIN


def test_the_search_ends_when_the_two_rates_are_near_enough() -> None:
    assert next_rate([made(100, True), made(107, False)], 5.0) is None
    assert next_rate([made(100, True), made(120, False)], 5.0) is not None


def test_a_rate_that_is_surely_kept_outweighs_a_lower_one_that_was_not() -> None:
    probes = [made(50, False, sure=False), made(60, True), made(70, False)]
    assert (found(probes).kept_per_s, found(probes).missed_per_s) == (60, 70)
    doubtful = [made(50, False), made(60, True, sure=False), made(40, True)]
    assert (found(doubtful).kept_per_s, found(doubtful).missed_per_s) == (40, 50)
    assert (found(doubtful).sure_low_per_s, found(doubtful).sure_high_per_s) == (40, 50)


def test_a_lower_rate_that_surely_misses_more_makes_a_search_invalid() -> None:
    kept, missed = made(60, True), made(70, False)
    assert not contradict([kept, missed])
    assert contradict([kept, missed, made(50, False)])
    # An interval that reaches into the other's may be chance.
    doubtful = replace(made(50, False), missed=Share(0.01, 0.0005, 0.02))
    assert not contradict([kept, doubtful])


def test_a_rate_that_can_not_be_tried_ends_the_search_with_what_is_known() -> None:
    settings = SearchSettings(load=LoadSettings(duration_s=30, warm_up_s=5, rate_per_s=1.0), p99_ms=10, longest_s=30)
    probes = search(ServerProbe(settings, Server(latency_ms=50)), 1.0, 8)
    assert 1 <= len(probes) < 8
    assert not any(probe.kept for probe in probes)


def test_no_more_probes_are_made_than_asked_for() -> None:
    asked: list[float] = []

    def always_kept(rate_per_s: float) -> Probe:
        asked.append(rate_per_s)
        return made(rate_per_s, True)

    probes = search(always_kept, 1.0, 3)
    assert asked == [1, 4, 16]
    assert found(probes).rate_per_s is None


class Server:
    """Answers a load in virtual time; every ``refuses``-th request is refused."""

    def __init__(self, latency_ms: float, refuses: int = 10**9, late_ms: float = 0.0) -> None:
        self.loads: list[LoadSettings] = []
        self._latency_ms, self._refuses, self._late_ms = latency_ms, refuses, late_ms

    def __call__(self, load: LoadSettings) -> LoadRun:
        self.loads.append(load)
        outcomes = []
        for index, request in enumerate(poisson_schedule(load), 1):
            code = "UNAVAILABLE" if index % self._refuses == 0 else "OK"
            answered_s = request.send_s + self._latency_ms / 1000
            sent_s = request.send_s + self._late_ms / 1000
            outcomes.append(Outcome(request, sent_s, answered_s, Answer(LEFT if request.leaves_after_s else code)))
        return LoadRun(load, len(outcomes), outcomes)


def server_probe(server: Server, rate_per_s: float, *, load: dict[str, Any] | None = None, **objective: Any) -> Probe:
    settings = LoadSettings(duration_s=30, warm_up_s=5, **load or {})
    return ServerProbe(SearchSettings(load=settings, **objective), server)(rate_per_s)


def test_a_probe_counts_what_was_sent_after_the_warm_up() -> None:
    server = Server(latency_ms=50)
    probe = server_probe(server, 40, p99_ms=60)
    assert (probe.kept, probe.sure, probe.missed.value, probe.seconds) == (True, True, 0, 30)
    assert probe.requests == pytest.approx(25 * 40, rel=0.1)
    assert probe.answered_per_s == pytest.approx(40, rel=0.1)
    assert len(server.loads) == 1


def test_a_request_that_is_refused_misses_any_objective() -> None:
    probe = server_probe(Server(latency_ms=50, refuses=10), 40, p99_ms=60)
    assert (probe.kept, probe.sure) == (False, True)
    assert probe.missed.value == pytest.approx(0.1, abs=0.005)
    assert probe.p99_ms.value == math.inf
    assert math.isfinite(probe.missed.high)


def test_a_probe_goes_on_while_it_is_unsure_and_says_so_at_its_end() -> None:
    """Refuse as many as are allowed: no number of requests tells on which side it is."""
    server = Server(latency_ms=50, refuses=100)
    probe = server_probe(server, 40, p99_ms=60, longest_s=100)
    assert not probe.sure
    assert [load.duration_s for load in server.loads] == [30, 30, 40]
    assert len({load.seed for load in server.loads}) == 3
    assert probe.seconds == 100
    row = {"rate_per_s": 40.0, "requests": 9, "kept": True, "sure": False, "seconds": 100.0, "fell_behind": True}
    line = probe_line({**row, "missed": {"share": 0.01, "low": 0.001, "high": 0.02}}, 0.01)
    assert "kept, unsure: not enough samples in 100 s, INVALID" in line


def test_goodput_counts_answers_within_their_own_deadline() -> None:
    for deadline_ms, kept in ((60, True), (40, False)):
        probe = server_probe(Server(latency_ms=50), 40, load={"deadline_ms": deadline_ms}, goodput=0.95)
        assert (probe.kept, probe.sure, probe.missed.value) == (kept, True, float(not kept))


def test_callers_who_left_are_not_counted() -> None:
    everyone = server_probe(Server(latency_ms=50), 40, p99_ms=60)
    some = server_probe(Server(latency_ms=50), 40, load={"leaving": 0.5}, p99_ms=60)
    assert some.requests == pytest.approx(everyone.requests / 2, rel=0.15)
    assert some.missed.value == 0


def test_a_probe_whose_requests_left_late_is_invalid() -> None:
    assert not server_probe(Server(latency_ms=50, late_ms=0.4), 40, p99_ms=60).fell_behind
    assert server_probe(Server(latency_ms=50, late_ms=0.6), 40, p99_ms=60).fell_behind


def test_a_probe_without_a_request_says_what_to_change() -> None:
    with pytest.raises(InvalidRequest, match=r"no request falls into"):
        server_probe(Server(latency_ms=50), 1e-6, p99_ms=60)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "the objective: expected one of p99-ms and goodput"),
        ("--p99-ms 100 --goodput 0.9", "the objective: expected one of p99-ms and goodput"),
        ("--p99-ms 0", "p99-ms: 0, expected a number above 0"),
        ("--goodput 0.99", "goodput: counts answers within deadline-ms, which isn't given"),
        ("--goodput 1 --deadline-ms 9", "goodput: 1, expected a share between 0 and 1, such as 0.99"),
        ("--p99-ms 9 --longest 10", "longest: 10 s, expected the duration, 30 s, or more, up to 1e+07"),
        ("--p99-ms 9 --longest nan", "longest: nan s, expected the duration, 30 s, or more, up to 1e+07"),
        ("--p99-ms 9 --probes 0", "probes: 0, expected 1 or more"),
        ("--p99-ms 9 --start 0", "rate: 0, expected a number above 0"),
    ],
)
def test_the_command_line_says_what_is_wrong(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["search", *options.split()])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"python -m benchmarks search: error: {message}"


def report(**changes: Any) -> dict[str, Any]:
    missed = {"share": 0.0, "low": 0.0, "high": 0.002}
    probe = {"rate_per_s": 40.0, "requests": 9, "kept": True, "sure": True, "seconds": 30.0, "fell_behind": False}
    arguments = {"p99_ms": 60.0, "goodput": None, "load": {"url": "localhost:8001"}}
    return {
        "rate_per_s": 41.5,
        "interval_per_s": [40.0, None],
        "within_5_percent": True,
        "contradictory": False,
        "allowed_share": 0.01,
        "probes": [{**probe, "missed": missed}],
        "conditions": {"arguments": arguments},
        **changes,
    }


def test_the_table_ends_with_the_rate_and_its_interval_or_says_that_it_was_not_found() -> None:
    assert "the highest rate with p99 of at most 60 ms, at localhost:8001" in table(report())
    assert table(report()).splitlines()[-1] == "41.50/s, surely 40.00 to -/s"
    assert "because the probes were used up" in table(report(within_5_percent=False))
    assert "INVALID: a rate surely missed more than a higher one" in table(report(contradictory=True))
    assert table(report(rate_per_s=None)).splitlines()[-1] == "not found in 1 probes: it is above 40.00/s"


def test_a_search_that_is_invalid_ends_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Make reports up, because no server contradicts itself when asked to."""
    late = report()
    late["probes"][0]["fell_behind"] = True
    for made_up, message in (
        (report(), ""),
        (report(contradictory=True), "error: the search is invalid: a rate surely missed more than a higher one\n"),
        (late, "error: the run is invalid: requests left late by more than 1 % of the median latency\n"),
    ):
        monkeypatch.setattr("benchmarks.search.run_search", lambda *_, found=made_up: found)
        assert main(["search", "--p99-ms", "60"]) == int(bool(message))
        assert capsys.readouterr().err == message
