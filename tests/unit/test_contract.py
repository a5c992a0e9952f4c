"""The contract: geometry derived from presets, and tensors checked against it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from icportrait.contract import ENGINES, DType, contract_hash, engine_specs, stage_specs
from icportrait.errors import CheckpointError, ContractError, InvalidRequest, from_wire, to_wire
from icportrait.presets import DEMO_128, PRESETS, SD15_512, Preset


def test_sd15_residuals_are_stable_diffusion_15s() -> None:
    sizes = [(residual.channels, SD15_512.level_size(residual.level)) for residual in SD15_512.residuals]
    assert sizes == [
        *[(320, 64)] * 3,
        *[(320, 32), (640, 32), (640, 32)],
        *[(640, 16), (1280, 16), (1280, 16)],
        *[(1280, 8)] * 4,
    ]


def test_sd15_f_ref_of_one_portrait_is_27_mb_in_fp16() -> None:
    specs = engine_specs(SD15_512, "fp16")["unet"].inputs
    total = sum(2 * int(np.prod(spec.shape(batch=1))) for spec in specs if spec.name.startswith("f_ref"))
    assert 26e6 < total < 28e6


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_what_one_engine_gives_fits_what_the_next_takes(preset: Preset) -> None:
    specs = engine_specs(preset)
    given = {tensor.name: tensor for tensor in specs["warping_network"].outputs}
    taken = [tensor for tensor in specs["unet"].inputs if tensor.name in given]
    assert len(taken) == 13
    for tensor in taken:
        assert tensor.dtype == given[tensor.name].dtype
        assert tensor.axes[1:] == given[tensor.name].axes[1:]
    assert tuple(specs) == ENGINES


@pytest.mark.parametrize("name", ENGINES)
def test_dummy_inputs_satisfy_their_own_contract(name: str) -> None:
    spec = engine_specs(DEMO_128)[name]
    sizes = spec.check_inputs(spec.dummy_inputs(spec.batch.max))
    assert sizes["batch"] == spec.batch.max


def test_a_batch_that_differs_between_inputs_names_both() -> None:
    spec = engine_specs(DEMO_128)["unet"]
    inputs = spec.dummy_inputs(3)
    inputs["timestep"] = inputs["timestep"][:2]
    with pytest.raises(ContractError, match="axis batch is 3 in canvas_latent but 2 in timestep"):
        spec.check_inputs(inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda inputs: inputs.pop("latent"), "input latent is missing"),
        (lambda inputs: inputs.update(other=inputs["latent"]), "no input is called 'other'"),
        (
            lambda inputs: inputs.update(latent=inputs["latent"].astype(np.float64)),
            "latent is float64, expected float32",
        ),
        (lambda inputs: inputs.update(latent=inputs["latent"][0]), "latent has 3 axes"),
        (lambda inputs: inputs.update(latent=inputs["latent"][..., :20]), r"axis 3 \(width_32\) is 20, expected 32"),
        (
            lambda inputs: inputs.update(latent=np.repeat(inputs["latent"], 9, 0)),
            r"axis 0 \(batch\) is 9, expected 1..8",
        ),
    ],
)
def test_a_wrong_tensor_is_refused_with_what_came_and_what_was_expected(change, message: str) -> None:
    spec = replace(engine_specs(DEMO_128)["vae_decoder"])
    latent = replace(spec.inputs[0], name="latent")
    spec = replace(spec, inputs=(latent,))
    inputs = spec.dummy_inputs(1)
    change(inputs)
    with pytest.raises(ContractError, match=message):
        spec.check_inputs(inputs)


def test_optimization_profiles_vary_the_batch_alone() -> None:
    spec = engine_specs(SD15_512)["unet"]
    assert spec.optimization_profile["canvas_latent"] == ((1, 4, 64, 128), (4, 4, 64, 128), (16, 4, 64, 128))


def test_precision_changes_f_ref_and_nothing_else() -> None:
    for name, spec in engine_specs(DEMO_128, "fp16").items():
        other = engine_specs(DEMO_128, "fp32")[name]
        for half, full in zip((*spec.inputs, *spec.outputs), (*other.inputs, *other.outputs), strict=True):
            assert (half.dtype is not full.dtype) == half.name.startswith("f_ref_")
            assert half.axes == full.axes
    assert engine_specs(DEMO_128, "fp16")["unet"].inputs[-1].dtype is DType.FLOAT16


def test_the_contract_hash_tells_geometries_and_precisions_apart() -> None:
    hashes = {contract_hash(preset, precision) for preset in PRESETS.values() for precision in ("fp32", "fp16")}
    assert len(hashes) == 4
    assert contract_hash(replace(DEMO_128, max_unet_batch=8), "fp32") not in hashes


def test_stage_tensors_are_the_engines_tensors() -> None:
    stages, engines = stage_specs(SD15_512), engine_specs(SD15_512)
    latent = {tensor.name: tensor for tensor in stages["denoise"].outputs}["portrait_latent"]
    assert latent.axes[1:] == engines["vae_decoder"].inputs[0].axes[1:]
    pixels = stages["preprocess"].outputs[0]
    assert pixels.axes[1:] == engines["vae_encoder"].inputs[0].axes[1:]


def test_a_preset_whose_sizes_do_not_divide_is_refused() -> None:
    with pytest.raises(CheckpointError, match="image_size is 100, expected a multiple of 32"):
        replace(DEMO_128, image_size=100)
    with pytest.raises(CheckpointError, match="mask_patch_px is 6"):
        replace(DEMO_128, mask_patch_px=6)


def test_presets_survive_json() -> None:
    assert Preset.from_dict(SD15_512.to_dict()) == SD15_512


def test_error_codes_survive_triton_prefixes() -> None:
    wire = "in ensemble 'portrait_pipeline', " + to_wire(InvalidRequest("profile: empty"))
    restored = from_wire(wire)
    assert isinstance(restored, InvalidRequest)
    assert str(restored) == "profile: empty"
    assert from_wire("something else failed") is None
