"""Exported graphs are the contract's, and a graph that isn't fails its verification by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

import export.__main__
import export.graphs
import export.verification
from export.__main__ import main
from export.verification import (
    Tolerance,
    check_axes,
    check_names_and_types,
    check_shapes,
    check_values,
    end_point_error,
)
from icportrait.contract import ENGINES, ModelSpec, engine_specs
from icportrait.errors import CheckpointError, VerificationError
from icportrait.manifest import Manifest, file_sha256
from icportrait.nn import Checkpoint, engine_modules, save_checkpoint
from icportrait.policy import ServingPolicy
from icportrait.presets import DEMO_128
from icportrait.runtime import load_engine
from tests.conftest import ROOT
from tests.exports import shared_export
from tests.full_disk import full_disk
from tests.rows import rows_that_differ
from tests.tiny import SMALL
from tests.trivial_engines import write_trivial_export

SPECS = engine_specs(SMALL)
QUICKEST = ("vae_encoder",)
"""The engine that takes least to export, where one is enough."""


def test_the_manifest_tells_what_was_exported(demo_export: Path) -> None:
    manifest = Manifest.read(demo_export)
    assert manifest.preset == DEMO_128
    assert tuple(manifest.engines) == ENGINES
    assert manifest.opset >= 20
    assert {"torch", "onnx", "onnxruntime", "diffusers"} <= set(manifest.versions)
    for engine in manifest.engines.values():
        assert engine.sha256 == file_sha256(demo_export / engine.file)
        assert engine.size_bytes == (demo_export / engine.file).stat().st_size


@pytest.mark.parametrize("name", ENGINES)
def test_the_demo_graphs_are_the_contracts(demo_export: Path, name: str) -> None:
    path, spec = demo_export / f"{name}.onnx", engine_specs(DEMO_128)[name]
    check_names_and_types(path, spec, 20)
    check_axes(path, spec)
    check_shapes(path, spec)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ENGINES)
def test_a_row_depends_neither_on_its_batch_nor_on_its_place(demo_export: Path, name: str, threads: int) -> None:
    engine = load_engine(name, demo_export, Manifest.read(demo_export), ServingPolicy(engine_threads=threads))
    batches = [batch for batch in (1, 2, 3, 5, 6, 8, 11, 16) if batch <= engine.spec.batch.max]
    assert rows_that_differ(engine, batches) == []


@pytest.mark.parametrize("name", ENGINES)
def test_nor_does_torchs_if_deterministic(demo_export: Path, name: str) -> None:
    policy = ServingPolicy(runtime="torch", deterministic=True)
    engine = load_engine(name, demo_export, Manifest.read(demo_export), policy)
    assert rows_that_differ(engine, (1, 3, 6)) == []


def test_fp16_weights_and_residuals_are_fp16_and_the_rest_of_the_contract_stays() -> None:
    directory = shared_export("small-fp16")
    graph = onnx.load(directory / "unet.onnx").graph
    weights = [weight for weight in graph.initializer if np.prod(weight.dims) > 64]
    assert weights
    assert {weight.data_type for weight in weights} == {TensorProto.FLOAT16}
    engine = load_engine("warping_network", directory, Manifest.read(directory), ServingPolicy())
    outputs = engine.run(engine.spec.dummy_inputs(2))
    assert outputs["f_ref_00"].dtype == np.float16
    assert outputs["match_confidence"].dtype == np.float32


@pytest.mark.parametrize("name", ENGINES)
def test_a_graph_tells_nothing_of_the_machine_it_was_made_on(demo_export: Path, name: str) -> None:
    graph = (demo_export / f"{name}.onnx").read_bytes()
    assert b"site-packages" not in graph
    assert str(ROOT).encode() not in graph


def edited(source: Path, target: Path, edit: Callable[[onnx.GraphProto], None]) -> Path:
    model = onnx.load(source)
    edit(model.graph)
    onnx.save(model, target)
    return target


def rename_output(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name == "noise_pred":
                node.output[index] = "noise"
    graph.output[0].name = "noise"


def test_a_renamed_tensor_is_found(small_export: Path, tmp_path: Path) -> None:
    path = edited(small_export / "unet.onnx", tmp_path / "unet.onnx", rename_output)
    with pytest.raises(VerificationError, match="unet: outputs are noise, expected noise_pred"):
        check_names_and_types(path, SPECS["unet"], 20)
    with pytest.raises(CheckpointError, match="tensors are noise, expected noise_pred; export again"):
        load_engine("unet", tmp_path, Manifest.read(small_export), ServingPolicy())


def test_a_wrong_opset_is_found(small_export: Path) -> None:
    with pytest.raises(VerificationError, match="unet: opset is 20, expected 23"):
        check_names_and_types(small_export / "unet.onnx", SPECS["unet"], 23)


def test_a_wrong_type_is_found(small_export: Path) -> None:
    with pytest.raises(VerificationError, match="f_ref_00 is FLOAT, expected FLOAT16"):
        check_names_and_types(small_export / "warping_network.onnx", engine_specs(SMALL, "fp16")["warping_network"], 20)


def test_a_fixed_batch_is_found(small_export: Path, tmp_path: Path) -> None:
    def fix_batch(graph: onnx.GraphProto) -> None:
        graph.input[1].type.tensor_type.shape.dim[0].dim_value = 2

    path = edited(small_export / "unet.onnx", tmp_path / "unet.onnx", fix_batch)
    with pytest.raises(VerificationError, match=r"timestep: axes are \[2\], expected \['batch'\]"):
        check_axes(path, SPECS["unet"])


def test_a_wrong_shape_at_the_largest_batch_is_found(tmp_path: Path) -> None:
    write_trivial_export(tmp_path, SMALL)

    def one_column_less(graph: onnx.GraphProto) -> None:
        for constant in graph.initializer:
            if constant.name == "noise_pred_dims":
                constant.CopyFrom(numpy_helper.from_array(np.array([4, 16, 31]), constant.name))

    path = edited(tmp_path / "unet.onnx", tmp_path / "wrong.onnx", one_column_less)
    check_shapes(tmp_path / "unet.onnx", SPECS["unet"])
    with pytest.raises(VerificationError, match=r"noise_pred: shape at batch 4 is \[4, 4, 16, 31\], expected"):
        check_shapes(path, SPECS["unet"])


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        ("vae_encoder", "encoder.conv_in.weight", "vae_encoder: latent at batch 1: relative RMS error is"),
        ("warping_network", "zero_convs.1.weight", "warping_network: f_ref_01 at batch 1: relative RMS error is"),
        ("warping_network", "matching_net.conv_in.weight", "flow_0 at batch 1: flow disagreement is"),
        ("unet", "unet.conv_in.weight", "unet: noise_pred at batch 1: relative RMS error is"),
        ("vae_decoder", "decoder.conv_in.weight", "vae_decoder: portrait_pixels at batch 1: largest difference"),
    ],
)
def test_a_changed_weight_is_found_and_its_tensor_named(
    small_checkpoint: Checkpoint, small_export: Path, tmp_path: Path, name: str, weight: str, message: str
) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        found = next(entry for entry in graph.initializer if weight in entry.name)
        array = numpy_helper.to_array(found).copy()
        array[0] += 0.5
        found.CopyFrom(numpy_helper.from_array(array, found.name))

    path = edited(small_export / f"{name}.onnx", tmp_path / f"{name}.onnx", edit)
    tolerance = export.verification.TOLERANCES["fp32"][name]
    module = engine_modules(small_checkpoint)[name]
    for runtime in ("onnxruntime", "openvino"):
        arguments = SPECS[name], module, tolerance, [SPECS[name].dummy_inputs(1)], runtime
        check_values(small_export / f"{name}.onnx", *arguments)
        with pytest.raises(VerificationError, match=message):
            check_values(path, *arguments)


def test_end_point_error_is_a_distance_in_cells() -> None:
    # In a grid of 4 columns, position 0 is (0, 0) and position 7 is (1, 3).
    found, expected = np.zeros((1, 4, 4), np.int32), np.full((1, 4, 4), 7, np.int32)
    assert end_point_error(found, expected) == pytest.approx(np.hypot(1, 3))


@pytest.fixture
def arguments(tmp_path: Path, small_checkpoint: Checkpoint) -> list[str]:
    """Return the arguments of an export into ``tmp_path / "out"``."""
    save_checkpoint(small_checkpoint, tmp_path / "checkpoint")
    return ["--checkpoint", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "out")]


def test_large_weights_lie_in_a_file_of_their_own(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.graphs, "EXTERNAL_DATA_BYTES", 1000)
    monkeypatch.setattr(export.__main__, "ENGINES", QUICKEST)
    assert main(arguments) == 0
    out = tmp_path / "out"
    manifest = Manifest.read(out)
    assert manifest.source == {"checkpoint": str(tmp_path / "checkpoint")}
    (engine,) = manifest.engines.values()
    graph, data = out / engine.file, out / str(engine.external_data)
    assert data.stat().st_size > 10_000
    assert engine.sha256 == file_sha256(graph, data)
    load_engine(*QUICKEST, out, manifest, ServingPolicy())


def test_a_failed_export_exits_with_the_tensor_and_its_figures_and_leaves_no_manifest(
    arguments: list[str],
    small_export: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("of an earlier export")
    monkeypatch.setattr(export.graphs, "export_graph", lambda _, spec, *__: [small_export / f"{spec.name}.onnx"])
    monkeypatch.setitem(export.verification.TOLERANCES["fp32"], "vae_encoder", Tolerance(relative_rms=0))
    assert main(arguments) == 1
    assert "error: vae_encoder: latent at batch 1: relative RMS error is" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"manifest.json is missing; make it with"):
        Manifest.read(tmp_path / "out")


def test_a_full_disk_ends_an_export_in_one_sentence_and_leaves_none_of_its_graphs(
    arguments: list[str],
    small_export: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def copied(_: object, spec: ModelSpec, directory: Path, __: int) -> list[Path]:
        return [shutil.copyfile(small_export / f"{spec.name}.onnx", directory / f"{spec.name}.onnx")]

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    monkeypatch.setattr(export.graphs, "export_graph", copied)
    sizes = [(small_export / f"{name}.onnx").stat().st_size for name in ENGINES[:2]]
    assert sizes[0] < sizes[1], "the first graph must be written whole"
    with full_disk(sizes[1] - 1):
        assert main(arguments) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {tmp_path / 'out'}: File too large while writing the export, about ")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--random-weights"], "--random-weights needs --preset"),
        (["--random-weights", "--preset", "demo-128", "--opset", "17"], "--opset is 17, expected 20 or later"),
        (["--preset", "demo-128"], "one of the arguments --checkpoint --random-weights is required"),
    ],
)
def test_wrong_usage_says_what_is_expected(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_directory_without_a_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("text", ["{", "[]", '{"preset": {}}', '{"preset": {"name": "x"}, "engines": {}}'])
def test_a_damaged_or_older_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="not a manifest of this version"):
        Manifest.read(tmp_path)


def test_a_manifest_for_another_contract_is_refused(small_export: Path, tmp_path: Path) -> None:
    text = (small_export / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace('"max_unet_batch": 4', '"max_unet_batch": 2'))
    with pytest.raises(CheckpointError, match=r"exported for contract \w+, this code's is \w+; export again"):
        Manifest.read(tmp_path)
