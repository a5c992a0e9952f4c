"""Attention in plans: the builder's own messages say whether it is fused, and a plan with its scores isn't built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

import engines.building
import engines.fusion
from engines.__main__ import main
from engines.build_config import BuildConfig
from engines.building import build_engine
from engines.fusion import LEAST_BYTES, Fusion, fusion
from engines.gpu_target import GpuTarget
from engines.inspection import Inspection, inspect
from engines.network import parse
from engines.progress import progress_monitor
from icportrait.contract import engine_specs
from icportrait.manifest import Manifest
from icportrait.runtime.tensorrt.plans import PlanManifest
from icportrait.runtime.tensorrt.products import TENSORRT_RTX
from tests.tiny import TINY
from tests.trivial_engines import write_trivial_export

TOKENS = 512


def attention_graph(path: Path, head_size: int, dtype: int) -> Path:
    """Write an attention of 2 rows and 2 heads."""
    shape = [2, 2, TOKENS, head_size]
    inputs = [helper.make_tensor_value_info(name, dtype, shape) for name in "qkv"]
    output = helper.make_tensor_value_info("y", dtype, shape)
    made = helper.make_graph([helper.make_node("Attention", ["q", "k", "v"], ["y"])], "test", inputs, [output])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    return path


@pytest.mark.parametrize(
    ("head_size", "precision", "is_fused"), [(64, "fp16", True), (300, "fp16", False), (64, "fp32", False)]
)
def test_tensorrt_says_without_a_gpu_whether_an_attention_is_fused(
    head_size: int, precision: str, is_fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Build for two GPUs: no kernel of TensorRT-RTX has heads of 300, and none is for fp32."""
    dtype = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.FLOAT
    parsed = parse(TENSORRT_RTX, attention_graph(tmp_path / "g.onnx", head_size, dtype))
    inspected = inspect(parsed)
    assert (inspected.scores, inspected.attentions) == (2 * 2 * TOKENS * TOKENS, 1)
    with progress_monitor(TENSORRT_RTX, "g.plan") as monitor:
        target = GpuTarget(("8.9", "12.0"))
        assert engines.building._serialize(target, parsed, BuildConfig(), [], monitor) is not None
    monkeypatch.setattr(engines.fusion, "LEAST_BYTES", 1)
    found = fusion(parsed.planned, inspected, precision, profiles=1, largest_batch=1)
    assert found.fused == int(is_fused) and found.is_unfused != is_fused
    assert found.score_bytes == inspected.scores * (2 if precision == "fp16" else 4)
    (scratch_bytes,) = found.scratch_bytes
    assert (scratch_bytes < found.score_bytes) == is_fused


def test_the_fewest_fused_attentions_of_a_profile_count() -> None:
    kernels = ("_gemm_mha_v2_myl0_3", "_gemm_mha_v2_myl0_8", "_gemm_mha_v2_myl1_3", "__myl_Resh_myl1_4")
    layers = "Layers:\n" + "\n".join(f"Name: {name}, LayerType: kgen" for name in kernels)
    planned = ["Max Scratch Memory: 10 bytes", layers, f"Max Scratch Memory: {3 * LEAST_BYTES} bytes"]
    graph = Inspection(attentions=2, scores=LEAST_BYTES // 2, largest=4)
    found = fusion(planned, graph, "fp16", profiles=2, largest_batch=3)
    assert (found.fused, found.scratch_bytes, found.score_bytes) == (1, (10, 3 * LEAST_BYTES), 3 * LEAST_BYTES)
    assert found.is_unfused
    assert not replace(found, scratch_bytes=(10, 3 * LEAST_BYTES - 1)).is_unfused
    assert not replace(found, scores_stand_out=False).is_unfused
    assert not replace(found, score_bytes=LEAST_BYTES - 1).is_unfused
    # A profile without any isn't in the listing.
    assert fusion(planned, graph, "fp16", profiles=3, largest_batch=3).fused == 0


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an export whose UNet is thought to be in fp16, and its plan to be unfused."""
    manifest = write_trivial_export(tmp_path / "export", TINY)
    in_fp16 = replace(manifest.engines["unet"], precision="fp16")
    replace(manifest, engines=manifest.engines | {"unet": in_fp16}).write(tmp_path / "export")
    unfused = Fusion(2, 1, (10**9, 3 * 10**9), 2 * 10**9, scores_stand_out=True)
    monkeypatch.setattr(engines.building, "fusion", lambda *_: unfused)
    return tmp_path / "export"


def test_an_unfused_plan_is_refused_unless_allowed(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plans" / "unet.plan"
    arguments = ["build", "--onnx", str(export), "--out", str(plan.parent), "--engine", "unet", "--buckets", "1"]
    assert main([*arguments, "--allow-mixed"]) == 1
    said = capsys.readouterr()
    report = "scratch memory 3.00 GB; 1 of 2 attentions fused, the largest one's scores unfused 2.00 GB"
    assert report in said.out and report in said.err and "--allow-unfused" in said.err and not plan.exists()
    assert main([*arguments, "--allow-mixed", "--allow-unfused"]) == 0
    manifest = PlanManifest.read(plan)
    assert (manifest.scratch_bytes, manifest.attentions, manifest.fused_attentions) == ((10**9, 3 * 10**9), 2, 1)


def test_fp32_has_no_fused_kernels_and_is_built(export: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(export)
    in_fp32 = replace(manifest.engines["unet"], precision="fp32")
    replace(manifest, engines=manifest.engines | {"unet": in_fp32}).write(export)
    arguments = ["--onnx", str(export), "--out", str(tmp_path / "plans"), "--engine", "unet", "--buckets", "1"]
    assert main(["build", *arguments, "--allow-mixed"]) == 0


@pytest.mark.parametrize("name", ["warping_network", "unet"])
def test_the_export_that_tests_on_a_gpu_build_has_fused_attention_alone(
    name: str, small_fp16_export: Path, tmp_path: Path
) -> None:
    manifest = Manifest.read(small_fp16_export)
    spec, config = engine_specs(manifest.preset, "fp16")[name], BuildConfig(compute_capabilities=("8.9",), buckets=(2,))
    (plan,) = build_engine(TENSORRT_RTX, small_fp16_export, manifest, spec, config, tmp_path)
    assert plan.fused_attentions == plan.attentions == 8
