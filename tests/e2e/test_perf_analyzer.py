"""NVIDIA's perf_analyzer, a client that knows nothing of this project, against the real server on simulated engines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as grpc_client

from benchmarks.perf_analyzer_program import PerfAnalyzerError, find_program
from icportrait.server import Ports
from tests.conftest import EXAMPLES, ROOT
from tests.e2e.caller import settled
from tests.e2e.supervised import Supervised

STEPS = 2
PICTURES = f"--profile {EXAMPLES / 'hopper.jpg'} --reference {EXAMPLES / 'astronaut.jpg'}"


@pytest.fixture
def url(whole: Supervised, tmp_path: Path) -> str:
    try:
        find_program(tmp_path)
    except PerfAnalyzerError as error:
        pytest.skip(str(error))
    return whole.url


def perf_analyzer(url: str, options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", "perf-analyzer", "--url", url, *options.split()]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def statistics(url: str) -> dict[str, Any]:
    """Return what Triton itself counted of the public model."""
    with grpc_client.InferenceServerClient(url) as client:
        (model,) = client.get_inference_statistics("ic_portrait", as_json=True)["model_stats"]
    counted: dict[str, Any] = model["inference_stats"]
    return counted


def test_one_caller_and_eight_are_served_without_an_error(whole: Supervised, url: str) -> None:
    settled(whole.metrics_url)
    before = statistics(url)  # of other tests
    answer = perf_analyzer(url, f"--concurrency 1:8:7 --steps {STEPS} --window 0.8 --stability 1000 {PICTURES} --json")
    assert answer.returncode == 0, answer.stderr
    report = json.loads(answer.stdout)
    levels = report["levels"]
    assert [level["concurrency"] for level in levels] == [1, 8]
    assert report["unstable_at"] is None
    for level in levels:
        assert level["count"] > 0
        assert level["throughput_per_s"] > 0
        latency_ms = level["latency_ms"]
        assert 0 < latency_ms["p50"] <= latency_ms["p90"] <= latency_ms["p95"] <= latency_ms["p99"]
        # Little's law: what is under way is throughput by latency.
        assert level["throughput_per_s"] * latency_ms["p99"] / 1000 > 0.5 * level["concurrency"]
    assert report["simulated"] is True
    conditions = report["conditions"]
    assert conditions["perf_analyzer"] == "2.51.0"
    assert conditions["steps"] == STEPS
    assert conditions["picture_bytes"]["profile"] == (EXAMPLES / "hopper.jpg").stat().st_size
    assert conditions["picture_pixels"] == {"profile": [512, 600], "reference": [512, 512]}
    for name in ("commit", "date", "cpu_count", "preset", "precision", "model_version", "engine"):
        assert name in conditions
    # perf_analyzer's own words, too.
    assert "Request concurrency: 8" in answer.stderr
    counted = statistics(url)
    succeeded, failed = (
        int(counted[name].get("count", 0)) - int(before[name].get("count", 0)) for name in ("success", "fail")
    )
    assert succeeded >= sum(level["count"] for level in levels) and failed == 0


def test_our_closed_loop_and_perf_analyzer_stand_side_by_side(url: str) -> None:
    answer = perf_analyzer(
        url, f"--beside --concurrency 2 --steps {STEPS} --window 0.8 --stability 1000 --rounds 2 {PICTURES} --json"
    )
    report = json.loads(answer.stdout)
    # How near they are depends on the machine; the command ends with what it found.
    assert answer.returncode == int(not report["agree"]), answer.stderr
    [row] = report["levels"]
    assert row["concurrency"] == 2
    assert len(row["rounds"]) == 2
    for each in row["rounds"]:
        for figures in (each["ours"], each["perf_analyzer"]):
            # Two callers should get 50 answers each, by the latency before; a busy machine may have slowed down since.
            assert figures["count"] > 20
            assert figures["throughput_per_s"] > 0
            assert figures["latency_ms"]["p50"] > 0
        ratio = each["ours"]["throughput_per_s"] / each["perf_analyzer"]["throughput_per_s"]
        assert each["ratio"]["throughput"] == pytest.approx(ratio, abs=1e-3)
    assert report["simulated"] is True
    assert report["conditions"]["perf_analyzer"] == "2.51.0"


def test_windows_that_do_not_agree_leave_what_was_measured_and_say_so(url: str) -> None:
    answer = perf_analyzer(url, f"--concurrency 1 --steps {STEPS} --window 0.6 --stability 0.0001 {PICTURES}")
    assert answer.returncode == 1
    assert "SIMULATED" in answer.stdout
    assert answer.stderr.startswith("error: windows of 0.6 s never agreed within 0.0001 % at concurrency 1; ")
    assert answer.stderr.count("\n") == 1


def test_a_picture_that_the_server_refuses_gives_one_line(url: str) -> None:
    answer = perf_analyzer(url, "--profile pyproject.toml")
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: profile: ")
    assert answer.stderr.count("\n") == 1


def test_a_server_that_is_not_there_gives_one_line(url: str) -> None:
    nobody = f"localhost:{Ports.free().grpc}"
    answer = perf_analyzer(nobody, "--concurrency 1")
    assert answer.returncode == 1
    assert answer.stderr.startswith(f"error: {nobody}: no server answers")
    assert answer.stderr.count("\n") == 1
