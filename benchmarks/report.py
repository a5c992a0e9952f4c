"""The report of a load run: one dictionary of figures, and the same as a table."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.calls import LEFT, OK, Answer
from benchmarks.gpu.settings import GpuProbeSettings
from benchmarks.load import LoadRun, Outcome
from benchmarks.machine import machine
from benchmarks.mix import Mix
from benchmarks.settings import (
    ROOT,
    ClientOverheadSettings,
    CompareSettings,
    DevicesSettings,
    FacesSettings,
    GeneratorSettings,
    LatencySettings,
    LoadSettings,
    LoopSettings,
    MarkingSettings,
    PairsSettings,
    PerfAnalyzerSettings,
    SearchSettings,
)
from benchmarks.statistics import least_samples, quantile

REFUSALS = ("UNAVAILABLE", "INVALID_ARGUMENT")
LATE_MS = 10.0
"""Send lag that is too much where no request was answered."""
LATE_SHARE = 0.01
"""Share of the median latency that is too much."""
_QUANTILES = {"p50": 50, "p90": 90, "p99": 99, "max": 100}
_LEVELS = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def summarise(run: LoadRun) -> dict[str, Any]:
    """Summarise a run as figures for JSON; None where there is nothing to count.

    "Steady" are the requests meant to leave after the warm-up, and for the rate the answers that came after it while
    requests were still being sent.
    """
    settings, outcomes = run.settings, run.outcomes
    ended = [outcome for outcome in outcomes if outcome.answered_s is not None]
    served = [outcome for outcome in ended if outcome.answer.code == OK]
    steady = steady_answers(run)
    sending_s = min(settings.duration_s, run.interrupted_s if run.interrupted_s is not None else settings.duration_s)
    metadata = [json.loads(outcome.answer.metadata) for outcome in served]
    steady_metadata = [json.loads(outcome.answer.metadata) for outcome in steady]
    lateness_ms = sample_quantiles(1000 * outcome.lateness_s for outcome in outcomes)
    latency_ms: dict[str, Any] = {"whole run": _latency_ms(served), "steady": _latency_ms(steady) | _sure(steady)}
    for name, (low, high) in step_thirds(*settings.step_range).items():
        third = [outcome for outcome in steady if low <= outcome.request.num_inference_steps <= high]
        latency_ms[name] = {"steps": [low, high], **_latency_ms(third)}
    return {
        "simulated": any(map(is_simulated, metadata)) if metadata else None,
        "interrupted": run.interrupted_s is not None,
        "requests": {"planned": run.planned, "sent": len(outcomes), "ended": len(ended)},
        "outcomes": _outcomes(outcomes),
        "refusals": _refusals(ended),
        "rate_per_s": {
            "asked": settings.rate_per_s if settings.concurrency is None else None,
            "offered": _per_second(len(outcomes), sending_s),
            "achieved": _per_second(len(served), _answering_s(outcomes)),
            "steady": _per_second(
                sum(settings.warm_up_s <= (outcome.answered_s or 0) < sending_s for outcome in served),
                sending_s - settings.warm_up_s,
            ),
        },
        "goodput": goodput(run),
        "lateness_ms": lateness_ms,
        "fell_behind": fell_behind(
            lateness_ms["p99"], sample_quantiles(1000 * each.latency_s for each in served)["p50"]
        ),
        "latency_ms": latency_ms,
        "refusal_ms": _latency_ms([outcome for outcome in ended if outcome.answer.code in REFUSALS]),
        "stage_ms": _stage_ms(steady_metadata),
        "conditions": {**run_conditions(settings, run.picture_bytes), **(metadata[0]["versions"] if metadata else {})},
    }


def steady_answers(run: LoadRun) -> list[Outcome]:
    """List the answered requests that were meant to leave after the warm-up, in the order of their sending."""
    return [
        outcome
        for outcome in run.outcomes
        if outcome.answer.code == OK and outcome.request.send_s >= run.settings.warm_up_s
    ]


def goodput(run: LoadRun) -> dict[str, Any] | None:
    """Count the answers within their own deadline; None where no request has one.

    Of the requests meant to leave after the warm-up, by their number and by the seconds in which they were to leave.
    Callers who left aren't counted. Of an interrupted run those are left out whose deadline hadn't come.
    """
    settings, until_s = run.settings, run.settings.duration_s
    deadlines = {each.request.deadline_ms for each in run.outcomes if each.request.deadline_ms is not None}
    if not deadlines:
        return None
    if run.interrupted_s is not None:
        until_s = min(until_s, run.interrupted_s - max(deadlines) / 1000)
    asked = [
        outcome
        for outcome in run.outcomes
        if settings.warm_up_s <= outcome.request.send_s < until_s
        and outcome.request.deadline_ms is not None
        and outcome.answer.code != LEFT
    ]
    good = sum(map(in_time, asked))
    return {
        "deadline_ms": deadlines.pop() if len(deadlines) == 1 else sorted(deadlines),
        "asked": len(asked),
        "in_time": good,
        "per_s": _per_second(good, until_s - settings.warm_up_s),
        "share": round(good / len(asked), 4) if asked else None,
    }


def in_time(outcome: Outcome) -> bool:
    """Tell whether a request was answered, and within its own deadline."""
    deadline_ms = outcome.request.deadline_ms
    return outcome.answer.code == OK and (deadline_ms is None or 1000 * outcome.latency_s <= deadline_ms)


def reason(answer: Answer) -> str:
    """Say why a request was refused, without what differs from one refusal to the next: N stands for each number."""
    text = answer.message.partition(";")[0].removeprefix(f"{answer.code}: ")
    return " ".join(re.sub(r"\d+(?:[.,]\d+)*", "N", text).split())


def step_thirds(low: int, high: int) -> dict[str, tuple[int, int]]:
    """Return the shortest and the longest third of a range of steps, both ends included; none of a single number."""
    third = max(1, (high - low + 1) // 3)
    return {"short": (low, low + third - 1), "long": (high - third + 1, high)} if low < high else {}


def fell_behind(lateness_p99_ms: float | None, latency_p50_ms: float | None) -> bool:
    """Tell whether requests left so late that the run is invalid: p99 of the send lag is above 1 % of the median."""
    if lateness_p99_ms is None:
        return False
    return lateness_p99_ms > (LATE_MS if latency_p50_ms is None else LATE_SHARE * latency_p50_ms)


def run_fell_behind(runs: Sequence[LoadRun]) -> bool:
    """Tell whether runs are invalid together."""
    outcomes = [outcome for run in runs for outcome in run.outcomes]
    late_ms = sample_quantiles(1000 * outcome.lateness_s for outcome in outcomes)
    served_ms = sample_quantiles(1000 * outcome.latency_s for outcome in outcomes if outcome.answer.code == OK)
    return fell_behind(late_ms["p99"], served_ms["p50"])


def is_simulated(metadata: dict[str, Any]) -> bool:
    """Tell whether an answer's metadata says that no engine computed it."""
    engine = str(metadata.get("versions", {}).get("engine", ""))
    return metadata.get("simulated") is True or engine.startswith("simulated")


