"""Logs of latencies: what is written, and what several come to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.calls import Answer
from benchmarks.hdr import merge, write_log
from benchmarks.load import LoadRun, Outcome
from benchmarks.schedule import PlannedRequest
from benchmarks.settings import LoadSettings


def run(latencies_s: np.ndarray) -> LoadRun:
    """Make a run of one request in 10 ms, the first second of which is the warm-up."""
    outcomes = []
    for index, latency_s in enumerate(latencies_s):
        send_s = index / 100
        outcomes.append(Outcome(PlannedRequest(send_s, 5, 0), send_s, send_s + latency_s, Answer("OK")))
    outcomes[150].answer = Answer("UNAVAILABLE")
    return LoadRun(LoadSettings(duration_s=100, warm_up_s=1), len(outcomes), outcomes)


def test_merged_logs_have_the_quantiles_of_all_their_answers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    latencies_s = [rng.lognormal(-2, 0.5, 3000), rng.lognormal(-1, 0.5, 2000)]
    for name, each in zip("ab", latencies_s, strict=True):
        write_log(run(each), tmp_path / f"{name}.hdr")
    report = merge([tmp_path / "a.hdr", tmp_path / "b.hdr"])
    counted = np.concatenate([np.delete(each[100:], 50) for each in latencies_s])
    assert report["count"] == len(counted) == 4798
    for name, percent in (("p50", 50), ("p90", 90), ("p99", 99), ("max", 100)):
        # Three significant digits.
        assert report["latency_ms"][name] == pytest.approx(1000 * np.percentile(counted, percent), rel=5e-3)
    assert report["latency_ms"]["p999"] is not None
    assert (tmp_path / "a.hdr").read_text().count("HIST") == 29


def test_too_few_answers_have_no_p99(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(run(np.full(200, 0.1)), tmp_path / "few.hdr")
    assert main(["merge", str(tmp_path / "few.hdr"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["count"] == 99
    assert (report["latency_ms"]["p50"], report["latency_ms"]["p99"]) == (pytest.approx(100, rel=1e-3), None)
    assert main(["merge", str(tmp_path / "few.hdr")]) == 0
    assert "not enough samples: p99 takes 368, p999 takes 3688" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no histogram, expected a log of load --hdr"),
        ("0.1,1.0,2.0,HISTFAAAA\n", "no HdrHistogram log ("),
        (None, "can't be read (No such file or directory)"),
    ],
)
def test_a_file_that_is_no_log_is_one_line(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.hdr"
    if text is not None:
        path.write_text(text)
    assert main(["merge", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: {message}")
    assert error.count("\n") == 1
