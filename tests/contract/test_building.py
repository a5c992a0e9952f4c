"""An engine is parsed once, inspected without a trace, and not built where TensorRT warns of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

import engines.building
import icportrait.disk
from engines.__main__ import main
from engines.build_config import BuildConfig
from engines.building import build_engine
from engines.gpu_target import GpuTarget
from engines.inspection import Inspection, inspect
from engines.network import ParsedNetwork, parse, warnings_that_matter
from engines.polygraphy_setup import prepare_polygraphy
from engines.progress import progress_monitor
from icportrait.contract import engine_specs
from icportrait.manifest import Manifest, file_sha256
from icportrait.runtime.tensorrt.plans import PlanManifest
from icportrait.runtime.tensorrt.products import TENSORRT_RTX, Flavour
from tests.contract.test_engines import graph
from tests.full_disk import full_disk
from tests.tiny import SMALL, TINY
from tests.trivial_engines import write_trivial_export


@pytest.fixture
def trivial(tmp_path: Path) -> Path:
    write_trivial_export(tmp_path / "export", TINY)
    return tmp_path / "export"


@pytest.mark.parametrize("layout", ["profiles", "static"])
def test_an_engine_is_parsed_once_and_inspecting_it_changes_no_byte_of_its_plans(
    layout: str, small_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, spec = Manifest.read(small_export), engine_specs(SMALL)["vae_encoder"]
    config = BuildConfig(layout=layout, buckets=(1, 2), compute_capabilities=("8.9",))
    plans, parsed = {}, []

    def parse_and_note(flavour: Flavour, onnx: Path) -> ParsedNetwork:
        parsed.append(parse(flavour, onnx))
        return parsed[-1]

    monkeypatch.setattr(engines.building, "parse", parse_and_note)
    for inspected in (True, False):
        if not inspected:
            nothing = Inspection(weighted=Counter(fp32=1))
            monkeypatch.setattr(engines.building, "inspect", lambda _, nothing=nothing: nothing)
        built = build_engine(TENSORRT_RTX, small_export, manifest, spec, config, tmp_path / str(inspected))
        plans[inspected] = [(plan.plan_sha256, plan.profiles, plan.tensors) for plan in built]
    assert len(parsed) == 2
    assert plans[True] == plans[False]
    assert [[profile["pixels"][0][0] for profile in profiles] for _, profiles, _ in plans[True]] == (
        [[1, 2, 3]] if layout == "profiles" else [[1], [2], [3]]
    )


def test_inspecting_leaves_a_network_as_it_was(small_export: Path) -> None:
    parsed = parse(TENSORRT_RTX, small_export / "warping_network.onnx")

    def shapes() -> list[tuple[str, tuple[int, ...], str]]:
        network = parsed.network
        tensors = [network.get_input(index) for index in range(network.num_inputs)]
        tensors += [network.get_output(index) for index in range(network.num_outputs)]
        return [(tensor.name, tuple(tensor.shape), tensor.get_dimension_name(0)) for tensor in tensors]

    before = shapes()
    assert all(shape[0] == -1 for _, shape, _ in before)
    first = inspect(parsed)
    assert first.products and shapes() == before
    assert inspect(parsed) == first


def convolution_graph(path: Path) -> Path:
    convolution = helper.make_node("Conv", ["x", "kernel"], ["y"])
    return graph(path, [convolution], {"kernel": np.ones((2, 4, 1, 1), np.float32)}, {"x": [1, 4, 5, 7]})


def test_plans_of_tensorrt_rtx_never_allocate_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the configuration that TensorRT builds with. Else plans may allocate while a CUDA graph is captured."""
    parsed = parse(TENSORRT_RTX, convolution_graph(tmp_path / "g.onnx"))
    prepare_polygraphy(TENSORRT_RTX)
    import polygraphy.backend.trt

    flag, built_with = TENSORRT_RTX.load().BuilderFlag.REQUIRE_USER_ALLOCATION, []
    build = polygraphy.backend.trt.engine_bytes_from_network

    def build_and_note(network: Any, config: Callable[..., Any], **options: Any) -> Any:
        def noted(*arguments: Any) -> Any:
            built_with.append(config(*arguments))
            return built_with[-1]

        return build(network, config=noted, **options)

    monkeypatch.setattr(polygraphy.backend.trt, "engine_bytes_from_network", build_and_note)
    with progress_monitor(TENSORRT_RTX, "g.plan") as monitor:
        target = GpuTarget(("8.9",))
        assert engines.building._serialize(target, parsed, BuildConfig(), [], monitor) is not None
    assert [config.get_flag(flag) for config in built_with] == [True]


