"""The sections of ``python -m benchmarks load`` and ``search``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.calls import OK
from benchmarks.load import LoadRun
from benchmarks.pages.page import COLOURS, Row, interval_of, note, number, plot, rows_table, section

_LEVELS = ("p50", "p90", "p99")


def load_sections(report: Mapping[str, Any], run: LoadRun | None = None) -> list[str]:
    """Return the sections of a load.

    Args:
        report: its figures, of ``report.summarise``.
        run: where it is at hand, its requests one by one: the latencies' distribution, and what came over time.
    """
    sections = [_latencies(report), _outcomes(report), _stages(report)]
    return sections if run is None else [sections[0], _distribution(run), _over_time(run), *sections[1:]]


def _latencies(report: Mapping[str, Any]) -> str:
    rates, late = report["rate_per_s"], report["lateness_ms"]
    rows: list[Row] = [
        (name, figures["count"], *(number(figures[each]) for each in (*_LEVELS, "max")))
        for name, figures in {**report["latency_ms"], "refusals": report["refusal_ms"]}.items()
    ]
    steady = report["latency_ms"]["steady"]
    sure = [
        f"steady {name}: {steady['intervals'][name][0]:.1f} to {steady['intervals'][name][1]:.1f} ms"
        if name in steady["intervals"]
        else f"steady {name}: not enough samples, an interval takes about {steady['needed'][name]}"
        for name in _LEVELS
    ]
    goodput = report["goodput"]
    said = [
        f"Offered {number(rates['offered'], 2)} a second, answered {number(rates['achieved'], 2)},"
        f" {number(rates['steady'], 2)} after the warm-up.",
        f"95 % intervals: {'; '.join(sure)}.",
        f"Sent late by {number(late['p50'])} ms in the median, {number(late['p99'])} ms at p99.",
    ]
    if goodput:
        said.append(
            f"Goodput {number(goodput['per_s'], 2)} a second: {goodput['in_time']} of {goodput['asked']} in time."
        )
    if report["fell_behind"]:
        said.insert(0, "INVALID: the generator did not keep up.")
    return section(
        "Latency from the intended sending",
        rows_table(("milliseconds", "count", *_LEVELS, "max"), rows),
        *map(note, said),
    )


def _distribution(run: LoadRun) -> str:
    latencies = np.sort([1000 * outcome.latency_s for outcome in run.outcomes if outcome.answer.code == OK])

    def draw(axes: Any) -> None:
        shares = np.arange(1, len(latencies) + 1) / max(1, len(latencies))
        axes.step(latencies, shares, where="post", color=COLOURS[0])
        for level in (0.5, 0.9, 0.99):
            axes.axhline(level, color="#bbbbbb", linewidth=0.6)
        axes.set_xlabel("latency, ms")
        axes.set_ylabel("share of answers")

    return section("Distribution", plot(draw) if len(latencies) else note("No request was answered."))


def _over_time(run: LoadRun) -> str:
    served = [outcome for outcome in run.outcomes if outcome.answer.code == OK]
    others = [outcome for outcome in run.outcomes if outcome.answer.code != OK and outcome.answered_s is not None]
    rows = [(outcome.request.send_s, json.loads(outcome.answer.metadata).get("rows_shared")) for outcome in served]

    def draw_latency(axes: Any) -> None:
        for colour, label, outcomes in ((COLOURS[0], "answered", served), (COLOURS[1], "not", others)):
            moments = [outcome.request.send_s for outcome in outcomes]
            axes.plot(
                moments, [1000 * each.latency_s for each in outcomes], ".", color=colour, label=label, markersize=3
            )
        axes.set_xlabel("sent at, s")
        axes.set_ylabel("latency, ms")
        axes.legend(frameon=False)

    def draw_rows(axes: Any) -> None:
        axes.plot(*zip(*rows, strict=True), ".", color=COLOURS[2], markersize=3)
        axes.set_xlabel("sent at, s")
        axes.set_ylabel("rows of its steps, mean")
        axes.set_ylim(bottom=0)

    known = bool(rows) and all(count is not None for _, count in rows)
    return section("Over time", plot(draw_latency, height=3.0), plot(draw_rows, height=2.4) if known else "")


def _outcomes(report: Mapping[str, Any]) -> str:
    rows: list[Row] = [(code, kind["count"], kind["first_message"] or "") for code, kind in report["outcomes"].items()]
    return section("Outcomes", rows_table(("code", "count", "first message"), rows))


def _stages(report: Mapping[str, Any]) -> str:
    rows: list[Row] = [(name, number(duration_ms)) for name, duration_ms in report["stage_ms"].items()]
    return section("The server's stages", rows_table(("stage", "median, ms"), rows)) if rows else ""


def search_sections(report: Mapping[str, Any]) -> list[str]:
    """Return the sections of ``search.run_search``'s figures."""
    probes = sorted(report["probes"], key=lambda probe: probe["rate_per_s"])

    def draw(axes: Any) -> None:
        for kept, colour, label in ((True, COLOURS[2], "kept"), (False, COLOURS[1], "not kept")):
            shown = [each for each in probes if each["kept"] == kept]
            shares = [100 * each["missed"]["share"] for each in shown]
            errors = [
                [100 * (each["missed"]["share"] - each["missed"]["low"]) for each in shown],
                [100 * (each["missed"]["high"] - each["missed"]["share"]) for each in shown],
            ]
            rates = [each["rate_per_s"] for each in shown]
            axes.errorbar(rates, shares, yerr=errors, fmt="o", color=colour, label=label, capsize=3)
        axes.axhline(100 * report["allowed_share"], color="#222", linestyle=":", label="allowed")
        axes.set_xscale("log")
        axes.set_xlabel("requests a second")
        axes.set_ylabel("missed the objective, %")
        axes.legend(frameon=False)

    rows: list[Row] = [
        (
            number(each["rate_per_s"], 2),
            each["requests"],
            f"{each['missed']['share']:.2%} ({each['missed']['low']:.2%} to {each['missed']['high']:.2%})",
            interval_of(each["p99_ms"]),
            number(each["answered_per_s"], 2),
            ("kept" if each["kept"] else "not kept") + ("" if each["sure"] else ", unsure"),
        )
        for each in probes
    ]
    low, high = (number(each, 2) for each in report["interval_per_s"])
    return [
        section(
            f"Highest rate: {number(report['rate_per_s'], 2)} a second, surely {low} to {high}",
            plot(draw),
            rows_table(("a second", "requests", "missed", "p99, ms", "answered a second", ""), rows),
        )
    ]
