"""The autoscaler's rule is Kubernetes', and a fleet in virtual time is made of simulated servers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.planning.autoscale import CURVES, curve_calls
from benchmarks.planning.fleet import NOBODY, Fleet, FleetSettings
from benchmarks.planning.scaling_rule import Autoscaler, Direction, Policy, Rule, Trigger, rate, read_rule
from benchmarks.planning.simulation import OK, SimulatedServer
from benchmarks.planning.workload import Workload
from tests.conftest import ROOT
from tests.unit.test_planning import call, profile_of

NO_LIMIT = Direction(0, (Policy("Percent", 10_000, 15),))
DOWN_AT_ONCE = Direction(0, (Policy("Percent", 100, 15),))


def rule(target: float = 2.0, up: Direction = NO_LIMIT, down: Direction = DOWN_AT_ONCE, **fields: Any) -> Rule:
    values: dict[str, Any] = {"least": 1, "most": 100, "triggers": (Trigger("queue", "", target),), **fields}
    return Rule(up=up, down=down, **values)


def decided(autoscaler: Autoscaler, *values: float | None, every_s: float = 15.0) -> list[int]:
    """Ask once every period, with one metric's values."""
    return [autoscaler.decide(every_s * number, {"queue": value}) for number, value in enumerate(values)]


@pytest.mark.parametrize(
    ("replicas", "target", "value", "wanted"),
    # The first three are the controller's own cases (TestScaleUpPerPodCMExternal and its neighbours).
    [(3, 2.222, 8.6, 4), (5, 3.0, 8.6, 3), (4, 2.2, 8.6, 4), (2, 2.0, 4.41, 3), (2, 2.0, 4.39, 2), (2, 2.0, 0.0, 1)],
)
def test_replicas_are_the_metric_by_the_target_beyond_a_tolerance(
    replicas: int, target: float, value: float, wanted: int
) -> None:
    assert decided(Autoscaler(rule(target, least=1), replicas), value) == [wanted]


def test_the_largest_of_two_metrics_counts_and_one_that_is_missing_takes_nothing_away() -> None:
    both = rule(triggers=(Trigger("queue", "", 2.0), Trigger("slots", "", 12.0)))
    assert Autoscaler(both, 4).decide(0, {"queue": 2.0, "slots": 30.0}) == 3
    assert Autoscaler(both, 4).decide(0, {"queue": None, "slots": 30.0}) == 4
    assert Autoscaler(both, 4).decide(0, {"queue": None, "slots": 60.0}) == 5
    assert Autoscaler(both, 4).decide(0, {"queue": None, "slots": None}) == 4
    assert Autoscaler(both, 4).decide(0, {"queue": float("nan"), "slots": 30.0}) == 4


def test_a_fall_waits_until_its_window_has_no_higher_recommendation() -> None:
    slow = rule(down=Direction(60, DOWN_AT_ONCE.policies))
    assert decided(Autoscaler(slow, 10), 20, 2, 2, 2, 2, 2) == [10, 10, 10, 10, 1, 1]
    # The highest within the window counts, not the last before it.
    assert decided(Autoscaler(slow, 10), 20, 10, 6, 2, 2, 2) == [10, 10, 10, 10, 5, 3]


def test_a_rise_waits_until_its_window_has_no_lower_recommendation() -> None:
    slow = rule(up=Direction(60, NO_LIMIT.policies))
    assert decided(Autoscaler(slow, 1), 2, 20, 20, 20, 20, 20) == [1, 1, 1, 1, 10, 10]
    assert decided(Autoscaler(slow, 1), 2, 20, 8, 20, 20, 20) == [1, 1, 1, 1, 4, 4]


