"""What a load run says of the server: one dictionary of figures, and the same as a table."""

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

from benchmarks.load import OK, Answer, LoadRun, Outcome
from benchmarks.perf_analyzer import PerfAnalyzerSettings
from benchmarks.settings import ROOT, CompareSettings, LoadSettings, LoopSettings, PairsSettings

REFUSALS = ("UNAVAILABLE", "INVALID_ARGUMENT")
LATE_MS = 10.0
LATE_SHARE = 0.05
_QUANTILES = {"p50": 50, "p90": 90, "p99": 99, "max": 100}


def summarise(run: LoadRun) -> dict[str, Any]:
    """The figures of a run, ready for JSON; None where there is nothing to count.

    "Steady" are the requests meant to leave after the warm-up, and for the rate the answers that came after it while
    requests were still being sent.
    """
    settings, outcomes = run.settings, run.outcomes
    ended = [outcome for outcome in outcomes if outcome.answered_s is not None]
    served = [outcome for outcome in ended if outcome.answer.code == OK]
    steady = [outcome for outcome in served if outcome.request.send_s >= settings.warm_up_s]
    sending_s = min(settings.duration_s, run.interrupted_s if run.interrupted_s is not None else settings.duration_s)
    metadata = [json.loads(outcome.answer.metadata) for outcome in served]
    steady_metadata = [json.loads(outcome.answer.metadata) for outcome in steady]
    lateness_ms = _spread(1000 * outcome.lateness_s for outcome in outcomes)
    latency_ms: dict[str, Any] = {"whole run": _latency_ms(served), "steady": _latency_ms(steady)}
    for name, (low, high) in step_thirds(*settings.steps).items():
        third = [outcome for outcome in steady if low <= outcome.request.num_inference_steps <= high]
        latency_ms[name] = {"steps": [low, high], **_latency_ms(third)}
    return {
        "simulated": any(map(is_simulated, metadata)) if metadata else None,
        "interrupted": run.interrupted_s is not None,
        "requests": {"planned": run.planned, "sent": len(outcomes), "ended": len(ended)},
        "outcomes": _outcomes(outcomes),
        "refusals": _refusals(ended),
        "rate_per_s": {
            "asked": settings.rate_per_s,
            "offered": _per_second(len(outcomes), sending_s),
            "achieved": _per_second(len(served), _answering_s(outcomes)),
            "steady": _per_second(
                sum(settings.warm_up_s <= (outcome.answered_s or 0) < sending_s for outcome in served),
                sending_s - settings.warm_up_s,
            ),
        },
        "goodput": goodput(run),
        "lateness_ms": lateness_ms,
        "fell_behind": fell_behind(lateness_ms["p99"], latency_ms["whole run"]["p50"]),
        "latency_ms": latency_ms,
        "refusal_ms": _latency_ms([outcome for outcome in ended if outcome.answer.code in REFUSALS]),
        "stage_ms": _stage_ms(steady_metadata),
        "conditions": {**run_conditions(settings, run.picture_bytes), **(metadata[0]["versions"] if metadata else {})},
    }


def goodput(run: LoadRun) -> dict[str, Any] | None:
    """Answers within the deadline; None without one.

    Of the requests meant to leave after the warm-up, by their number and by the seconds in which they were to leave. Of
    an interrupted run those are left out whose deadline hadn't come.
    """
    settings, until_s = run.settings, run.settings.duration_s
    if settings.deadline_ms is None:
        return None
    if run.interrupted_s is not None:
        until_s = min(until_s, run.interrupted_s - settings.deadline_ms / 1000)
    asked = [outcome for outcome in run.outcomes if settings.warm_up_s <= outcome.request.send_s < until_s]
    good = sum(outcome.answer.code == OK and 1000 * outcome.latency_s <= settings.deadline_ms for outcome in asked)
    return {
        "deadline_ms": settings.deadline_ms,
        "asked": len(asked),
        "in_time": good,
        "per_s": _per_second(good, until_s - settings.warm_up_s),
        "share": round(good / len(asked), 4) if asked else None,
    }


def reason(answer: Answer) -> str:
    """Why a request was refused, without what differs from one refusal to the next: N stands for each number."""
    text = answer.message.partition(";")[0].removeprefix(f"{answer.code}: ")
    return " ".join(re.sub(r"\d+(?:[.,]\d+)*", "N", text).split())


