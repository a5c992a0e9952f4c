"""Graphs through the real TensorRT-RTX parser and builder; no GPU is needed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import engines.gpu_target
from engines.__main__ import main
from engines.build_config import BuildConfig
from engines.gpu_target import GpuTarget, gpu_target
from engines.inspection import inspect
from engines.network import parse
from engines.polygraphy_setup import PRODUCT_VARIABLE, prepare_polygraphy
from icportrait.contract import ENGINES, engine_specs
from icportrait.errors import PlanError, RuntimeNotAvailable, VerificationError
from icportrait.manifest import Manifest
from icportrait.runtime.cuda import Gpu
from icportrait.runtime.tensorrt.plans import PlanHost, PlanManifest, read_plan
from icportrait.runtime.tensorrt.products import FLAVOURS, TENSORRT, TENSORRT_RTX, Flavour
from tests.tiny import TINY
from tests.trivial_engines import write_trivial_export

ALLOW = ("--allow-mixed", "--allow-warnings")
"""Trivial graphs need both: nothing in them is a convolution, and most of their inputs aren't read."""


@pytest.fixture(scope="module")
def trivial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trivial")
    write_trivial_export(directory, TINY)
    return directory


def graph(
    path: Path, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], inputs: dict[str, list], opset: int = 20
) -> Path:
    """Write nodes that end in ``y``, fp32, with fp32 inputs of the given axes."""
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, axes) for name, axes in inputs.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    made = helper.make_graph(nodes, "test", tensors, [output], initializers)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path


# Inspection


