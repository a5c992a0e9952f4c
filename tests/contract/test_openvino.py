"""OpenVINO's engines do what torch does, row by row, on the graphs that ONNX Runtime and TensorRT get."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.verification import TOLERANCES, WEIGHT_TYPES, cast, compare, torch_outputs, with_flows_of
from icportrait.contract import ENGINES, engine_specs
from icportrait.deploy.repository import assemble
from icportrait.errors import CheckpointError
from icportrait.manifest import Manifest
from icportrait.nn import engine_modules, random_checkpoint
from icportrait.policy import ServingPolicy
from icportrait.presets import SD15_512
from icportrait.runtime import load_engine
from icportrait.runtime.load import buckets_at_once, compiled_folder
from icportrait.runtime.ov import OpenVinoEngine, inference_precision
from icportrait.runtime.portions import portions
from tests.exports import shared_export
from tests.rows import rows_that_differ
from tests.tiny import SMALL

OPENVINO = ServingPolicy(runtime="openvino")


@pytest.mark.parametrize("export_name", ["small", "small-fp16"])
@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_does_what_torch_does(export_name: str, name: str) -> None:
    """Run an engine at one row, at the largest batch, and in portions."""
    directory = shared_export(export_name)
    manifest = Manifest.read(directory)
    engine = load_engine(name, directory, manifest, OPENVINO)
    module = engine_modules(random_checkpoint(SMALL))[name]
    cast(module, WEIGHT_TYPES[manifest.precision])
    assert isinstance(engine, OpenVinoEngine)
    tolerance = TOLERANCES["bf16" if engine.precision == "bf16" else manifest.precision][name]
    for batch in {1, engine.spec.batch.max - 1, engine.spec.batch.max}:
        inputs = engine.spec.dummy_inputs(batch)
        found, expected = engine.run(inputs), torch_outputs(module, engine.spec, inputs)
        wanted = with_flows_of(found, expected, lambda flows, i=inputs: torch_outputs(module, engine.spec, i, flows))
        for tensor in engine.spec.outputs:
            assert found[tensor.name].dtype == tensor.dtype.numpy and found[tensor.name].shape == tensor.shape(
                batch=batch
            )
            assert all(figure.passed for figure in compare(tensor, found[tensor.name], wanted[tensor.name], tolerance))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ENGINES)
def test_a_row_depends_neither_on_its_batch_nor_on_its_place_if_deterministic(
    demo_export: Path, name: str, threads: int
) -> None:
    policy = ServingPolicy(runtime="openvino", deterministic=True, engine_threads=threads)
    engine = load_engine(name, demo_export, Manifest.read(demo_export), policy)
    assert rows_that_differ(engine, [batch for batch in (1, 2, 3, 6) if batch <= engine.spec.batch.max]) == []


def test_attention_scores_are_never_held() -> None:
    """Check that none of the UNet's tensors between operators is as large as the scores of its attentions."""
    import openvino

    core, spec = openvino.Core(), engine_specs(SMALL, "fp16")["unet"]
    graph = core.read_model(shared_export("small-fp16") / "unet.onnx")
    graph.reshape({tensor.name: list(tensor.shape(batch=1)) for tensor in spec.inputs})
    compiled = core.compile_model(graph, "CPU")
    tokens = 2 * SMALL.level_size(1) ** 2
    shapes = [tuple(port.shape) for node in compiled.get_runtime_model().get_ops() for port in node.outputs()]
    assert any(tokens in shape for shape in shapes)
    assert not [shape for shape in shapes if len(shape) == 4 and shape[-2:] == (tokens, tokens)]


def test_a_batch_runs_in_whole_buckets_the_largest_first() -> None:
    assert [(rows.start, rows.stop) for rows in portions(7, (1, 2, 4))] == [(0, 4), (4, 6), (6, 7)]
    assert [(rows.start, rows.stop) for rows in portions(9, (1, 2, 4))] == [(0, 4), (4, 8), (8, 9)]
    spec = engine_specs(SMALL)["vae_encoder"]
    assert spec.batch.max == 3
    assert buckets_at_once(spec, OPENVINO) == (1, 2)
    assert buckets_at_once(spec, ServingPolicy(rows_at_once=1)) == (1,)
    assert buckets_at_once(spec, ServingPolicy(runtime="openvino", deterministic=True)) == (1,)


