"""``python -m benchmarks loop``: the loop alone, kept full."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from icportrait_client.errors import InvalidRequest

from benchmarks.__main__ import main
from benchmarks.loop import Recorder
from benchmarks.settings import LoopSettings
from icportrait.contract import ENGINES
from icportrait.presets import DEMO_128
from tests.trivial_engines import write_trivial_export

STEP_MS = 5.0


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    write_trivial_export(tmp_path / "export", DEMO_128)
    table = {"device": "test device", "engines": {name: {"1": 1.0} for name in ENGINES} | {"unet": {"1": STEP_MS}}}
    (tmp_path / "table.json").write_text(json.dumps(table))
    return ["loop", "--export", str(tmp_path / "export"), "--latency-table", str(tmp_path / "table.json")]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_full_loop_is_measured(
    guidance: float, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--slots", "4", "--guidance", str(guidance), "--seconds", "0.5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["simulated"] is True
    assert report["occupancy"] > 3.5
    assert 0 < report["outside_engine_ms"]["median"] <= report["outside_engine_ms"]["p99"]
    assert report["engine_ms"]["median"] >= STEP_MS
    # A step has at least the UNet's time.
    assert 0 < report["steps_per_s"] < 1000 / STEP_MS
    assert report["steps"] >= 0.5 * report["steps_per_s"]
    conditions = report["conditions"]
    assert (conditions["engine"], conditions["precision"]) == ("simulated-test device", "fp32")
    assert conditions["arguments"]["slots"] == 4
    assert list((tmp_path / "temporary").iterdir()) == []


def test_the_table_is_labelled(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--seconds", "0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "SIMULATED" in lines[0]
    assert any(line.startswith("outside the engines") and "ms a step median" in line for line in lines)


def test_only_what_comes_while_it_records_is_kept() -> None:
    recorder = Recorder()
    recorder.observe("step_outside_engine_ms", 9.0)
    recorder.is_recording = True
    recorder.observe("step_outside_engine_ms", 0.5)
    recorder.observe("warping_ms", 4.0)
    assert recorder.values == {"step_outside_engine_ms": [0.5], "step_ms": [], "step_slots": []}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"slots": 0}, "slots: 0, expected 1 or more at this guidance"),
        ({"slots": 1, "guidance_scale": 3.0}, "slots: 1, expected 2 or more at this guidance"),
        ({"guidance_scale": 0.5}, "guidance_scale: 0.5, expected 1.0..20.0"),
        ({"seconds": 0.0}, "seconds: 0, expected a number above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        LoopSettings(Path("export"), **wrong)
    assert str(refused.value) == message


def test_more_slots_than_the_unet_has_are_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--slots", "17"]) == 1
    assert capsys.readouterr().err.startswith("error: slots: 17, expected 16 or fewer")
