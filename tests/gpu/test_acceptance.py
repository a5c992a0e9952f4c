"""The checks of ``python -m engines accept``, on a small export with random weights; skipped without an NVIDIA GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.acceptance import Acceptance, accept, installed_products
from engines.acceptance_report import write_report
from engines.checks import CHECKS
from icportrait.contract import ENGINES
from icportrait.errors import RuntimeNotAvailable
from icportrait.runtime.tensorrt.products import FLAVOURS

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module", params=FLAVOURS)
def accepted(gpu: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Acceptance:
    try:
        products = installed_products(request.param)
    except RuntimeNotAvailable as error:
        pytest.skip(str(error))
    export = request.getfixturevalue("small_export")  # not made where it isn't used
    out: Path = tmp_path_factory.mktemp("acceptance")
    (found,) = accept(products, export, out)
    write_report([found], out)
    return found


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_bucket_passes(accepted: Acceptance, engine: str, check: str) -> None:
    found = [entry for entry in accepted.checks if entry.engine in (engine, "all")]
    assert [entry.text for entry in found if not entry.passed and entry.name not in CHECKS] == []
    found = [entry for entry in found if entry.name == check]
    assert found
    assert [f"batch {entry.batch}: {entry.text}" for entry in found if not entry.passed] == []


def test_every_rung_of_tensorrt_is_measured(accepted: Acceptance) -> None:
    measured = {rung.name for rung in accepted.ladder if rung.ms}
    assert {"TensorRT", "TensorRT with CUDA graphs"} <= measured
