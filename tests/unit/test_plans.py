"""Plans on disk: what is refused before TensorRT sees it."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest

from engines.build_config import BuildConfig
from icportrait.contract import engine_specs
from icportrait.errors import PlanError
from icportrait.presets import DEMO_128
from icportrait.runtime.tensorrt.plans import PlanHost, PlanManifest, PlanTensor, buckets_of, read_plan

CONTENT = bytes(range(256)) * 4
HOST = PlanHost("tensorrt-rtx", "1.7.1.116", "c0ffee", "8.9")


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "unet.plan"
    path.write_bytes(CONTENT)
    shape = (1, 4, 8, 16)
    PlanManifest(
        engine="unet",
        preset="tiny",
        precision="fp16",
        flavour=HOST.flavour,
        tensorrt_version=HOST.tensorrt_version,
        compute_capabilities=("8.6", "8.9"),
        profiles=({"canvas_latent": (shape, shape, shape)},),
        tensors=(PlanTensor("canvas_latent", True, "FLOAT", (-1, 4, 8, 16)),),
        contract_hash=HOST.contract_hash,
        onnx_sha256="0" * 64,
        plan_sha256=hashlib.sha256(CONTENT).hexdigest(),
        plan_bytes=len(CONTENT),
        build_seconds=1.5,
        peak_memory_bytes=10**9,
    ).write(path)
    return path


def load(plan: Path, host: PlanHost) -> bytes:
    return read_plan(plan, PlanManifest.read(plan), host)


def test_a_plan_that_fits_is_read_whole(plan: Path) -> None:
    manifest = PlanManifest.read(plan)
    assert read_plan(plan, manifest, HOST) == CONTENT
    assert manifest.compute_capabilities == ("8.6", "8.9")
    assert manifest.profiles[0]["canvas_latent"][1] == (1, 4, 8, 16)
    manifest.write(plan)
    assert PlanManifest.read(plan) == manifest


def test_a_machine_without_a_gpu_reads_it_too(plan: Path) -> None:
    assert load(plan, dataclasses.replace(HOST, compute_capability=None)) == CONTENT


@pytest.mark.parametrize(
    ("changed", "both"),
    [
        ({"flavour": "tensorrt"}, ("product tensorrt-rtx", "this is tensorrt;")),
        ({"tensorrt_version": "1.8.0.1"}, ("TensorRT 1.7.1.116", "this is 1.8.0.1")),
        ({"contract_hash": "decade"}, ("contract c0ffee", "this is decade")),
        ({"compute_capability": "9.0"}, ("8.6, 8.9", "this one has 9.0")),
    ],
)
def test_another_host_is_refused_with_both_sides_in_one_line(
    plan: Path, changed: dict[str, str], both: tuple[str, str]
) -> None:
    with pytest.raises(PlanError) as refusal:
        load(plan, dataclasses.replace(HOST, **changed))
    assert str(plan) in str(refusal.value) and "\n" not in str(refusal.value)
    assert all(side in str(refusal.value) for side in both)


@pytest.mark.parametrize("place", [0, 500, len(CONTENT) - 1])
def test_a_flipped_byte_is_refused(plan: Path, place: int) -> None:
    changed = bytearray(CONTENT)
    changed[place] ^= 1
    plan.write_bytes(changed)
    with pytest.raises(PlanError, match=r"its SHA-256 is .* its manifest says .* won't be loaded"):
        load(plan, HOST)


def test_a_plan_without_a_manifest_or_a_manifest_without_a_plan_is_refused(plan: Path) -> None:
    plan.unlink()
    with pytest.raises(PlanError, match=r"unet\.plan is missing"):
        load(plan, HOST)
    PlanManifest.path(plan).unlink()
    with pytest.raises(PlanError, match=r"unet\.plan\.json is missing, and no plan is loaded without it"):
        load(plan, HOST)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"compute_capabilities": 3}'])
def test_a_manifest_of_another_form_is_refused(plan: Path, text: str) -> None:
    PlanManifest.path(plan).write_text(text)
    with pytest.raises(PlanError, match="not a plan's manifest of this version"):
        load(plan, HOST)


# Which batches a plan is run with


def test_profiles_for_tritons_backend_hold_every_batch_once() -> None:
    spec = engine_specs(DEMO_128)["vae_decoder"]
    for buckets, expected in {
        (1, 2, 4, 8, 16): [(1, 1), (2, 2), (3, 4), (5, 8)],
        (3,): [(1, 3), (4, 8)],
        (8,): [(1, 8)],
    }.items():
        (profiles,) = BuildConfig(buckets=buckets).plans(spec, cover_gaps=True).values()
        shapes = [profile["portrait_latent"] for profile in profiles]
        assert [(smallest[0], largest[0]) for smallest, _, largest in shapes] == expected
        assert all(best == largest for _, best, largest in shapes)
        assert all(smallest[1:] == (4, 32, 32) for smallest, _, _ in shapes)


@pytest.mark.parametrize(
    ("ranges", "buckets"),
    [
        ([(1, 1), (2, 2), (4, 4)], (1, 2, 4)),
        ([(1, 1), (2, 2), (3, 4), (5, 8)], (1, 2, 3, 4, 6, 8)),
        ([(1, 16)], (1, 2, 3, 4, 6, 8, 10, 12, 14, 16)),
        ([(1, 7)], (1, 2, 3, 4, 6, 7)),
    ],
    ids=["fixed", "covering", "dynamic", "dynamic, an odd end"],
)
def test_buckets_are_what_the_profiles_have_room_for(ranges: list[tuple[int, int]], buckets: tuple[int, ...]) -> None:
    assert buckets_of(ranges) == buckets


def test_a_manifest_tells_the_batches_of_its_profiles(plan: Path) -> None:
    low, high = (3, 4, 8, 16), (4, 4, 8, 16)
    profiles = ({"canvas_latent": (low, low, low)}, {"canvas_latent": (low, high, high)})
    assert dataclasses.replace(PlanManifest.read(plan), profiles=profiles).batch_ranges == ((3, 3), (3, 4))
