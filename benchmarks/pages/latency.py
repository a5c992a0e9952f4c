"""The sections of ``python -m benchmarks latency``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.ladder_names import OURS
from benchmarks.machine import over_the_floor
from benchmarks.pages.page import COLOURS, Row, note, plot, rows_table, section
from benchmarks.request_alone import PARTS
from benchmarks.spread import interval_text, ratio_text


def latency_sections(report: Mapping[str, Any]) -> list[str]:
    """Return the sections of ``latency_run.measure_latency``'s figures."""
    return [
        _requests(report["requests"]),
        _ladder(report["ladder"], report["conditions"]["arguments"]),
        _engines(report["engines"], report["peak"]),
        _limits(report["gateway"]),
    ]


def _requests(requests: Sequence[Mapping[str, Any]]) -> str:
    """Return where a request's milliseconds go."""
    options = [request["options"] for request in requests]
    names = [f"steps {each['num_inference_steps']}, guidance {each['guidance_scale']:g}" for each in options]

    def draw(axes: Any) -> None:
        left = [0.0] * len(requests)
        for colour, part in zip(COLOURS, PARTS, strict=True):
            widths = [request["ms"][part]["p50"] for request in requests]
            axes.barh(names, widths, left=left, color=colour, label=part.replace("_", " "))
            left = [before + width for before, width in zip(left, widths, strict=True)]
        axes.set_xlabel("milliseconds, medians")
        axes.figure.legend(ncols=4, frameon=False, loc="outside upper center")

    head = ("milliseconds", *names)
    rows: list[Row] = [("whole", *(interval_text(request["ms"]["whole"]) for request in requests))]
    rows += [
        (
            part.replace("_", " "),
            *(f"{interval_text(request['ms'][part])}, {request['share'][part]:.1%}" for request in requests),
        )
        for part in PARTS
    ]
    return section(
        "A request alone",
        plot(draw, height=1.6 + 0.5 * len(requests)),
        rows_table(head, rows),
        note(
            "Medians with 95 % intervals by the bootstrap, and shares of the whole. "
            + "; ".join(f"{name.replace('_', ' ')}: {what}" for name, what in PARTS.items())
        ),
    )


def _ladder(ladder: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
    measured = {name: rung for name, rung in ladder.items() if "ms" in rung}

    def draw(axes: Any) -> None:
        names = list(measured)[::-1]
        medians = [measured[name]["ms"]["p50"] for name in names]
        errors = [
            [measured[name]["ms"]["p50"] - measured[name]["ms"]["p50_low"] for name in names],
            [measured[name]["ms"]["p50_high"] - measured[name]["ms"]["p50"] for name in names],
        ]
        colours = [COLOURS[2] if name == OURS else COLOURS[0] for name in names]
        axes.barh(names, medians, xerr=errors, color=colours, ecolor="#222", capsize=3)
        axes.set_xlabel("milliseconds a portrait, medians with 95 % intervals")

    rows = []
    for name, rung in ladder.items():
        ours = rung.get("ours_by_this")
        by = "" if ours is None or name == OURS else ratio_text(ours)
        figures = interval_text(rung["ms"]) if "ms" in rung else f"left out: {rung['left_out']}"
        rows.append((name, figures, by, rung["what"]))
    return section(
        f"The ladder, {arguments['num_inference_steps']} steps, guidance {arguments['guidance_scale']:g}",
        plot(draw, height=0.8 + 0.4 * len(measured)),
        rows_table(("", "milliseconds", "ours by this", ""), rows),
        note("Each round asks every rung for the same new portrait; a ratio is the median of the rounds' ratios."),
    )


def _engines(engines: Sequence[Mapping[str, Any]], peak: Mapping[str, float]) -> str:
    head = ("engine", "rows", "runtime", "milliseconds", "p90", "floor", "share of floor", "to the first runtime")
    rows = [
        (
            row["engine"],
            row["batch"],
            row["runtime"],
            interval_text(row["ms"]),
            "-" if row["ms"]["p90"] is None else f"{row['ms']['p90']:.1f}",
            f"{row['floor_ms']:.1f}",
            f"{row['share_of_floor']:.0%}",
            f"{row['ratio_to_first']['median']:.2f}",
        )
        for row in engines
    ]
    return section(
        "Engines alone",
        rows_table(head, rows),
        note(
            f"The floor is the longer of an engine's operations at {peak['gflops']:.0f} GFLOP/s (a float32 matrix"
            f" product here) and its bytes at {peak['gb_per_s']:.1f} GB/s (a copy here). {over_the_floor(engines)}"
        ),
    )


def _limits(limits: Mapping[str, Any]) -> str:
    head = ("", "a second, measured", "a second of a core", "MB a second, measured", "MB a second of a core")
    keys = ("per_s", "per_s_of_a_core", "megabytes_per_s", "megabytes_per_s_of_a_core")
    rows = [(name, *(each[key] for key in keys)) for name, each in limits.items() if name != "callers"]
    return section(
        "The gateway's own limits",
        rows_table(head, rows),
        note(f"{limits['callers']} callers in a closed loop on the same machine; engines that take no time."),
    )
