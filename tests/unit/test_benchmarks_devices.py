"""The figures of several devices are those of the committed run."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.devices import table
from tests.conftest import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "devices-simulated-h200.json"
DOCUMENT = ROOT / "docs" / "adr" / "0020-several-engines-behind-one-gateway.md"


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return dict(json.loads(RESULTS.read_text()))


def test_the_document_has_the_committed_run(report: dict[str, Any]) -> None:
    assert f"```text\n{table(report)}\n```" in DOCUMENT.read_text()


def test_four_devices_serve_four_times_as_much_with_the_same_p99(report: dict[str, Any]) -> None:
    one, four = (report["devices"][count] for count in ("1", "4"))
    assert four["rate_per_s"] >= 3.6 * one["rate_per_s"] and four["p99_ms"]["value"] <= one["p99_ms"]["value"]
    for found in (one, four):
        assert not found["failed"] and not found["fell_behind"]


def test_a_run_of_few_requests_has_no_quantiles(report: dict[str, Any]) -> None:
    found = {**report["devices"]["1"], "p50_ms": None, "p99_ms": {"value": None, "low": None, "high": None}}
    assert "         -  - (- to -)" in table({**report, "devices": {"1": found}})


def test_a_p99_without_an_interval_and_a_generator_that_fell_behind_are_told_as_that(report: dict[str, Any]) -> None:
    found = {**report["devices"]["1"], "p99_ms": {"value": 1.0, "low": None, "high": None}, "fell_behind": True}
    text = table({**report, "devices": {"1": found}})
    assert "  1 (- to -)  INVALID: the generator did NOT keep up" in text


@pytest.mark.parametrize(
    ("flag", "value", "named"),
    [
        ("--devices", "1", "devices"),
        ("--slower", "0", "slower"),
        ("--rate", "-1", "rate"),
        ("--duration", "2", "duration"),
        ("--cost-s", "0", "cost_s"),
    ],
)
def test_wrong_settings_are_told_before_anything_runs(
    flag: str, value: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["devices", flag, value])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and f"error: {named}: {value}" in said and "expected" in said
