"""The kept rows of an engine: what runs, what doesn't, and that nobody can tell by the values."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from icportrait.contract import Axis, DType, ModelSpec, TensorSpec
from icportrait.serving.encoder_cache import RowCache

ROW_BYTES = 8
BATCH = Axis("batch", 1, 4, 8)


class Doubling:
    """An engine that gives what it gets twice as large, in float32, and notes the rows of each run."""

    spec = ModelSpec(
        "doubling",
        (TensorSpec("pixels", DType.UINT8, (BATCH, Axis.fixed("side", 1))),),
        (TensorSpec("latent", DType.FLOAT32, (BATCH, Axis.fixed("side", 2))),),
    )
    version = "test"

    def __init__(self) -> None:
        self.runs: list[list[int]] = []
        self.broken = False

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        pixels = inputs["pixels"]
        self.runs.append(pixels[:, 0].tolist())
        if self.broken:
            raise RuntimeError("out of memory")
        return {"latent": np.repeat(2 * pixels, 2, axis=1).astype(np.float32)}


@pytest.fixture
def engine() -> Doubling:
    return Doubling()


def pixels(*values: int) -> dict[str, np.ndarray]:
    return {"pixels": np.array(values, np.uint8)[:, None]}


def encode(cache: RowCache, *values: int) -> None:
    (latent,) = cache(pixels(*values)).values()
    assert latent.dtype == np.float32
    assert latent.tolist() == [[2.0 * value] * 2 for value in values]


def test_rows_that_return_are_not_computed_again(engine: Doubling) -> None:
    counted: list[tuple[int, int]] = []
    cache = RowCache(engine, 1000, lambda hits, misses: counted.append((hits, misses)))
    encode(cache, 1, 2)
    encode(cache, 3, 1, 4)
    encode(cache, 4, 2)
    assert engine.runs == [[1, 2], [3, 4]]
    assert counted == [(0, 2), (1, 2), (2, 0)]


def test_equal_rows_of_a_batch_are_computed_once(engine: Doubling) -> None:
    counted: list[tuple[int, int]] = []
    encode(RowCache(engine, 1000, lambda hits, misses: counted.append((hits, misses))), 7, 8, 7)
    assert engine.runs == [[7, 8]]
    assert counted == [(1, 2)]


def test_what_was_used_last_stays(engine: Doubling) -> None:
    cache = RowCache(engine, 2 * ROW_BYTES)
    for value in (1, 2, 1, 3, 1, 2):
        encode(cache, value)
    assert engine.runs == [[1], [2], [3], [2]]


def test_a_batch_may_be_larger_than_the_cache(engine: Doubling) -> None:
    cache = RowCache(engine, 2 * ROW_BYTES)
    encode(cache, 1, 2, 3)
    encode(cache, 3, 2, 1)
    assert engine.runs == [[1, 2, 3], [1]]


def test_a_batch_keeps_what_it_has_found_until_it_has_it(engine: Doubling) -> None:
    """Let a batch's new rows push out the rows that the batch uses."""
    cache = RowCache(engine, 2 * ROW_BYTES)
    encode(cache, 1, 2)
    encode(cache, 3, 1, 4, 2, 3)
    encode(cache, 4, 3)
    assert engine.runs == [[1, 2], [3, 4]]


TAKES_MEMORY = """
import resource
from pathlib import Path
from icportrait.serving.encoder_cache import RowCache
from tests.unit.test_encoder_cache import Doubling

def taken_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

before = taken_bytes()
cache = RowCache(Doubling(), 64 * 2**20)
print(taken_bytes() - before)
"""


def test_all_of_its_memory_is_taken_at_once() -> None:
    """Count the pages that are there, because memory that was only asked for would be taken row by row.

    A process of its own holds no pages that were freed before and would be used again.
    """
    taken_bytes = int(subprocess.run([sys.executable, "-c", TAKES_MEMORY], check=True, capture_output=True).stdout)
    assert 64 * 2**20 * 0.9 < taken_bytes < 64 * 2**20 * 1.1


def test_what_a_caller_does_to_an_answer_stays_there(engine: Doubling) -> None:
    cache = RowCache(engine, 1000)
    for _ in range(2):
        cache(pixels(5))["latent"][...] = 0
        encode(cache, 5)


def test_nothing_of_a_failed_run_is_kept(engine: Doubling) -> None:
    cache = RowCache(engine, 1000)
    encode(cache, 1)
    engine.broken = True
    with pytest.raises(RuntimeError, match="out of memory"):
        cache(pixels(1, 2))
    engine.broken = False
    encode(cache, 1, 2)
    assert engine.runs == [[1], [2], [2]]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_with_nan_or_inf_is_not_kept(engine: Doubling, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = RowCache(engine, 1000)
    spoilt = {"latent": np.array([[2.0, 2.0], [4.0, value]], np.float32)}
    with monkeypatch.context() as patch:
        patch.setattr(engine, "run", lambda _: spoilt)
        assert not np.isfinite(cache(pixels(1, 2))["latent"][1]).all()
    encode(cache, 1, 2)
    assert engine.runs == [[2]]


def test_callers_of_different_partitions_share_nothing(engine: Doubling) -> None:
    cache = RowCache(engine, 1000)
    for partitions in (["ann", "ann"], ["ben", "ann"], ["", "ben"], ["ben", ""]):
        (latent,) = cache(pixels(1, 1), partitions).values()
        assert latent.tolist() == [[2.0, 2.0]] * 2
    assert engine.runs == [[1], [1], [1]]
    encode(cache, 1)
    assert engine.runs == [[1], [1], [1]], "no partition is one of its own"


def test_a_row_is_computed_again_once_it_is_too_old_however_often_it_was_used(engine: Doubling) -> None:
    now_s = [0.0]
    cache = RowCache(engine, 2 * ROW_BYTES, keep_s=10.0, clock=lambda: now_s[0])
    encode(cache, 1)
    now_s[0] = 6.0
    encode(cache, 2, 1)
    now_s[0] = 10.0
    encode(cache, 1, 2)
    assert engine.runs == [[1], [2]]
    now_s[0] = 11.0
    encode(cache, 2)
    assert engine.runs == [[1], [2]] and not (cache._kept["latent"] == 2.0).any(), "nothing is left of it"
    encode(cache, 2, 1, 3)
    assert engine.runs == [[1], [2], [1, 3]]
    now_s[0] = 30.0
    encode(cache, 4, 5, 6)
    encode(cache, 6, 5)
    assert engine.runs == [[1], [2], [1, 3], [4, 5, 6]]


@pytest.mark.parametrize("limit_bytes", [-1, 0, ROW_BYTES - 1])
def test_too_few_bytes_keep_nothing(engine: Doubling, limit_bytes: int) -> None:
    cache = RowCache(engine, limit_bytes)
    encode(cache, 1)
    encode(cache, 1)
    assert engine.runs == [[1], [1]]


def test_what_lies_in_the_gpus_memory_is_always_computed() -> None:
    given: list[object] = []
    on_gpu = object()

    class OnGpu(Doubling):
        def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
            given.append(inputs["pixels"])
            return {"latent": np.zeros((1, 2), np.float32)}

    cache = RowCache(OnGpu(), 1000)
    cache({"pixels": on_gpu})  # type: ignore[dict-item]
    cache({"pixels": on_gpu})  # type: ignore[dict-item]
    assert given == [on_gpu, on_gpu]
