"""The figures of several devices are those of the committed run."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.devices import main, table
from tests.conftest import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "devices-simulated-h200.json"
DOCUMENT = ROOT / "docs" / "adr" / "0020-several-engines-behind-one-gateway.md"


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return dict(json.loads(RESULTS.read_text()))


def test_the_document_has_the_committed_run(report: dict[str, Any]) -> None:
    assert f"```text\n{table(report)}\n```" in DOCUMENT.read_text()


def test_four_devices_serve_what_was_asked_of_them(report: dict[str, Any]) -> None:
    assert list(report["devices"]) == ["1", "4"] and report["times_as_many"] >= 3.6
    for search in report["devices"].values():
        assert not search["contradictory"] and not any(probe["fell_behind"] for probe in search["probes"])


def test_a_rate_that_was_not_found_is_told_as_that(report: dict[str, Any]) -> None:
    search = {"rate_per_s": None, "interval_per_s": [None, None]}
    text = table({**report, "devices": {"1": search, "4": search}, "times_as_many": None})
    assert text.count("not found") == 2 and "times as many" not in text


@pytest.mark.parametrize("flags", [["--devices", "1"], ["--p99-ms", "0"], ["--duration", "100", "--longest", "50"]])
def test_wrong_settings_are_told_before_anything_runs(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2 and "expected" in capsys.readouterr().err
