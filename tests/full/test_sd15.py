"""Stable Diffusion's whole geometry, with random weights, through what a user runs: ``make test-full``.

Nothing here needs a GPU: the plans are compiled ahead of time, and a portrait is served on this CPU. Each step's time
and largest resident size are printed at the end, and the memory is held to its budget.
"""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import pytest
from icportrait_client import Portrait, PortraitClient
from PIL import Image

from engines.inspection import inspect
from engines.network import parse
from examples.comparison import psnr_db
from icportrait.contract import ENGINES, Array, engine_specs
from icportrait.deploy.stub_processes import descendants
from icportrait.manifest import Manifest, file_sha256
from icportrait.presets import SD15_512
from icportrait.runtime.tensorrt.plans import PlanManifest
from icportrait.runtime.tensorrt.products import TENSORRT_RTX
from tests.conftest import ROOT
from tests.e2e.supervised import supervised
from tests.full.conftest import WHAT, Step, make, say
from tests.full.paths import EXPORT, PLANS, REFERENCE_PORTRAIT, REPOSITORY
from tests.full.reference import PROFILE, REFERENCE, SEED, STEPS

pytestmark = [pytest.mark.full, pytest.mark.timeout(3600)]

MEMORY_BUDGET_BYTES, SERVED_MEMORY_BUDGET_BYTES = 18 * 10**9, 16 * 10**9
LEAST_PSNR_DB = 40.0
WHOLE = (0.0, 0.0, 1.0, 1.0)
READY_TIMEOUT_S, ANSWER_TIMEOUT_S = 600, 1200
BATCHES = {
    "vae_encoder": [1, 2, 3, 4, 6, 8],
    "warping_network": [1, 2, 3, 4],
    "unet": [1, 2, 3, 4, 6, 8, 10, 12, 14, 16],
    "vae_decoder": [1, 2, 3, 4, 6, 8],
}
ATTENTIONS = {"vae_encoder": 1, "warping_network": 28, "unet": 32, "vae_decoder": 1}
"""Two a transformer block: 7 in each of the warping network's two encoders, 16 in the UNet. One in each VAE half."""
SPECS = engine_specs(SD15_512, "fp16")


def test_memory_stays_within_its_budget(steps: list[Step]) -> None:
    assert {step.name: step.peak_bytes for step in steps if step.peak_bytes > MEMORY_BUDGET_BYTES} == {}


def test_the_second_step_builds_what_the_first_exported(steps: list[Step]) -> None:
    """Hold the two together, else the first one's memory would be another export's."""
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


# Served


def png(pixels: Array) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def ask(url: str) -> Portrait:
    with PortraitClient(url, timeout_s=ANSWER_TIMEOUT_S) as client:
        return client.generate(
            profile=png(PROFILE),
            reference=png(REFERENCE),
            seed=SEED,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            profile_box=WHOLE,
            reference_box=WHOLE,
        )


def peak_bytes(pid: int) -> int:
    """Sum the peaks of a process and of each process below; together they never took more."""
    status = [Path(f"/proc/{each}/status").read_text() for each in (pid, *descendants(pid))]
    return sum(int(text.partition("VmHWM:")[2].split()[0]) * 1024 for text in status)


def test_a_served_portrait_is_the_reference_pipelines_and_the_same_twice(steps: list[Step], tmp_path: Path) -> None:
    assert "openvino" in make("repository", *WHAT).output
    began = time.monotonic()
    with supervised(REPOSITORY, tmp_path, ready_timeout_s=READY_TIMEOUT_S) as server:
        ready = time.monotonic()
        first = ask(server.url)
        answered = time.monotonic()
        second = ask(server.url)
        peak = peak_bytes(server.process.pid)
    assert first.files == second.files
    assert first.metadata.versions.engine.startswith("openvino-")
    with Image.open(REFERENCE_PORTRAIT) as picture:
        expected = np.asarray(picture)
    likeness = psnr_db(first.image, Image.fromarray(expected))
    say(
        f"served: ready after {ready - began:.0f} s, {STEPS} steps in {answered - ready:.0f} s, "
        f"all processes at most {peak / 1e9:.1f} GB, {likeness:.1f} dB to the reference pipeline"
    )
    assert expected.std() > 10, "or any two grey pictures would do"
    assert likeness >= LEAST_PSNR_DB
    assert peak <= SERVED_MEMORY_BUDGET_BYTES
