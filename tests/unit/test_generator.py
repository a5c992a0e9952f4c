"""The load generator against a server that does nothing, its progress, and the pictures that it makes."""

from __future__ import annotations

import io
import sys
import time

import numpy as np
import pytest
from icportrait_client.errors import InvalidRequest
from PIL import Image

from benchmarks.generator import main, measure, row_line
from benchmarks.load import OpenLoop, _progress
from benchmarks.pictures import new_pictures
from benchmarks.settings import HEADS, GeneratorSettings


def test_the_generator_is_measured_on_a_server_that_does_nothing() -> None:
    lines: list[str] = []
    report = measure(GeneratorSettings(rates_per_s=(30,), duration_s=2.1, latency_ms=5), lines.append)
    [row] = report["rates"]
    assert row["answered"] == row["requests"] > 30
    assert row["cpu_ms_a_request"] > 0
    assert lines == [row_line(row)]
    assert report["conditions"]["arguments"]["latency_ms"] == 5


def test_a_rate_needs_some_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--duration", "1"])
    assert "duration: 1 s, expected more than 2 s" in capsys.readouterr().err


def test_new_pictures_differ_everywhere_and_look_alike() -> None:
    """Compare quarters: none is equal in two pictures, so that no crop is, and none is changed much."""
    original = (HEADS / "profile.png").read_bytes()
    made = new_pictures(original, 3, seed=0)
    assert made == new_pictures(original, 3, seed=0)
    first, second, third, given = (
        np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.int16) for data in (*made, original)
    )
    height, width = (size // 2 for size in given.shape[:2])
    for rows in (slice(height), slice(height, None)):
        for columns in (slice(width), slice(width, None)):
            assert (first[rows, columns] != second[rows, columns]).any()
            assert (second[rows, columns] != third[rows, columns]).any()
    assert np.abs(first - given).mean() < 6


def test_new_pictures_are_made_of_a_picture() -> None:
    assert new_pictures(b"no picture", 0, seed=0) == []
    with pytest.raises(InvalidRequest, match="profile: can't be read"):
        new_pictures(b"no picture", 1, seed=0)


class Terminal(io.StringIO):
    """Keeps what is written, and says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_is_live_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    loop = OpenLoop(lambda _, __: None)
    with _progress(loop, show=True):
        while "0 sent, 0 answered, 0 failed" not in terminal.getvalue():
            time.sleep(0.01)
    with _progress(loop, show=False):
        pass
