"""bf16 exports, and what is measured over exports: each precision's quality, and fp16's magnitudes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from export import magnitudes, quality
from export.magnitudes import LARGEST, MeasuredEngine
from export.quality import Quality, compare_precisions
from export.verification import TOLERANCES, check_values
from export.widening import widened
from icportrait.contract import engine_specs
from icportrait.deploy.repository import assemble
from icportrait.errors import CheckpointError, VerificationError
from icportrait.manifest import Manifest, file_sha256
from icportrait.nn import engine_modules, random_checkpoint
from icportrait.policy import ServingPolicy
from icportrait.runtime.eager import source_modules
from tests.exports import shared_export
from tests.tiny import SMALL
from tests.trivial_engines import write_trivial_export


@pytest.fixture(scope="module")
def exports() -> dict[str, Path]:
    """Return exports of the same random weights in three precisions."""
    return {"fp32": shared_export("small"), "fp16": shared_export("small-fp16"), "bf16": shared_export("small-bf16")}


def test_a_bf16_graph_is_bf16(exports: dict[str, Path]) -> None:
    graph = onnx.load(exports["bf16"] / "unet.onnx").graph
    weights = {weight.data_type for weight in graph.initializer if np.prod(weight.dims) > 64}
    assert weights == {TensorProto.BFLOAT16}
    f_ref = next(tensor for tensor in graph.input if tensor.name == "f_ref_00")
    assert f_ref.type.tensor_type.elem_type == TensorProto.BFLOAT16


def test_a_widened_graph_has_no_half_precision_left(exports: dict[str, Path]) -> None:
    for precision in ("fp16", "bf16"):
        for path in exports[precision].glob("*.onnx"):
            text = str(widened(onnx.load(path)).graph.value_info)
            assert "elem_type: 10\n" not in text
            assert "elem_type: 16\n" not in text


def test_a_wrong_weight_in_a_bf16_graph_is_found(exports: dict[str, Path], tmp_path: Path) -> None:
    module = engine_modules(random_checkpoint(SMALL))["unet"].bfloat16()
    spec = engine_specs(SMALL, "bf16")["unet"]
    arguments = (spec, module, TOLERANCES["fp16"]["unet"], [spec.dummy_inputs(2)])
    check_values(exports["bf16"] / "unet.onnx", *arguments)
    model = onnx.load(exports["bf16"] / "unet.onnx")
    weight = next(weight for weight in model.graph.initializer if weight.name == "unet.conv_in.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 2, weight.name))
    onnx.save(model, tmp_path / "unet.onnx")
    with pytest.raises(VerificationError, match="unet: noise_pred at batch 2: relative RMS error"):
        check_values(tmp_path / "unet.onnx", *arguments)


def test_bf16_isnt_served_on_the_cpu(tmp_path: Path) -> None:
    write_trivial_export(tmp_path / "export", SMALL, "bf16")
    with pytest.raises(CheckpointError, match="is bf16, for which ONNX Runtime has no CPU kernels"):
        assemble(tmp_path / "export", tmp_path / "repository", ServingPolicy())


def test_precisions_are_compared_with_fp32(exports: dict[str, Path]) -> None:
    plain, half, brain = compare_precisions([exports["fp16"], exports["fp32"]], 2)
    assert [plain.precision, half.precision, brain.precision] == ["fp32", "fp16", "bf16"]
    assert plain.psnr_db == float("inf")
    assert plain.latent_cosine == pytest.approx(1, abs=1e-6)
    assert brain.psnr_db < half.psnr_db < float("inf")
    assert brain.latent_cosine < half.latent_cosine < 1


@pytest.mark.full
def test_a_spoilt_graph_shows_in_its_quality(exports: dict[str, Path], tmp_path: Path) -> None:
    spoilt = tmp_path / "fp16"
    spoilt.mkdir()
    copy(exports["fp16"], spoilt)
    model = onnx.load(spoilt / "unet.onnx")
    weight = next(weight for weight in model.graph.initializer if weight.name == "unet.conv_out.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float16(1.5), weight.name))
    save_with_its_hash(model, spoilt, "unet")
    whole, broken = (compare_precisions([exports["fp32"], each], 2)[1] for each in (exports["fp16"], spoilt))
    assert broken.latent_cosine < whole.latent_cosine
    assert broken.psnr_db < whole.psnr_db - 3


def test_exports_of_different_weights_arent_compared(exports: dict[str, Path], tmp_path: Path) -> None:
    copy(exports["fp16"], tmp_path)
    text = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace('"random_weights": 0', '"random_weights": 1'))
    with pytest.raises(CheckpointError, match=r"was made from .*1.*, .* from .*0"):
        compare_precisions([exports["fp32"], tmp_path], 2)
    with pytest.raises(CheckpointError, match="none of the exports is fp32"):
        compare_precisions([exports["fp16"]], 2)


def test_a_precision_below_its_limit_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Quality(precision, "onnxruntime", 0.99, 44.9, 40.0, 17.0) for precision in ("int8", "fp16")]
    monkeypatch.setattr(quality, "compare_precisions", lambda *_: rows[:1])
    assert quality.main(["somewhere"]) == 0
    assert "holds 30 dB" in capsys.readouterr().out
    monkeypatch.setattr(quality, "compare_precisions", lambda *_: rows)
    assert quality.main(["somewhere"]) == 1
    assert "FAILS 45 dB" in capsys.readouterr().out
    assert quality.main(["somewhere", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[1]["psnr_db"] == 44.9
    monkeypatch.setattr(quality, "compare_precisions", lambda *_: [replace(rows[0], psnr_db=float("inf"))])
    assert quality.main(["somewhere", "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)[0]["psnr_db"] is None


@pytest.mark.full
def test_an_overflow_is_seen_that_the_cpu_would_hide(
    exports: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert magnitudes.main([str(exports["fp16"]), "--pairs", "1"]) == 0
    assert "| of 65504 |" in capsys.readouterr().out
    copy(exports["fp16"], tmp_path)
    model = onnx.load(tmp_path / "vae_decoder.onnx")
    weight = next(weight for weight in model.graph.initializer if weight.name == "vae.decoder.conv_in.weight")
    weight.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(weight), 60000), weight.name))
    save_with_its_hash(model, tmp_path, "vae_decoder")
    assert magnitudes.main([str(tmp_path), "--pairs", "1", "--json"]) == 1
    worst = json.loads(capsys.readouterr().out)[0]
    assert worst["engine"] == "vae_decoder"
    assert worst["largest"] > LARGEST


def test_a_nan_is_the_worst_of_all(
    exports: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Put a NaN in the last place, which the runtime's own reductions lose."""
    copy(exports["fp16"], tmp_path)
    model = onnx.load(tmp_path / "vae_decoder.onnx")
    weight = next(weight for weight in model.graph.initializer if weight.name == "vae.decoder.conv_out.weight")
    values = numpy_helper.to_array(weight).copy()
    values[-1, -1, -1, -1] = np.nan
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    save_with_its_hash(model, tmp_path, "vae_decoder")
    assert magnitudes.main([str(tmp_path), "--pairs", "1"]) == 1
    assert "| nan | nan % |" in capsys.readouterr().out