def step_thirds(low: int, high: int) -> dict[str, tuple[int, int]]:
    """The shortest and the longest third of a range of steps, both ends included; none of a single number."""
    third = max(1, (high - low + 1) // 3)
    return {"short": (low, low + third - 1), "long": (high - third + 1, high)} if low < high else {}


def fell_behind(lateness_p99_ms: float | None, latency_p50_ms: float | None) -> bool:
    """Whether requests left so late that the generator shaped the load, or the latencies, itself."""
    if lateness_p99_ms is None:
        return False
    return lateness_p99_ms > LATE_MS or (latency_p50_ms is not None and lateness_p99_ms > LATE_SHARE * latency_p50_ms)


def is_simulated(metadata: dict[str, Any]) -> bool:
    """Whether an answer's metadata says that no engine computed it."""
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
    return _spread(1000 * outcome.latency_s for outcome in outcomes)


def _spread(figures_ms: Iterable[float]) -> dict[str, Any]:
    values = list(figures_ms)
    quantiles = {name: round(float(np.percentile(values, q)), 2) if values else None for name, q in _QUANTILES.items()}
    return {"count": len(values), **quantiles}


def _stage_ms(metadata: Sequence[dict[str, Any]]) -> dict[str, float]:
    stages = list(metadata[0].get("stage_ms", {})) if metadata else []
    return {stage: round(median(each["stage_ms"][stage] for each in metadata), 2) for stage in stages}


def run_conditions(settings: LoadSettings | PerfAnalyzerSettings, picture_bytes: dict[str, Any]) -> dict[str, Any]:
    """What a figure needs beside it and the server doesn't say."""
    return {**conditions_here(settings), "tritonclient": version("tritonclient"), "picture_bytes": picture_bytes}


def conditions_here(
    settings: LoadSettings | PerfAnalyzerSettings | CompareSettings | LoopSettings | PairsSettings,
) -> dict[str, Any]:
    """Of any run: the code, the machine and what was asked for."""
    return {
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "arguments": {name: _plain(value) for name, value in asdict(settings).items()},
        "seed": settings.seed,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.relative_to(ROOT) if value.is_relative_to(ROOT) else value)
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _commit() -> str | None:
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def table(report: dict[str, Any]) -> str:
    """The figures of ``summarise`` as lines for a reader."""
    conditions, rates, late = report["conditions"], report["rate_per_s"], report["lateness_ms"]
    arguments, sizes = conditions["arguments"], conditions["picture_bytes"]
    requests = report["requests"]
    lines = [
        headline(report),
        f"pictures: {', '.join(f'{name} {_sizes(each)}' for name, each in sizes.items())};"
        f" steps {arguments['steps'][0]}..{arguments['steps'][1]}, guidance {arguments['guidance_scale']:g},"
        + "".join(f" {name} {arguments[name]}," for name in ("priority", "deadline_ms") if arguments[name] is not None)
        + f" seed {conditions['seed']}",
        "",
        f"{'requests':<26}{requests['sent']} sent of {requests['planned']}"
        + (", interrupted by Ctrl-C" if report["interrupted"] else ""),
    ]
    for code, kind in report["outcomes"].items():
        message = " ".join((kind["first_message"] or "").split())
        lines.append(f"  {code:<24}{kind['count']}" + (f"   first: {message[:150]}" if message else ""))
    if report["refusals"]:
        lines += ["refused, by reason"] + [f"  {count:<8}{text[:150]}" for text, count in report["refusals"].items()]
    lines += [
        "",
        f"{'offered':<26}{_figure(rates['offered'], 2)}/s, asked for {rates['asked']:g}/s",
        f"{'achieved':<26}{_figure(rates['achieved'], 2)}/s OK; {_figure(rates['steady'], 2)}/s after the warm-up"
        f" of {arguments['warm_up_s']:g} s",
        *_goodput_lines(report["goodput"]),
        f"{'sent late by':<26}{_figure(late['p50'], 1)} ms median, {_figure(late['p99'], 1)} ms p99,"
        f" {_figure(late['max'], 1)} ms at most",
    ]
    if report["fell_behind"]:
        lines.append(
            f"the generator did NOT keep up: p99 of the lateness is above {LATE_MS:g} ms or {LATE_SHARE:.0%} of the"
            " median latency"
        )
    lines += ["", f"{'latency, ms':<26}{'count':>7}" + "".join(f"{name:>10}" for name in _QUANTILES)]
    for name, figures in {**report["latency_ms"], "refusals": report["refusal_ms"]}.items():
        label = f"{name}, {figures['steps'][0]}..{figures['steps'][1]} steps" if "steps" in figures else name
        lines.append(
            f"  {label:<24}{figures['count']:>7}" + "".join(f"{_figure(figures[each], 1):>10}" for each in _QUANTILES)
        )
    if report["stage_ms"]:
        stages = ", ".join(f"{stage} {duration:.1f}" for stage, duration in report["stage_ms"].items())
        lines += ["", f"{'server stages, median ms':<26}{stages}"]
    return "\n".join(lines)


def headline(report: dict[str, Any]) -> str:
    """What was measured, in one line."""
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


def _sizes(found: list[int]) -> str:
    return f"{found[0]} bytes" if len(found) == 1 else f"{len(found)} of {min(found)}..{max(found)} bytes"


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