def random_graph(path: Path) -> Path:
    """Make a graph of which the parser warns: TensorRT draws its own seeds."""
    noise = helper.make_node("RandomNormalLike", ["x"], ["noise"], seed=1.0)
    convolution = helper.make_node("Conv", ["noise", "kernel"], ["y"])
    return graph(path, [noise, convolution], {"kernel": np.ones((2, 4, 1, 1), np.float32)}, {"x": [1, 4, 5, 7]})


@pytest.fixture
def warned_of(trivial: Path) -> Path:
    """Make an export whose UNet has random numbers in it."""
    path = random_graph(trivial / "unet.onnx")
    manifest = Manifest.read(trivial)
    entry = replace(manifest.engines["unet"], sha256=file_sha256(path), size_bytes=path.stat().st_size)
    replace(manifest, engines=manifest.engines | {"unet": entry}).write(trivial)
    return trivial


def test_what_the_parser_warns_of_is_not_built(
    warned_of: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", "--onnx", str(warned_of), "--out", str(tmp_path / "plans"), "--engine", "unet"]) == 1
    said = capsys.readouterr().err
    assert "unet.onnx: TensorRT warns: " in said and 'ignores the "seed" field' in said and "--allow-warnings" in said
    assert not list(tmp_path.glob("plans/*"))


def test_what_the_builder_warns_of_is_built_and_stands_beside_the_plan(
    trivial: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Build the trivial UNet, which reads only one of its inputs. TensorRT notices that while it builds."""
    arguments = ["--onnx", str(trivial), "--out", str(tmp_path), "--engine", "unet", "--buckets", "1", "--allow-mixed"]
    assert main(["build", *arguments]) == 0
    assert "warning: Unused Input: timestep" in capsys.readouterr().out
    plan = PlanManifest.read(tmp_path / "unet.plan")
    assert any("Unused Input: timestep" in text for text in plan.warnings) and plan.gpu_name == ""


def test_a_full_disk_ends_a_build_in_one_sentence_and_leaves_no_half(
    trivial: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = tmp_path / "plans"
    arguments = ["build", "--onnx", str(trivial), "--out", str(plans), "--engine", "vae_encoder", "--allow-mixed"]
    arguments += ["--buckets", "1", "--compute-capability", "8.9", "--allow-warnings"]
    with full_disk(1000):
        assert main(arguments) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {plans}: File too large while writing the plan, about ")
    assert not list(tmp_path.glob("plans/*"))


def test_plans_without_room_are_not_begun(
    trivial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(icportrait.disk, "free_bytes", lambda _: 0)
    monkeypatch.setattr(engines.building, "parse", None)
    assert main(["build", "--onnx", str(trivial), "--out", str(tmp_path / "plans")]) == 1
    assert "of disk are needed for the plans, and 0.0 MB are free" in capsys.readouterr().err


def test_known_harmless_warnings_let_a_build_go_on(tmp_path: Path) -> None:
    """Build a quantised fp16 convolution, of which TensorRT itself warns."""
    scales = {"scale": np.array(0.1, np.float16), "zero": np.array(0, np.int8)}
    scales |= {"scales": np.full(4, 0.1, np.float16), "zeros": np.zeros(4, np.int8)}
    nodes = [
        helper.make_node("Cast", ["x"], ["x16"], to=TensorProto.FLOAT16),
        helper.make_node("QuantizeLinear", ["x16", "scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["kernel", "scales", "zeros"], ["kd"], axis=0),
        helper.make_node("Conv", ["xd", "kd"], ["c"]),
        helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT),
    ]
    weights = scales | {"kernel": np.ones((4, 4, 3, 3), np.int8)}
    parsed = parse(TENSORRT_RTX, graph(tmp_path / "g.onnx", nodes, weights, {"x": [2, 4, 8, 8]}, opset=23))
    config, target = BuildConfig(), GpuTarget(("8.9",))
    with progress_monitor(TENSORRT_RTX, "g.plan") as monitor:
        assert engines.building._serialize(target, parsed, config, [], monitor) is not None
    assert parsed.warnings and not warnings_that_matter(parsed.warnings)
