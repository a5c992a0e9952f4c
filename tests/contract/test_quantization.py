"""int8 and fp8 exports by the real quantiser: what is quantised, how it computes, and that TensorRT takes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import export.quantization
from engines.__main__ import main as engines_main
from engines.inspection import inspect
from engines.network import parse
from export.__main__ import main
from export.calibration import ROWS, folder_pairs, record_inputs, rendered_pairs
from export.quantization import engine_precision, quantize
from icportrait.contract import ENGINES, QUANTIZED_PRECISIONS, engine_specs
from icportrait.errors import CheckpointError, VerificationError
from icportrait.manifest import Manifest
from icportrait.nn import Checkpoint, engine_modules, random_checkpoint
from icportrait.nn.pipeline import ReferencePipeline
from icportrait.policy import ServingPolicy
from icportrait.runtime import load_engine
from icportrait.runtime.tensorrt.plans import PlanManifest
from icportrait.runtime.tensorrt.products import TENSORRT_RTX
from tests.conftest import EXAMPLES
from tests.exports import WIDE, shared_export
from tests.tiny import TINY

# Because the quantiser needs an environment of its own, and its exports take a minute and a half.
pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", params=QUANTIZED_PRECISIONS)
def quantized(request: pytest.FixtureRequest) -> Path:
    return shared_export(f"wide-{request.param}")


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_the_unet_is_quantised_and_nothing_else(precision: str) -> None:
    expected = dict.fromkeys(ENGINES, "fp16") | {"unet": precision}
    assert {name: engine_precision(precision, name) for name in ENGINES} == expected


def test_a_graph_is_in_its_engines_precision(quantized: Path) -> None:
    manifest = Manifest.read(quantized)
    assert manifest.engines["unet"].precision == manifest.precision
    graph = onnx.load(quantized / "unet.onnx").graph
    assert "QuantizeLinear" in [node.op_type for node in graph.node]
    inputs = {tensor.name: tensor for tensor in graph.input}
    assert inputs["f_ref_00"].type.tensor_type.elem_type == TensorProto.FLOAT16
    given = next(spec for spec in engine_specs(WIDE, manifest.precision)["warping_network"].outputs)
    assert (given.name, given.dtype.numpy) == ("f_ref_00", "float16")


def test_tensorrt_sees_the_asked_for_type(quantized: Path) -> None:
    manifest = Manifest.read(quantized)
    found = inspect(parse(TENSORRT_RTX, quantized / "unet.onnx"))
    assert found.share(manifest.precision) >= 0.95
    assert set(found.products) == {"fp16"}  # attention isn't quantised
    assert found.attentions > 0


def test_a_quantised_unet_compiles_for_the_gpus_that_can(
    quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    precision = Manifest.read(quantized).precision
    arguments = ["build", "--onnx", str(quantized), "--out", str(tmp_path), "--engine", "unet", "--buckets", "1"]
    assert engines_main(arguments) == 0, capsys.readouterr().err
    plan = PlanManifest.read(tmp_path / "unet.plan")
    assert plan.precision == precision
    newer = ("8.9", "12.0")
    assert plan.compute_capabilities == (newer if precision == "fp8" else ("8.0", "8.6", *newer))
    capsys.readouterr()
    status = engines_main([*arguments, "--compute-capability", "8.6"])
    error = capsys.readouterr().err
    if precision == "fp8":
        assert (status, error) == (1, "error: compute capability 8.6: has no fp8 arithmetic, expected 8.9 or newer\n")
    else:
        assert status == 0


def test_a_quantised_unet_serves_and_rounds(quantized: Path) -> None:
    """Check that outputs are near the fp16 weights' in torch, and not equal, because the Q/DQ nodes are computed."""
    manifest = Manifest.read(quantized)
    engine = load_engine("unet", quantized, manifest, ServingPolicy())
    inputs = record_inputs(random_checkpoint(WIDE), rendered_pairs(WIDE, 2))
    rows = {spec.name: inputs[spec.name][:4].astype(spec.dtype.numpy) for spec in engine.spec.inputs}
    found = engine.run(rows)["noise_pred"]
    module = engine_modules(random_checkpoint(WIDE))["unet"]
    from export.verification import torch_outputs

    expected = torch_outputs(module, engine.spec, rows)["noise_pred"]
    relative = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-3 < relative < 0.15


def test_what_is_recorded_is_what_the_unet_got() -> None:
    checkpoint = random_checkpoint(TINY)
    pairs = rendered_pairs(TINY, 4)
    recorded = record_inputs(checkpoint, pairs)
    specs = {spec.name: spec for spec in engine_specs(TINY)["unet"].inputs}
    rows = len(recorded["timestep"])
    assert list(recorded) == list(specs)
    assert 8 < rows <= ROWS
    for name, array in recorded.items():
        assert array.shape == specs[name].shape(batch=rows)
    calls = []
    pipeline = ReferencePipeline.of(checkpoint)
    pipeline.modules["unet"].register_forward_pre_hook(lambda _, arguments: calls.append(arguments))
    pipeline(*pairs[0], seed=0)
    assert np.array_equal(recorded["canvas_latent"][0], calls[0][0][0].numpy())
    assert np.array_equal(recorded["f_ref_00"][0], calls[0][2][0].numpy())