def test_policies_limit_a_period_by_the_replicas_at_its_beginning() -> None:
    doubling = rule(up=Direction(0, (Policy("Percent", 100, 60),)))
    assert decided(Autoscaler(doubling, 2), *[200] * 9) == [4, 4, 4, 4, 8, 8, 8, 8, 16]
    # The policy with the larger change counts.
    either = rule(up=Direction(0, (Policy("Percent", 100, 60), Policy("Pods", 3, 60))))
    assert decided(Autoscaler(either, 2), 200) == [5]
    tenth = rule(down=Direction(0, (Policy("Percent", 10, 60),)))
    assert decided(Autoscaler(tenth, 40), *[2] * 9) == [36, 36, 36, 36, 32, 32, 32, 32, 28]
    pods = rule(down=Direction(0, (Policy("Pods", 5, 60),)))
    assert decided(Autoscaler(pods, 40), *[2] * 5) == [35, 35, 35, 35, 30]


def test_replicas_stay_between_the_least_and_the_most() -> None:
    assert decided(Autoscaler(rule(least=2, most=6), 3), 200, 0) == [6, 2]


def test_the_rule_is_the_manifests_and_can_be_made_faster() -> None:
    read = read_rule()
    assert [trigger.name for trigger in read.triggers] == ["queue", "slots"]
    assert (read.least, read.sync_s, read.down.window_s) == (2, 15, 300)
    fast = read.faster(20)
    assert (fast.sync_s, fast.down.window_s, fast.up.policies[0].period_s) == (0.75, 15, 15)
    assert (fast.least, fast.most, fast.tolerance) == (read.least, read.most, 0.1)
    (queue, slots), (fast_queue, fast_slots) = read.triggers, fast.triggers
    assert fast_queue == replace(queue, target=queue.target / 20) and fast_slots == slots


def test_a_rate_is_prometheus_rate() -> None:
    # As PromQL's own arithmetic has it: extended to the window's ends, but no further than half a gap or a counter's 0.
    steady = [(5.0 * number, 10.0 * number) for number in range(20)]
    assert rate(steady, 92.0, 60.0) == pytest.approx(2.0)
    assert rate(steady[:3], 12.0, 60.0) == pytest.approx(2.0 * (10 + 0 + 2) / 60)
    later = [(at_s, value + 100) for at_s, value in steady[:3]]
    assert rate(later, 12.0, 60.0) == pytest.approx(2.0 * (10 + 2.5 + 2) / 60)
    assert rate(steady[:1], 12.0, 60.0) is None
    assert rate([(0.0, 3.0), (5.0, 3.0)], 6.0, 60.0) == 0


def settings(cold_start_s: float = 1.0) -> FleetSettings:
    return replace(FleetSettings(read_rule(), 0.0).faster(20), cold_start_s=cold_start_s)


def test_a_fleet_of_one_is_the_simulated_server() -> None:
    calls = [call(0.05137 * number, steps=1 + number % 7, picture=number) for number in range(200)]
    alone = SimulatedServer(profile_of()).run(calls).passages
    led = Fleet(profile_of(), settings(), 1, is_fixed=True).run(calls, 12.0).passages
    assert [each.stage_ms for each in led] == [pytest.approx(each.stage_ms) for each in alone]


def test_a_fleet_deals_to_the_least_busy_and_pays_for_all() -> None:
    calls = [call(0.05 * number, picture=number) for number in range(100)]
    found = Fleet(profile_of(), settings(), 4, is_fixed=True).run(calls, 20.0)
    assert {each.code for each in found.passages} == {OK}
    assert found.replica_s == pytest.approx(80.0)
    one = Fleet(profile_of(), settings(), 1, is_fixed=True).run(calls, 20.0)
    assert found.quantile_ms(0.5) < one.quantile_ms(0.5)


def test_a_fleet_follows_a_burst_and_goes_back_and_loses_nothing() -> None:
    slow = profile_of(unet=100.0)
    rates = [*[2] * 20, *[60] * 20, *[1] * 80]
    calls = [
        call(second + number / per_s, picture=second) for second, per_s in enumerate(rates) for number in range(per_s)
    ]
    found = Fleet(slow, settings(cold_start_s=2.0), 2).run(calls, 120.0)
    curve = [point.wanted for point in found.points]
    assert {each.code for each in found.passages} == {OK}
    assert curve[0] == 2 and found.most > 3 and curve[-1] < found.most
    grown = next(point for point in found.points if point.wanted > 2)
    assert grown.at_s > 20 and grown.ready == 2
    later = next(point for point in found.points if point.at_s >= grown.at_s + 2.0)
    assert later.ready > 2
    assert 2 * 120 < found.replica_s < found.most * 120


