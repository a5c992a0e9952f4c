"""Repositories for simulated engines: what lies in them, what is refused, and what is labelled."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from icportrait.contract import ENGINES, bytes_tensor
from icportrait.deploy.preflight import simulation_note
from icportrait.deploy.repository import assemble, main
from icportrait.deploy.triton_config import PRIVATE_MODELS
from icportrait.errors import CheckpointError, IcPortraitError, LatencyTableError
from icportrait.manifest import MANIFEST_NAME, Manifest
from icportrait.policy import ServingPolicy
from icportrait.runtime import load_slots
from icportrait.runtime.latency_table import LATENCY_TABLE_NAME
from icportrait.serving.stages import PostprocessStage
from tests.tiny import TINY
from tests.trivial_engines import write_trivial_export

FIVE_MS = {"device": "test device", "engines": {name: {"1": 5.0} for name in ENGINES}}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(FIVE_MS))
    return path


@pytest.fixture
def export(tmp_path: Path) -> Path:
    write_trivial_export(tmp_path / "export", TINY)
    return tmp_path / "export"


def policy_of(config: Path) -> ServingPolicy:
    parsed = text_format.Parse(config.read_text(), pb.ModelConfig())
    return ServingPolicy.from_parameters({key: value.string_value for key, value in parsed.parameters.items()})


def test_a_repository_holds_the_table_and_no_graph(
    export: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for graph in export.glob("*.onnx"):
        graph.unlink()
    repository = tmp_path / "repository"
    policy = ServingPolicy(runtime="simulated", latency_table=str(table), batching="whole")
    assemble(export, repository, policy)
    content = table.read_bytes()
    table.unlink()
    found = {folder.parent.name: {path.name for path in folder.iterdir()} for folder in repository.glob("*/1")}
    python = {"model.py", MANIFEST_NAME}
    assert set(found) == set(PRIVATE_MODELS)
    for name in ("denoise", "vae_encoder", "vae_decoder"):
        assert found[name] == python | {LATENCY_TABLE_NAME}
        assert (repository / name / "1" / LATENCY_TABLE_NAME).read_bytes() == content
        assert policy_of(repository / name / "config.pbtxt") == dataclasses.replace(
            policy, latency_table=LATENCY_TABLE_NAME
        )
    directory = repository / "denoise" / "1"
    loaded = load_slots(directory, Manifest.read(directory), policy_of(repository / "denoise" / "config.pbtxt"))
    assert loaded.version == "simulated-test device"
    assert simulation_note(repository).startswith("SIMULATED engines: their times are a table's for test device")
    # Its own copy will do to assemble it again.
    assemble(export, repository, dataclasses.replace(policy, latency_table=str(directory / LATENCY_TABLE_NAME)))
    assert (directory / LATENCY_TABLE_NAME).read_bytes() == content


def test_a_table_that_was_broken_in_the_repository_is_refused_at_start_up(
    export: Path, table: Path, tmp_path: Path
) -> None:
    assemble(export, tmp_path / "repository", ServingPolicy(runtime="simulated", latency_table=str(table)))
    (tmp_path / "repository" / "denoise" / "1" / LATENCY_TABLE_NAME).write_text("[]")
    with pytest.raises(LatencyTableError, match=r"latency.json: is \[\], expected an object"):
        simulation_note(tmp_path / "repository")


def test_other_runtimes_have_no_table_and_no_note_and_still_want_their_graphs(export: Path, tmp_path: Path) -> None:
    assemble(export, tmp_path / "repository", ServingPolicy())
    assert simulation_note(tmp_path / "repository") == ""
    assert not list((tmp_path / "repository").rglob(LATENCY_TABLE_NAME))
    (export / "unet.onnx").unlink()
    with pytest.raises(CheckpointError, match=r"unet\.onnx is missing"):
        assemble(export, tmp_path / "repository", ServingPolicy())


def test_tables_and_runtimes_belong_together(
    export: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--export", str(export), "--out", str(tmp_path / "repository")]
    simulated, with_table = ["--runtime", "simulated"], ["--latency-table", str(table)]
    for extra, complaint in (
        (simulated, "error: runtime simulated takes its times from a latency table: name its file"),
        (with_table, f"error: {table}: runtime onnxruntime takes as long as it takes"),
        ([*simulated, "--latency-table", str(export)], f"error: {export}: can't be read as JSON"),
        ([*simulated, *with_table, "--plans", str(tmp_path)], f"error: {tmp_path}: runtime simulated runs no plans"),
    ):
        assert main([*arguments, *extra]) == 1
        said = capsys.readouterr().err
        assert said.startswith(complaint) and said.count("\n") == 1
        assert not (tmp_path / "repository").exists()
    assert main([*arguments, *simulated, *with_table, "--batching", "whole"]) == 0
    assert "custom, fp32, simulated" in capsys.readouterr().out
    assert policy_of(tmp_path / "repository" / "denoise" / "config.pbtxt").batching == "whole"


def test_a_batching_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    expected = "batching: 'continuous', expected one of in-flight, whole, whole-leave-early, whole-equal-steps"
    with pytest.raises(IcPortraitError) as refused:
        ServingPolicy.from_parameters({"batching": "continuous"})
    assert str(refused.value) == expected


@pytest.mark.parametrize("runtime", ["simulated", "onnxruntime"])
def test_only_a_simulated_answer_says_so(export: Path, runtime: str) -> None:
    stage = PostprocessStage(Manifest.read(export), ServingPolicy(runtime=runtime))
    request = {
        "seed": 1, "num_portraits": 1, "num_inference_steps": 2, "guidance_scale": 1.0, "mask_ratio": 0.8,
        "scheduler": "ddim", "output_format": "png", "encoding": "binary", "profile_box": None, "reference_box": None,
    }  # fmt: skip
    preprocess = {"crops": {}, "started_ns": 0, "ended_ns": 1}
    names = ("arrived_ns", "joined_ns", "conditioned_ns", "denoised_ns", "warp_ms", "rows_shared", "engine_ms")
    report = dict.fromkeys(names, 2) | {"match_confidence": 0.0, "engine": "simulated-x", "numerics_id": None}
    texts = {"request": request, "preprocess_report": preprocess, "denoise_report": report}
    tensors = {name: bytes_tensor(json.dumps(text).encode()) for name, text in texts.items()}
    outputs = stage({"portrait_pixels": np.zeros((1, 32, 32, 3), np.uint8), **tensors})
    metadata = json.loads(outputs["metadata"][0])
    assert metadata.get("simulated") is (True if runtime == "simulated" else None)
