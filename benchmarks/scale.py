"""Capacity at ten thousand portraits a second, on paper: ``python -m benchmarks.scale``.

Asks the planner the question of ``benchmarks/questions/scale.toml``, and what the caches of returning profiles are
worth. Writes the answers to ``benchmarks/results/scale.json``, and the tables of ``docs/scale.md`` from them.
``--tables`` writes the tables alone. A test compares the tables with the answers, another the answers with the planner.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from benchmarks.planning.answer import figures_json, to_json
from benchmarks.planning.evaluation import Scenario, Simulator
from benchmarks.planning.planner import FINAL, Plan, plan
from benchmarks.planning.question import Question, read
from benchmarks.planning.workload import Workload

ROOT = Path(__file__).parents[1]
QUESTION = ROOT / "benchmarks" / "questions" / "scale.toml"
RESULTS = ROOT / "benchmarks" / "results" / "scale.json"
DOCUMENT = ROOT / "docs" / "scale.md"
KNOWN_PROFILES = 1_000_000
"""Last profiles that a returning caller's is one of."""


@dataclass(frozen=True)
class ScaleSettings:
    """A run's settings."""

    processes: int | None = None
    """None is one a core."""
    seed: int = 0


@dataclass(frozen=True)
class Cache:
    """A way in which profiles return."""

    name: str
    returning: float
    to_their_server: bool = False
    """A profile's requests all come to one server; else each comes to any."""

    def scenario(self, fleet: Scenario) -> Scenario:
        """Return the fleet's scenario with these profiles. A server with callers of its own is a fleet of one."""
        workload: Workload = replace(fleet.workload, returning=self.returning, profiles=KNOWN_PROFILES)
        if not self.to_their_server:
            return replace(fleet, workload=workload)
        own = replace(workload.at(workload.rate_per_s / fleet.replicas), profiles=KNOWN_PROFILES // fleet.replicas)
        return replace(fleet, workload=own, replicas=1)


CACHES = (
    Cache("no profile returns", 0.0),
    Cache("half return, to any server", 0.5),
    Cache("half return, to their server", 0.5, to_their_server=True),
    Cache("nine of ten return, to their server", 0.9, to_their_server=True),
)


def measured(answers: Sequence[Any]) -> Plan:
    """Return the answer for the GPU whose times were measured."""
    (found,) = [each for each in answers if isinstance(each, Plan) and each.profile.origin == "measured"]
    return found


def caches(question: Question, fleet: Scenario, simulator: Simulator) -> list[dict[str, Any]]:
    """Simulate the planned load on the needed servers with each way in which profiles return."""
    limit_ms = question.goal.limit_ms
    found = simulator.evaluate([cache.scenario(fleet) for cache in CACHES], *FINAL, limit_ms, question.seed)
    return [{"name": cache.name, **figures_json(figures)} for cache, figures in zip(CACHES, found, strict=True)]


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Write the document's tables by name."""
    plans = results["answers"]
    zones, currency = results["question"]["zones"], results["question"]["currency"]
    return {
        "plans": _table(
            (
                "",
                "needed",
                "bought",
                "a zone",
                f"{currency} an hour",
                f"portraits for 1 {currency}",
                "p99, ms",
                "p99 as usual, ms",
            ),
            (
                (
                    f"{each['profile']} ({each['origin']})",
                    f"{each['replicas']:,}",
                    f"{each['total']:,}",
                    f"{each['total'] // zones:,}",
                    f"{each['cost_an_hour']:,.0f}",
                    f"{each['images_per_currency_unit']:,.0f}",
                    _interval(each["planned"]["p99_ms"]),
                    _interval(each["normal"]["p99_ms"]),
                )
                for each in plans
            ),
        ),
        "busy": _table(
            ("", "device", "picture workers", "gateway", "rows a step"),
            (
                (
                    each["profile"],
                    *(f"{each['planned']['busy'][part]:.0%}" for part in ("device", "workers", "gateway")),
                    f"{each['planned']['rows_a_run']['unet']:.1f}",
                )
                for each in plans
            ),
        ),
        "knee": _table(
            ("load of the planned", *(each["profile"] for each in plans)),
            (
                (
                    f"{point['load']:.0%}",
                    *(_late(each["knee"][index]) for each in plans),
                )
                for index, point in enumerate(plans[0]["knee"])
            ),
        ),
        "breaks": "\n".join(f"- {each['profile']}: {each['breaks_first']}." for each in plans),
        "changes": _table(
            ("with the same servers", *(each["profile"] for each in plans)),
            (
                (
                    f"{change['input']} x {change['factor']:g}",
                    *(_late(each["changes"][index]) for each in plans),
                )
                for index, change in enumerate(plans[0]["changes"])
            ),
        ),
        "caches": _table(
            ("", "p50, ms", "p99, ms", "device busy", "encoding, ms (median)"),
            (
                (
                    each["name"],
                    _interval(each["p50_ms"]),
                    _interval(each["p99_ms"]),
                    f"{each['busy']['device']:.1%}",
                    f"{each['stage_ms']['encode']:.0f}",
                )
                for each in results["caches"]
            ),
        ),
    }


def with_tables(text: str, results: dict[str, Any]) -> str:
    """Write the tables into the document between their marks."""
    for name, table in tables(results).items():
        start, end = f"<!-- {name}: python -m benchmarks.scale -->\n", f"<!-- /{name} -->"
        head, _, rest = text.partition(start)
        _, _, tail = rest.partition(end)
        text = f"{head}{start}\n{table}\n\n{end}{tail}"
    return text


def _table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _interval(estimate: dict[str, Any]) -> str:
    return f"{_whole(estimate['value'])} ({_whole(estimate['low'])} to {_whole(estimate['high'])})"


def _late(point: dict[str, Any]) -> str:
    return f"{_whole(point['p99_ms']['value'])}, {point['goodput']['value']:.0%}"


def _whole(value: float | None) -> str:
    return "none" if value is None else f"{value:,.0f}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tables", action="store_true", help="write the document's tables from the answers that are there"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="that simulate; default: one a core")
    args = parser.parse_args(argv)
    if not args.tables:
        from benchmarks.report import conditions_here

        settings = ScaleSettings(args.processes)
        question = read(QUESTION, {"seed": settings.seed})
        with Simulator(settings.processes) as simulator:
            answers = plan(question, simulator, lambda line: print(line, file=sys.stderr, flush=True))
            found = caches(question, measured(answers).figures.scenario, simulator)
            results = to_json(question, answers, simulator.requests, 0.0)
        del results["simulated"]["took_s"]
        results |= {"kind": "scale", "caches": found, "conditions": conditions_here(cast(Any, settings))}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(), json.loads(RESULTS.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
