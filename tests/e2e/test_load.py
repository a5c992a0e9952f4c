"""The load generator's command against the real server."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.compare import server_counters
from benchmarks.settings import LoadSettings
from icportrait.server import Ports, ServerProcess
from tests.conftest import ROOT

# With a server of their own, because all tests on one server would take the longest.
pytestmark = pytest.mark.xdist_group("load")


def load(url: str, options: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", "load", "--url", url, *options.split()]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_light_load_is_all_served_and_reported(server: ServerProcess) -> None:
    answer = load(server.grpc_url, "--rate 2 --duration 6 --warm-up 1 --steps 1 2 --seed 3 --json")
    report = json.loads(answer.stdout)
    # On a busy machine requests leave late, and the run is called invalid.
    assert answer.returncode == int(report["fell_behind"]), answer.stderr
    assert ("error: the run is invalid: requests left late" in answer.stderr) == report["fell_behind"]
    sent = report["requests"]["sent"]
    assert sent > 6
    assert report["requests"] == {"planned": sent, "sent": sent, "ended": sent}
    assert report["outcomes"] == {"OK": {"count": sent, "first_message": None}}
    assert (report["refusals"], report["goodput"]) == ({}, None)
    assert report["interrupted"] is False
    assert report["simulated"] is False
    assert report["rate_per_s"]["achieved"] > 0
    assert report["rate_per_s"]["steady"] > 0
    latency_ms = report["latency_ms"]
    assert latency_ms["whole run"]["count"] == sent
    assert 0 < latency_ms["whole run"]["p50"] <= latency_ms["whole run"]["max"]
    # Too few for a p99.
    assert latency_ms["whole run"]["p99"] is None
    assert latency_ms["steady"]["needed"]["p99"] == 368
    assert latency_ms["short"]["count"] + latency_ms["long"]["count"] == latency_ms["steady"]["count"] > 0
    # The server's own time is a part of what the caller waits for.
    assert {"preprocess", "denoise", "decode"} <= set(report["stage_ms"])
    assert 0 < report["stage_ms"]["denoise"] < latency_ms["steady"]["max"]
    conditions = report["conditions"]
    assert (conditions["preset"], conditions["precision"], conditions["seed"]) == ("demo-128", "fp32", 3)
    assert conditions["arguments"]["steps"] == [1, 2]
    assert conditions["arguments"]["profile"] == ["examples/heads/profile.png"]
    assert conditions["picture_bytes"]["profile"] == [LoadSettings.profile[0].stat().st_size]
    for name in ("commit", "date", "python", "tritonclient", "cpu_count", "model_version", "engine"):
        assert name in conditions
    # A line every 5 s.
    assert " sent, " in answer.stderr


def test_classes_and_deadlines_reach_the_server_and_goodput_counts_what_kept_them(server: ServerProcess) -> None:
    pictures = "--profile examples/heads/profile.png examples/hopper.jpg"
    options = f"{pictures} --rate 4 --duration 2 --warm-up 0 --steps 1 2 --priority 0 --json"
    kept = json.loads(load(server.grpc_url, f"{options} --deadline-ms 60000").stdout)
    sent = kept["requests"]["sent"]
    assert kept["goodput"] == {"deadline_ms": 60000, "asked": sent, "in_time": sent, "per_s": sent / 2, "share": 1}
    assert len(kept["conditions"]["picture_bytes"]["profile"]) == 2
    missed = json.loads(load(server.grpc_url, f"{options} --deadline-ms 1").stdout)
    assert (missed["goodput"]["in_time"], missed["goodput"]["share"]) == (0, 0)
    assert sum(missed["refusals"].values()) == missed["outcomes"]["UNAVAILABLE"]["count"] == sent
    assert all(reason.startswith("deadline_ms: ") for reason in missed["refusals"])


def test_what_the_server_refuses_is_counted_with_its_first_message(server: ServerProcess, tmp_path: Path) -> None:
    half = (ROOT / "examples" / "heads" / "profile.png").read_bytes()[:2000]
    (tmp_path / "half.png").write_bytes(half)
    options = f"--profile {tmp_path / 'half.png'} --rate 8 --duration 1 --warm-up 0 --steps 1 1"
    answer = load(server.grpc_url, options)
    assert "INVALID_ARGUMENT" in answer.stdout
    assert "profile" in answer.stdout.split("INVALID_ARGUMENT")[1].splitlines()[0]


def test_a_closed_loop_keeps_its_callers_busy_and_logs_its_latencies(server: ServerProcess, tmp_path: Path) -> None:
    options = f"--concurrency 2 --duration 3 --warm-up 0.5 --ramp 0.2 --steps 1 1 --hdr {tmp_path / 'a.hdr'} --json"
    report = json.loads(load(server.grpc_url, options).stdout)
    assert set(report["outcomes"]) == {"OK"}
    assert (report["requests"]["planned"], report["rate_per_s"]["asked"]) == (None, None)
    steady = report["latency_ms"]["steady"]
    # Little's law: what is under way is throughput by latency.
    assert report["rate_per_s"]["steady"] * steady["max"] / 1000 > 0.5
    command = [sys.executable, "-m", "benchmarks", "merge", str(tmp_path / "a.hdr"), "--json"]
    merged = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout)
    assert merged["count"] == steady["count"]
    assert merged["latency_ms"]["max"] == pytest.approx(steady["max"], rel=2e-3)


def test_a_trace_has_its_own_moments_profiles_and_callers_who_leave(server: ServerProcess, tmp_path: Path) -> None:
    """Count the encoder's rows: a profile that returns isn't encoded again, and a new one is."""
    load(server.grpc_url, "--rate 5 --duration 1 --warm-up 0 --steps 1 1")
    name, before = "encoder_cache_misses_total", server_counters(server.metrics_url)
    trace = tmp_path / "trace.csv"
    trace.write_text("offset_s,steps,profile\n0,1,anna\n0.8,1,bert\n1.6,1,anna\n2.4,1,bert\n")
    report = json.loads(load(server.grpc_url, f"--trace {trace} --warm-up 0 --json").stdout)
    assert report["outcomes"] == {"OK": {"count": 4, "first_message": None}}
    assert report["conditions"]["arguments"]["duration_s"] == 2.4
    # The models' metrics come four times a second, and the gateway adds them to its own.
    deadline_s = time.monotonic() + 20
    while (encoded := server_counters(server.metrics_url)[name] - before[name]) < 2 and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert encoded == 2
    options = "--rate 8 --duration 1 --warm-up 0 --steps 150 150 --leaving 1 --leaving-ms 50 --json"
    left = json.loads(load(server.grpc_url, options).stdout)
    assert set(left["outcomes"]) == {"LEFT"}
    assert left["latency_ms"]["whole run"]["count"] == 0


def test_a_search_tries_rates_and_says_what_they_came_to(server: ServerProcess) -> None:
    options = "--p99-ms 60000 --steps 1 1 --start 5 --duration 2 --warm-up 0.5 --longest 2 --probes 1 --json"
    command = [sys.executable, "-m", "benchmarks", "search", "--url", server.grpc_url, *options.split()]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    report = json.loads(answer.stdout)
    [probe] = report["probes"]
    assert (probe["rate_per_s"], probe["kept"], probe["missed"]["share"]) == (5, True, 0)
    # Too few to be sure that no more than 1 % are slower.
    assert (probe["sure"], report["rate_per_s"], probe["p99_ms"]["value"]) == (False, None, None)
    assert "kept, unsure: not enough samples in 2 s" in answer.stderr


def test_a_model_that_is_not_there_is_named(server: ServerProcess) -> None:
    answer = load(server.grpc_url, "--model nobody")
    assert answer.returncode == 1
    assert answer.stderr == f"error: {server.grpc_url}: model 'nobody' isn't ready there\n"


def test_a_server_that_is_not_there_gives_one_line() -> None:
    url = f"localhost:{Ports.free().grpc}"
    answer = load(url)
    assert answer.returncode == 1
    assert answer.stderr == f'error: {url}: no server answers; "make serve" starts one\n'
    assert answer.stdout == ""


def test_two_servers_are_timed_side_by_side(server: ServerProcess) -> None:
    command = [sys.executable, "-m", "benchmarks", "pairs", server.grpc_url, server.grpc_url, "--json"]
    command += ["--rounds", "1", "--requests", "2", "--steps", "1"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    [figures] = json.loads(answer.stdout)["rounds"]
    # What comes second finds the latents of the first kept: the ratio tells nothing here.
    for medians in figures["median_ms"]:
        assert 0 < medians["denoise"] < medians["whole"]
    assert "round 1 of 1: second to first" in answer.stderr
    gone = subprocess.run([*command[:4], "localhost:9", *command[5:]], cwd=ROOT, capture_output=True, text=True)
    assert (gone.returncode, gone.stderr) == (1, 'error: localhost:9: no server answers; "make serve" starts one\n')
