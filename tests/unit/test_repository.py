"""Repositories of plans: which files lie where, and what is refused with both sides named."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

import icportrait.deploy.repository
import icportrait.disk
from engines.build_config import BuildConfig
from icportrait.contract import ENGINES
from icportrait.deploy.repository import assemble, main
from icportrait.deploy.triton_config import PRIVATE_MODELS, STANDALONE_MODELS
from icportrait.errors import CheckpointError, IcPortraitError, NotEnoughDisk, PlanError
from icportrait.manifest import Manifest
from icportrait.policy import ServingPolicy
from icportrait.presets import DEMO_128
from icportrait.runtime.device_engine import BUCKETS
from icportrait.runtime.tensorrt.plans import PlanManifest, check_content, find_plans
from tests.fake_plans import write_fake_plans
from tests.full_disk import full_disk
from tests.trivial_engines import write_trivial_export


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("export")
    write_trivial_export(directory, DEMO_128)
    return directory


def files(repository: Path) -> dict[str, set[str]]:
    return {folder.parent.name: {path.name for path in folder.iterdir()} for folder in repository.glob("*/1")}


def assembled(
    export: Path, tmp_path: Path, runtime: str, config: BuildConfig | None = None, **settings: Any
) -> dict[str, set[str]]:
    write_fake_plans(tmp_path / "plans", Manifest.read(export), runtime, config)
    assemble(export, tmp_path / "repository", ServingPolicy(runtime=runtime, **settings), plans=tmp_path / "plans")
    return files(tmp_path / "repository")


def with_manifest(*plans: str) -> set[str]:
    return {name for plan in plans for name in (plan, f"{plan}.json")}


PYTHON = {"model.py", "manifest.json"}


def test_triton_itself_runs_the_vae_and_denoise_the_rest(export: Path, tmp_path: Path) -> None:
    found = assembled(export, tmp_path, "tensorrt")
    for name in ("vae_encoder", "vae_decoder"):
        assert found[name] == with_manifest("model.plan")
        plan = tmp_path / "repository" / name / "1" / "model.plan"
        check_content(plan, PlanManifest.read(plan))
        assert PlanManifest.read(plan).engine == name
        config = text_format.Parse((tmp_path / "repository" / name / "config.pbtxt").read_text(), pb.ModelConfig())
        assert config.platform == "tensorrt_plan" and list(config.instance_group[0].profile) == [
            str(index) for index in range(6)
        ]
    assert found["denoise"] == PYTHON | with_manifest("warping_network.plan", "unet.plan")
    assert set(found) == set(PRIVATE_MODELS)


def test_a_standalone_repository_has_the_models_for_files_too(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--export", str(export), "--out", str(tmp_path / "repository")]
    for flags, models in ((["--standalone"], STANDALONE_MODELS), ([], PRIVATE_MODELS)):
        assert main([*arguments, *flags]) == 0
        assert {path.parent.name for path in (tmp_path / "repository").glob("*/config.pbtxt")} == set(models)
        found = files(tmp_path / "repository")
        assert set(found) == set(models)
        if flags:
            assert found["preprocess"] == found["postprocess"] == PYTHON


def test_python_models_run_every_engine_on_tensorrt_rtx(export: Path, tmp_path: Path) -> None:
    found = assembled(export, tmp_path, "tensorrt-rtx")
    assert found["vae_encoder"] == PYTHON | with_manifest("vae_encoder.plan")
    assert found["vae_decoder"] == PYTHON | with_manifest("vae_decoder.plan")
    assert found["denoise"] == PYTHON | with_manifest("warping_network.plan", "unet.plan")
    assert not list((tmp_path / "repository").rglob("*.onnx"))


def test_deterministic_python_models_run_every_engine_on_tensorrt_too(export: Path, tmp_path: Path) -> None:
    """Compare runners: Triton's own backend runs the batches that come, our runner one and the same."""
    found = assembled(export, tmp_path, "tensorrt", BuildConfig(layout="static"), deterministic=True)
    for name in ("vae_encoder", "vae_decoder"):
        assert found[name] == PYTHON | with_manifest(*(f"{name}.batch{batch}.plan" for batch in (1, 2, 3, 4, 6, 8)))
        config = text_format.Parse((tmp_path / "repository" / name / "config.pbtxt").read_text(), pb.ModelConfig())
        assert config.backend == "python" and config.instance_group[0].kind == pb.ModelInstanceGroup.KIND_GPU
        assert config.max_batch_size == DEMO_128.max_vae_batch


