"""From a built engine to a repository: the builder's own plans and manifests, and no stand-ins."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.__main__ import main as engines
from icportrait.contract import ENGINES
from icportrait.deploy.repository import ENGINE_OWNERS, main
from icportrait.manifest import Manifest
from icportrait.runtime.tensorrt.plans import PlanManifest, check_content, find_plans
from tests.tiny import TINY
from tests.trivial_engines import write_trivial_export


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("export")
    write_trivial_export(directory, TINY)
    return directory


def build(export: Path, out: Path, *options: str) -> None:
    arguments = [
        "--onnx",
        str(export),
        "--out",
        str(out),
        "--compute-capability",
        "8.9",
        "--allow-mixed",
        "--allow-warnings",
    ]
    assert engines(["build", *arguments, *options]) == 0


def test_what_is_built_is_what_is_served(export: Path, tmp_path: Path) -> None:
    plans, repository = tmp_path / "plans", tmp_path / "repository"
    build(export, plans, "--buckets", "1")
    arguments = ["--export", str(export), "--out", str(repository), "--runtime", "tensorrt-rtx", "--plans", str(plans)]
    assert main(arguments) == 0
    for engine in ENGINES:
        (plan,) = find_plans(repository / ENGINE_OWNERS[engine] / "1", engine)
        manifest = PlanManifest.read(plan)
        check_content(plan, manifest)
        assert manifest.onnx_sha256 == Manifest.read(export).engines[engine].sha256


def test_a_build_leaves_no_plan_of_another_layout(export: Path, tmp_path: Path) -> None:
    for layout, names in (
        ("static", ["unet.batch1.plan", "unet.batch16.plan"]),
        ("profiles", ["unet.plan"]),
        ("static", ["unet.batch1.plan", "unet.batch16.plan"]),
    ):
        build(export, tmp_path, "--engine", "unet", "--buckets", "1", "--layout", layout)
        assert [plan.name for plan in find_plans(tmp_path, "unet")] == names
        assert {path.name for path in tmp_path.iterdir()} == {*names, *(f"{name}.json" for name in names)}
