"""Counters on Triton's metrics endpoint, over a stand-in for the module that only Triton's own processes have."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from icportrait.contract import engine_specs
from icportrait.serving.counters import (
    CACHE_COUNTERS,
    ENGINE_COUNTERS,
    ENGINE_MS,
    ENGINE_ROWS,
    HITS,
    MISSES,
    CountedEngine,
    triton_counters,
)
from tests.tiny import TINY


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], float]:
    """Return the values of all counters by name and label."""
    values: dict[tuple[str, str], float] = {}

    class Family:
        """Triton's, which makes a series for each set of labels."""

        COUNTER = "counter"

        def __init__(self, name: str, description: str, kind: str) -> None:
            assert description and kind == self.COUNTER
            self._name = name

        def Metric(self, labels: dict[str, str]) -> Any:  # noqa: N802 - Triton's name
            series = self._name, "".join(labels.values())
            assert series not in values
            values[series] = 0

            def increment(by: float) -> None:
                assert by > 0
                values[series] += by

            return SimpleNamespace(increment=increment)

    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", SimpleNamespace(MetricFamily=Family))
    return values


def test_every_counter_is_there_from_the_start_and_adds_up(counted: dict[tuple[str, str], float]) -> None:
    counters = triton_counters(CACHE_COUNTERS)
    assert counted == {(HITS, ""): 0, (MISSES, ""): 0}
    for hits, misses in ((0, 3), (2, 1), (4, 0)):
        counters[HITS](hits)
        counters[MISSES](misses)
    assert counted == {(HITS, ""): 6, (MISSES, ""): 4}


def test_an_engines_rows_and_time_are_counted_and_its_outputs_are_its_own(
    counted: dict[tuple[str, str], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = iter([10.0, 10.5, 20.0, 20.25])
    monkeypatch.setattr("icportrait.serving.counters.time.perf_counter", lambda: next(now_s))
    outputs = iter([{"latent": np.zeros((3, 1))}, {"latent": np.ones((1, 1))}])
    engine = SimpleNamespace(spec=engine_specs(TINY)["vae_encoder"], version="some", run=lambda _: next(outputs))
    wrapped = CountedEngine(engine, triton_counters(ENGINE_COUNTERS, engine="vae_encoder"))
    assert (wrapped.spec, wrapped.version) == (engine.spec, "some")
    assert wrapped.run({})["latent"].shape == (3, 1)
    assert wrapped.run({})["latent"].tolist() == [[1.0]]
    assert counted == {(ENGINE_ROWS, "vae_encoder"): 4, (ENGINE_MS, "vae_encoder"): 750}
