"""The latency benchmark on real servers, with few repetitions: its parts, and not its figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.client_overhead import measure
from benchmarks.gateway_limits import gateway_limits
from benchmarks.ladder import climb
from benchmarks.ladder_names import OURS, RUNGS
from benchmarks.pairs import pixels
from benchmarks.request_alone import PARTS, request_alone
from benchmarks.settings import HEADS, LEAST_ROUNDS, ClientOverheadSettings, LatencySettings
from icportrait.errors import CheckpointError
from icportrait.server import ServerProcess
from tests.conftest import ROOT

PICTURES = {name: HEADS / f"{name}.png" for name in ("profile", "reference")}
ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 1.5}


def test_a_requests_parts_are_all_measured_and_together_the_whole(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ask the shared server, which others may ask too: a part can be too long there, but none is left out."""
    monkeypatch.setattr("benchmarks.request_alone.WARM_UPS", 0)
    found = request_alone(server, {name: pixels(path, name) for name, path in PICTURES.items()}, ONE_STEP, 3, 77)
    assert found["options"] == ONE_STEP and set(found["ms"]) == {"whole", *PARTS}
    for part in ("pictures", "vae_encoder", "warping_network", "unet", "vae_decoder", "triton_and_python"):
        assert found["ms"][part]["count"] == 3 and found["ms"][part]["p50"] > 0, part
        assert found["share"][part] == pytest.approx(found["ms"][part]["p50"] / found["ms"]["whole"]["p50"], abs=0.001)


def test_a_portrait_by_the_client_stands_beside_the_bare_call(server: ServerProcess) -> None:
    found = measure(server.grpc_url, ClientOverheadSettings(requests=3))
    assert [found[name]["count"] for name in ("stub_ms", "client_ms", "more_ms")] == [3, 3, 3]
    assert found["stub_ms"]["p50"] > 0 and found["conditions"]["arguments"]["requests"] == 3


def test_the_gateways_limits_are_of_calls_that_ended_as_they_should(demo_export: Path, tmp_path: Path) -> None:
    files = {name: path.read_bytes() for name, path in PICTURES.items()}
    found = gateway_limits(demo_export, tmp_path, files, 0.3)
    assert found.pop("callers") == 16 and set(found) == {"portraits", "refusals", "uploads of 8 MiB"}
    for name, limit in found.items():
        assert limit["count"] >= 16 and limit["per_s"] > 0, name
        assert limit["megabytes_per_s"] == pytest.approx(limit["per_s"] * limit["megabytes_each"], rel=0.1), name
    assert found["uploads of 8 MiB"]["megabytes_each"] > 8 > found["refusals"]["megabytes_each"]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
def test_every_rung_makes_the_same_portrait_by_turns(demo_export: Path, tmp_path: Path) -> None:
    said: list[str] = []
    settings = LatencySettings(
        demo_export, rungs=tuple(RUNGS), num_inference_steps=1, guidance_scale=1.5, rounds=LEAST_ROUNDS
    )
    found = climb(settings, tmp_path, said.append)
    assert list(found) == list(RUNGS) and f"round {LEAST_ROUNDS} of {LEAST_ROUNDS}" in said
    for name, rung in found.items():
        assert ("left_out" in rung) == (name not in found or f"{name}: ready" not in said), said
        if "ms" in rung:
            assert rung["ms"]["count"] == LEAST_ROUNDS
            assert rung["ours_by_this"]["low"] <= rung["ours_by_this"]["median"] <= rung["ours_by_this"]["high"]
    assert found[OURS]["ours_by_this"] == {"median": 1.0, "low": 1.0, "high": 1.0}


def test_an_export_of_other_weights_is_no_peer(small_export: Path, tmp_path: Path) -> None:
    settings = LatencySettings(
        small_export, checkpoint=ROOT / "checkpoints" / "demo-128", rungs=("eager", "onnxruntime")
    )
    with pytest.raises(CheckpointError, match=r"onnxruntime: its portrait .*; is the export of another checkpoint\?"):
        climb(settings, tmp_path)
