"""Logs of latencies in the format of HdrHistogram, which its tools read, and the merging of several.

A log has a histogram for each second of intended sendings, in microseconds with three significant digits. Histograms
add up exactly, so that the quantiles of several runs, or of several generators, are those of all their requests. The
order within a run is lost, and with it the interval that stands autocorrelation: a merged figure has none.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from hdrh.codec import HdrCookieException, HdrLengthException
from hdrh.histogram import HdrHistogram
from hdrh.log import HistogramLogReader, HistogramLogWriter
from icportrait_client.errors import InvalidRequest

from benchmarks.load import LoadRun
from benchmarks.report import steady_answers
from benchmarks.statistics import least_samples

_HIGHEST_US = 3_600_000_000
_DIGITS = 3
_INTERVAL_S = 1.0
_QUANTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p999": 99.9}


def _empty() -> Any:
    return HdrHistogram(1, _HIGHEST_US, _DIGITS)


def write_log(run: LoadRun, path: Path) -> None:
    """Write the latencies of a run's steady answers.

    Raises:
        OSError: the file can't be written.
    """
    with path.open("w", encoding="utf-8") as file:
        log = HistogramLogWriter(file)
        log.output_log_format_version()
        log.output_comment("latencies in microseconds from the intended sending, of answers after the warm-up")
        log.output_comment("[BaseTime: 0.0 (seconds since the run's start)]")
        log.output_legend()
        for second, outcomes in groupby(steady_answers(run), lambda each: each.request.send_s // _INTERVAL_S):
            histogram = _empty()
            for outcome in outcomes:
                histogram.record_value(min(_HIGHEST_US, max(1, round(1e6 * outcome.latency_s))))
            begin_s = second * _INTERVAL_S
            # A time of 0 would be taken for one that is missing.
            log.output_interval_histogram(histogram, max(begin_s, 1e-6), begin_s + _INTERVAL_S, 1e6)


def merge(paths: Sequence[Path]) -> dict[str, Any]:
    """Add the logs of several runs.

    Returns:
        The count, the quantiles in milliseconds (None below the order statistics' floor) and the maximum.

    Raises:
        InvalidRequest: a file can't be read, or isn't a log.
    """
    whole = _empty()
    for path in paths:
        _add(path, whole)
    count = int(whole.get_total_count())
    return {
        "files": [str(path) for path in paths],
        "count": count,
        "latency_ms": {
            name: round(whole.get_value_at_percentile(percent) / 1000, 2)
            if count >= least_samples(percent / 100)
            else None
            for name, percent in _QUANTILES.items()
        }
        | {"max": round(whole.get_max_value() / 1000, 2)},
    }


def _add(path: Path, whole: Any) -> None:
    before = whole.get_total_count()
    try:
        log = HistogramLogReader(str(path), whole)
        try:
            while (histogram := log.get_next_interval_histogram()) is not None:
                whole.add(histogram)
        finally:
            log.input_file.close()
    except OSError as error:
        raise InvalidRequest(f"{path}: can't be read ({error.strerror})") from None
    except (ArithmeticError, LookupError, ValueError, zlib.error, HdrCookieException, HdrLengthException) as error:
        raise InvalidRequest(f"{path}: no HdrHistogram log ({type(error).__name__}: {error})") from None
    if whole.get_total_count() == before:
        raise InvalidRequest(f"{path}: no histogram, expected a log of load --hdr")


def table(report: dict[str, Any]) -> str:
    """Write the figures of ``merge`` as lines for a reader."""
    figures = report["latency_ms"]
    lines = [
        f"{report['count']} answers of {len(report['files'])} logs",
        "".join(f"{name:>12}" for name in figures),
        "".join(f"{'-' if value is None else f'{value:.2f}':>12}" for value in figures.values()) + "  ms",
    ]
    few = [name for name, percent in _QUANTILES.items() if figures[name] is None]
    needed = (f"{name} takes {least_samples(_QUANTILES[name] / 100)}" for name in few)
    return "\n".join([*lines, f"not enough samples: {', '.join(needed)}"] if few else lines)
