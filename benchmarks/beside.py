"""Our closed loop and perf_analyzer on one setting in turn: two generators that share no code, and must agree.

Each number of calls under way is measured by ours, by perf_analyzer and by ours again, so that a machine that grows
slower or faster meanwhile is no difference between them. Both send the same pictures and options. perf_analyzer counts
a call from its sending to its answer, and so does ours, from the moment its caller was free.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TextIO

from icportrait_client.portraits import Metadata

from benchmarks.load import LoadRun, run_load
from benchmarks.perf_analyzer import measure
from benchmarks.report import run_fell_behind, sample_quantiles, steady_answers, summarise
from benchmarks.settings import LoadSettings, PerfAnalyzerSettings

THROUGHPUT = 0.05
P50 = 0.1
"""Shares of perf_analyzer's figures by which ours may differ."""
_WINDOWS = 1.5
"""Length of each of our two runs, in perf_analyzer's windows, of which it needs three."""
_WARM_UP_S = 1.0


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
        first = client.generate(profile=settings.profile, reference=settings.reference, **settings.options)
    rows, conditions = [], None
    for concurrency in settings.levels:
        load = _load(settings, concurrency, first.metadata)
        before = run_load(load)
        theirs = measure(replace(settings, concurrency=str(concurrency)), echo)
        runs = (before, run_load(replace(load, seed=load.seed + 1)))
        if any(run.interrupted_s is not None for run in runs):
            raise KeyboardInterrupt
        conditions = conditions or theirs["conditions"]
        level = theirs["levels"][0] if theirs["levels"] else None
        rows.append(compared(concurrency, _figures(runs), level))
    assert conditions is not None
    return {
        "simulated": theirs["simulated"],
        "levels": rows,
        "agree": all(row["agree"] for row in rows),
        "conditions": {**conditions, "arguments": {**conditions["arguments"], "concurrency": settings.concurrency}},
    }


def _load(settings: PerfAnalyzerSettings, concurrency: int, metadata: Metadata) -> LoadSettings:
    return LoadSettings(
        url=settings.url,
        model=settings.model,
        concurrency=concurrency,
        duration_s=_WARM_UP_S + _WINDOWS * settings.window_s,
        warm_up_s=_WARM_UP_S,
        steps=(metadata.steps, metadata.steps),
        guidance_scale=metadata.guidance_scale,
        profile=(settings.profile,),
        reference=(settings.reference,),
    )


def _figures(runs: tuple[LoadRun, LoadRun]) -> dict[str, Any]:
    """Return our figures of both runs together."""
    answers = [answer for run in runs for answer in steady_answers(run)]
    latency_ms = sample_quantiles(1000 * answer.latency_s for answer in answers)
    rates = [summarise(run)["rate_per_s"]["steady"] for run in runs]
    return {
        "count": latency_ms["count"],
        "throughput_per_s": round(sum(rates) / len(rates), 3),
        "latency_ms": {name: latency_ms[name] for name in ("p50", "p99")},
        "fell_behind": run_fell_behind(runs),
    }


def compared(concurrency: int, ours: dict[str, Any], theirs: dict[str, Any] | None) -> dict[str, Any]:
    """Return one concurrency's figures side by side; perf_analyzer's are None where its windows didn't agree."""
    row: dict[str, Any] = {"concurrency": concurrency, "ours": ours, "perf_analyzer": theirs, "agree": False}
    if theirs is None or not ours["count"]:
        return {**row, "ratio": {"throughput": None, "p50": None}}
    throughput = ours["throughput_per_s"] / theirs["throughput_per_s"]
    p50 = ours["latency_ms"]["p50"] / theirs["latency_ms"]["p50"]
    agree = abs(throughput - 1) <= THROUGHPUT and abs(p50 - 1) <= P50
    return {**row, "ratio": {"throughput": round(throughput, 4), "p50": round(p50, 4)}, "agree": agree}


def table(report: dict[str, Any]) -> str:
    """Write the figures of ``measure_both`` as lines for a reader."""
    lines = [
        f"{'':<12}{'calls/s':>30}{'p50, ms':>30}",
        f"{'concurrency':<12}" + f"{'ours':>10}{'theirs':>10}{'ratio':>10}" * 2,
    ]
    for row in report["levels"]:
        ours, theirs, ratio = row["ours"], row["perf_analyzer"], row["ratio"]
        if theirs is None:
            lines.append(f"{row['concurrency']:<12}  perf_analyzer's windows didn't agree: no figures of it")
            continue
        lines.append(
            f"{row['concurrency']:<12}{ours['throughput_per_s']:>10.2f}{theirs['throughput_per_s']:>10.2f}"
            f"{_ratio(ratio['throughput'])}{ours['latency_ms']['p50'] or 0:>10.1f}{theirs['latency_ms']['p50']:>10.1f}"
            f"{_ratio(ratio['p50'])}" + ("" if row["agree"] else "  differ")
        )
        if ours["fell_behind"]:
            lines.append("  INVALID: our generator did NOT keep up")
    verdict = "agree" if report["agree"] else "don't agree"
    return "\n".join([*lines, f"they {verdict} within {THROUGHPUT:.0%} of calls/s and {P50:.0%} of the median"])


def _ratio(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.3f}':>10}"
