"""The checks of ``python -m engines accept``, on a small fp16 export; skipped without an NVIDIA GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engines.acceptance import RUNG_NAMES, TORCH, Acceptance, accept, products_for
from engines.acceptance_report import write_report
from engines.checks import CHECKS
from icportrait.contract import ENGINES
from icportrait.errors import RuntimeNotAvailable
from icportrait.runtime.cuda import find_gpu
from icportrait.runtime.tensorrt.products import FLAVOURS

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module", params=[*FLAVOURS, TORCH])
def accepted(gpu: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Acceptance:
    try:
        products = products_for(request.param, find_gpu().compute_capability, torch.cuda.is_available())
    except RuntimeNotAvailable as error:
        pytest.skip(str(error))
    export = request.getfixturevalue("small_fp16_export")  # not made where it isn't used
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


def test_every_rung_is_measured(accepted: Acceptance) -> None:
    measured, name = {rung.name for rung in accepted.ladder if rung.ms}, RUNG_NAMES[accepted.product]
    assert {name, f"{name} with CUDA graphs"} <= measured
