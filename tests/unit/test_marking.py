"""Times of marking: every way, format and size by turns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.marking import C2PA, C2PA_KEPT, FORMATS, NO_MARK, READING, XMP, main
from tests.certificates import make_chain


def test_every_way_is_timed_and_compared_with_iptcs_mark_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = make_chain().write(tmp_path)
    flags = [f"--{name.removeprefix('c2pa_')}={path}" for name, path in files.items()]
    assert main([*flags, "--rounds", "1", "--out", str(tmp_path / "out.json")]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    rows = {(row["size"], row["format"], row["marked"]): row for row in report["rows"]}
    ways = (NO_MARK, XMP, C2PA, C2PA_KEPT, READING)
    assert list(rows) == [(size, name, way) for size in (128, 512) for name in FORMATS for way in ways]
    assert all(row["ms"] > 0 for row in rows.values()) and rows[128, "png", XMP]["ratio"] == 1
    assert {"commit", "versions", "cpu_count"} <= report["conditions"].keys()
    assert "XMP, C2PA" in capsys.readouterr().out


def test_a_key_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = make_chain().write(tmp_path)
    assert main(["--certificate", str(files["c2pa_certificate"]), "--key", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
