"""Our closed loop and perf_analyzer on one setting in turn: two generators that share no code, and must agree.

Each number of calls under way is measured in rounds: perf_analyzer between two runs of ours, so that a machine that
grows slower or faster meanwhile is no difference between them, and the median of the rounds counts. Both send the same
pictures and options. perf_analyzer counts a call from its sending to its answer, and so does ours, from the moment its
caller was free.

Calls under way together are answered together. The count of a run's answers is therefore off by up to one of each
caller, and the first ones take longer. Runs are long enough for that to be a few percent, and as long for both. Ours
needs no count: a caller is always in a call, so that calls a second are callers by their mean latency.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean, median
from typing import Any, TextIO

from icportrait_client.portraits import Metadata

from benchmarks.load import LoadRun, run_load
from benchmarks.perf_analyzer import measure
from benchmarks.report import run_fell_behind, sample_quantiles, steady_answers
from benchmarks.settings import LoadSettings, PerfAnalyzerSettings

THROUGHPUT = 0.05
P50 = 0.1
"""Shares of perf_analyzer's figures by which ours may differ."""
_WINDOWS = 3 * 1.2
"""Length of a run in windows: perf_analyzer needs three that agree, each a fifth longer than asked for."""
_ANSWERS = 40
"""Answers of each caller for which a run lasts."""


def measure_both(settings: PerfAnalyzerSettings, echo: TextIO) -> dict[str, Any]:
    """Measure every concurrency with both.

    Args:
        settings: the run.
        echo: gets what perf_analyzer prints, as it comes.

    Returns:
        Figures side by side and conditions, ready for JSON.

    Raises:
        PerfAnalyzerError: perf_analyzer can't run here, or a call failed.
        PortraitError: no server answers, or a first call fails.
        KeyboardInterrupt: as our loop swallows it, it is raised again.
    """
    from icportrait_client import PortraitClient

    with PortraitClient(settings.url) as client:
        metadata = client.generate(profile=settings.profile, reference=settings.reference, **settings.options).metadata
    rows, conditions = [], None
    for concurrency in settings.levels:
        level = replace(settings, concurrency=str(concurrency))
        p50_ms = _figures(concurrency, [_ours(level, metadata, settings.rounds)])["latency_ms"]["p50"] or 0.0
        level = replace(level, window_s=max(settings.window_s, round(_ANSWERS * p50_ms / 1000 / _WINDOWS, 1)))
        ours = [_ours(level, metadata, 0)]
        found = []
        for number in range(1, settings.rounds + 1):
            theirs = measure(level, echo)
            conditions = conditions or theirs["conditions"]
            ours.append(_ours(level, metadata, number))
            found.append(compared(_figures(concurrency, ours[-2:]), theirs["levels"][0] if theirs["levels"] else None))
        rows.append(together(concurrency, found) | {"window_s": level.window_s})
    assert conditions is not None
    return {
        "simulated": theirs["simulated"],
        "levels": rows,
        "agree": all(row["agree"] for row in rows),
        "conditions": {**conditions, "arguments": {**conditions["arguments"], "concurrency": settings.concurrency}},
    }


def _ours(level: PerfAnalyzerSettings, metadata: Metadata, seed: int) -> LoadRun:
    """Run our closed loop; runs of different seeds draw different portraits."""
    run = run_load(
        LoadSettings(
            url=level.url,
            model=level.model,
            concurrency=level.levels[0],
            duration_s=_WINDOWS * level.window_s,
            warm_up_s=0.0,
            steps=(metadata.steps, metadata.steps),
            guidance_scale=metadata.guidance_scale,
            profile=(level.profile,),
            reference=(level.reference,),
            seed=seed,
        )
    )
    if run.interrupted_s is not None:
        raise KeyboardInterrupt
    return run


def _figures(concurrency: int, runs: Sequence[LoadRun]) -> dict[str, Any]:
    """Return our figures of all runs together."""
    latencies_s = [answer.latency_s for run in runs for answer in steady_answers(run)]
    latency_ms = sample_quantiles(1000 * each for each in latencies_s)
    return {
        "count": len(latencies_s),
        "throughput_per_s": round(concurrency / mean(latencies_s), 3) if latencies_s else 0.0,
        "latency_ms": {name: latency_ms[name] for name in ("p50", "p99")},
        "fell_behind": run_fell_behind(runs),
    }


def compared(ours: dict[str, Any], theirs: dict[str, Any] | None) -> dict[str, Any]:
    """Return a round's figures side by side; perf_analyzer's are None where its windows didn't agree."""
    if theirs is None or not ours["count"]:
        return {"ours": ours, "perf_analyzer": theirs, "ratio": None}
    ratio = {
        "throughput": round(ours["throughput_per_s"] / theirs["throughput_per_s"], 4),
        "p50": round(ours["latency_ms"]["p50"] / theirs["latency_ms"]["p50"], 4),
    }
    return {"ours": ours, "perf_analyzer": theirs, "ratio": ratio}


def together(concurrency: int, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one concurrency's rounds, the medians of their ratios, and whether these are near enough to 1."""
    ratios = [each["ratio"] for each in rounds if each["ratio"]]
    if not ratios:
        return {"concurrency": concurrency, "rounds": rounds, "ratio": None, "agree": False}
    ratio = {name: median(each[name] for each in ratios) for name in ("throughput", "p50")}
    agree = abs(ratio["throughput"] - 1) <= THROUGHPUT and abs(ratio["p50"] - 1) <= P50
    return {"concurrency": concurrency, "rounds": rounds, "ratio": ratio, "agree": agree}


def table(report: dict[str, Any]) -> str:
    """Write the figures of ``measure_both`` as lines for a reader."""
    lines = [
        f"{'':<12}{'calls/s':>30}{'p50, ms':>30}",
        f"{'concurrency':<12}" + f"{'ours':>10}{'theirs':>10}{'ratio':>10}" * 2,
    ]
    for row in report["levels"]:
        for each in row["rounds"]:
            ours, theirs, ratio = each["ours"], each["perf_analyzer"], each["ratio"]
            if not ratio:
                lines.append(f"{row['concurrency']:<12}  perf_analyzer's windows didn't agree: no figures of it")
                continue
            lines.append(
                f"{row['concurrency']:<12}{ours['throughput_per_s']:>10.2f}{theirs['throughput_per_s']:>10.2f}"
                f"{ratio['throughput']:>10.3f}{ours['latency_ms']['p50']:>10.1f}{theirs['latency_ms']['p50']:>10.1f}"
                f"{ratio['p50']:>10.3f}"
            )
            if ours["fell_behind"]:
                lines.append("  INVALID: our generator did NOT keep up")
        if ratio := row["ratio"]:
            lines.append(
                f"{'  median':<32}{ratio['throughput']:>10.3f}{ratio['p50']:>30.3f}"
                + ("" if row["agree"] else "  differ")
            )
    verdict = "agree" if report["agree"] else "don't agree"
    return "\n".join([*lines, f"they {verdict} within {THROUGHPUT:.0%} of calls/s and {P50:.0%} of the median"])
