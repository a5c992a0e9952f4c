"""The rows that an engine has computed, kept by their inputs' content, so that a row that returns isn't computed again.

The VAE encoder has one: a profile returns with every other reference and seed (ADR 0008).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from icportrait.contract import Array
from icportrait.runtime.placement import Placed

HITS = "icportrait_encoder_cache_hits_total"
MISSES = "icportrait_encoder_cache_misses_total"
Count = Callable[[int, int], None]
"""Takes the rows of one batch that were found, and those that weren't."""


class RowCache:
    """An engine's ``run`` that computes each row once, until others that were used since push it out.

    A row's key is the SHA-256 of its input, so that no caller can make a picture that is taken for another. Rows that
    are equal within a batch are computed once. Nothing of a run that failed is kept. For one thread.
    """

    def __init__(
        self, run: Callable[[Mapping[str, Any]], dict[str, Array]], limit_bytes: int, count: Count = lambda *_: None
    ) -> None:
        """Keep rows of ``run``.

        Args:
            run: batches of named inputs to batches of named outputs; a row of these depends on no other row.
            limit_bytes: of the outputs that are kept; 0 keeps none.
            count: told of every batch.
        """
        self._run, self._limit_bytes, self._count = run, limit_bytes, count
        self._kept: OrderedDict[bytes, dict[str, Array]] = OrderedDict()
        self._kept_bytes = 0

    def __call__(self, inputs: Mapping[str, Placed]) -> dict[str, Array]:
        """What ``run`` makes of the inputs; where they lie in the GPU's memory, always by running it."""
        batches = {name: batch for name, batch in inputs.items() if isinstance(batch, np.ndarray)}
        if self._limit_bytes <= 0 or len(batches) < len(inputs):
            return self._run(inputs)
        keys = _keys(batches)
        rows = {key: self._kept[key] for key in keys if key in self._kept}
        missing = {key: index for index, key in enumerate(keys) if key not in rows}
        if missing:
            indices = list(missing.values())
            outputs = self._run({name: batch[indices] for name, batch in batches.items()})
            for position, key in enumerate(missing):
                rows[key] = {name: batch[position].copy() for name, batch in outputs.items()}
        self._keep(rows)
        self._count(len(keys) - len(missing), len(missing))
        return {name: np.stack([rows[key][name] for key in keys]) for name in rows[keys[0]]}

    def _keep(self, rows: Mapping[bytes, dict[str, Array]]) -> None:
        for key, row in rows.items():
            if key not in self._kept:
                self._kept_bytes += _nbytes(row)
            self._kept[key] = row
            self._kept.move_to_end(key)
        while self._kept_bytes > self._limit_bytes:
            self._kept_bytes -= _nbytes(self._kept.popitem(last=False)[1])


def _keys(batches: Mapping[str, Array]) -> list[bytes]:
    """A key for each row; the contract fixes a row's shape and type, so its bytes are all there is to it."""
    columns = [np.ascontiguousarray(batches[name]) for name in sorted(batches)]
    keys = []
    for row in zip(*columns, strict=True):
        digest = hashlib.sha256()
        for array in row:
            digest.update(array)
        keys.append(digest.digest())
    return keys


def _nbytes(row: Mapping[str, Array]) -> int:
    return sum(array.nbytes for array in row.values())


def triton_counters() -> Count:
    """Publish the counts on Triton's metrics endpoint; only within its Python backend."""
    import triton_python_backend_utils as pb_utils

    descriptions = {
        HITS: "Pictures whose latent was kept",
        MISSES: "Pictures that the VAE encoder had to encode",
    }
    counters = {}
    for name, description in descriptions.items():
        family = pb_utils.MetricFamily(name=name, description=description, kind=pb_utils.MetricFamily.COUNTER)
        counters[name] = family, family.Metric(labels={})  # the family must live as long as its metric

    def count(hits: int, misses: int) -> None:
        for name, rows in ((HITS, hits), (MISSES, misses)):
            if rows:
                counters[name][1].increment(rows)

    return count
