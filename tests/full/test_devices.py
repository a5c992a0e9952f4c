"""The benchmark of several devices on real servers, as short as it can be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.devices import main

pytestmark = pytest.mark.full


def test_one_device_and_two_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "devices.json"
    short = ("--devices", "2", "--slower", "1", "--duration", "8", "--rounds", "1", "--cost-s", "8")
    main([*short, "--out", str(out)])
    report = json.loads(out.read_text())
    assert [found["failed"] for found in report["devices"].values()] == [0, 0]
    for cost in report["a_portrait"].values():
        assert 0 < cost["gateway_cpu_ms"] < cost["all_processes_cpu_ms"] and cost["portraits"]
