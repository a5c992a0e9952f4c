"""Parts that tests on a GPU share, and their reasons to skip: no GPU, or a library that isn't installed beside it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engines.acceptance import installed_products
from icportrait.errors import RuntimeNotAvailable
from icportrait.runtime.cuda import find_gpu


@pytest.fixture(scope="module")
def gpu() -> None:
    try:
        find_gpu()
    except RuntimeNotAvailable as error:
        pytest.skip(str(error))


@pytest.fixture
def on_product(gpu: None, request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Any]:
    """Call a function with a TensorRT product's name, an export and a folder.

    Each call has a process of its own, because two TensorRTs don't share one.
    """

    def call(product: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            installed_products(product)
        except RuntimeNotAvailable as error:
            pytest.skip(str(error))
        export = request.getfixturevalue("small_fp16_export")  # fused attention; not made where it isn't used
        with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as process:
            return process.submit(function, product, export, tmp_path, *arguments).result()

    return call


@pytest.fixture
def torch_on_gpu(gpu: None) -> Any:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} has no CUDA here")
    return torch