def _outcomes(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    counted: dict[str, Any] = {}
    for outcome in outcomes:
        kind = counted.setdefault(outcome.answer.code, {"count": 0, "first_message": outcome.answer.message or None})
        kind["count"] += 1
    return dict(sorted(counted.items(), key=lambda item: (item[0] != OK, -item[1]["count"])))


def _refusals(ended: Sequence[Outcome]) -> dict[str, int]:
    refused = (outcome.answer for outcome in ended if outcome.answer.code in REFUSALS)
    return dict(Counter(map(reason, refused)).most_common())


def _answering_s(outcomes: Sequence[Outcome]) -> float:
    ended_s = [outcome.answered_s for outcome in outcomes if outcome.answered_s is not None]
    return max(ended_s) - min(outcome.request.send_s for outcome in outcomes) if ended_s else 0.0


def _per_second(count: int, seconds: float) -> float | None:
    return round(count / seconds, 3) if seconds > 0 else None


def _latency_ms(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return quantiles of latencies; None where there are fewer than the order statistics' floor."""
    found = sample_quantiles(1000 * outcome.latency_s for outcome in outcomes)
    few = [name for name, level in _LEVELS.items() if found["count"] < least_samples(level)]
    return {**found, **dict.fromkeys(few)}


def _sure(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the quantiles' 95 % intervals, and for those that have none the samples that they take."""
    values = [1000 * outcome.latency_s for outcome in outcomes]
    found = {name: quantile(values, level) for name, level in _LEVELS.items()}
    return {
        "intervals": {
            name: [round(each.low, 2), round(each.high, 2)]
            for name, each in found.items()
            if each.low is not None and each.high is not None
        },
        "needed": {name: each.needed for name, each in found.items() if each.needed is not None},
    }


def sample_quantiles(figures_ms: Iterable[float]) -> dict[str, Any]:
    """Return the count, quantiles and maximum of what was counted, whatever it is worth."""
    values = list(figures_ms)
    quantiles = {name: round(float(np.percentile(values, q)), 2) if values else None for name, q in _QUANTILES.items()}
    return {"count": len(values), **quantiles}


def _stage_ms(metadata: Sequence[dict[str, Any]]) -> dict[str, float]:
    stages = list(metadata[0].get("stage_ms", {})) if metadata else []
    return {stage: round(median(each["stage_ms"][stage] for each in metadata), 2) for stage in stages}


def run_conditions(settings: LoadSettings | PerfAnalyzerSettings, picture_bytes: dict[str, Any]) -> dict[str, Any]:
    """Return the conditions that a figure needs beside it and the server doesn't report."""
    return {**conditions_here(settings), "tritonclient": version("tritonclient"), "picture_bytes": picture_bytes}


def conditions_here(
    settings: LoadSettings
    | PerfAnalyzerSettings
    | CompareSettings
    | LoopSettings
    | PairsSettings
    | FacesSettings
    | LatencySettings
    | MarkingSettings
    | SearchSettings
    | DevicesSettings
    | GeneratorSettings
    | ClientOverheadSettings
    | GpuProbeSettings,
) -> dict[str, Any]:
    """Return the conditions of any run: the code, the machine and the settings."""
    return {
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": machine(),
        "cpu_count": os.cpu_count(),
        "arguments": {name: _plain(value) for name, value in asdict(settings).items()},
        "seed": settings.seed,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.relative_to(ROOT) if value.is_relative_to(ROOT) else value)
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _commit() -> str | None:
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def table(report: dict[str, Any]) -> str:
    """Write the figures of ``summarise`` as lines for a reader."""
    conditions, rates, late = report["conditions"], report["rate_per_s"], report["lateness_ms"]
    arguments, sizes = conditions["arguments"], conditions["picture_bytes"]
    requests = report["requests"]
    lines = [
        headline(report),
        f"pictures: {', '.join(f'{name} {_sizes(each)}' for name, each in sizes.items())};"
        f" {_steps(arguments)}, guidance {_mixed(arguments['guidance_scale'])},"
        + "".join(
            f" {name} {_mixed(arguments[name])},"
            for name in ("guidance_interval", "priority", "deadline_ms", "returning")
            if arguments[name] is not None
        )
        + f" seed {conditions['seed']}",
        _loop_line(arguments),
        "",
        f"{'requests':<26}{requests['sent']} sent"
        + ("" if requests["planned"] is None else f" of {requests['planned']}")
        + (", interrupted by Ctrl-C" if report["interrupted"] else ""),
    ]
    for code, kind in report["outcomes"].items():
        message = " ".join((kind["first_message"] or "").split())
        lines.append(f"  {code:<24}{kind['count']}" + (f"   first: {message[:150]}" if message else ""))
    if report["refusals"]:
        lines += ["refused, by reason"] + [f"  {count:<8}{text[:150]}" for text, count in report["refusals"].items()]
    lines += [
        "",
        f"{'offered':<26}{_figure(rates['offered'], 2)}/s"
        + ("" if rates["asked"] is None else f", asked for {rates['asked']:g}/s"),
        f"{'achieved':<26}{_figure(rates['achieved'], 2)}/s OK; {_figure(rates['steady'], 2)}/s after the warm-up"
        f" of {arguments['warm_up_s']:g} s",
        *_goodput_lines(report["goodput"]),
        f"{'sent late by':<26}{_figure(late['p50'], 1)} ms median, {_figure(late['p99'], 1)} ms p99,"
        f" {_figure(late['max'], 1)} ms at most",
    ]
    if report["fell_behind"]:
        lines.append(
            f"INVALID: the generator did NOT keep up, p99 of the lateness is above {LATE_SHARE:.0%} of the median"
            " latency"
        )
    lines += ["", f"{'latency, ms':<26}{'count':>7}" + "".join(f"{name:>10}" for name in _QUANTILES)]
    for name, figures in {**report["latency_ms"], "refusals": report["refusal_ms"]}.items():
        label = f"{name}, {figures['steps'][0]}..{figures['steps'][1]} steps" if "steps" in figures else name
        lines.append(
            f"  {label:<24}{figures['count']:>7}" + "".join(f"{_figure(figures[each], 1):>10}" for each in _QUANTILES)
        )
    lines += _interval_lines(report["latency_ms"]["steady"])
    if report["stage_ms"]:
        stages = ", ".join(f"{stage} {duration:.1f}" for stage, duration in report["stage_ms"].items())
        lines += ["", f"{'server stages, median ms':<26}{stages}"]
    return "\n".join(lines)


def headline(report: dict[str, Any]) -> str:
    """Describe the measurement in one line."""
    conditions = report["conditions"]
    what = [str(conditions[key]) for key in ("preset", "precision", "model_version", "engine") if key in conditions]
    title = f"{conditions['arguments']['model']} at {conditions['arguments']['url']}: {', '.join(what) or 'no answer'}"
    return title + (" - SIMULATED engines, no figure is a real engine's" if report["simulated"] else "")


def _goodput_lines(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    share = "-" if found["share"] is None else f"{found['share']:.1%}"
    return [
        f"{'goodput':<26}{_figure(found['per_s'], 2)}/s within {found['deadline_ms']} ms, {share} of the"
        f" {found['asked']} asked for after the warm-up"
    ]


def _interval_lines(steady: dict[str, Any]) -> list[str]:
    lines = [""] if steady["intervals"] or steady["needed"] else []
    for name in _LEVELS:
        label = f"steady {name}, 95 %"
        if name in steady["intervals"]:
            low, high = steady["intervals"][name]
            lines.append(f"  {label:<24}{low:.1f} to {high:.1f} ms")
        else:
            lines.append(
                f"  {label:<24}not enough samples: {steady['count']}, an interval takes about {steady['needed'][name]}"
            )
    return lines


def _loop_line(arguments: dict[str, Any]) -> str:
    if arguments["concurrency"] is not None:
        sending = f"closed loop of {arguments['concurrency']} callers"
    elif arguments["trace"] is not None:
        sending = f"open loop, replayed from {arguments['trace']}"
    elif arguments["burstiness"] == 1:
        sending = "open loop, Poisson"
    else:
        sending = f"open loop, gamma gaps with a coefficient of variation of {arguments['burstiness']:g}"
    ramp = f", growing for {arguments['ramp_s']:g} s" if arguments["ramp_s"] else ""
    leaving = f"; {arguments['leaving']:.0%} leave within {arguments['leaving_ms']} ms" if arguments["leaving"] else ""
    return sending + ramp + leaving


def _steps(arguments: dict[str, Any]) -> str:
    if arguments["steps_mix"] is not None:
        return f"steps {_mixed(arguments['steps_mix'])}"
    return f"steps {arguments['steps'][0]}..{arguments['steps'][1]}"


def _mixed(value: Any) -> str:
    if isinstance(value, list):
        return "..".join(f"{each:g}" for each in value)
    return str(Mix(**value)) if isinstance(value, dict) else f"{value:g}"


def _sizes(found: list[int]) -> str:
    return f"{found[0]} bytes" if len(found) == 1 else f"{len(found)} of {min(found)}..{max(found)} bytes"


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
