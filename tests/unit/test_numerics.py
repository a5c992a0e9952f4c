"""The name of a server's arithmetic: equal where bytes are, another where they may not be, none where they depend."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import icportrait.serving.numerics
from engines.build_config import BuildConfig
from icportrait.deploy.repository import assemble
from icportrait.errors import RuntimeNotAvailable
from icportrait.manifest import Manifest
from icportrait.policy import ServingPolicy
from icportrait.presets import DEMO_128
from icportrait.runtime.cuda import Gpu
from icportrait.serving.numerics import numerics_id
from tests.fake_plans import write_fake_plans
from tests.trivial_engines import write_trivial_export


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_trivial_export(tmp_path / "export", DEMO_128)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[Gpu | None]:
    """Return a list with the GPU that CUDA shows."""
    shown: list[Gpu | None] = [None]

    def find() -> Gpu:
        if shown[0] is None:
            raise RuntimeNotAvailable("none")
        return shown[0]

    monkeypatch.setattr(icportrait.serving.numerics, "find_gpu", find)
    return shown


def test_it_is_a_name_that_stays(manifest: Manifest, tmp_path: Path) -> None:
    names = {numerics_id(tmp_path, manifest, ServingPolicy(), "onnxruntime-1") for _ in range(2)}
    (name,) = names
    assert name and len(name) == 16 and int(name, 16) >= 0


def test_whatever_may_change_bytes_changes_it(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def named(policy: ServingPolicy | None = None, version: str = "onnxruntime-1", of: Manifest = manifest) -> str:
        return numerics_id(tmp_path, of, policy or ServingPolicy(), version) or ""

    engines = {name: replace(engine, sha256="0" * 64) for name, engine in manifest.engines.items()}
    found = [
        named(),
        named(version="onnxruntime-2"),
        named(of=replace(manifest, engines=engines)),
        named(ServingPolicy(engine_threads=7)),
        named(ServingPolicy(rows_at_once=1)),
        named(ServingPolicy(deterministic=True)),
    ]
    cpu = tmp_path / "cpuinfo"
    for model in ("Zen", "Skylake"):
        cpu.write_text(f"processor\t: 0\nmodel name\t: {model}\nflags\t\t: avx2\nprocessor\t: 1\nmodel name\t: other\n")
        monkeypatch.setattr(icportrait.serving.numerics, "CPUINFO", cpu)
        found.append(named())
    monkeypatch.setattr(icportrait.serving.numerics.metadata, "version", lambda name: "99")
    found.append(named())
    assert len(set(found)) == len(found) and "" not in found


def test_what_only_decides_on_the_queue_does_not_change_it(manifest: Manifest, tmp_path: Path) -> None:
    few = ServingPolicy(slots=2, max_queued_slots=1, cache_bytes=0)
    assert numerics_id(tmp_path, manifest, few, "v") == numerics_id(tmp_path, manifest, ServingPolicy(), "v")


@pytest.mark.parametrize(
    ("policy", "has_one"),
    [
        (ServingPolicy(runtime="onnxruntime"), True),
        (ServingPolicy(runtime="openvino"), False),
        (ServingPolicy(runtime="openvino", rows_at_once=1), True),
        (ServingPolicy(runtime="openvino", deterministic=True), True),
        (ServingPolicy(runtime="torch"), False),
        (ServingPolicy(runtime="torch", deterministic=True), True),
        (ServingPolicy(runtime="tensorrt-rtx"), False),
        (ServingPolicy(runtime="tensorrt"), False),
        (ServingPolicy(runtime="simulated"), True),
    ],
)
def test_there_is_none_where_bytes_depend_on_what_shares_a_batch(
    manifest: Manifest, tmp_path: Path, policy: ServingPolicy, has_one: bool
) -> None:
    assert (numerics_id(tmp_path, manifest, policy, "v") is not None) is has_one


@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
def test_deterministic_plans_are_named_by_their_content_and_their_gpu(
    manifest: Manifest, tmp_path: Path, gpu: list[Gpu | None], runtime: str
) -> None:
    policy = ServingPolicy(runtime=runtime, deterministic=True)
    found = []
    for content in ("first", "second"):
        plans = tmp_path / content
        write_fake_plans(plans, manifest, runtime, BuildConfig(layout="static" if content == "first" else "profiles"))
        repository = tmp_path / f"repository-{content}"
        assemble(tmp_path / "export", repository, policy, plans=plans)
        for name in ("H100", "H200"):
            gpu[0] = Gpu(name, "9.0", 1, 1, "13.0")
            found.append(numerics_id(repository, manifest, policy, "v"))
    assert len(set(found)) == 4 and None not in found
