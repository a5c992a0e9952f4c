"""The load generator's command against the real server."""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.settings import LoadSettings
from icportrait.server import Ports, ServerProcess
from tests.conftest import ROOT


def load(url: str, options: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", "load", "--url", url, *options.split()]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_light_load_is_all_served_and_reported(server: ServerProcess) -> None:
    answer = load(server.grpc_url, "--rate 2 --duration 6 --warm-up 1 --steps 1 2 --seed 3 --json")
    assert answer.returncode == 0, answer.stderr
    report = json.loads(answer.stdout)
    sent = report["requests"]["sent"]
    assert sent > 3
    assert report["requests"] == {"planned": sent, "sent": sent, "ended": sent}
    assert report["outcomes"] == {"OK": {"count": sent, "first_message": None}}
    assert (report["refusals"], report["goodput"]) == ({}, None)
    assert report["interrupted"] is False
    assert report["simulated"] is False
    assert report["rate_per_s"]["achieved"] > 0
    assert report["rate_per_s"]["steady"] > 0
    latency_ms = report["latency_ms"]
    assert latency_ms["whole run"]["count"] == sent
    assert 0 < latency_ms["whole run"]["p50"] <= latency_ms["whole run"]["p99"] <= latency_ms["whole run"]["max"]
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


def test_what_the_server_refuses_is_counted_with_its_first_message(server: ServerProcess) -> None:
    answer = load(server.grpc_url, "--profile pyproject.toml --rate 8 --duration 1 --warm-up 0 --steps 1 1")
    assert answer.returncode == 0, answer.stderr
    assert "INVALID_ARGUMENT" in answer.stdout
    assert "profile" in answer.stdout.split("INVALID_ARGUMENT")[1].splitlines()[0]


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
