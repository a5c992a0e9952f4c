"""The comparison of batching modes without a server: its arithmetic, its command line."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from icportrait_client.errors import InvalidRequest

from benchmarks.__main__ import main
from benchmarks.compare import estimated_capacity_per_s, mean_between, server_counters
from benchmarks.compare_report import medians, ratios, table
from benchmarks.settings import CompareSettings
from icportrait.policy import BATCHING_MODES
from icportrait.presets import DEMO_128
from icportrait.runtime.latency_table import LatencyTable
from tests.trivial_engines import write_trivial_export

EXPORT = Path("export")
METRICS = b"""# HELP icportrait_step_slots_sum Slots
icportrait_step_slots_sum 320
icportrait_step_slots_count 40
icportrait_step_slots_bucket{le="16"} 40
icportrait_refusals_total{reason="deadline"} 3
nv_cpu_utilization 0.5
icportrait_step_outside_engine_ms_sum 1.5e+01
"""


def run(mode: str, load: float, p50_ms: float | None, **more: Any) -> dict[str, Any]:
    figures = {"p99_ms": 900, "throughput_per_s": 20, "refused": 0, "failed": 0, "occupancy": 8, "cpu_busy": 0.5}
    return (
        {"mode": mode, "load": load, "p50_ms": p50_ms, "outside_engine_ms": 0.5, "fell_behind": False} | figures | more
    )


RUNS = [
    *(run("in-flight", 0.7, p50_ms) for p50_ms in (300, 200, 900)),
    *(run("whole", 0.7, p50_ms, occupancy=12, fell_behind=p50_ms > 500) for p50_ms in (450, 500, 510)),
    *(run("in-flight", 1.1, p50_ms) for p50_ms in (300, None, 900)),
    *(run("whole", 1.1, p50_ms) for p50_ms in (450, 500, 510)),
]
MODES = ("in-flight", "whole")


def test_medians_are_over_the_rounds_of_one_mode_and_load() -> None:
    modes = medians(MODES, RUNS, 0.7)["modes"]
    assert {mode: figures["p50_ms"] for mode, figures in modes.items()} == {"in-flight": 300, "whole": 500}
    assert [figures["fell_behind"] for figures in modes.values()] == [0, 1]


def test_a_round_without_answers_has_no_median() -> None:
    found = medians(MODES, RUNS, 1.1)
    assert found["modes"]["in-flight"]["p50_ms"] is None
    assert found["ratios"]["whole"]["p50_ms"] is None
    assert found["ratios"]["whole"]["p99_ms"] == 1


def test_ratios_are_to_in_flight() -> None:
    modes = medians(MODES, RUNS, 0.7)["modes"]
    assert ratios(modes) == {
        "whole": {"p50_ms": 1.667, "p99_ms": 1, "throughput_per_s": 1, "outside_engine_ms": 1, "occupancy": 1.5}
    }
    assert ratios({"whole": modes["whole"]}) == {}
    still = {"in-flight": modes["in-flight"] | {"throughput_per_s": 0}, "whole": modes["whole"]}
    assert ratios(still)["whole"]["throughput_per_s"] is None


def test_the_table_says_that_it_is_simulated_and_what_fell_behind() -> None:
    report = {
        "capacity": {"mode": "whole", "per_s": 25.0, "offered_per_s": 90.0, "cpu_busy": None},
        "loads": [{"share": load, "rate_per_s": 25 * load, **medians(MODES, RUNS, load)} for load in (0.7, 1.1)],
        "conditions": {
            "preset": "demo-128",
            "engine": "simulated-x",
            "slots": 16,
            "max_queued_slots": 64,
            "steps": [5, 30],
            "guidance_scale": 1.0,
            "seed": 0,
            "cpu_count": 2,
            "commit": None,
            "warm_up_s": 5.0,
            "arguments": {"rounds": 3, "duration_s": 20.0},
        },
    }
    text = table(report)
    assert "demo-128, simulated-x - SIMULATED" in text.splitlines()[0]
    assert text.count("did NOT keep up in 1 of 3 rounds") == 1
    low, high = text.split("1.1 of that")
    assert "1.67x" in low and "1.67x" not in high


def test_means_are_of_what_came_between_two_readings() -> None:
    first, last = {"x_sum": 100.0, "x_count": 10.0}, {"x_sum": 190.0, "x_count": 40.0}
    assert mean_between(first, last, "x") == 3
    assert mean_between(first, first, "x") is None
    assert mean_between({}, last, "x") == 4.75


@pytest.fixture
def endpoint() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(METRICS)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_counters_are_read_by_their_names(endpoint: str) -> None:
    assert server_counters(endpoint) == {
        "step_slots_sum": 320,
        "step_slots_count": 40,
        "step_outside_engine_ms_sum": 15,
        'step_slots_bucket{le="16"}': 40,
        'refusals_total{reason="deadline"}': 3,
    }


def test_the_estimate_is_the_devices_time_for_a_full_batch(tmp_path: Path) -> None:
    manifest = write_trivial_export(tmp_path, DEMO_128)
    latency_ms = {"unet": {1: 10.0, 16: 14.0}, "vae_encoder": {8: 10.0}, "warping_network": {8: 20.0}}
    latencies = LatencyTable("x", {**latency_ms, "vae_decoder": {8: 24.0}})
    steps = np.random.default_rng(0).integers(5, 30, (20_000, 16), endpoint=True)
    batch_s = (14.0 * steps.max(axis=1).mean() + 2 * (10 + 20 + 24)) / 1000
    assert estimated_capacity_per_s(latencies, manifest) == pytest.approx(16 / batch_s, rel=0.002)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"modes": ("whole", "whole")}, f"modes: whole whole, expected some of {', '.join(BATCHING_MODES)}"),
        ({"loads": (0.7, 0.7)}, "loads: 0.7 0.7, expected each once"),
        ({"loads": (0.7, 0.0)}, "loads: 0, expected a number above 0"),
        ({"duration_s": float("inf")}, "duration: inf, expected a number above 0"),
        ({"rounds": 0}, "rounds: 0, expected 1 or more"),
        ({"seed": -1}, "seed: -1, expected 0 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        CompareSettings(EXPORT, **wrong)
    assert str(refused.value) == message


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = ["compare", "--export", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        main([*export, "--rounds", "0"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("error: rounds: 0, expected 1 or more")
    with pytest.raises(SystemExit):
        main([*export, "--modes", "in-flight", "half"])
    assert "invalid choice: 'half'" in capsys.readouterr().err
    assert main(export) == 1
    assert capsys.readouterr().err == f'error: {tmp_path}/manifest.json is missing; make it with "python -m export"\n'
    (tmp_path / "table.json").write_text(json.dumps([]))
    assert main([*export, "--latency-table", str(tmp_path / "table.json")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/table.json: is [], expected")