def copy(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())


def save_with_its_hash(model: onnx.ModelProto, directory: Path, name: str) -> None:
    """Write a graph as if the export had made it so."""
    onnx.save(model, directory / f"{name}.onnx")
    manifest = Manifest.read(directory)
    manifest.engines[name] = replace(manifest.engines[name], sha256=file_sha256(directory / f"{name}.onnx"))
    manifest.write(directory)


def test_a_changed_graph_and_a_bf16_export_are_refused(exports: dict[str, Path], tmp_path: Path) -> None:
    copy(exports["fp16"], tmp_path)
    (tmp_path / "unet.onnx").write_bytes(b"damaged")
    for refused in (
        lambda: compare_precisions([exports["fp32"], tmp_path], 1),
        lambda: magnitudes.measure(tmp_path, 1),
    ):
        with pytest.raises(CheckpointError, match=r"unet\.onnx: hash is"):
            refused()
    with pytest.raises(CheckpointError, match="is bf16, which is computed by torch here"):
        compare_precisions([exports["fp32"], exports["bf16"]], 1)


@pytest.mark.parametrize("command", [quality, magnitudes])
def test_numbers_below_one_are_refused(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["somewhere", "--pairs", "0"])
    assert "--pairs is 0, expected 1 or more" in capsys.readouterr().err


def test_the_exports_own_modules_stay_as_they_are(exports: dict[str, Path]) -> None:
    compare_precisions([exports["fp32"]], 1)
    modules = source_modules(Manifest.read(exports["fp32"]))
    assert {weight.dtype for module in modules.values() for weight in module.parameters()} == {torch.float32}


def test_magnitudes_are_those_of_the_tensors_and_of_the_scores(exports: dict[str, Path]) -> None:
    """Compare with torch: the first convolution's output, and an attention's query times its key."""
    spec = engine_specs(SMALL)["vae_encoder"]
    engine = MeasuredEngine(exports["fp16"] / "vae_encoder.onnx", spec)
    inputs = spec.dummy_inputs(2)
    module = engine_modules(random_checkpoint(SMALL))["vae_encoder"].half().float()
    seen: dict[str, float] = {}

    def note(name: str) -> object:
        return lambda _module, _arguments, output: seen.__setitem__(name, output.abs().max().item())

    encoder = module.vae.encoder
    encoder.conv_in.register_forward_hook(note("conv"))
    attention = encoder.mid_block.attentions[0]
    projected: list[torch.Tensor] = []
    for projection in (attention.to_q, attention.to_k):
        projection.register_forward_hook(lambda _module, _arguments, output: projected.append(output))
    with torch.inference_mode():
        module(torch.from_numpy(inputs["pixels"]))
    query, key = (each.unflatten(2, (attention.heads, -1)).transpose(1, 2) for each in projected)
    scores = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).abs().max().item()
    found = engine.run(inputs)
    assert set(found) == {"latent"}
    measured = {row.tensor: row for row in engine.magnitudes()}
    assert measured["conv2d"].largest == pytest.approx(seen["conv"], rel=1e-4)
    inside = next(row for row in measured.values() if row.operator == "Attention, inside")
    assert inside.largest == pytest.approx(scores, rel=1e-3)
    assert Manifest.read(exports["fp16"]).engines["vae_encoder"].sha256 == file_sha256(
        exports["fp16"] / "vae_encoder.onnx"
    )


def test_only_fp16_exports_are_measured(exports: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="is fp32, expected fp16"):
        magnitudes.measure(exports["fp32"], 1)
