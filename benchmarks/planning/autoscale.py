"""Replicas that follow a load, against as many as its peak needs: ``python -m benchmarks autoscale``.

The load is a curve of the question's rate, which is its peak. The same requests go to a fleet that the autoscaler's
rule scales, and to one of the fewest replicas that keep the goal at the peak.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from icportrait_client.errors import InvalidRequest

from benchmarks.output import Output, add_output_arguments
from benchmarks.planning.profile import PlanningError

if TYPE_CHECKING:
    from benchmarks.planning.fleet import FleetRun, FleetSettings
    from benchmarks.planning.profile import ServiceProfile
    from benchmarks.planning.question import Question
    from benchmarks.planning.workload import Call, Workload

HOUR_S = 3600.0
DAY = tuple(
    share / 100
    for share in (25, 18, 14, 12, 12, 15, 22, 35, 50, 62, 70, 74, 78, 76, 74, 76, 80, 86, 94, 100, 98, 85, 62, 40)
)
"""Shares of the peak at the beginning of each hour, linear between: a day of callers who live in one time zone."""
CURVES: dict[str, tuple[tuple[float, float], ...]] = {
    "daily": tuple((hour * HOUR_S, share) for hour, share in enumerate([*DAY, DAY[0]])),
    "burst": ((0.0, 0.25), (599.0, 0.25), (600.0, 1.0), (1500.0, 1.0), (1501.0, 0.25), (HOUR_S, 0.25)),
}
"""Moments in seconds with shares of the peak, linear between."""
MOST_REQUESTS = 10**7
"""Limit of a curve's requests: they are drawn at once, and a hundred thousand are simulated in minutes."""
PEAK_S = 600.0
"""Seconds of the peak for which a fixed number of replicas must keep the goal."""


@dataclass(frozen=True)
class AutoscaleSettings:
    """One question; ``None`` leaves a value to the file."""

    question: Path | None = None
    curve: str = "daily"
    rate_per_s: float | None = None
    p99_ms: float | None = None
    profiles: tuple[str, ...] | None = None
    cold_start_s: tuple[float, ...] = (30.0, 120.0, 300.0)
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values that aren't the question's.

        Raises:
            InvalidRequest: names the value, what came and what was expected.
        """
        if self.curve not in CURVES:
            raise InvalidRequest(f"curve: {self.curve!r}, expected one of {', '.join(CURVES)}")
        for value in self.cold_start_s:
            if not 0 < value <= HOUR_S:
                raise InvalidRequest(f"cold_start_s: {value:g}, expected seconds above 0, up to {HOUR_S:g}")
        if self.seed < 0:
            raise InvalidRequest(f"seed: {self.seed}, expected 0 or more")


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = commands.add_parser("autoscale", help="replicas that follow a day or a burst, against a fixed number")
    command.set_defaults(settings=AutoscaleSettings, run=run)
    default = AutoscaleSettings()
    command.add_argument("question", nargs="?", type=Path, metavar="TOML", help="the question; flags go before it")
    command.add_argument("--curve", choices=list(CURVES), default=default.curve, help="default: %(default)s")
    command.add_argument("--rate", dest="rate_per_s", type=float, metavar="N", help="requests a second at the peak")
    command.add_argument("--p99-ms", type=float, metavar="N", help="goal at the peak; goodput counts within it")
    command.add_argument("--profiles", nargs="+", metavar="NAME", help="of benchmarks/profiles, or paths")
    command.add_argument(
        "--cold-start",
        dest="cold_start_s",
        nargs="+",
        type=float,
        default=default.cold_start_s,
        metavar="N",
        help="seconds from a replica's start until it is ready; each is simulated (default: 30 120 300)",
    )
    command.add_argument("--seed", type=int, default=default.seed, metavar="N", help="default: %(default)s")
    add_output_arguments(command)


def run(settings: AutoscaleSettings, output: Output) -> int:
    """Answer a question, and print the answer."""
    from benchmarks.planning.question import read
    from benchmarks.report import conditions_here

    names = ("rate_per_s", "p99_ms", "profiles", "seed")
    question = read(settings.question, {name: getattr(settings, name) for name in names})
    rows = [
        row
        for profile in question.profiles
        for row in compare(question, profile, settings, lambda line: print(line, file=sys.stderr, flush=True))
    ]
    report = {
        "kind": "autoscale",
        "simulated": True,
        "currency": question.currency,
        "limit_ms": question.goal.limit_ms,
        "rows": rows,
        "conditions": conditions_here(cast(Any, settings)),
    }
    output.show(report, table)
    return 0


def curve_calls(workload: Workload, points: Sequence[tuple[float, float]], seed: int) -> list[Call]:
    """Draw the requests of a curve.

    Args:
        workload: its rate is the curve's 1.
        points: moments in seconds with shares of the rate, linear between.
        seed: the same seed, the same requests.

    Raises:
        PlanningError: there would be none, or too many to be simulated.
    """
    import numpy as np

    grid_s = np.linspace(points[0][0], points[-1][0], 1 + max(len(points), math.ceil(points[-1][0] - points[0][0])))
    rates = workload.rate_per_s * np.interp(grid_s, *np.array(points).T)
    sent = np.concatenate([[0.0], np.cumsum((rates[1:] + rates[:-1]) / 2 * np.diff(grid_s))])
    if sent[-1] > MOST_REQUESTS:
        raise PlanningError(f"workload: {sent[-1]:.3g} requests, expected {MOST_REQUESTS:.0e} or fewer; ask for less")
    # A process of one a second, in whose time each moment of the curve is as long as what the curve sends by then.
    steady = workload.at(1.0).calls(math.ceil(sent[-1] + 10 * math.sqrt(sent[-1]) + 10), seed)
    moments_s = np.interp([call.send_s for call in steady], sent, grid_s)
    calls = [
        replace(call, send_s=float(at_s))
        for call, at_s in zip(steady, moments_s, strict=True)
        if call.send_s < sent[-1]
    ]
    if not calls:
        raise PlanningError(f"workload: no request in {points[-1][0]:g} s; ask for a higher rate")
    return calls


def compare(
    question: Question,
    profile: ServiceProfile,
    settings: AutoscaleSettings,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Return rows of figures: the fixed fleet's, and the scaled fleet's for each cold start.

    Raises:
        PlanningError: no number of replicas keeps the goal at the curve's peak.
    """
    from benchmarks.planning.fleet import Fleet, FleetSettings
    from benchmarks.planning.scaling_rule import read_rule

    points, rule = CURVES[settings.curve], read_rule()
    calls, duration_s = curve_calls(question.workload, points, question.seed), points[-1][0]
    fixed = replicas_for_peak(question, profile, rule_settings := FleetSettings(rule, settings.cold_start_s[0]))
    if not fixed:
        raise PlanningError(
            f"{profile.name}: no number of servers keeps the goal at the peak; ask for a faster GPU or more time"
        )
    begins = max(rule.least, math.ceil(fixed * points[0][1]))
    rows = []
    for name, fleet_settings, replicas, is_fixed in [
        ("fixed", rule_settings, fixed, True),
        *(
            (f"scaled, cold start {seconds:g} s", FleetSettings(rule, seconds), begins, False)
            for seconds in settings.cold_start_s
        ),
    ]:
        fleet = Fleet(profile, fleet_settings, replicas, question.settings, is_fixed)
        found = fleet.run(calls, duration_s)
        rows.append({"profile": profile.name, "fleet": name, **figures(found, question, profile)})
        say(row_line(rows[-1]))
    for row in rows:
        row["cost_by_fixed"] = round(row["replica_hours"] / rows[0]["replica_hours"], 4)
    return rows


