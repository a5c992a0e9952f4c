"""Engines alone: the latency benchmark over real runtimes, with few repetitions."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.engines_alone import engines_alone


def test_engines_alone_take_turns_and_have_their_floor(demo_export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.engines_alone.LEAST_RUNS", 1)
    monkeypatch.setattr("benchmarks.engines_alone._WARM_UPS", 0)
    monkeypatch.setattr("benchmarks.engines_alone.ENGINES", ("vae_decoder",))
    said: list[str] = []
    peak = {"gflops": 100.0, "gb_per_s": 10.0}
    rows = engines_alone(demo_export, ("onnxruntime", "openvino"), 0.001, peak, said.append)
    assert {row["engine"] for row in rows} == {"vae_decoder"} and len(rows) == 8 and len(said) == 1
    by_place = {(row["engine"], row["batch"], row["runtime"].partition("-")[0]): row for row in rows}
    assert len(by_place) == len(rows)
    for (engine, batch, runtime), row in by_place.items():
        assert row["ms"]["p50"] > 0 and row["ms"]["p90"] is None
        assert row["floor_ms"] == pytest.approx(max(1000 * row["gflop"] / 100, row["megabytes"] / 10), rel=0.02)
        assert row["share_of_floor"] == pytest.approx(row["floor_ms"] / row["ms"]["p50"], rel=0.02, abs=0.002)
        if runtime == "onnxruntime":
            assert row["ratio_to_first"] == {"median": 1.0, "low": 1.0, "high": 1.0}
        if batch > 1:
            assert row["gflop"] == pytest.approx(batch * by_place[engine, 1, runtime]["gflop"], rel=0.02)