@pytest.mark.parametrize("flag", [True, False])
def test_the_command_says_whether_the_models_are_deterministic(export: Path, tmp_path: Path, flag: bool) -> None:
    arguments = ["--export", str(export), "--out", str(tmp_path / "repository")]
    assert main([*arguments, *(["--deterministic"] if flag else [])]) == 0
    for name in ("denoise", "vae_encoder", "vae_decoder"):
        config = text_format.Parse((tmp_path / "repository" / name / "config.pbtxt").read_text(), pb.ModelConfig())
        parameters = {key: value.string_value for key, value in config.parameters.items()}
        assert ServingPolicy.from_parameters(parameters) == ServingPolicy(deterministic=flag)


def test_simulated_engines_are_not_deterministic(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--export", str(export), "--out", str(tmp_path / "repository"), "--runtime", "simulated"]
    assert main([*arguments, "--latency-table", "table.json", "--deterministic"]) == 1
    assert capsys.readouterr().err.startswith("error: deterministic: runtime simulated always draws")


def test_every_plan_of_a_static_layout_is_placed_in_the_order_of_its_batch(export: Path, tmp_path: Path) -> None:
    found = assembled(export, tmp_path, "tensorrt-rtx", BuildConfig(layout="static"))
    expected = [f"unet.batch{batch}.plan" for batch in BUCKETS]
    assert with_manifest(*expected) < found["denoise"]
    assert [plan.name for plan in find_plans(tmp_path / "repository" / "denoise" / "1", "unet")] == expected


def refusal(export: Path, tmp_path: Path, runtime: str = "tensorrt") -> str:
    with pytest.raises(PlanError) as refused:
        assemble(export, tmp_path / "repository", ServingPolicy(runtime=runtime), plans=tmp_path / "plans")
    assert "\n" not in str(refused.value) and not (tmp_path / "repository").exists()
    return str(refused.value)


@pytest.mark.parametrize(
    ("changes", "both"),
    [
        ({"flavour": "tensorrt-rtx"}, ("product tensorrt-rtx", "expected tensorrt;")),
        ({"contract_hash": "decade"}, ("contract decade", "expected {contract}")),
        ({"onnx_sha256": "f" * 64}, ("hash ffffffffffff", "expected {graph}")),
        ({"engine": "vae_encoder"}, ("engine vae_encoder", "expected unet")),
    ],
)
def test_a_plan_of_something_else_is_refused(
    export: Path, tmp_path: Path, changes: dict[str, str], both: tuple[str, str]
) -> None:
    manifest, plan = Manifest.read(export), tmp_path / "plans" / "unet.plan"
    write_fake_plans(plan.parent, manifest, "tensorrt")
    dataclasses.replace(PlanManifest.read(plan), **changes).write(plan)
    text = refusal(export, tmp_path)
    known = {"contract": manifest.contract_hash, "graph": manifest.engines["unet"].sha256[:12]}
    assert str(plan) in text and all(side.format(**known) in text for side in both)


def test_a_changed_plan_and_a_missing_one_are_refused(export: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plans" / "vae_decoder.plan"
    write_fake_plans(plan.parent, Manifest.read(export), "tensorrt")
    plan.write_bytes(b"changed")
    assert "vae_decoder.plan: its SHA-256 is" in refusal(export, tmp_path)
    plan.unlink()
    assert "vae_decoder.plan is missing" in refusal(export, tmp_path)


def test_plans_of_two_layouts_are_refused(export: Path, tmp_path: Path) -> None:
    for layout in ("profiles", "static"):
        write_fake_plans(tmp_path / "plans", Manifest.read(export), "tensorrt-rtx", BuildConfig(layout=layout))
    assert "has both vae_encoder.plan and vae_encoder.batch1.plan" in refusal(export, tmp_path, "tensorrt-rtx")


def test_plans_that_tritons_backend_could_not_run_are_refused(export: Path, tmp_path: Path) -> None:
    write_fake_plans(tmp_path / "plans", Manifest.read(export), "tensorrt", cover_gaps=False)
    assert "vae_encoder.plan: no optimization profile holds a batch of 5" in refusal(export, tmp_path)
    for path in (tmp_path / "plans").iterdir():
        path.unlink()
    write_fake_plans(tmp_path / "plans", Manifest.read(export), "tensorrt", BuildConfig(layout="static"))
    assert "vae_encoder has 6 plans, and Triton's TensorRT backend takes one" in refusal(export, tmp_path)


def test_plans_and_runtimes_belong_together(export: Path, tmp_path: Path) -> None:
    with pytest.raises(IcPortraitError, match="runtime tensorrt-rtx runs plans: name their directory"):
        assemble(export, tmp_path / "repository", ServingPolicy(runtime="tensorrt-rtx"))
    with pytest.raises(IcPortraitError, match="runtime onnxruntime runs no plans, expected tensorrt or tensorrt-rtx"):
        assemble(export, tmp_path / "repository", ServingPolicy(), plans=tmp_path)


def test_the_command_takes_plans(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_fake_plans(tmp_path / "plans", Manifest.read(export), "tensorrt-rtx")
    arguments = ["--export", str(export), "--out", str(tmp_path / "repository"), "--runtime", "tensorrt-rtx"]
    assert main([*arguments, "--plans", str(tmp_path / "plans")]) == 0
    assert "demo-128, fp32, tensorrt-rtx" in capsys.readouterr().out
    assert main(arguments) == 1
    assert "error: runtime tensorrt-rtx runs plans" in capsys.readouterr().err


def test_every_engine_has_a_model_that_runs_it(export: Path, tmp_path: Path) -> None:
    placed = {plan for names in assembled(export, tmp_path, "tensorrt-rtx").values() for plan in names}
    assert {f"{engine}.plan" for engine in ENGINES} <= placed


def test_an_export_of_another_kind_of_folder_is_left_alone(tmp_path: Path) -> None:
    write_trivial_export(tmp_path / "export", DEMO_128)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("work of years")
    with pytest.raises(IcPortraitError, match="isn't empty and no model repository"):
        assemble(tmp_path / "export", tmp_path / "mine", ServingPolicy())
    assert (tmp_path / "mine" / "thesis.txt").exists()
    for _ in range(2):
        assemble(tmp_path / "export", tmp_path / "repository", ServingPolicy())


def test_a_changed_graph_is_not_assembled(tmp_path: Path) -> None:
    export = tmp_path / "export"
    write_trivial_export(export, DEMO_128)
    with (export / "unet.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match=r"unet.onnx: hash is .*, manifest.json says .*; export again"):
        assemble(export, tmp_path / "repository", ServingPolicy())


def test_a_full_disk_leaves_no_half_of_a_copied_repository(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    arguments = ["--export", str(export), "--out", str(tmp_path / "repository")]
    assert main(arguments) == 0
    with full_disk(100):
        assert main(arguments) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {tmp_path / 'repository'}: File too large while writing the repository, about ")
    assert not (tmp_path / "repository").exists()
    assert main(arguments) == 0


def test_a_copy_that_has_no_room_leaves_the_old_repository(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assemble(export, tmp_path / "repository", ServingPolicy())
    before = files(tmp_path / "repository")
    monkeypatch.setattr(icportrait.disk, "free_bytes", lambda _: 0)
    monkeypatch.setattr(icportrait.deploy.repository, "_copied_bytes", lambda *_: 10**9)
    with pytest.raises(NotEnoughDisk, match=r"about 1\.0 GB of disk are needed for the repository, and"):
        assemble(export, tmp_path / "repository", ServingPolicy())
    assert files(tmp_path / "repository") == before