def replicas_for_peak(question: Question, profile: ServiceProfile, settings: FleetSettings) -> int:
    """Return the fewest replicas with which the goal is kept for a while at the workload's own rate; 0: none are."""
    from benchmarks.planning.evaluation import Scenario
    from benchmarks.planning.fleet import Fleet
    from benchmarks.planning.planner import fewest, least_replicas

    calls = curve_calls(question.workload, ((0.0, 1.0), (PEAK_S, 1.0)), question.seed + 1)
    goal = question.goal

    def excess(replicas: int) -> float:
        found = Fleet(profile, settings, replicas, question.settings, is_fixed=True).run(calls, PEAK_S)
        by_p99 = found.quantile_ms(0.99) / goal.p99_ms if goal.p99_ms else 0.0
        short = goal.goodput is not None and found.goodput(goal.limit_ms) < goal.goodput
        return max(by_p99, 1.0 + 1e-9) if short else by_p99

    return fewest(excess, least_replicas(Scenario(profile, question.workload, settings=question.settings)))


def figures(found: FleetRun, question: Question, profile: ServiceProfile) -> dict[str, Any]:
    """Return a run's figures for JSON; null stands for what isn't finite."""
    p99_ms, hours, price = found.quantile_ms(0.99), found.replica_s / HOUR_S, question.price(profile)
    return {
        "requests": len(found.passages),
        "refused": found.refused,
        "goodput": round(found.goodput(question.goal.limit_ms), 5),
        "p50_ms": round(found.quantile_ms(0.5), 1),
        "p99_ms": round(p99_ms, 1) if math.isfinite(p99_ms) else None,
        "replicas": {
            "least": min(point.wanted for point in found.points),
            "most": found.most,
            "changes": sum(a.wanted != b.wanted for a, b in zip(found.points, found.points[1:], strict=False)),
        },
        "replica_hours": round(hours, 2),
        "cost": None if price is None else round(hours * price, 2),
    }


def row_line(row: dict[str, Any]) -> str:
    """Write one fleet's figures as a line."""
    replicas = row["replicas"]
    p99 = "none" if row["p99_ms"] is None else f"{row['p99_ms']:.0f} ms"
    return (
        f"{row['profile']}, {row['fleet']}: {replicas['least']} to {replicas['most']} replicas,"
        f" {row['replica_hours']:.1f} hours of them, goodput {row['goodput']:.2%}, p99 {p99},"
        f" {row['refused']} of {row['requests']} refused"
    )


def table(report: dict[str, Any]) -> str:
    """Write the figures as lines for a reader."""
    lines = [f"SIMULATED; goodput within {report['limit_ms']:g} ms"]
    for row in report["rows"]:
        lines.append(f"{row_line(row)}; {row['cost_by_fixed']:.0%} of the fixed fleet's hours")
    return "\n".join(lines)
