"""The comparison of batching modes on real servers with simulated engines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from icportrait.contract import ENGINES
from icportrait.presets import DEMO_128
from tests.conftest import ROOT
from tests.e2e.supervised import temporary_folder
from tests.trivial_engines import write_trivial_export

STEP_MS = 20.0


@pytest.mark.full
def test_two_modes_get_the_same_load_and_are_told_apart(tmp_path: Path) -> None:
    write_trivial_export(tmp_path / "export", DEMO_128)
    table = {"device": "test device", "engines": {name: {"1": 2.0} for name in ENGINES} | {"unet": {"1": STEP_MS}}}
    (tmp_path / "table.json").write_text(json.dumps(table))
    (tmp_path / "t").mkdir()
    command = [sys.executable, "-m", "benchmarks", "compare", "--export", str(tmp_path / "export")]
    options = "--modes in-flight whole --loads 0.5 --duration 2 --rounds 1 --json"
    with temporary_folder(tmp_path / "t") as environment:
        answer = subprocess.run(
            [*command, "--latency-table", str(tmp_path / "table.json"), *options.split()],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=200,
            env=environment,
        )
    assert answer.returncode == 0, answer.stderr
    report = json.loads(answer.stdout)
    assert report["simulated"] is True
    assert report["conditions"]["engine"] == "simulated-test device"
    capacity = report["capacity"]
    assert 0 < capacity["per_s"] < 1.2 * capacity["estimated_per_s"] < capacity["offered_per_s"]
    in_flight, whole = report["runs"]
    assert (in_flight["mode"], whole["mode"]) == ("in-flight", "whole")
    for name in ("requests", "rate_per_s", "seed"):
        assert in_flight[name] == whole[name]
    for run in (in_flight, whole):
        assert (run["refused"], run["failed"]) == (0, 0)
        assert run["p50_ms"] > 5 * STEP_MS
        assert run["outside_engine_ms"] > 0
        assert 1 <= run["occupancy"] <= 16
        assert 0 < run["cpu_busy"] <= 1
    (load,) = report["loads"]
    assert load["ratios"]["whole"]["p50_ms"] > 1, "who comes while a batch runs waits for its end"
    assert "round 1 of 1, whole at 0.5" in answer.stderr
    assert list((tmp_path / "t").iterdir()) == []
