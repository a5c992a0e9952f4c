"""The report of a comparison of batching modes: medians over rounds, ratios, and the same as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

SERVER = ("preset", "precision", "model_version", "engine")
"""Fields in which answers describe their server."""
REFERENCE = "in-flight"
"""The mode that ratios are to."""
RATIOS = ("p50_ms", "p99_ms", "throughput_per_s", "outside_engine_ms", "occupancy")
_COLUMNS = {
    "p50_ms": ("p50, ms", 1),
    "p99_ms": ("p99, ms", 1),
    "throughput_per_s": ("answered/s", 2),
    "refused": ("refused", 3),
    "failed": ("failed", 3),
    "outside_engine_ms": ("outside, ms", 3),
    "occupancy": ("slots", 2),
    "cpu_busy": ("CPU busy", 2),
}


def run_line(run: Mapping[str, Any], rounds: int) -> str:
    """Return a line with a run's first figures, for a waiting reader."""
    figures = (f"{_COLUMNS[name][0]} {_cell(run[name], name)}" for name in ("p50_ms", "p99_ms", "throughput_per_s"))
    return f"round {run['round']} of {rounds}, {run['mode']} at {run['load']:g}: {', '.join(figures)}"


def medians(modes: Sequence[str], runs: Sequence[Mapping[str, Any]], share: float) -> dict[str, Any]:
    """Return each mode's figures under one load, and their ratios; None where a round has none."""
    of_mode = {mode: [run for run in runs if (run["mode"], run["load"]) == (mode, share)] for mode in modes}
    figures = {
        mode: {
            **{name: _median([run[name] for run in own]) for name in _COLUMNS},
            "fell_behind": sum(run["fell_behind"] for run in own),
        }
        for mode, own in of_mode.items()
    }
    return {"modes": figures, "ratios": ratios(figures)}


def _median(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return round(median(found), 4) if len(found) == len(values) else None


def ratios(modes: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Divide every other mode's figures by in-flight's; empty without in-flight."""
    if REFERENCE not in modes:
        return {}
    reference = modes[REFERENCE]
    return {
        mode: {
            name: round(own[name] / reference[name], 3) if own[name] is not None and reference[name] else None
            for name in RATIOS
        }
        for mode, own in modes.items()
        if mode != REFERENCE
    }


def table(report: Mapping[str, Any]) -> str:
    """Write the figures of ``compare`` as lines for a reader."""
    conditions, capacity = report["conditions"], report["capacity"]
    arguments = conditions["arguments"]
    server = ", ".join(str(conditions[name]) for name in SERVER if name in conditions)
    lines = [
        f"batching modes: {server} - SIMULATED engines, no figure is a real engine's",
        f"{conditions['slots']} slots, {conditions['max_queued_slots']} more wait; steps {conditions['steps'][0]}.."
        f"{conditions['steps'][1]}, guidance {conditions['guidance_scale']:g}, seed {conditions['seed']};"
        f" {conditions['cpu_count']} CPUs, commit {(conditions['commit'] or 'unknown')[:12]}",
        f"medians over {arguments['rounds']} rounds of {arguments['duration_s']:g} s, the first"
        f" {conditions['warm_up_s']:g} s left out",
        f"{capacity['mode']} serves {capacity['per_s']:.2f}/s at most: asked for {capacity['offered_per_s']:.2f}/s,"
        f" CPUs {_cell(capacity['cpu_busy'], 'cpu_busy')} busy",
    ]
    for load in report["loads"]:
        lines += [
            "",
            f"{load['share']:g} of that, {load['rate_per_s']:.2f}/s",
            f"{'':<20}" + "".join(f"{title:>12}" for title, _ in _COLUMNS.values()),
        ]
        for mode, figures in load["modes"].items():
            lines.append(f"{mode:<20}" + "".join(f"{_cell(figures[name], name):>12}" for name in _COLUMNS))
            if behind := figures["fell_behind"]:
                lines.append(f"  the generator did NOT keep up in {behind} of {arguments['rounds']} rounds")
        if load["ratios"]:
            lines.append(f"by {REFERENCE}'s")
        for mode, figures in load["ratios"].items():
            cells = ("" if name not in RATIOS else _ratio(figures[name]) for name in _COLUMNS)
            lines.append(f"  {mode:<18}" + "".join(f"{cell:>12}" for cell in cells))
    lines += [
        "",
        "outside: of the engines, mean a step; slots: taken at a step, mean, in a whole batch also by what has ended;",
        "refused and failed: shares of what was sent; CPU busy: all of this machine's, with whatever else runs on it",
    ]
    return "\n".join(lines)


def _cell(value: float | None, name: str) -> str:
    return "-" if value is None else f"{value:.{_COLUMNS[name][1]}f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