def test_without_a_ready_replica_a_request_is_lost() -> None:
    fleet = Fleet(profile_of(), settings(), 0, is_fixed=True)
    (passage,) = fleet.run([call(0.5)], 1.0).passages
    assert (passage.code, passage.latency_s) == (NOBODY, 0)


def test_a_curves_requests_follow_it() -> None:
    calls = curve_calls(Workload(rate_per_s=5.0), CURVES["burst"], seed=1)
    within = [sum(begin <= each.send_s < end for each in calls) for begin, end in ((0, 600), (600, 1500), (1500, 3600))]
    assert within == [pytest.approx(750, rel=0.15), pytest.approx(4500, rel=0.1), pytest.approx(2625, rel=0.1)]
    assert calls == sorted(calls, key=lambda each: each.send_s)
    assert len(CURVES["daily"]) == 25


def test_the_command_compares_a_scaled_fleet_with_a_fixed_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CURVES, "burst", ((0.0, 0.2), (40.0, 0.2), (41.0, 1.0), (130.0, 1.0)))
    monkeypatch.setattr("benchmarks.planning.autoscale.PEAK_S", 30.0)
    words = ["autoscale", "--curve", "burst", "--rate", "24", "--p99-ms", "4000"]
    assert main([*words, "--profiles", "h200-sd15-512-fp16", "--cold-start", "10", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    fixed, scaled = report["rows"]
    assert (fixed["replicas"]["least"], fixed["replicas"]["changes"]) == (fixed["replicas"]["most"], 0)
    assert fixed["goodput"] > 0.97 and scaled["requests"] == fixed["requests"]
    assert scaled["cost_by_fixed"] < 1 and scaled["replicas"]["changes"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed", "-1"], "seed: -1, expected 0 or more"),
        (["--rate", "1e-6"], "workload: no request in 3600 s; ask for a higher rate"),
        (["--rate", "1e6"], "workload: 1.58e+09 requests, expected 1e+07 or fewer; ask for less"),
        (["--rate", "0.01", "--p99-ms", "1"], "h200-sd15-512-fp16: no number of servers keeps the goal at the peak"),
    ],
)
def test_a_question_that_has_no_answer_is_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--curve": "burst", "--rate": "1", "--p99-ms": "4000", "--profiles": "h200-sd15-512-fp16"}
    given |= dict(zip(words[::2], words[1::2], strict=True))
    try:
        assert main(["autoscale", *(word for pair in given.items() for word in pair)]) == 1
    except SystemExit as ended:
        assert ended.code == 2
    assert f"error: {said}" in capsys.readouterr().err


@pytest.mark.parametrize(("curve", "name"), [("burst", "burst"), ("daily", "day")])
def test_the_documents_rows_are_of_the_committed_runs(curve: str, name: str) -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / f"autoscale-{curve}.json").read_text())
    text = (ROOT / "docs" / "capacity.md").read_text()
    for row in found["rows"]:
        least, most = row["replicas"]["least"], row["replicas"]["most"]
        goodput, p99_ms = 100 * row["goodput"], row["p99_ms"]
        fleet = f"{name}, fixed" if row["fleet"] == "fixed" else row["fleet"]
        cells = (
            fleet,
            str(most) if least == most else f"{least} to {most}",
            f"{row['replica_hours']:.1f}",
            f"{row['cost_by_fixed']:.0%}".replace("%", " %"),
            f"{row['cost']:.2f}",
            f"{goodput:.0f} %" if goodput == 100 else f"{goodput:.{1 if goodput < 99.9 else 2}f} %",
            "none" if p99_ms is None else f"{p99_ms:,.0f}",
            f"{row['refused']}",
        )
        assert f"| {' | '.join(cells)}" in text