def test_onnx_runtimes_rows_at_once_are_limited_too(demo_export: Path) -> None:
    manifest = Manifest.read(demo_export)
    whole, limited = (
        load_engine("vae_encoder", demo_export, manifest, ServingPolicy(rows_at_once=rows)) for rows in (16, 2)
    )
    inputs = whole.spec.dummy_inputs(5)
    assert whole.run(inputs)["latent"].tobytes() == limited.run(inputs)["latent"].tobytes()
    asked: list[int] = []
    run = limited._run
    limited._run = lambda given: (asked.append(len(given["pixels"])), run(given))[1]
    limited.run(inputs)
    assert asked == [2, 2, 1]


def test_only_a_half_precision_unet_is_computed_in_bfloat16_and_only_where_the_cpu_has_it() -> None:
    has, lacks = ["FP32", "BF16", "INT8"], ["FP32", "INT8"]
    half, full = engine_specs(SD15_512, "fp16"), engine_specs(SD15_512, "fp32")
    assert inference_precision(half["unet"], has) == "bf16"
    assert inference_precision(half["unet"], lacks) == inference_precision(full["unet"], has) == "f32"
    assert {inference_precision(half[name], has) for name in ENGINES if name != "unet"} == {"f32"}


def test_what_was_compiled_is_kept_beside_the_repository_while_the_graph_is_the_same(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    kept = []
    for export_name in ("small", "small", "small-fp16"):
        assemble(shared_export(export_name), repository, OPENVINO)
        manifest = Manifest.read(repository / "vae_encoder" / "1")
        folder = compiled_folder(repository, manifest, "vae_encoder")
        kept.append(sorted(folder.glob("*.blob")))
        engine = load_engine("vae_encoder", repository / "vae_encoder" / "1", manifest, OPENVINO)
        engine.run(engine.spec.dummy_inputs(1))
        assert len(list(folder.glob("*.blob"))) == len(buckets_at_once(engine.spec, OPENVINO))
    assert [len(files) for files in kept] == [0, 2, 0]
    assert len(list(repository.with_name("repository.compiled").iterdir())) == len(ENGINES)


def test_what_is_mapped_of_compiled_graphs_does_not_stay_in_memory(demo_export: Path, tmp_path: Path) -> None:
    spec = engine_specs(Manifest.read(demo_export).preset)["unet"]
    engine = OpenVinoEngine(demo_export / "unet.onnx", spec, (1,), cache=tmp_path)
    resident, mapped = 0, 0
    is_ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if "-" in name and not name.endswith(":"):
            is_ours = line.endswith(".blob") and str(tmp_path) in line
        elif is_ours and name in ("Size:", "Rss:"):
            mapped, resident = mapped + int(values[0]) * (name == "Size:"), resident + int(values[0]) * (name == "Rss:")
    assert mapped > 10_000 and resident < mapped / 10, "in KiB"
    compiled_here, inputs = OpenVinoEngine(demo_export / "unet.onnx", spec, (1,)), spec.dummy_inputs(1)
    assert np.array_equal(engine.run(inputs)["noise_pred"], compiled_here.run(inputs)["noise_pred"])


def test_what_cannot_be_kept_is_said(small_export: Path, caplog: pytest.LogCaptureFixture) -> None:
    unwritable = Path("/proc/self/task")
    OpenVinoEngine(small_export / "vae_encoder.onnx", engine_specs(SMALL)["vae_encoder"], (1,), cache=unwritable)
    assert f"{unwritable}: can't be written; vae_encoder holds its weights twice" in caplog.text


def test_a_graph_that_is_not_the_contracts_is_refused_by_name(small_export: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(small_export)
    with pytest.raises(CheckpointError, match=r"unet\.onnx is missing; make it with"):
        load_engine("unet", tmp_path, manifest, OPENVINO)
    model = onnx.load(small_export / "unet.onnx")
    for node in model.graph.node:
        node.output[:] = ["noise" if name == "noise_pred" else name for name in node.output]
    model.graph.output[0].name = "noise"
    onnx.save(model, tmp_path / "unet.onnx")
    with pytest.raises(CheckpointError, match="tensors are noise, expected noise_pred; export again"):
        load_engine("unet", tmp_path, manifest, OPENVINO)
    with pytest.raises(CheckpointError, match="f_ref_00 is float32, expected float16; export again"):
        OpenVinoEngine(small_export / "unet.onnx", engine_specs(SMALL, "fp16")["unet"], (1,))
    with pytest.raises(CheckpointError, match=r"canvas_latent: height_32 is 16, expected 32; export"):
        OpenVinoEngine(small_export / "unet.onnx", engine_specs(replace(SMALL, image_size=64))["unet"], (1,))
