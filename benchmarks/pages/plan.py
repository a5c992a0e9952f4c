"""The sections of ``python -m benchmarks plan``, ``replay`` and ``validate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.pages.page import COLOURS, Row, interval_of, note, number, plot, rows_table, section

STAGE_NAMES = ("front", "preprocess", "encode", "queue", "warp", "denoise", "decode", "postprocess", "back")


def plan_sections(report: Mapping[str, Any]) -> list[str]:
    """Return an answer's sections: the replicas, the knee, the cost, the stages, and what a changed input does."""
    question, answers = report["question"], report["answers"]
    answered = [answer for answer in answers if answer["replicas"] is not None]
    parts = [_replicas(question, answers)]
    if answered:
        parts += [_knee(question, answered), _cost(question, answered), _stages(answered), _changes(answered)]
    return parts


def _replicas(question: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> str:
    head = ["profile", "engine times", "replicas", "with redundancy", "p50, ms", "p99, ms", "goodput", "device busy"]
    head += ["portraits an hour", f"{question['currency']} an hour".strip()]
    rows: list[Row] = []
    said: list[str] = []
    for answer in answers:
        if answer["replicas"] is None:
            rows.append((answer["profile"], "", "none", *[""] * 7))
            said.append(f"{answer['profile']}: no number of replicas keeps the goal; {answer['reason']}.")
            continue
        planned = answer["planned"]
        rows.append(
            (
                answer["profile"],
                answer["origin"],
                answer["replicas"],
                answer["total"],
                interval_of(planned["p50_ms"]),
                interval_of(planned["p99_ms"]),
                f"{planned['goodput']['value']:.2%}",
                f"{planned['busy']['device']:.0%}",
                f"{answer['images_an_hour']:,.0f}",
                "no price" if answer["cost_an_hour"] is None else f"{answer['cost_an_hour']:,.2f}",
            )
        )
        said.append(f"{answer['profile']} breaks first at its {answer['breaks_first']}.")
    asked = ", ".join(f"{name} {value}" for name, value in question.items() if name not in ("currency",))
    assumed = {text: None for answer in answers for text in answer.get("assumptions", ())}
    return section(
        f"Replicas for {question['rate_per_s']:g} requests a second",
        rows_table(head, rows),
        *map(note, said),
        note(f"A simulation in virtual time. Asked: {asked}. Intervals are 90 % ones, over independent runs."),
        *(note(f"Assumed: {text}") for text in assumed),
    )


def _knee(question: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> str:
    def draw(axes: Any) -> None:
        for colour, answer in zip(COLOURS, answers, strict=False):
            known = [point for point in answer["knee"] if point["p99_ms"]["value"] is not None]
            rates = [answer["planned_rate_per_s"] * point["load"] for point in known]
            axes.plot(rates, [point["p99_ms"]["value"] for point in known], "o-", color=colour, label=answer["profile"])
            axes.fill_between(
                rates,
                [point["p99_ms"]["low"] for point in known],
                [point["p99_ms"]["high"] or point["p99_ms"]["value"] for point in known],
                color=colour,
                alpha=0.2,
                linewidth=0,
            )
        if (goal := question["slo"].get("p99_ms")) is not None:
            axes.axhline(goal, color="#222", linestyle=":", label="goal")
        axes.set_xlabel("requests a second, of all replicas")
        axes.set_ylabel("p99, ms")
        axes.set_yscale("log")
        axes.legend(frameon=False)

    return section(
        "Latency against load", plot(draw), note("The same replicas at other rates. Bands are 90 % intervals.")
    )


def _cost(question: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> str:
    priced = [answer for answer in answers if answer["cost_an_hour"]]
    if not priced:
        return ""

    def draw(axes: Any) -> None:
        for colour, answer in zip(COLOURS, priced, strict=False):
            points = [point for point in answer["knee"] if point["goodput"]["value"]]
            rates = [answer["planned_rate_per_s"] * point["load"] for point in points]
            costs = [
                1000 * answer["cost_an_hour"] / (3600 * rate * point["goodput"]["value"])
                for rate, point in zip(rates, points, strict=True)
            ]
            axes.plot(rates, costs, "o-", color=colour, label=f"{answer['profile']}, {answer['total']} replicas")
        axes.set_xlabel("requests a second, of all replicas")
        axes.set_ylabel(f"{question['currency']} for 1,000 portraits in time".strip())
        axes.legend(frameon=False)

    return section("Cost", plot(draw), note("The price of all replicas by the portraits that are in time."))


def _stages(answers: Sequence[Mapping[str, Any]]) -> str:
    def draw(axes: Any) -> None:
        names = [answer["profile"] for answer in answers]
        left = [0.0] * len(answers)
        palette = (*COLOURS, "#222222", "#999933")
        for colour, stage in zip(palette, STAGE_NAMES, strict=True):
            widths = [answer["planned"]["stage_ms"].get(stage, 0.0) for answer in answers]
            axes.barh(names, widths, left=left, color=colour, label=stage)
            left = [before + width for before, width in zip(left, widths, strict=True)]
        axes.set_xlabel("milliseconds, each stage's median")
        axes.figure.legend(ncols=5, frameon=False, loc="outside upper center")

    return section("Stages at the planned rate", plot(draw, height=1.7 + 0.4 * len(answers)))


def _changes(answers: Sequence[Mapping[str, Any]]) -> str:
    head = ("profile", "input", "p99, ms", "goodput", "the goal")
    rows = [
        (
            answer["profile"],
            f"{change['input']} x {change['factor']:g}",
            interval_of(change["p99_ms"]),
            f"{change['goodput']['value']:.2%}",
            "is kept" if change["keeps_goal"] else "isn't kept",
        )
        for answer in answers
        for change in answer["changes"]
    ]
    return section("The same replicas, one input changed", rows_table(head, rows))


def validation_sections(report: Mapping[str, Any]) -> list[str]:
    """Return the sections of predictions against measurements."""
    scenarios, found = report["scenarios"], report["summary"]

    def draw(axes: Any) -> None:
        both = [
            row[name][kind] for row in scenarios for name in ("p50", "p99") for kind in ("measured_ms", "simulated_ms")
        ]
        ends = [min(both) / 1.2, max(both) * 1.2]
        axes.plot(ends, ends, color="#222", linewidth=0.8)
        for colour, name in zip(COLOURS, ("p50", "p99"), strict=False):
            measured = [row[name]["measured_ms"] for row in scenarios]
            axes.plot(measured, [row[name]["simulated_ms"] for row in scenarios], "o", color=colour, label=name)
            for row in scenarios:
                axes.plot([row[name]["measured_ms"]] * 2, row[name]["interval_ms"], color=colour, linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("measured, ms")
        axes.set_ylabel("simulated, ms")
        axes.legend(frameon=False)

    head = ("mix", "load", "a second", "p50 measured", "simulated", "error", "p99 measured", "simulated", "error")
    rows = []
    for row in scenarios:
        cells: list[object] = [row["mix"], f"{row['load']:.0%}", f"{row['rate_per_s']:.2f}"]
        for name in ("p50", "p99"):
            each = row[name]
            cells += [f"{each['measured_ms']:.0f}", f"{each['simulated_ms']:.0f}", f"{each['error']:+.1%}"]
        rows.append(cells)
    rates = [
        (
            row["mix"],
            f"{row['p99_goal_ms']:.0f}",
            number(row["measured_per_s"], 2),
            number(row["predicted_per_s"], 2),
            "not between the loads" if row["error"] is None else f"{row['error']:+.1%}",
        )
        for row in report["highest_rates"]
    ]
    return [
        section(
            "Prediction against measurement",
            plot(draw, width=6.0, height=5.0),
            rows_table(head, rows),
            note(f"90 % intervals cover {found['intervals_cover']:.0%} of the measured figures."),
            *(note(f"Too wide to judge: {each}") for each in found["abstain"]),
            *(note(f"Miss: {miss}") for miss in found["misses"]),
        ),
        section(
            "Highest rate that keeps a goal",
            rows_table(("mix", "p99 goal, ms", "measured a second", "predicted", "error"), rates),
        ),
    ]


def replay_sections(report: Mapping[str, Any]) -> list[str]:
    """Return the sections of one load on a real server and on the simulation."""
    stages = report["stage_ms"]

    def draw(axes: Any) -> None:
        names = list(stages)
        places = range(len(names))
        axes.bar([place - 0.2 for place in places], [stages[name]["measured"] for name in names], 0.4, label="measured")
        axes.bar(
            [place + 0.2 for place in places], [stages[name]["simulated"] for name in names], 0.4, label="simulated"
        )
        axes.set_xticks(list(places), names)
        axes.set_ylabel("median, ms")
        axes.legend(frameon=False)

    figures = [
        (
            name,
            *(f"{report[name][kind]:.1f}" for kind in ("measured_ms", "simulated_ms")),
            f"{report[name]['error']:+.1%}",
        )
        for name in ("p50", "p90", "p99")
    ]
    worst = [
        (f"{row['send_s']:.2f}", row["steps"], f"{row['measured_ms']:.0f}", f"{row['simulated_ms']:.0f}", row["cause"])
        for row in report["worst"]
    ]
    return [
        section(
            f"{report['compared']} requests, measured and simulated",
            rows_table(("", "measured, ms", "simulated, ms", "error"), figures),
            plot(draw),
        ),
        section(
            "The requests that differ most", rows_table(("sent at, s", "steps", "measured", "simulated", ""), worst)
        ),
    ]
