"""perf_analyzer's benchmark without perf_analyzer: what it is given, how its figures are read, and what it lacks."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path
from typing import Any

import pytest
from icportrait_client.errors import InvalidRequest

from benchmarks.beside import compared, table, together
from benchmarks.perf_analyzer import input_data, levels, request_counts, unstable_level
from benchmarks.perf_analyzer_program import PerfAnalyzerError, Program, find_program
from benchmarks.settings import PerfAnalyzerSettings

CSV = """Concurrency,Inferences/Second,Client Send,p50 latency,p90 latency,p95 latency,p99 latency
2,19.0398,23,103393,109690,112657,115829
1,10.8272,24,90208,97378,101771,105103
""".splitlines()
PRINTED = [
    "Request concurrency: 1",
    "Client:",
    "Request count: 39",
    "Request concurrency: 2",
    "Request count: 69",
    "Request concurrency: 3",
    "Failed to obtain stable measurement within 10 measurement windows for concurrency 3. Please try to increase the "
    "--measurement-interval.",
]


@pytest.mark.parametrize(
    ("text", "expected"), [("4", [4]), ("1:8", list(range(1, 9))), ("2:8:2", [2, 4, 6, 8]), ("1:8:3", [1, 4, 7])]
)
def test_concurrency_is_a_level_or_a_range(text: str, expected: list[int]) -> None:
    assert list(PerfAnalyzerSettings(concurrency=text).levels) == expected


@pytest.mark.parametrize("text", ["0", "0:4", "8:1", "1:0", "1:8:0", "1:8:1:1", "four", "", "-1"])
def test_another_concurrency_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^concurrency: .*, expected such as 4, 1:8 or 2:8:2$"):
        PerfAnalyzerSettings(concurrency=text)


def test_an_option_out_of_range_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="num_inference_steps: 151"):
        PerfAnalyzerSettings(num_inference_steps=151)
    with pytest.raises(InvalidRequest, match="window: 0"):
        PerfAnalyzerSettings(window_s=0)


def test_pictures_go_with_their_length_and_options_only_where_they_are_given() -> None:
    (call,) = input_data({"profile": b"abc"}, {"seed": 7})["data"]
    assert base64.b64decode(call["profile"]["b64"]) == b"\x03\x00\x00\x00abc"
    assert call["seed"] == [7]
    assert set(call) == {"profile", "seed"}


def test_figures_are_read_by_concurrency() -> None:
    first, second = levels(CSV, request_counts(PRINTED))
    latency_ms = {"p50": 90.21, "p90": 97.38, "p95": 101.77, "p99": 105.1}
    assert first == {"concurrency": 1, "count": 39, "throughput_per_s": 10.827, "latency_ms": latency_ms}
    assert (second["concurrency"], second["count"]) == (2, 69)


def test_where_it_gave_up_is_read_from_what_it_printed() -> None:
    assert unstable_level(PRINTED) == 3
    assert unstable_level(PRINTED[:-1]) is None


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exec sleep 60", "perf_analyzer measured nothing for 0.5 s; does the server still answer?"),
        (
            "echo; echo 'Thread [0] had error: no'; exit 99",
            "perf_analyzer ended with status 99: Thread [0] had error: no",
        ),
    ],
)
def test_a_run_that_fails_or_falls_silent_is_one_line(script: str, message: str) -> None:
    echo = io.StringIO()
    with pytest.raises(PerfAnalyzerError) as raised:
        Program("sh", {}, "2").run(["-c", f"echo 'Request concurrency: 1'; {script}"], silence_s=0.5, echo=echo)
    assert str(raised.value) == message
    assert echo.getvalue().startswith("Request concurrency: 1\n")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path where ``make setup`` puts perf_analyzer, in an environment that has none."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    binary = tmp_path / "perf_analyzer" / "bin" / "perf_analyzer"
    binary.parent.mkdir(parents=True)
    return binary


def test_without_a_binary_set_up_is_named(installed: Path, tmp_path: Path) -> None:
    with pytest.raises(PerfAnalyzerError, match=r'^perf_analyzer isn\'t installed; run "make setup"$'):
        find_program(tmp_path)


@pytest.mark.parametrize(
    ("library", "remedy"),
    [
        ("libssl.so.3", "on Debian or Ubuntu: apt-get install libssl3"),
        ("libb64.so.0d", "on Debian or Ubuntu: apt-get install libb64-0d"),
        ("libcudart.so.12", 'run "make setup"'),
    ],
)
def test_a_missing_library_is_named_with_what_brings_it(
    installed: Path, tmp_path: Path, library: str, remedy: str
) -> None:
    complaint = f"error while loading shared libraries: {library}: cannot open shared object file: No such file"
    installed.write_text(f"#!/bin/sh\necho '{installed}: {complaint}' >&2\nexit 127\n")
    installed.chmod(0o755)
    with pytest.raises(PerfAnalyzerError) as raised:
        find_program(tmp_path)
    assert str(raised.value) == f"perf_analyzer lacks {library}; {remedy}"


def figures(throughput_per_s: float, p50_ms: float) -> dict[str, Any]:
    latency_ms = {"p50": p50_ms, "p99": 2 * p50_ms}
    return {"count": 9, "throughput_per_s": throughput_per_s, "latency_ms": latency_ms, "fell_behind": False}


@pytest.mark.parametrize(
    ("throughput_per_s", "p50_ms", "agree"),
    [(10.0, 100.0, True), (10.4, 91.0, True), (9.4, 100.0, False), (10.0, 111.0, False)],
)
def test_two_generators_agree_within_5_percent_of_calls_and_10_of_the_median(
    throughput_per_s: float, p50_ms: float, agree: bool
) -> None:
    even = compared(figures(10.0, 100.0), figures(10.0, 100.0))
    other = compared(figures(throughput_per_s, p50_ms), figures(10.0, 100.0))
    row = together(2, [other, even, other])
    assert row["agree"] is agree
    assert row["ratio"] == pytest.approx({"throughput": throughput_per_s / 10, "p50": p50_ms / 100})
    assert together(2, [even, other, even])["agree"]
    verdict = "they agree" if agree else "they don't agree"
    assert table({"levels": [row], "agree": agree}).endswith(f"{verdict} within 5% of calls/s and 10% of the median")


def test_windows_that_did_not_agree_leave_nothing_to_compare() -> None:
    nothing = compared(figures(10.0, 100.0), None)
    row = together(2, [nothing])
    assert (row["agree"], row["ratio"]) == (False, None)
    assert "perf_analyzer's windows didn't agree" in table({"levels": [row], "agree": False})
    assert together(2, [nothing, compared(figures(10.0, 100.0), figures(10.0, 100.0))])["agree"]
