"""Stable Diffusion's whole geometry, with random weights, through what a user runs: ``make test-full``.

Nothing here needs a GPU; the plans are compiled ahead of time. Each step's time and largest resident size are printed
at the end, and the memory is held to its budget.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.inspection import inspect
from engines.network import parse
from icportrait.contract import ENGINES, engine_specs
from icportrait.manifest import Manifest, file_sha256
from icportrait.presets import SD15_512
from icportrait.runtime.flavours import TENSORRT_RTX
from icportrait.runtime.plans import PlanManifest
from tests.conftest import ROOT
from tests.full.conftest import EXPORT, PLANS, Step

pytestmark = [pytest.mark.full, pytest.mark.timeout(3600)]

MEMORY_BUDGET_BYTES = 18 * 10**9
BATCHES = {
    "vae_encoder": [1, 2, 4, 8],
    "warping_network": [1, 2, 4],
    "unet": [1, 2, 4, 8, 16],
    "vae_decoder": [1, 2, 4, 8],
}
ATTENTIONS = {"vae_encoder": 1, "warping_network": 28, "unet": 32, "vae_decoder": 1}
"""Two a transformer block: 7 in each of the warping network's two encoders, 16 in the UNet. One in each VAE half."""
SPECS = engine_specs(SD15_512, "fp16")


def test_memory_stays_within_its_budget(steps: list[Step]) -> None:
    assert {step.name: step.peak_bytes for step in steps if step.peak_bytes > MEMORY_BUDGET_BYTES} == {}


def test_the_second_step_builds_what_the_first_exported(steps: list[Step]) -> None:
    """Else the first one's memory would be another export's."""
    _, exported, built = steps
    assert f"{EXPORT.relative_to(ROOT)}: sd15-512, fp16" in exported.output
    assert "sd15-512, fp16" not in built.output
    manifest = Manifest.read(EXPORT)
    assert manifest.preset == SD15_512
    for name in ENGINES:
        assert PlanManifest.read(PLANS / f"{name}.plan").onnx_sha256 == manifest.engines[name].sha256


@pytest.mark.parametrize("name", ENGINES)
def test_a_plan_is_the_contracts_and_has_a_profile_for_each_bucket(steps: list[Step], name: str) -> None:
    plan, spec = PLANS / f"{name}.plan", SPECS[name]
    manifest = PlanManifest.read(plan)
    assert (manifest.engine, manifest.preset, manifest.precision) == (name, "sd15-512", "fp16")
    assert manifest.plan_sha256 == file_sha256(plan) and manifest.plan_bytes == plan.stat().st_size
    for is_input, tensors in ((True, spec.inputs), (False, spec.outputs)):
        contract = [
            (entry.name, tuple(-1 if axis.is_dynamic else axis.min for axis in entry.axes)) for entry in tensors
        ]
        assert [(found.name, found.shape) for found in manifest.tensors if found.is_input == is_input] == contract
    assert BATCHES[name][-1] == spec.batch.max
    assert manifest.profiles == tuple(
        {tensor.name: (tensor.shape(batch=batch),) * 3 for tensor in spec.inputs} for batch in BATCHES[name]
    )


def test_the_warping_networks_residuals_fit_the_unet_one_by_one(steps: list[Step]) -> None:
    given, taken = (
        [
            (tensor.name, tensor.dtype, tensor.shape)
            for tensor in PlanManifest.read(PLANS / f"{name}.plan").tensors
            if tensor.name.startswith("f_ref_")
        ]
        for name in ("warping_network", "unet")
    )
    assert len(given) == len(SD15_512.residuals) == 13
    assert given == taken


@pytest.mark.parametrize("name", ENGINES)
def test_a_graph_is_parsed_without_a_warning_in_fp16_and_with_whole_attentions(steps: list[Step], name: str) -> None:
    path: Path = Manifest.read(EXPORT).files(name, EXPORT)[0]
    parsed = parse(TENSORRT_RTX, path)
    found = inspect(parsed)
    assert parsed.warnings == []
    assert found.share("fp16") >= 0.95
    assert found.attentions == ATTENTIONS[name]
