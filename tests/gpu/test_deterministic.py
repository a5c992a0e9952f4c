"""The deterministic mode on a real GPU: a row's bits depend neither on how many rows there are nor on its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engines.build_config import BuildConfig
from engines.building import build_engine
from icportrait.contract import ENGINES, engine_specs
from icportrait.manifest import Manifest
from icportrait.policy import ServingPolicy
from icportrait.runtime import load_engine
from icportrait.runtime.cuda import find_gpu
from icportrait.runtime.tensorrt.products import FLAVOURS
from tests.rows import rows_that_differ

pytestmark = pytest.mark.timeout(1800)
Differing = dict[str, list[tuple[int, ...]]]


def differing(runtime: str, directory: Path, manifest: Manifest) -> Differing:
    """List the differing rows by engine."""
    policy = ServingPolicy(runtime=runtime, deterministic=True)
    engines = {name: load_engine(name, directory, manifest, policy) for name in ENGINES}
    return {name: rows_that_differ(engine, range(1, engine.spec.batch.max + 1)) for name, engine in engines.items()}


def of_plans(product: str, export: Path, out: Path) -> Differing:
    manifest, config = Manifest.read(export), BuildConfig(compute_capabilities=(find_gpu().compute_capability,))
    for spec in engine_specs(manifest.preset, manifest.precision).values():
        build_engine(FLAVOURS[product], export, manifest, spec, config, out)
    return differing(product, out, manifest)


@pytest.mark.parametrize("product", FLAVOURS)
def test_rows_of_plans_are_what_they_are_alone(on_product: Callable[..., Differing], product: str) -> None:
    assert on_product(product, of_plans) == {name: [] for name in ENGINES}


@pytest.mark.usefixtures("torch_on_gpu")
def test_rows_of_torch_are_what_they_are_alone(request: pytest.FixtureRequest) -> None:
    export = request.getfixturevalue("demo_export")
    assert differing("torch", export, Manifest.read(export)) == {name: [] for name in ENGINES}
