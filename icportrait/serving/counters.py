"""Counters that a Python model publishes on Triton's metrics endpoint by itself, and an engine that is counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from icportrait.contract import Array
from icportrait.runtime import Engine

HITS = "icportrait_encoder_cache_hits_total"
MISSES = "icportrait_encoder_cache_misses_total"
ENGINE_ROWS = "icportrait_engine_rows_total"
ENGINE_MS = "icportrait_engine_ms_total"
CACHE_COUNTERS = {
    HITS: "Pictures whose latent was kept",
    MISSES: "Pictures that the VAE encoder had to encode",
}
ENGINE_COUNTERS = {
    ENGINE_ROWS: "Pictures that a VAE engine computed",
    ENGINE_MS: "Milliseconds that a VAE engine ran for",
}
Counters = dict[str, Callable[[float], object]]
"""Functions that add to a counter, by the counter's name."""


def triton_counters(descriptions: Mapping[str, str], **labels: str) -> Counters:
    """Publish counters; only within Triton's Python backend.

    Args:
        descriptions: by each counter's name.
        labels: of all these counters.
    """
    import triton_python_backend_utils as pb_utils

    def counter(name: str) -> Callable[[float], object]:
        kind = pb_utils.MetricFamily.COUNTER
        family = pb_utils.MetricFamily(name=name, description=descriptions[name], kind=kind)
        metric = family.Metric(labels=labels)

        def add(number: float, _: object = family) -> None:  # the family must live as long as its metric
            if number:
                metric.increment(number)

        return add

    return {name: counter(name) for name in descriptions}


class CountedEngine:
    """An engine whose rows and time are counted."""

    def __init__(self, engine: Engine, counters: Counters) -> None:
        """Take an engine and the counters of ``ENGINE_COUNTERS``."""
        self.spec, self.version = engine.spec, engine.version
        self._engine, self._counters = engine, counters

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one batch; see ``Engine.run``."""
        began_s = time.perf_counter()
        outputs = self._engine.run(inputs)
        self._counters[ENGINE_MS](1000 * (time.perf_counter() - began_s))
        self._counters[ENGINE_ROWS](len(next(iter(outputs.values()))))
        return outputs