def test_multiply_adds_are_counted_by_type_and_use(tmp_path: Path) -> None:
    """Count a convolution in fp16, a linear in fp32, and a product of two activations; all sizes differ."""
    nodes = [
        helper.make_node("Cast", ["x"], ["x16"], to=TensorProto.FLOAT16, name="down"),
        helper.make_node("Conv", ["x16", "kernel"], ["c"], pads=[1, 1, 1, 1], group=2),
        helper.make_node("Cast", ["c"], ["c32"], to=TensorProto.FLOAT, name="up"),
        helper.make_node("MatMul", ["c32", "weight"], ["l"]),
        helper.make_node("Transpose", ["l"], ["t"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["l", "t"], ["y"]),
    ]
    weights = {"kernel": np.ones((6, 2, 3, 3), np.float16), "weight": np.ones((7, 11), np.float32)}
    found = inspect(parse(TENSORRT_RTX, graph(tmp_path / "g.onnx", nodes, weights, {"x": ["batch", 4, 5, 7]})))
    convolution, linear = 6 * 5 * 7 * 2 * 9, 6 * 5 * 7 * 11
    assert dict(found.weighted) == {"fp16": convolution, "fp32": linear}
    assert dict(found.products) == {"fp32": 6 * 5 * 5 * 11}
    assert found.share("fp16") == pytest.approx(convolution / (convolution + linear))
    assert found.casts == ["down: FLOAT to HALF, [1, 4, 5, 7]", "up: HALF to FLOAT, [1, 6, 5, 7]"]
    assert found.layers["CONVOLUTION", "HALF"] == 1 and found.layers["MATRIX_MULTIPLY", "FLOAT"] == 2


def test_a_quantised_product_counts_as_what_it_was_quantised_to(tmp_path: Path) -> None:
    scale = {"scale": np.array(0.1, np.float32), "zero": np.array(0, np.int8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["kernel", "scale", "zero"], ["kd"]),
        helper.make_node("Conv", ["xd", "kd"], ["c"]),
        helper.make_node("Conv", ["c", "plain"], ["y"]),
    ]
    weights = scale | {"kernel": np.ones((3, 4, 1, 1), np.int8), "plain": np.ones((2, 3, 1, 1), np.float32)}
    found = inspect(parse(TENSORRT_RTX, graph(tmp_path / "g.onnx", nodes, weights, {"x": ["batch", 4, 5, 7]})))
    assert dict(found.weighted) == {"int8": 3 * 4 * 35, "fp32": 2 * 3 * 35}


def test_attention_is_tensorrts_own(tmp_path: Path) -> None:
    """Parse an attention of 5 queries, 7 keys and values of 8, under 2 heads."""
    nodes = [helper.make_node("Attention", ["q", "k", "v"], ["y"])]
    inputs = {"q": ["batch", 2, 5, 8], "k": ["batch", 2, 7, 8], "v": ["batch", 2, 7, 8]}
    parsed = parse(TENSORRT_RTX, graph(tmp_path / "g.onnx", nodes, {}, inputs, opset=23))
    found = inspect(parsed)
    assert found.attentions == 1
    layers = [parsed.network.get_layer(index) for index in range(parsed.network.num_layers)]
    attention = next(layer for layer in layers if layer.type.name == "ATTENTION_INPUT")
    attention.__class__ = TENSORRT_RTX.load().IAttentionInputLayer
    assert attention.attention.decomposable, "or fp32, which has no fused kernel, wouldn't build"
    assert dict(found.products) == {"fp32": 2 * 5 * 7 * (8 + 8)}
    assert not found.weighted


def test_what_tensorrt_cannot_parse_is_refused_with_its_node(tmp_path: Path) -> None:
    path = graph(tmp_path / "g.onnx", [helper.make_node("Det", ["x"], ["y"], name="culprit")], {}, {"x": [1, 3, 3]})
    with pytest.raises(VerificationError, match=r"g\.onnx: TensorRT can't parse it: node culprit \(Det\)"):
        parse(TENSORRT_RTX, path)


# Which plans


def test_batches_are_laid_out_as_asked() -> None:
    spec = engine_specs(TINY)["unet"]
    largest = spec.batch.max
    profiles = BuildConfig(buckets=(1, 2)).plans(spec)["unet.plan"]
    assert [profile["timestep"] for profile in profiles] == [((n,), (n,), (n,)) for n in (1, 2, largest)]
    assert BuildConfig(layout="dynamic").plans(spec) == {"unet.plan": [spec.optimization_profile]}
    static = BuildConfig(layout="static", buckets=(1, 2, 1000)).plans(spec)
    assert list(static) == ["unet.batch1.plan", "unet.batch2.plan", f"unet.batch{largest}.plan"]
    assert static["unet.batch2.plan"][0]["canvas_latent"][0][0] == 2


def test_a_bucket_without_rows_is_refused() -> None:
    with pytest.raises(PlanError, match="buckets: 0, expected batches of 1 or more"):
        BuildConfig(buckets=(1, 0))


# Building


def test_four_engines_are_compiled_with_their_manifests(
    trivial: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--onnx", str(trivial), "--out", str(tmp_path / "plans"), "--compute-capability", "8.9", "12.0"]
    assert main(["build", *arguments, "--buckets", "1", "2", *ALLOW]) == 0
    export = Manifest.read(trivial)
    said = capsys.readouterr().out
    for name in ENGINES:
        plan = tmp_path / "plans" / f"{name}.plan"
        host = PlanHost("tensorrt-rtx", TENSORRT_RTX.load().__version__, export.contract_hash, "12.0")
        manifest = PlanManifest.read(plan)
        content = read_plan(plan, manifest, host)
        spec = engine_specs(TINY)[name]
        assert len(content) == manifest.plan_bytes and manifest.engine == name
        assert manifest.onnx_sha256 == export.engines[name].sha256
        for is_input, contract in ((True, spec.inputs), (False, spec.outputs)):
            # Were a network inspected and not put back, its batch would be 1.
            axes = [
                (entry.name, tuple(-1 if axis.is_dynamic else axis.min for axis in entry.axes)) for entry in contract
            ]
            assert [(found.name, found.shape) for found in manifest.tensors if found.is_input == is_input] == axes
        assert len(manifest.profiles) == 3 and manifest.build_seconds > 0 and manifest.peak_memory_bytes > 10**7
        assert f"{name}: {manifest.plan_bytes / 1e6:.0f} MB for 8.9, 12.0, 3 profiles" in said
        with pytest.raises(PlanError, match=r"8\.9, 12\.0, and this one has 9\.0"):
            read_plan(plan, manifest, PlanHost(host.flavour, host.tensorrt_version, host.contract_hash, "9.0"))


def test_a_graph_in_another_precision_than_asked_is_not_built(
    trivial: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ask for fp32 of the trivial graphs, which have no convolution at all, so no arithmetic is fp32 convolutions."""
    assert main(["build", "--onnx", str(trivial), "--out", str(tmp_path), "--engine", "unet"]) == 1
    assert "0.0 % of the convolutions' and linears' multiply-adds are fp32, expected 95 %" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.plan*"))


def test_a_changed_graph_is_not_built(trivial: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = tmp_path / "export"
    shutil.copytree(trivial, export)
    model = onnx.load(export / "unet.onnx")
    model.producer_name = "somebody else"
    onnx.save(model, export / "unet.onnx")
    assert main(["build", "--onnx", str(export), "--out", str(tmp_path / "plans"), "--engine", "unet"]) == 1
    assert "unet.onnx: hash is" in capsys.readouterr().err


def test_inspect_prints_every_engine(trivial: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--onnx", str(trivial)]) == 0
    said = capsys.readouterr().out
    assert all(f"{name}: " in said for name in ENGINES)
    assert "TensorRT attentions: 0" in said


def test_polygraphy_is_told_of_the_product_that_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_polygraphy(TENSORRT_RTX)  # Polygraphy reads it once, when this process imports Polygraphy
    monkeypatch.setenv(PRODUCT_VARIABLE, "1")
    prepare_polygraphy(TENSORRT)
    assert os.environ[PRODUCT_VARIABLE] == "0"
    prepare_polygraphy()
    assert os.environ[PRODUCT_VARIABLE] == "0", "comparing needs no product, and the one that was chosen stays"
    prepare_polygraphy(TENSORRT_RTX)
    assert os.environ[PRODUCT_VARIABLE] == "1"


def gpu_of(capability: str) -> Callable[[], Gpu]:
    return lambda: Gpu("NVIDIA Test", capability, 8 * 10**9, 8 * 10**9, "13.0")


def test_capabilities_with_a_name_are_compiled_ahead_of_time() -> None:
    assert gpu_target(TENSORRT_RTX, ("8.0", "12.0")) == GpuTarget(("8.0", "12.0"))


@pytest.mark.parametrize("asked", [("9.0",), ("8.9", "9.0")])
def test_tensorrt_rtx_is_refused_where_it_has_no_kernels_and_says_what_to_use(
    asked: tuple[str, ...], trivial: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--onnx", str(trivial), "--out", str(tmp_path), "--engine", "vae_decoder", *ALLOW]
    assert main(["build", *arguments, "--compute-capability", *asked, "--buckets", "1"]) == 1
    said = capsys.readouterr().err
    assert "tensorrt-rtx has no kernels for compute capability 9.0 (H100, H200)" in said
    assert "--target tensorrt, or serve with RUNTIME=torch" in said
    assert not list(tmp_path.glob("*.plan*"))


def test_the_full_product_builds_for_the_gpu_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = Flavour("tensorrt", "json", "tensorrt==0", compiles_without_gpu=False)
    monkeypatch.setattr(engines.gpu_target, "find_gpu", gpu_of("9.0"))
    assert gpu_target(installed, ("8.0", "8.9")) == GpuTarget(("9.0",), "NVIDIA Test")


def test_the_full_product_names_only_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Flavour("tensorrt", "tensorrt_of_another_world", "tensorrt==0", compiles_without_gpu=False)
    monkeypatch.setattr(engines.gpu_target, "find_gpu", gpu_of("9.0"))
    with pytest.raises(RuntimeNotAvailable, match="pip install tensorrt==0; or use --target") as refusal:
        gpu_target(absent, ())
    assert "NVIDIA GPU was found" not in str(refusal.value)


def test_the_full_product_says_that_it_needs_its_gpu(
    trivial: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", "--onnx", str(trivial), "--out", str(tmp_path), "--target", "tensorrt"]) == 1
    said = capsys.readouterr().err
    assert "--target tensorrt-rtx, which compiles without one" in said
    assert "no NVIDIA GPU was found" in said and "pip install tensorrt-cu13" in said


def test_a_product_that_is_not_installed_says_how_to_install_it() -> None:
    absent = Flavour("tensorrt", "tensorrt_of_another_world", "tensorrt==0", compiles_without_gpu=False)
    with pytest.raises(RuntimeNotAvailable, match=r"tensorrt is not installed here .*: pip install tensorrt==0"):
        absent.load()
    assert all(flavour.package.startswith("tensorrt") for flavour in FLAVOURS.values())
