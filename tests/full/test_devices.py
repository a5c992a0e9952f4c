"""The benchmark of several devices on real servers, as short as it can be."""

from __future__ import annotations

import json

import pytest

from benchmarks.__main__ import main

pytestmark = pytest.mark.full


def test_one_device_and_two_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    short = ("--devices", "2", "--slower", "1", "--duration", "8", "--rounds", "1", "--cost-s", "8")
    main(["devices", *short, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [found["failed"] for found in report["devices"].values()] == [0, 0]
    assert all(0 < found["gateway_share"] < 1 for found in report["devices"].values())
    for cost in report["a_portrait"].values():
        assert 0 < cost["gateway_cpu_ms"] < cost["all_processes_cpu_ms"] and cost["portraits"]