def test_rows_with_and_without_f_ref_and_many_timesteps_are_recorded() -> None:
    checkpoint = replace(random_checkpoint(TINY), guidance_scale=2.0, num_inference_steps=10)
    recorded = record_inputs(checkpoint, rendered_pairs(TINY, 8))
    unconditional = (recorded["f_ref_00"] == 0).all(axis=(1, 2, 3))
    assert 0.3 < unconditional.mean() < 0.7
    assert len(set(recorded["timestep"].tolist())) >= 10


def test_calibration_renders_no_evaluated_person() -> None:
    from training.evaluation_pairs import evaluation_pairs

    rendered = rendered_pairs(TINY, 4)
    evaluated = evaluation_pairs(TINY, 1, 4).profile.permute(0, 2, 3, 1).numpy()
    assert not any(np.array_equal(profile, other) for profile, _ in rendered for other in evaluated)


def test_a_folder_of_pictures_makes_pairs(tmp_path: Path) -> None:
    pairs = folder_pairs(TINY, EXAMPLES, 16)
    assert len(pairs) == 2
    assert np.array_equal(pairs[0][1], pairs[1][0])
    assert pairs[0][0].shape == (TINY.image_size, TINY.image_size, 3)
    with pytest.raises(CheckpointError, match=r"has 0 pictures \(jpg, png, webp\), expected 2 or more"):
        folder_pairs(TINY, tmp_path, 16)
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    with pytest.raises(CheckpointError, match=r"a\.jpg"):
        folder_pairs(TINY, tmp_path, 16)


def test_without_the_quantiser_an_export_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export.quantization, "QUANTIZER", tmp_path / "missing")
    arguments = [
        "--random-weights",
        "--preset",
        "demo-128",
        "--precision",
        "fp8",
        "--opset",
        "23",
        "--calibration-pairs",
        "2",
    ]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    assert 'run "make quantizer"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_quantisers_failure_is_told(tmp_path: Path, small_checkpoint: Checkpoint) -> None:
    graph = tmp_path / "unet.onnx"
    graph.write_bytes(b"no graph")
    with pytest.raises(VerificationError, match=r"unet.onnx: ModelOpt couldn't quantise it to int8: \S+"):
        quantize([graph], "int8", {"x": np.zeros(1, np.float32)})
    assert graph.read_bytes() == b"no graph"


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_only_int8_clips_a_rare_value(precision: str, tmp_path: Path) -> None:
    """Compare one value's effect on an input's scale: int8 is calibrated by entropy, fp8 by the largest value."""
    generator = np.random.default_rng(0)
    usual = generator.normal(0, 1, (16, 32, 8, 8)).astype(np.float16)
    rare = usual.copy()
    rare[3, 4, 5, 6] = 64
    given = {"usual": usual, "rare": rare}
    tensors = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["batch", 32, 8, 8]) for name in (*given, "y")
    }
    kernel = numpy_helper.from_array(generator.normal(0, 0.1, (32, 32, 3, 3)).astype(np.float16), "kernel")
    nodes = [helper.make_node("Conv", [name, "kernel"], [f"{name}_y"], f"{name}_conv", pads=[1] * 4) for name in given]
    nodes.append(helper.make_node("Add", ["usual_y", "rare_y"], ["y"], "sum"))
    inputs = [tensors[name] for name in given]
    made = helper.make_graph(nodes, "test", inputs, [tensors["y"]], [kernel])
    path = tmp_path / "g.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    quantize([path], precision, given)
    quantized = onnx.load(path).graph
    constants = {tensor.name: tensor for tensor in quantized.initializer}
    constants |= {node.output[0]: node.attribute[0].t for node in quantized.node if node.op_type == "Constant"}
    scales = {
        node.input[0]: float(numpy_helper.to_array(constants[node.input[1]]))
        for node in quantized.node
        if node.op_type == "QuantizeLinear" and node.input[0] in given
    }
    growth = scales["rare"] / scales["usual"]
    by_largest = 64 / float(np.abs(usual).max())
    assert by_largest > 10
    assert growth < 2 if precision == "int8" else growth == pytest.approx(by_largest, rel=0.02)


@pytest.mark.parametrize(("precision", "least"), [("bf16", 22), ("int8", 23), ("fp8", 23)])
def test_each_precision_has_its_opset(
    precision: str, least: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--random-weights", "--preset", "demo-128", "--precision", precision, "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        main([*arguments, "--opset", str(least - 1)])
    assert f"--opset is {least - 1}, expected {least} or later for {precision}" in capsys.readouterr().err
