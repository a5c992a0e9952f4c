"""NVIDIA's perf_analyzer, a client that knows nothing of this project, against the real server on simulated engines."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import tritonclient.grpc as grpc_client

from benchmarks.perf_analyzer_program import PerfAnalyzerError, find_program
from icportrait.contract import ENGINES
from icportrait.presets import DEMO_128
from icportrait.repository import main
from icportrait.server import Ports, TritonServer
from tests.conftest import EXAMPLES, ROOT
from tests.trivial_engines import write_trivial_export

STEPS = 2
PICTURES = f"--profile {EXAMPLES / 'hopper.jpg'} --reference {EXAMPLES / 'astronaut.jpg'}"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("perf_analyzer")
    (folder / "links").mkdir()
    try:
        find_program(folder / "links")
    except PerfAnalyzerError as error:
        pytest.skip(str(error))
    write_trivial_export(folder / "export", DEMO_128)
    table = {"device": "test device", "engines": {name: {"1": 1.0} for name in ENGINES}}
    (folder / "table.json").write_text(json.dumps(table))
    repository = ["--export", str(folder / "export"), "--out", str(folder / "repository"), "--runtime", "simulated"]
    assert main([*repository, "--latency-table", str(folder / "table.json")]) == 0
    with TritonServer(folder / "repository", Ports.free(), folder / "server.log") as running:
        yield running.grpc_url


def perf_analyzer(url: str, options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", "perf-analyzer", "--url", url, *options.split()]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def statistics(url: str) -> dict[str, Any]:
    """What Triton itself counted of the public model."""
    with grpc_client.InferenceServerClient(url) as client:
        (model,) = client.get_inference_statistics("ic_portrait", as_json=True)["model_stats"]
    counted: dict[str, Any] = model["inference_stats"]
    return counted


def test_one_to_eight_callers_are_served_without_an_error(url: str) -> None:
    answer = perf_analyzer(url, f"--concurrency 1:8 --steps {STEPS} --window 0.8 --stability 1000 {PICTURES} --json")
    assert answer.returncode == 0, answer.stderr
    report = json.loads(answer.stdout)
    levels = report["levels"]
    assert [level["concurrency"] for level in levels] == list(range(1, 9))
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
    assert int(counted["success"]["count"]) >= sum(level["count"] for level in levels)
    assert int(counted["fail"].get("count", 0)) == 0


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
